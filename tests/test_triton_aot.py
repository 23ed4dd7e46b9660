"""The Triton kernels compiled ahead of time, without a GPU: cheap spills, fits every device, 16-byte loads.

Registers and spills are the compiler's choice. benchmarks/results/triton_resources.json records them for each
version of Triton that was seen, and a version gives what its record says; all are judged by one bound.
"""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from dataclasses import replace

import proven
import pytest
import torch
import triton_resources
from tolerances import MAX_SPILL_SHARE

from bsgap_kernels.triton import compiled, config
from bsgap_kernels.triton.gram import triton_version
from bsgap_kernels.triton.machine_code import Loop, innermost_loops

RECORDS = triton_resources.load()
SIDE_128, DEPTH_128 = 0x1000, 0x2000

compiles = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton, and kernels that this process does not interpret",
)


def problems(row: compiled.Resources) -> list[str]:
    """What is wrong with a variant whatever compiled it."""
    found, where = [], f"{row.variant} on sm_{row.capability}"
    if row.spill_share > MAX_SPILL_SHARE:
        found.append(
            f"{where} spends {row.spill_share} of a loop's time on {row.spilled_bytes} spilled bytes"
        )
    if row.shared_bytes > compiled.SHARED_LIMIT[row.capability]:
        found.append(f"{where} takes {row.shared_bytes} bytes of shared memory")
    if row.registers > compiled.MAX_REGISTERS or row.registers * row.warps * 32 > 65536:
        found.append(f"{where} takes {row.registers} registers x {row.warps} warps")
    return found


def judge(row: compiled.Resources, version: str) -> None:
    """Hold a row to the bound, and to the record of its version; warn of figures that no version gave."""
    assert not problems(row)
    figures = {
        seen: recorded
        for seen, rows in RECORDS.items()
        for recorded in rows
        if (recorded.variant, recorded.capability) == (row.variant, row.capability)
    }
    if version in RECORDS:
        assert row == figures[version], "python benchmarks/triton_resources.py records what changed"
    elif row not in figures.values():
        warnings.warn(f"Triton {version} is not recorded and gives figures of its own: {row}", stacklevel=2)


def skip_if_known_to_fail(capability: int) -> None:
    try:
        config.check_compiler(capability // 10, triton_version())
    except RuntimeError as error:
        pytest.skip(str(error))


def test_a_compiler_that_fails_is_named() -> None:
    config.check_compiler(9, (3, 6))
    config.check_compiler(10, (3, 8))
    with pytest.raises(
        RuntimeError, match=r"Triton 3\.7 does not compile .* capability 10; expected .* 3\.8"
    ):
        config.check_compiler(10, (3, 7))


def listing(*instructions: str) -> str:
    """Machine code in the words of nvdisasm, one instruction every 16 bytes."""
    lines = [
        word if word.endswith(":") else f"        /*{16 * i:04x}*/                   {word} ;"
        for i, word in enumerate(instructions)
    ]
    return "\n".join(lines)


def test_spills_are_judged_where_they_cost() -> None:
    loop = ["LDGSTS.E.BYPASS.128 [R4], desc[UR6][R2.64]", "@!P0 LDG.E.64 R8, desc[UR6][R2.64]"]
    products = ["HMMA.16816.F32 R4, R8, R12, R4", "DMMA.16x8x16 R4, R8, R12, R4", "DFMA R4, R8, R12, R4"]
    spills = ["STL.64 [R1+0x8], R4", "@P1 LDL R4, [R1+0x8]"]
    back = "@P0 BRA `(.L_x_1)"
    outside = innermost_loops(listing(*spills, ".L_x_1:", *loop, products[0], back, *spills))
    assert outside == [Loop(0, 24, 0, 0, True)]
    inside = innermost_loops(listing(".L_x_0:", ".L_x_1:", *loop, *spills, back, "BRA `(.L_x_0)"))
    assert inside == [Loop(12, 24, 0, 0, False)]
    # 12 bytes through the cache at 128 a clock, 24 from memory at 32.
    assert inside[0].spill_share(90) == (12 / 128) / (24 / 32)
    (both,) = innermost_loops(listing(".L_x_1:", *products, *spills, back))
    assert both == Loop(12, 0, 1, 64, True)
    assert both.spill_share(90) == (12 / 128) / (64 / 128)
    assert both.spill_share(86) == (12 / 128) / (64 / 2)
    (idle,) = innermost_loops(listing(".L_x_1:", *spills, back))
    assert idle.spill_share(90) == float("inf")


def test_what_a_version_decides_is_held_to_its_record_and_to_the_bound() -> None:
    version, rows = list(RECORDS.items())[-1]
    row = rows[0]
    judge(row, version)
    other = replace(row, registers=1)
    with pytest.raises(AssertionError, match="records what changed"):
        judge(other, version)
    with pytest.warns(UserWarning, match=r"Triton 99\.0 is not recorded .* figures of its own"):
        judge(other, "99.0")
    for wrong in (replace(row, spill_share=0.13), replace(row, registers=256)):
        with pytest.raises(AssertionError):
            judge(wrong, "99.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge(row, "99.0")


@compiles
@pytest.mark.parametrize(
    ("variant", "capability"),
    compiled.checked(),
    ids=lambda value: f"sm_{value}" if isinstance(value, int) else value.name,
)
def test_fits_and_loads_16_bytes(variant: compiled.Variant | compiled.ProbeVariant, capability: int) -> None:
    import triton

    skip_if_known_to_fail(capability)
    row = compiled.resources(variant, capability)
    judge(row, triton.__version__)
    proven.note(variant.proves, proven.COMPILED, registers=row.registers, sm=str(capability))
    if isinstance(variant, compiled.ProbeVariant):
        return
    # A rescue is rare and reads element by element; unaligned layouts have to.
    assert row.wide_loads or variant.rescue or variant.codes & compiled.OTHER_CODES
    if "128" in variant.name and not variant.rescue:
        assert (row.wgmma, row.tcgen05) == (capability == 90, capability == 100)
    if variant.precision == "float64" and capability in (80, 90):
        assert row.float64_mma


@compiles
@pytest.mark.parametrize(
    ("dtype", "code", "hops"),
    # float32 along side is left out: sm_90's tf32 products want the depth contiguous in shared memory, so
    # these copies are transposed and 4 bytes wide.
    [
        (torch.bfloat16, SIDE_128, 1),
        (torch.bfloat16, DEPTH_128, 1),
        (torch.bfloat16, 0x200, 2),
        (torch.float32, 0x200, 1),
    ],
)
def test_every_copy_of_an_aligned_layout_has_16_bytes(dtype: torch.dtype, code: int, hops: int) -> None:
    variant = compiled.Variant("one", dtype, "float32", code, multi=True, hops=hops)
    ptx = compiled.compile_variant(variant, 90).asm["ptx"]
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", ptx)
    assert not re.findall(
        r"cp\.async\.ca\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x[48]|ld\.global\S*\.b16", ptx
    )


@compiles
@pytest.mark.parametrize("capability", [80, 90])
def test_warps_of_a_narrow_tile_multiply_depths_of_their_own(capability: int) -> None:
    variant = compiled.Variant("narrow", torch.bfloat16, "float32", 0x1)
    assert "warpsPerCTA = [4, 1, 1]" in compiled.compile_variant(variant, capability).asm["ttgir"]


@compiles
@pytest.mark.parametrize("capability", [80, 90])
def test_float64_blocks_are_summed_apart(capability: int) -> None:
    # What `roundings` rests on: a block's product starts from zero and is then added to the total.
    variant = compiled.Variant("float64", torch.float32, "float64", 0x100, multi=True)
    kernel = compiled.compile_variant(variant, capability)
    accumulators = re.findall(r"tt\.dot %\S+, %\S+, (%\w+)", kernel.asm["ttgir"])
    assert accumulators
    assert all(name.startswith("%cst") for name in accumulators)


@compiles
@pytest.mark.parametrize("tile", [0x1, 0x100])
@pytest.mark.parametrize("capability", [80, 90])
def test_float32_blocks_are_multiplied_apart_and_added_in_float32(tile: int, capability: int) -> None:
    # What the limit of float32 sums rests on: the low parts first, from zero, then the high parts on top of
    # them, and one IEEE addition a block. Operands are rounded to tf32, not cut off.
    variant = compiled.Variant("float32", torch.float32, "float32", tile)
    kernel = compiled.compile_variant(variant, capability)
    ttgir = kernel.asm["ttgir"]
    dots = re.findall(
        r"(%[\w#]+) = (?:tt\.dot|ttng\.warp_group_dot) %[\w#]+, %[\w#]+, (%[\w#]+).*xf32, #mma\d*>(?: loc|$)",
        ttgir,
        re.MULTILINE,
    )
    assert len(dots) == 3, dots
    assert dots[0][1].startswith("%cst")
    last = dots[2][0]
    waited = re.search(rf"(%\w+):\d+ = ttng\.warp_group_dot_wait {last},", ttgir)
    last = f"{waited[1]}#0" if waited else last
    assert re.search(rf"arith\.addf {last}, %(?:part|arg)\w* : tensor<\S+xf32,", ttgir)
    assert "cvt.rna.tf32.f32" in kernel.asm["ptx"]


@compiles
@pytest.mark.parametrize(
    ("variant", "capability"),
    [pair for pair in compiled.checked() if isinstance(pair[0], compiled.ProbeVariant)],
    ids=lambda value: f"sm_{value}" if isinstance(value, int) else value.name,
)
def test_probes(variant: compiled.ProbeVariant, capability: int) -> None:
    skip_if_known_to_fail(capability)
    kernel = compiled.compile_variant(variant, capability)
    ptx = kernel.asm["ptx"]
    # The bound needs every subnormal; the logarithm starts from an approximate reciprocal.
    assert not re.findall(r"\.ftz(?!\.f64)", ptx)
    if variant.dtype is not None:
        accumulators = re.findall(r"tt\.dot %\S+, %\S+, (%\w+)", kernel.asm["ttgir"])
        assert accumulators
        assert all(name.startswith("%cst") for name in accumulators)
        assert ("f64.f64.f64.f64" in ptx) == (capability in (80, 90, 100))
    if "aligned along" in variant.name:
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", ptx)
        assert not re.findall(
            r"cp\.async\.ca\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x[48]|ld\.global\S*\.b(16|32)", ptx
        )


@pytest.mark.parametrize("version", RECORDS)
def test_committed_resources_are_within_the_bound_and_complete(version: str) -> None:
    rows = RECORDS[version]
    assert not [problem for row in rows for problem in problems(row)]
    recorded = {(row.variant, row.capability) for row in rows}
    assert len(recorded) == len(rows)
    served = [
        (variant.name, capability)
        for variant, capability in compiled.checked()
        if capability != 100 or triton_resources.parts(version) >= config.BLACKWELL_TRITON
    ]
    assert recorded >= set(served)
    assert all(row.wide_loads for row in rows if "aligned" in row.variant and "rescue" not in row.variant)


def test_one_version_is_recorded_with_every_variant() -> None:
    every = {(variant.name, capability) for variant, capability in compiled.wanted()}
    assert any(every <= {(row.variant, row.capability) for row in rows} for rows in RECORDS.values())
