"""The machine code of the built CPU library: loops of its kernels, and what they do besides products.

Every kernel is compiled once for each instruction set (``csrc/core/isa.h``) under a name that says for which,
``tile_avx2<float, 3, false>``. Code for AVX2 or AVX-512 cannot be inlined into code for the baseline, so each
is a function of the library. Code for the baseline is one where its address is taken, as that of tiles is.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bsgap_kernels

OBJDUMP, READELF = shutil.which("objdump"), shutil.which("readelf")

WIDEST = {"generic": "%xmm", "avx2": "%ymm", "avx512": "%zmm"}
NAME = re.compile(r"(?:([a-z]\w*)_(avx512|avx2|generic)|(tile_bfloat16))(?:<.*>)?(?=\()")
PRODUCT = re.compile(r"v?(?:fn?m(?:add|sub)\d+|mul)[ps][sd]|vdpbf16ps")
VECTOR_MOVE = re.compile(r"v?mov(?:[au]p[sd]|[lh]p[sd]|dq[au]\d*)")


@dataclass(frozen=True)
class Instruction:
    """In the syntax of AT&T: the result is the last operand."""

    address: int
    text: str  # "vfmadd231ps 0x48(%rsp),%ymm4,%ymm15"

    @functools.cached_property
    def operation(self) -> str:
        return self.text.split()[0]

    @functools.cached_property
    def touches_vectors(self) -> bool:
        return re.search(r"%[xyz]mm", self.text) is not None

    @property
    def multiplies(self) -> bool:
        return PRODUCT.fullmatch(self.operation) is not None

    @functools.cached_property
    def jump(self) -> int:
        """Where it may jump to; -1 if it does not jump."""
        match = re.fullmatch(r"j\w+ +([0-9a-f]+)", self.text)
        return int(match[1], 16) if match else -1


@dataclass(frozen=True)
class Loop:
    function: str
    isa: str
    stack: tuple[str, ...]  # registers that point to it
    body: tuple[Instruction, ...]

    def on_stack(self, instruction: Instruction) -> bool:
        return any(f"({register}" in instruction.text for register in self.stack)

    @property
    def products(self) -> list[Instruction]:
        """Products of whole vectors, alone or fused with an addition."""
        return [
            i for i in self.body
            if i.multiplies and i.operation[-2] == "p" and WIDEST[self.isa] in i.text.split(",")[-1]
        ]  # fmt: skip

    @property
    def unfused(self) -> list[Instruction]:
        return [i for i in self.products if "mul" in i.operation]

    @property
    def loads(self) -> list[Instruction]:
        read = [i for i in self.body if i.touches_vectors and re.search(r"\)(?:\{1to\d+\})?,", i.text)]
        return [i for i in read if not self.on_stack(i)]

    @property
    def spills(self) -> list[Instruction]:
        """Vectors that go to the stack or come from it, by a move or as an operand."""
        return [i for i in self.body if i.touches_vectors and self.on_stack(i)]

    @property
    def parts(self) -> list[Instruction]:
        """Vectors that are moved in parts, as memcpy may be compiled, or put together."""
        narrow = [r for r in WIDEST.values() if r < WIDEST[self.isa]]
        moved = [i for i in self.body if VECTOR_MOVE.fullmatch(i.operation) and "(" in i.text]
        joined = [i for i in self.body if re.match(r"v(?:insert|extract)[fi]", i.operation)]
        return joined + [i for i in moved if any(r in i.text for r in narrow) and not self.on_stack(i)]

    def __str__(self) -> str:
        return (
            f"{self.function}: {len(self.body)} instructions, {len(self.products)} products "
            f"({len(self.unfused)} not fused), {len(self.loads)} loads, {len(self.spills)} on the stack, "
            f"{len(self.parts)} in parts"
        )


def _reached(span: list[Instruction]) -> dict[int, Instruction]:
    """Those that may run after the first one without leaving the span, by address."""
    index = {instruction.address: n for n, instruction in enumerate(span)}
    reached, waiting = set(), [0]
    while waiting:
        n = waiting.pop()
        if n in reached or n >= len(span):
            continue
        reached.add(n)
        if span[n].jump in index:
            waiting.append(index[span[n].jump])
        if span[n].operation not in ("jmp", "ret"):
            waiting.append(n + 1)
    return {span[n].address: span[n] for n in sorted(reached)}


@dataclass(frozen=True)
class Function:
    name: str  # "tile_avx2<float, 3, false>"
    kernel: str  # "tile"
    isa: str  # "avx2"
    code: tuple[Instruction, ...]

    @functools.cached_property
    def _loops(self) -> list[dict[int, Instruction]]:
        """The smallest first: instructions that lead from the target of a jump backward to that jump."""
        found = []
        for jump in self.code:
            if self.code[0].address <= jump.jump <= jump.address:
                reached = _reached([i for i in self.code if jump.jump <= i.address <= jump.address])
                if jump.address in reached:  # else it belongs to a block that stands aside
                    found.append(reached)
        return sorted(found, key=len)

    def _loops_with(self, wanted: Callable[[Instruction], bool]) -> list[Loop]:
        """The smallest loop around every wanted instruction, unless it contains another one of these."""
        smallest = {}
        for instruction in filter(wanted, self.code):
            loop = next((loop for loop in self._loops if instruction.address in loop), None)
            if loop is not None:
                smallest[id(loop)] = loop
        inner = [a for a in smallest.values() if not any(b.keys() < a.keys() for b in smallest.values())]
        framed = any(re.fullmatch(r"mov +%rsp,%rbp", i.text) for i in self.code)
        stack = ("%rsp", "%rbp") if framed else ("%rsp",)
        return [Loop(self.name, self.isa, stack, tuple(body.values())) for body in inner]

    @property
    def product_loops(self) -> list[Loop]:
        """Loops whose products are mostly of whole vectors; others work on what these leave over."""
        loops = self._loops_with(lambda i: i.multiplies)
        return [loop for loop in loops if 2 * len(loop.products) > sum(i.multiplies for i in loop.body)]

    @property
    def sum_loops(self) -> list[Loop]:
        """Loops that add whole vectors of float64."""
        return self._loops_with(lambda i: i.operation == "vaddpd" and WIDEST[self.isa] in i.text)

    @property
    def store_loops(self) -> list[Loop]:
        """Loops that write vectors, for AVX-512 of 32 bytes at least."""
        widths = ("%ymm", "%zmm") if self.isa == "avx512" else (WIDEST[self.isa],)
        return self._loops_with(
            lambda i: (
                VECTOR_MOVE.fullmatch(i.operation) is not None
                and i.text.endswith(")")
                and any(w in i.text for w in widths)
                and not re.search(r"\(%r[sb]p", i.text)
            )
        )


def library() -> Path:
    (path,) = Path(bsgap_kernels.__file__).parent.glob("_cpu*.so")
    return path


def _output(*command: str | Path | None) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


@functools.cache
def compiler() -> str:
    """Name and major version of the library's compiler: ``GCC 12``, ``clang 19``."""
    notes = _output(READELF, "-p", ".comment", library())
    # What clang makes also names the GCC of the C runtime.
    for pattern, name in ((r"clang version (\d+)", "clang"), (r"GCC: .*?(\d+)\.\d+\.\d+", "GCC")):
        if versions := re.findall(pattern, notes):
            return f"{name} {max(map(int, versions))}"
    return "an unknown compiler"


@functools.cache
def functions() -> tuple[Function, ...]:
    """Those of the library that are compiled for one instruction set."""
    found = []
    text = _output(OBJDUMP, "--disassemble", "--demangle", "--no-show-raw-insn", library())
    for block in text.split("\n\n"):
        title = re.match(r"[0-9a-f]+ <(.*)>:\n", block)
        name = NAME.search(re.sub(r"bsgap::(?:detail::)?", "", title[1])) if title else None
        if name is None or re.search(r"@plt|\.cold", block.partition("\n")[0]):
            continue
        lines = re.finditer(r"^ *([0-9a-f]+):\t(.*?) *(?:[#<].*)?$", block, re.MULTILINE)
        code = tuple(Instruction(int(line[1], 16), line[2]) for line in lines)
        found.append(Function(name[0], name[1] or name[3], name[2] or "avx512", code))
    return tuple(found)
