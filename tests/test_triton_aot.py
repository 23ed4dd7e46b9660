"""The Triton kernels compiled ahead of time, without a GPU: no spills, fits every device, 16-byte loads."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

import proven
import pytest
import torch

from bsgap_kernels.triton import compiled, config
from bsgap_kernels.triton.gram import triton_version

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "triton_resources.json"

compiles = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

# One of each tile and precision; benchmarks/triton_resources.py has them all.
SIDE_128, DEPTH_128 = 0x1000, 0x2000
CHECKED = [
    (compiled.Variant("128 along side", torch.bfloat16, "float32", SIDE_128, multi=True), (90, 100)),
    (compiled.Variant("128 along depth", torch.bfloat16, "float32", DEPTH_128, multi=True), (90,)),
    (compiled.Variant("128 rescue", torch.bfloat16, "float32", SIDE_128, multi=True, rescue=True), (90,)),
    (compiled.Variant("bfloat16 tiles", torch.bfloat16, "float32", 0x100, multi=True), (120,)),
    (compiled.Variant("bfloat16, sides to 64", torch.bfloat16, "float32", 0x111), (80,)),
    (compiled.Variant("float32, sides to 64", torch.float32, "float32", 0x100), (80, 90)),
    (compiled.Variant("float64 of float32", torch.float32, "float64", 0x200, multi=True), (80, 90)),
    (compiled.Variant("float64 shifted", torch.float64, "float64", 0x100, multi=True, shift=1), (89,)),
]
# What the kernels are tuned for. Older compilers spill here and there off sm_90, and fail for sm_100.
TUNED = importlib.util.find_spec("triton") is not None and triton_version() >= config.BLACKWELL_TRITON


def problems(row: compiled.Resources) -> list[str]:
    found = []
    if row.spilled_bytes and (TUNED or row.capability == 90):
        found.append(f"{row.variant} on sm_{row.capability} spills {row.spilled_bytes} bytes")
    if row.shared_bytes > compiled.SHARED_LIMIT[row.capability]:
        found.append(f"{row.variant} on sm_{row.capability} takes {row.shared_bytes} bytes of shared memory")
    if row.registers > compiled.MAX_REGISTERS or row.registers * row.warps * 32 > 65536:
        found.append(
            f"{row.variant} on sm_{row.capability} takes {row.registers} registers x {row.warps} warps"
        )
    return found


def skip_if_known_to_fail(capability: int) -> None:
    try:
        config.check_compiler(capability // 10, triton_version())
    except RuntimeError as error:
        pytest.skip(str(error))


def test_a_compiler_that_fails_is_named() -> None:
    config.check_compiler(9, (3, 6))
    config.check_compiler(10, (3, 9))
    with pytest.raises(
        RuntimeError, match=r"Triton 3\.6 does not compile .* capability 10; expected .* 3\.9"
    ):
        config.check_compiler(10, (3, 6))


@compiles
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels of this process are interpreted"
)
@pytest.mark.parametrize(
    ("variant", "capability"),
    [(variant, capability) for variant, capabilities in CHECKED for capability in capabilities],
    ids=lambda value: value.name if isinstance(value, compiled.Variant) else f"sm_{value}",
)
def test_fits_and_loads_16_bytes(variant: compiled.Variant, capability: int) -> None:
    skip_if_known_to_fail(capability)
    row = compiled.resources(variant, capability)
    assert not problems(row)
    kernel = "gram_kernel, rescue" if variant.rescue else "gram_kernel"
    proven.note(kernel, proven.COMPILED, registers=row.registers, sm=str(capability))
    # A rescue is rare and reads element by element.
    assert row.wide_loads or variant.rescue
    if "128" in variant.name and not variant.rescue:
        assert (row.wgmma, row.tcgen05) == (capability == 90, capability == 100)
    if variant.precision == "float64" and capability in (80, 90):
        assert row.float64_mma


@compiles
@pytest.mark.parametrize(
    ("dtype", "code"),
    # float32 along side is left out: sm_90's tf32 products want the depth contiguous in shared memory, so
    # these copies are transposed and 4 bytes wide.
    [(torch.bfloat16, SIDE_128), (torch.bfloat16, DEPTH_128), (torch.float32, 0x200)],
)
def test_every_copy_of_an_aligned_layout_has_16_bytes(dtype: torch.dtype, code: int) -> None:
    variant = compiled.Variant("one", dtype, "float32", code, multi=True)
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
@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("vectors", 89),
        ("bfloat16 aligned along side", 90),
        ("bfloat16 aligned along depth", 120),
        ("bfloat16 aligned along depth, transposed", 80),
        ("float32 aligned along side", 86),
        ("float32 unaligned, transposed", 90),
        ("Gram unaligned", 100),
    ],
)
def test_probes(name: str, capability: int) -> None:
    skip_if_known_to_fail(capability)
    (variant,) = (v for v in compiled.probe_variants() if v.name == f"probe {name}")
    row = compiled.resources(variant, capability)
    assert not problems(row)
    ran = "omega_kernel" if variant.dtype is None else "product_kernel"
    proven.note(ran, proven.COMPILED, registers=row.registers, sm=str(capability))
    kernel = compiled.compile_variant(variant, capability)
    ptx = kernel.asm["ptx"]
    # The bound needs every subnormal; the logarithm starts from an approximate reciprocal.
    assert not re.findall(r"\.ftz(?!\.f64)", ptx)
    if variant.dtype is not None:
        accumulators = re.findall(r"tt\.dot %\S+, %\S+, (%\w+)", kernel.asm["ttgir"])
        assert accumulators
        assert all(name.startswith("%cst") for name in accumulators)
        assert ("f64.f64.f64.f64" in ptx) == (capability in (80, 90, 100))
    if "aligned along" in name:
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", ptx)
        assert not re.findall(
            r"cp\.async\.ca\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x[48]|ld\.global\S*\.b(16|32)", ptx
        )


def test_committed_resources_are_clean_and_complete() -> None:
    rows = [compiled.Resources(**row) for row in json.loads(RESULT.read_text())["kernels"]]
    assert not [problem for row in rows for problem in problems(row)]
    assert [(row.variant, row.capability) for row in rows] == [(v.name, c) for v, c in compiled.wanted()]
    assert all(row.wide_loads for row in rows if "aligned" in row.variant and "rescue" not in row.variant)
