"""Compiles the Triton kernels ahead of time, without a GPU, and reports what each variant takes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import config, probe
from .config import Precision
from .gram import ARGUMENTS
from .machine_code import innermost_loops, tool_output
from .plan import PlannedLaunch, launch_constants

# Shared memory of one block, bytes (CUDA C++ Programming Guide, technical specifications per capability).
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
MAX_REGISTERS = 255

ALIGNED_CODES = sum(1 << config.CODE_LAYOUTS * size | 2 << config.CODE_LAYOUTS * size for size in range(3))
OTHER_CODES = ALIGNED_CODES << 2


@dataclass(frozen=True)
class Variant:
    """One compilation of the Gram kernel."""

    name: str
    dtype: torch.dtype
    precision: Precision
    codes: int
    multi: bool = False
    shift: int = config.NO_SHIFT
    rescue: bool = False
    accumulate: bool = False
    sums: bool = False  # of columns; a shift brings them
    hops: int = 1  # images in a block of depth

    @property
    def proves(self) -> str:
        """The kernel, as the table of what is proven without a GPU names it."""
        return self.launch(90).kernel

    def launch(self, capability: int) -> PlannedLaunch:
        """As `gram_plan` would launch it on a device of this compute capability."""
        big = self.multi and self.precision == "float32"
        largest = max(t for i, t in enumerate(config.TILES) if self.codes >> i * config.CODE_LAYOUTS & 15)
        itemsize = self.dtype.itemsize
        constants = config.gram_config(self.precision, itemsize, largest, big, capability // 10)
        if self.rescue:
            constants = config.rescue_config(constants)
        return PlannedLaunch(
            group=0,
            dtype=self.dtype,
            items=1,
            codes=self.codes,
            multi=self.multi,
            config=constants,
            stats=big and not self.rescue,
            rescue=self.rescue,
            accumulate=self.accumulate,
            hops=self.hops,
        )

    def source(self, capability: int) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
        """The kernel, the types of its arguments, its constants, the compiler's options."""
        from .gram_kernel import gram_kernel

        constants, options = launch_constants(
            self.launch(capability),
            self.precision,
            self.shift,
            self.sums or self.shift != config.NO_SHIFT,
            False,
            capability // 10,
        )
        return gram_kernel, ARGUMENTS, {"C": constants}, _set(options)


@dataclass(frozen=True)
class ProbeVariant:
    """One compilation of the probes' product with a matrix; of their vectors where dtype is None."""

    name: str
    dtype: torch.dtype | None
    layout: int = 0
    transposed: bool = False

    @property
    def proves(self) -> str:
        """The kernel, as the table of what is proven without a GPU names it."""
        return "omega_kernel" if self.dtype is None else "product_kernel"

    def source(self, capability: int) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
        """The kernel, the types of its arguments, its constants, the compiler's options."""
        from .probe_kernel import omega_kernel, product_kernel

        if self.dtype is None:
            types = {"omega_ptr": "*fp64", "seed": "i64", "side": "i32"}
            return omega_kernel, types, *_options(probe.omega_constants())
        element = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16"}[self.dtype]
        types = {"x_ptr": element} | dict.fromkeys(("thin_ptr", "out_ptr", "squares_ptr"), "*fp64")
        strides = ("stride_batch", "stride_outer", "stride_inner", "stride_side")
        types |= dict.fromkeys(("side", "outer", "inner", *strides, "tiles", "splits"), "i32")
        constants = probe.product_constants(self.layout, self.dtype, self.transposed, capability // 10)
        return product_kernel, types, *_options(constants)


def _set(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _options(constants: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    names = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
    options = {name: constants.pop(name) for name in names if name in constants}
    return constants, options


def probe_variants() -> list[ProbeVariant]:
    """What `probe_error` launches; of the unaligned layouts the one with a division per element."""
    found = [ProbeVariant("probe vectors", None)]
    layouts = (
        (config.SIDE_ALIGNED, "aligned along side"),
        (config.DEPTH_ALIGNED, "aligned along depth"),
        (config.ANY, "unaligned"),
    )
    for dtype in (torch.bfloat16, torch.float32):
        for layout, where in layouts:
            name = f"probe {str(dtype).removeprefix('torch.')} {where}"
            found.append(ProbeVariant(name, dtype, layout))
            found.append(ProbeVariant(name + ", transposed", dtype, layout, transposed=True))
    found += [ProbeVariant(f"probe Gram {where}", torch.float64, layout) for layout, where in layouts[::2]]
    return found


def variants() -> list[Variant]:
    """What the heuristics can choose, the memory layouts in two halves.

    float16 differs from bfloat16 in the name of the instruction only. Launches of fewer classes are parts of
    these; those of narrow matrices alone run on fewer warps and are here by themselves.
    """
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for codes, layouts in ((ALIGNED_CODES, "aligned"), (OTHER_CODES, "any")):
            found += [
                Variant(f"{name} float32 {layouts}", dtype, "float32", codes),
                Variant(f"{name} float32 {layouts}, site", dtype, "float32", codes, accumulate=True),
                Variant(f"{name} float32 {layouts}, sides to 32", dtype, "float32", codes & 0xFF),
                Variant(
                    f"{name} float32 {layouts}, tiles of 64", dtype, "float32", codes & 0xF00, multi=True
                ),
            ]
        rescue = Variant(f"{name} rescue", dtype, "float32", 0xF00, multi=True, rescue=True)
        found += [rescue, replace(rescue, name=f"{name} rescue, site", accumulate=True)]
    images = 1 << config.TILES.index(64) * config.CODE_LAYOUTS + config.DEPTH_ALIGNED
    found.append(
        Variant(
            "bfloat16 float32 small images, site", torch.bfloat16, "float32", images, accumulate=True, hops=2
        )
    )
    for layout, where in ((config.SIDE_ALIGNED, "side"), (config.DEPTH_ALIGNED, "depth")):
        codes = 1 << config.TILES.index(128) * config.CODE_LAYOUTS + layout
        name = f"bfloat16 float32 aligned along {where}, tiles of 128"
        found.append(Variant(name, torch.bfloat16, "float32", codes, multi=True))
        rescue = Variant(name + ", rescue", torch.bfloat16, "float32", codes, multi=True, rescue=True)
        found += [rescue, replace(rescue, name=name + ", rescue, site", accumulate=True)]
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        for codes, layouts in ((ALIGNED_CODES, "aligned"), (OTHER_CODES, "any")):
            shifted = Variant(f"{name} float64 {layouts}", dtype, "float64", codes, multi=True)
            found += [shifted, replace(shifted, name=f"{shifted.name}, shift", shift=config.BY_VECTOR)]
            site = f"{name} float64 {layouts}, site"
            found.append(Variant(site, dtype, "float64", codes, multi=True, sums=True, accumulate=True))
            about_mean = f"{site} about the mean"
            found.append(
                Variant(about_mean, dtype, "float64", codes & 0xFFF, accumulate=True, shift=config.BY_MEAN)
            )
        first = f"{name} float64 any, first row"
        found.append(Variant(first, dtype, "float64", OTHER_CODES, multi=True, shift=config.BY_FIRST_ROW))
    return found


def wanted() -> list[tuple[Variant | ProbeVariant, int]]:
    """Every variant with the compute capabilities that can be given it."""
    every: list[Variant | ProbeVariant] = [*variants(), *probe_variants()]
    return [
        (variant, capability)
        for variant in every
        for capability in SHARED_LIMIT
        if "128" not in variant.name or capability in (90, 100)
    ]


def checked() -> list[tuple[Variant | ProbeVariant, int]]:
    """One of each tile, precision and kind of probe: few enough for every run of the tests."""
    side_128, depth_128, float32, bfloat16 = 0x1000, 0x2000, torch.float32, torch.bfloat16
    rescue = Variant("128 rescue", bfloat16, "float32", side_128, multi=True, rescue=True)
    site = Variant("site of bfloat16, sides to 64", bfloat16, "float32", 0x111, accumulate=True)
    wide = Variant("float64 of float32", float32, "float64", 0x200, multi=True)
    grams = [
        (Variant("128 along side", bfloat16, "float32", side_128, multi=True), (90, 100)),
        (Variant("128 along depth", bfloat16, "float32", depth_128, multi=True), (90,)),
        (rescue, (90,)),
        (replace(rescue, name="site, 128 rescue", accumulate=True), (90,)),
        (site, (80, 90)),
        (replace(site, name="site of bfloat16 any", codes=0x888), (90,)),
        (replace(site, name="site of small images", codes=0x200, hops=2), (90,)),
        (
            replace(site, name="site of float32", dtype=float32, precision="float64", sums=True, multi=True),
            (90,),
        ),
        (Variant("bfloat16 tiles", bfloat16, "float32", 0x100, multi=True), (120,)),
        (Variant("bfloat16, sides to 64", bfloat16, "float32", 0x111), (80,)),
        (Variant("float32, sides to 64", float32, "float32", 0x100), (80, 90)),
        (wide, (80, 90)),
        (
            replace(site, name="site of float64", dtype=torch.float64, precision="float64", multi=True),
            (90,),
        ),
        (
            replace(
                site,
                name="site of float32 about the mean",
                dtype=float32,
                precision="float64",
                codes=0x200,
                shift=config.BY_MEAN,
            ),
            (90,),
        ),
        (
            replace(
                wide,
                name="float64 of bfloat16, first row",
                dtype=bfloat16,
                codes=0x800,
                shift=config.BY_FIRST_ROW,
            ),
            (90,),
        ),
        (
            replace(wide, name="float64 shifted", dtype=torch.float64, codes=0x100, shift=config.BY_VECTOR),
            (89,),
        ),
    ]
    probes = {
        "vectors": 89,
        "bfloat16 aligned along side": 90,
        "bfloat16 aligned along depth": 120,
        "bfloat16 aligned along depth, transposed": 80,
        "float32 aligned along side": 86,
        "float32 unaligned, transposed": 90,
        "Gram unaligned": 100,
    }
    by_name = {variant.name: variant for variant in probe_variants()}
    found: list[tuple[Variant | ProbeVariant, int]] = [
        (variant, capability) for variant, capabilities in grams for capability in capabilities
    ]
    return found + [(by_name[f"probe {name}"], capability) for name, capability in probes.items()]


@dataclass(frozen=True)
class Resources:
    """What a compiled variant takes of a multiprocessor, and which instructions it has."""

    variant: str
    capability: int
    warps: int
    registers: int
    spilled_bytes: int  # the stack frame of a thread
    spill_share: float  # of the time of a round, in the worst innermost loop
    shared_bytes: int
    wide_loads: bool  # 16-byte copies or loads from global memory
    wgmma: bool
    tcgen05: bool
    mma: bool
    float64_mma: bool


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack a thread, by the cuobjdump that comes with triton."""
    text = tool_output("cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump printed no resource usage: {text}")
    return int(found[1]), int(found[2])


def spill_share(cubin: bytes, capability: int) -> float:
    """Time lost to spills in the innermost loop where it is most, as a share of the loop's least time."""
    loops = innermost_loops(tool_output("nvdisasm", "-c", cubin))
    if not any(loop.multiplies for loop in loops):
        raise ValueError("nvdisasm printed no loop that multiplies, so spills cannot be judged")
    return round(max(loop.spill_share(capability) for loop in loops), 4)


def compile_variant(variant: Variant | ProbeVariant, capability: int) -> Any:
    """The compiled kernel; needs triton, no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants, options = variant.source(capability)
    signature = types | dict.fromkeys(constants, "constexpr")
    # x_ptr of an unaligned matrix has no more alignment than its elements.
    loose = {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    loose |= {"x_ptr"} if constants.get("LAYOUT") == config.ANY else set()
    # Empty where a call says nothing of an argument: then Triton 3.8 finds the kernel in its cache.
    attributes = {
        (i,): [] if name in loose or kind == "constexpr" else [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or kind == "constexpr"
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(variant: Variant | ProbeVariant, capability: int) -> Resources:
    """Compiles the variant and reads its PTX and its binary."""
    kernel = compile_variant(variant, capability)
    ptx = kernel.asm["ptx"]
    registers, stack = resource_usage(kernel.asm["cubin"])
    return Resources(
        variant=variant.name,
        capability=capability,
        warps=int(kernel.metadata.num_warps),
        registers=registers,
        spilled_bytes=stack,
        spill_share=spill_share(kernel.asm["cubin"], capability) if stack else 0.0,
        shared_bytes=int(kernel.metadata.shared),
        wide_loads=bool(
            re.search(r"cp\.async\.\S+ \[[^\]]*\], \[[^\]]*\], 0x10|ld\.global\S*\.(v4\.b32|v2\.b64)", ptx)
        ),
        wgmma="wgmma.mma_async" in ptx,
        tcgen05="tcgen05.mma" in ptx,
        mma="mma.sync" in ptx,
        float64_mma=bool(re.search(r"mma\.sync\S*\.f64", ptx)),
    )
