"""The paper model: bytes, operations and floors by formula, the device table, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bsgap_kernels.bench import devices
from bsgap_kernels.bench.cases import resnet56_channel_shapes
from bsgap_kernels.bench.devices import DEVICES, Rates, device_named, device_of_driver, measured_rates
from bsgap_kernels.bench.model_sites import model_sites, trace_convolutions
from bsgap_kernels.bench.roofline import Roofline, floor, floor_of_shapes, roofline, work
from bsgap_kernels.bench.roofline_report import main
from bsgap_kernels.cli import main as bsgap

H200 = device_named("h200")
assert H200.ceilings is not None
CEILINGS: Rates = H200.ceilings


def paper(model: str, batch: int = 1, *, unfold: str = "channel", dtype: str = "bfloat16") -> Roofline:
    return roofline(model_sites(model), batch, unfold, dtype, H200, CEILINGS)


def test_resnet56_at_batch_8192_is_one_read_of_2_ms() -> None:
    result = paper("resnet56", 8192)
    values = 8192 * (19 * 16 * 32**2 + 18 * 32 * 16**2 + 18 * 64 * 8**2)
    assert result.layers == 55
    assert result.bytes_read == 2 * values
    assert round(result.bytes_read / 1e9, 2) == 8.72
    assert result.floor.read == 2 * values / 4.3e12
    assert round(result.floor.read * 1e3, 2) == 2.03
    # Whole Gram matrices, which tiles of 16 cannot halve at 16 channels: 0.30 ms; half of them is the floor.
    assert round(2 * result.floor.gram_math * 1e3, 2) == 0.30
    assert result.gram == result.floor.read
    assert result.floor.bound == "memory"
    assert [line.times for line in result.lines] == [19, 18, 18]
    shapes = [(line.work.m, line.work.n) for line in result.lines for _ in range(line.times)]
    assert tuple(shapes) == resnet56_channel_shapes(8192)


def test_one_wide_bf16_matrix_of_8192_by_65536() -> None:
    once = floor(work(8192, 65536, "bfloat16"), CEILINGS, H200.l2_bytes)
    assert once.read == 2 * 8192 * 65536 / 4.3e12
    assert once.gram_math == 8192**2 * 65536 / 790e12
    assert once.lambda_max == 40 * 8 * 8192**2 / 4.3e12
    assert once.ldlt == 8192**3 / 3 / 67e12
    milliseconds = [round(s * 1e3, 2) for s in (once.read, once.gram_math, once.lambda_max, once.ldlt)]
    assert milliseconds == [0.25, 5.57, 4.99, 2.74]
    assert once.total == once.gram_math + once.lambda_max + once.ldlt
    assert once.bound == "Gram math"


def test_thirty_two_transformer_layers() -> None:
    result = paper("transformer:32,32768,4096")
    assert [(line.name, line.times, line.work.k) for line in result.lines] == [("layer0", 32, 4096)]
    assert round(result.floor.read * 1e3, 1) == 2.0
    assert round(result.floor.gram_math * 1e3) == 22
    assert round(result.floor.ldlt * 1e3) == 11


def test_small_sides_take_lambda_max_from_the_tridiagonal_form_and_large_ones_leave_the_cache() -> None:
    assert work(1000, 128, "float32").lambda_max_flops == 4 / 3 * 128**3
    assert work(1000, 128, "float32").lambda_max_bytes == 0
    assert work(1000, 129, "float32").lambda_max_flops == 80 * 129**2
    cached = floor(work(1000, 1000, "float32"), CEILINGS, 8 * 1000**2)
    assert cached.lambda_max == 80 * 1000**2 / CEILINGS.fp64
    assert floor(work(1000, 1000, "float32"), CEILINGS, 8 * 1000**2 - 1).lambda_max == 320e6 / 4.3e12


def test_rates_by_dtype() -> None:
    item = {d: floor(work(512, 256, d), CEILINGS, 1 << 20) for d in ("float64", "float32", "float16")}
    flops = 512 * 256**2
    assert item["float64"].gram_math == flops / 67e12
    assert item["float32"].gram_math == flops / (494.7e12 / 3)
    assert item["float16"].gram_math == flops / 790e12
    ada = device_named("rtx4090")
    assert floor(work(512, 256, "float64"), ada.datasheet, ada.l2_bytes).ldlt == 256**3 / 3 / 1.29e12


@pytest.mark.parametrize(
    ("unfold", "m", "n"), [("channel", 2 * 28 * 28, 6), ("flatten", 2, 6 * 28 * 28), ("pool", 2, 6)]
)
def test_unfoldings_read_the_same_bytes(unfold: str, m: int, n: int) -> None:
    first = paper("lenet5", 2, unfold=unfold, dtype="float32").lines[0].work
    assert (first.m, first.n, first.k) == (m, n, min(m, n))
    assert first.bytes_read == 4 * 2 * 6 * 28 * 28
    assert first.gram_flops == m * n * min(m, n)


def test_models() -> None:
    assert len(model_sites("vgg16")) == 13
    assert [site.channels for site in model_sites("lenet5")] == [6, 16]
    assert model_sites("vgg16")[-1].positions == 4
    for wrong in ("nix", "transformer:1,2", "transformer:0,2,3", "matrix:0,4", "matrix:4"):
        with pytest.raises(ValueError, match="expected one of resnet56"):
            model_sites(wrong)


def test_convolutions_are_traced_on_meta_tensors() -> None:
    with torch.device("meta"):
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU(), torch.nn.Conv2d(8, 5, 1)
        )
        sites = trace_convolutions(network, torch.empty(1, 3, 9, 9))
    assert [(s.name, s.channels, s.positions) for s in sites] == [("0", 8, 16), ("2", 5, 16)]


@pytest.mark.parametrize(("model", "convolutions"), [("resnet18", 20), ("resnet50", 53)])
def test_torchvision_models(model: str, convolutions: int) -> None:
    try:
        sites = model_sites(model)
    except ValueError as error:
        pytest.skip(str(error))
    assert len(sites) == convolutions
    assert (sites[0].channels, sites[0].positions) == (64, 112 * 112)


def test_floors_of_benchmark_cases_count_batches() -> None:
    one = floor_of_shapes([(100, 100)], torch.float32, CEILINGS, H200.l2_bytes)
    many = floor_of_shapes([(500, 100, 100)], torch.float32, CEILINGS, H200.l2_bytes)
    assert many.total == pytest.approx(500 * one.total, rel=1e-12)
    assert many.read == pytest.approx(500 * 4e4 / 4.3e12, rel=1e-12)


def test_the_device_table() -> None:
    assert [d.key for d in DEVICES] == ["h200", "h100", "a100", "b200", "rtx4090"]
    for device in DEVICES:
        rates = device.datasheet
        assert rates.source.startswith("datasheet: NVIDIA")
        assert 5e11 < rates.bandwidth < 1e13
        assert rates.fp64 <= rates.fp32 <= rates.tf32 < rates.bf16
        assert rates.fp64_tensor is None or rates.fp64_tensor >= rates.fp64
        assert device.ceilings is None or device.ceilings.bf16 <= rates.bf16
        assert device_of_driver(f"NVIDIA {device.match} something") is device
    assert device_named("RTX-4090").key == "rtx4090"
    assert device_of_driver("A processor") is None
    with pytest.raises(ValueError, match="expected one of h200, h100, a100, b200, rtx4090"):
        device_named("v100")


def test_measured_rates_replace_what_was_measured_and_no_more() -> None:
    found = {"copy_bytes_per_s": 4e12, "read_bytes_per_s": 4.5e12, "bf16_flops": 7e14, "fp64_flops": 6e13}
    rates = measured_rates(found, H200.datasheet)
    assert (rates.bandwidth, rates.bf16, rates.fp64_tensor) == (4.5e12, 7e14, 6e13)
    assert (rates.fp64, rates.tf32) == (H200.datasheet.fp64, H200.datasheet.tf32)
    ada = measured_rates({"fp64_flops": 1.2e12}, device_named("rtx4090").datasheet)
    assert (ada.fp64, ada.fp64_tensor, ada.bandwidth) == (1.2e12, None, 1.008e12)
    assert measured_rates({"copy_bytes_per_s": 4e12}, H200.datasheet).bandwidth == 4e12
    with pytest.raises(ValueError, match="no measured bf16_flops and no datasheet rate"):
        measured_rates({"read_bytes_per_s": 1e12, "fp64_flops": 1e12}, None)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "roofline.json"
    arguments = [
        "--model",
        "resnet56",
        "--batch",
        "8192",
        "--device",
        "h200",
        "--measured",
        "--json",
        str(target),
    ]
    assert bsgap(["roofline", *arguments]) == 0
    printed = capsys.readouterr().out
    for part in (
        "stage1.conv0 x19",
        "stage3.conv0 x18",
        "all 55",
        "8.724 GB",
        "Floor 2.03 ms",
        "Rates: ceilings",
    ):
        assert part in printed
    written = json.loads(target.read_text(encoding="utf-8"))
    assert written["total"]["bytes_read"] == paper("resnet56", 8192).bytes_read
    assert written["total"]["seconds"]["gram"] == paper("resnet56", 8192).gram
    assert sum(layer["times"] for layer in written["layers"]) == 55
    assert main(["--model", "resnet56", "--batch", "8192"]) == 0
    printed = capsys.readouterr().out
    assert "Rates: datasheet: NVIDIA H200" in printed
    assert "Floor 1.82 ms" in printed  # 8.72 GB at 4.8 TB/s


def result_file(folder: Path, change: Callable[[dict[str, object]], object] = lambda _: None) -> str:
    content: dict[str, object] = {"machine": {"gpu": "NVIDIA H200"}, "ceilings": {"read_bytes_per_s": 4.4e12}}
    change(content)
    path = folder / "result.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def test_measured_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "resnet56", "--batch", "8192", "--measured", result_file(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "memory 4.4 TB/s" in printed
    assert "Rates: measured: result.json, else datasheet" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "the following arguments are required: --model"),
        ("--model nix", "model: got 'nix', expected one of resnet56"),
        ("--model resnet56 --device v100", "got the device 'v100', expected one of h200"),
        ("--model resnet56 --batch 0", "batch: got 0, expected a positive number"),
        ("--model resnet56 --batch x", "invalid int value: 'x'"),
        ("--model resnet56 --dtype int8", "dtype: got 'int8', expected one of bfloat16"),
        ("--model resnet56 --unfold rows", "unfold: got 'rows', expected one of channel"),
        ("--model resnet56 --device h100 --measured", "no ceilings are known of H100"),
        ("--model resnet56 --measured no/such.json", "no/such.json: No such file"),
        ("--model resnet56 --json no/such/folder/x.json", "no/such/folder/x.json: No such file"),
    ],
)
def test_mistakes_are_one_sentence(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bsgap(["roofline", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("bsgap roofline: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not a JSON file"),
        ("{}", "holds no measured ceilings"),
        ('{"machine": {"gpu": "NVIDIA L4"}, "ceilings": {}}', "was measured on NVIDIA L4, not on H200"),
    ],
)
def test_measured_files_that_cannot_be_used(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        devices.read_measured(path, H200)
