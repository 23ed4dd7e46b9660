"""The kernels' innermost loops keep their vectors in registers, read from the built library's machine code.

A tile whose vectors go through the stack gives the same numbers at a tenth to a half of the speed: no other
test sees it, and a clock on a shared machine proves nothing. Compilers differ: bounds are kept for some,
others get a warning.
"""

from __future__ import annotations

import platform
import re
import warnings
from pathlib import Path

import disassembly
import pytest

pytestmark = [
    pytest.mark.torch_free,
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64") or not disassembly.OBJDUMP or not disassembly.READELF,
        reason="needs an x86 processor and binutils",
    ),
]

CORE = Path(__file__).parent.parent / "csrc" / "core"

# Nearly all the work: whole vectors, fused, nothing on the stack and nothing moved in parts.
PRODUCTS = ("tile", "tile_bfloat16", "plane_tile", "few_planes", "dot", "add_multiple", "symmetric_rows",
            "probe_rows", "solve_columns")  # fmt: skip
# Whole vectors, but divisions, comparisons and triangles are part of the loop.
STEPS = ("factor_block", "divide_columns", "lanes_tridiagonalize", "lanes_largest", "lanes_sturm")
# Whole vectors are added.
SUMS = ("add_panel_sums", "add_plane_sum")
# Whole vectors are written.
COPIES = ("pack_plain", "pack_pairs", "pack_shifted", "copy_plane")

# Whose code is not inlined for the baseline either.
GENERIC = ("tile", "plane_tile", "few_planes")

# Instructions of one loop that touch the stack, by the compiler; none of a kernel that is not listed.
COMMON = {
    ("tile", "generic"): 2,  # 12 sums, 3 columns and a copy of one: products of SSE2 overwrite a factor
    ("probe_rows", "avx2"): 1,  # 12 factors, 3 sums and 2 numbers
    # The column that is eliminated is an array on the stack.
    ("factor_block", "avx2"): 2,
    ("factor_block", "avx512"): 4,
    ("pack_shifted", "avx512"): 4,  # float16 with strides: constants of the conversion
}
ALLOWED: dict[str, dict[tuple[str, str], int]] = {
    "GCC 11": COMMON | {("few_planes", "avx512"): 21, ("probe_rows", "avx2"): 2},  # stores sums in every turn
    "GCC 12": COMMON,
}


def judge(complaints: list[str]) -> None:
    """Fails for a compiler that bounds are kept for and warns for others."""
    if complaints and disassembly.compiler() in ALLOWED:
        pytest.fail("\n".join(complaints), pytrace=False)
    for complaint in complaints:
        warnings.warn(f"no bounds are kept for {disassembly.compiler()}: {complaint}", stacklevel=2)


@pytest.mark.parametrize(
    ("kernel", "isa"),
    [(k, isa) for isa in ("avx512", "avx2") for k in (*PRODUCTS, *STEPS, *SUMS, *COPIES)
     if (k, isa) != ("tile_bfloat16", "avx2")] + [(k, "generic") for k in GENERIC],
)  # fmt: skip
def test_loops_stay_in_registers(kernel: str, isa: str) -> None:
    allowed = ALLOWED.get(disassembly.compiler(), {}).get((kernel, isa), 0)
    instances = [f for f in disassembly.functions() if (f.kernel, f.isa) == (kernel, isa)]
    assert instances, f"the library has no {kernel}_{isa}: was it renamed?"
    complaints = []
    for instance in instances:
        loops = (
            instance.store_loops if kernel in COPIES
            else instance.sum_loops if kernel in SUMS
            else instance.product_loops
        )  # fmt: skip
        if not loops:
            complaints.append(f"{instance.name} has no loop over whole vectors")
        for loop in loops:
            print(loop)
            bad = [("on the stack", i) for i in loop.spills] if len(loop.spills) > allowed else []
            if kernel in PRODUCTS:
                bad += [("a part of a vector", i) for i in loop.parts]
            if kernel in PRODUCTS and isa != "generic" and 2 * len(loop.unfused) > len(loop.products):
                bad += [("not fused", i) for i in loop.unfused]
            if bad:
                lines = [f"  {i.address:x}: {i.text}  ({why})" for why, i in bad]
                complaints.append("\n".join([f"{loop}; at most {allowed} on the stack", *lines]))
    judge(complaints)


def test_no_kernel_is_left_out() -> None:
    """Of those that are compiled for every instruction set."""
    declared = set()
    for header in CORE.glob("*.h"):
        pattern = r"^BSGAP_PER_ISA(?:_WIDTH|_TEMPLATE\(\(.*?\))?[(,]\s*[\w ]+,\s*(\w+)"
        declared |= set(re.findall(pattern, header.read_text(), re.MULTILINE))
    built = {f.kernel for f in disassembly.functions()}
    assert declared | built == {*PRODUCTS, *STEPS, *SUMS, *COPIES}, (
        "a kernel belongs to one of the lists above"
    )
