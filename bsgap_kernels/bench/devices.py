"""GPUs that floors are computed for: rates from the vendor's datasheets, dense (without sparsity)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TERA = 1e12
MEBI = 1 << 20


@dataclass(frozen=True)
class Rates:
    """Bytes per second of device memory and floating-point operations per second."""

    bandwidth: float
    bf16: float
    """bfloat16 and float16 tensor cores, accumulated in float32."""
    tf32: float
    fp32: float
    fp64: float
    fp64_tensor: float | None
    """None: the tensor cores have no float64."""
    source: str


@dataclass(frozen=True)
class Device:
    """One GPU model."""

    key: str
    name: str
    match: str
    """Part of the name that the driver gives such a device."""
    sms: int
    l2_bytes: int
    datasheet: Rates
    ceilings: Rates | None = None
    """Rates that a kernel was seen to reach; None where none is known."""


def _rates(
    source: str,
    bandwidth: float,
    bf16: float,
    tf32: float,
    fp32: float,
    fp64: float,
    fp64_tensor: float | None,
) -> Rates:
    """From TB/s and TFLOP/s."""
    tensor = None if fp64_tensor is None else fp64_tensor * TERA
    return Rates(
        bandwidth * TERA, bf16 * TERA, tf32 * TERA, fp32 * TERA, fp64 * TERA, tensor, f"datasheet: {source}"
    )


DEVICES = (
    # NVIDIA H200 Tensor Core GPU datasheet, column SXM; it prints tensor rates with sparsity: half.
    # SMs and L2: H100 Tensor Core GPU Architecture whitepaper (the same die). Ceilings: copy kernel (read and
    # write counted), 8192^3 bf16 matmul; float32 and float64 matmul reach their datasheet rates.
    Device(
        "h200",
        "H200 SXM 141GB",
        "H200",
        132,
        50 * MEBI,
        _rates("NVIDIA H200 Tensor Core GPU, SXM", 4.8, 989.5, 494.7, 67, 34, 67),
        Rates(
            4.3 * TERA,
            790 * TERA,
            494.7 * TERA,
            67 * TERA,
            34 * TERA,
            67 * TERA,
            "ceilings: 4.3 TB/s copy and 790 TFLOP/s bf16 measured, else datasheet",
        ),
    ),
    # NVIDIA H100 Tensor Core GPU datasheet, column SXM; SMs and L2 from the architecture whitepaper.
    Device(
        "h100",
        "H100 SXM 80GB",
        "H100",
        132,
        50 * MEBI,
        _rates("NVIDIA H100 Tensor Core GPU, SXM", 3.35, 989.5, 494.7, 67, 34, 67),
    ),
    # NVIDIA A100 Tensor Core GPU datasheet, column 80GB SXM; SMs and L2 from the architecture whitepaper.
    Device(
        "a100",
        "A100 SXM 80GB",
        "A100",
        108,
        40 * MEBI,
        _rates("NVIDIA A100 80GB Tensor Core GPU, SXM", 2.039, 312, 156, 19.5, 9.7, 19.5),
    ),
    # NVIDIA HGX B200 datasheet, an eighth of the eight-GPU board, tensor rates without sparsity; SMs and
    # L2 as the driver reports them.
    Device(
        "b200",
        "B200 SXM",
        "B200",
        148,
        126 * MEBI,
        _rates("NVIDIA HGX B200, one of eight GPUs", 8.0, 2250, 1125, 75, 37, 37),
    ),
    # NVIDIA Ada GPU Architecture whitepaper, appendix A: bf16 and TF32 with float32 accumulation; float64
    # runs at 1/64 of the float32 rate, on no tensor core.
    Device(
        "rtx4090",
        "GeForce RTX 4090",
        "RTX 4090",
        128,
        72 * MEBI,
        _rates("NVIDIA Ada architecture whitepaper, RTX 4090", 1.008, 165.2, 82.6, 82.6, 1.29, None),
    ),
)


def device_named(name: str) -> Device:
    """The device of the table by its key; ValueError names what there is."""
    for device in DEVICES:
        if device.key == name.lower().replace(" ", "").replace("_", "").replace("-", ""):
            return device
    raise ValueError(f"got the device {name!r}, expected one of {', '.join(d.key for d in DEVICES)}")


def device_of_driver(name: str) -> Device | None:
    """The device by the name that the driver gives it, or None for one that is not in the table."""
    return next((device for device in DEVICES if device.match in name), None)


def measured_rates(ceilings: dict[str, Any], base: Rates | None) -> Rates:
    """Rates from measured ceilings (bench/cuda/ceilings.py); what was not measured is `base`'s.

    The read bandwidth is the one that a Gram kernel can reach; the copy's counts where it is all there is.
    Raises ValueError where a rate is neither measured nor known.
    """

    def pick(rate: str, *names: str) -> float:
        for name in names:
            value = ceilings.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
                return float(value)
        known = getattr(base, rate) if base else None
        if known is None:
            raise ValueError(f"no measured {' or '.join(names)} and no datasheet rate for this device")
        return float(known)

    fp64 = (
        pick("fp64_tensor", "fp64_flops") if base is None or base.fp64_tensor else pick("fp64", "fp64_flops")
    )
    return Rates(
        bandwidth=pick("bandwidth", "read_bytes_per_s", "copy_bytes_per_s"),
        bf16=pick("bf16", "bf16_flops"),
        tf32=pick("tf32", "tf32_flops"),
        fp32=pick("fp32", "fp32_flops"),
        # A float64 matmul runs on the tensor cores where they have float64: that says nothing of the others.
        fp64=base.fp64 if base and base.fp64_tensor else fp64,
        fp64_tensor=None if base and base.fp64_tensor is None else fp64,
        source="measured in the same run, else datasheet",
    )


def read_measured(path: Path, device: Device) -> Rates:
    """Rates from a result of `bsgap bench --device cuda`; ValueError says what is wrong with the file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: is not a JSON file") from error
    if not isinstance(result, dict) or not isinstance(result.get("ceilings"), dict):
        raise ValueError(f"{path}: holds no measured ceilings; expected a file of bsgap bench --device cuda")
    name = str(result.get("machine", {}).get("gpu", ""))
    if device.match not in name:
        raise ValueError(f"{path}: was measured on {name or 'an unnamed device'}, not on {device.name}")
    rates = measured_rates(result["ceilings"], device.datasheet)
    return Rates(**{**rates.__dict__, "source": f"measured: {path.name}, else datasheet"})
