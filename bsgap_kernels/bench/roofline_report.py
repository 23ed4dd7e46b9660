"""`bsgap roofline`: prints the paper model of one model on one GPU, or writes it as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from .devices import DEVICES, Device, Rates, device_named, read_measured
from .model_sites import MODELS, model_sites
from .roofline import DTYPE_BYTES, UNFOLDS, Roofline, roofline

SCHEMA = 1
CEILINGS = "ceilings"


def scaled(value: float, unit: str) -> str:
    """Four digits with a decimal prefix, such as 8.724 GB."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def duration(seconds: float) -> str:
    """Three digits in ms, µs or ns."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def text(result: Roofline, *, title: str) -> str:
    """The table: a line for all layers of one shape, then the sums."""
    work_heads = ["layer", "m x n", "k", "read", "half Gram", "lambda_max", "one LDLt"]
    rows = [[*work_heads, "read", "Gram math", "Gram", "count", "total", "bound"]]
    for line in result.lines:
        item, t, f = line.work, line.times, line.floor
        rows.append(
            [
                line.name + (f" x{t}" if t > 1 else ""),
                f"{item.m} x {item.n}",
                str(item.k),
                scaled(t * item.bytes_read, "B"),
                scaled(t * item.gram_flops, "FLOP"),
                scaled(t * item.lambda_max_flops, "FLOP"),
                scaled(t * item.ldlt_flops, "FLOP"),
                *(duration(s) for s in (f.read, f.gram_math, f.gram, f.count, f.total)),
                f.bound,
            ]
        )
    f = result.floor
    rows.append(
        [
            f"all {result.layers}",
            "",
            "",
            scaled(result.bytes_read, "B"),
            *(
                scaled(sum(line.times * getattr(line.work, name) for line in result.lines), "FLOP")
                for name in ("gram_flops", "lambda_max_flops", "ldlt_flops")
            ),
            *(duration(s) for s in (f.read, f.gram_math, result.gram, f.count, result.total)),
            f.bound,
        ]
    )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i in (0, len(row) - 1) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([title, rates_line(result.device, result.rates), "", *lines, "", *notes(result)])


def rates_line(device: Device, rates: Rates) -> str:
    """The rates that the times come from, and whose they are."""
    tensor = "none" if rates.fp64_tensor is None else scaled(rates.fp64_tensor, "FLOP/s")
    return (
        f"{device.name}, {device.sms} SMs, L2 {device.l2_bytes >> 20} MiB; memory "
        f"{scaled(rates.bandwidth, 'B/s')}, bf16 {scaled(rates.bf16, 'FLOP/s')}, TF32 "
        f"{scaled(rates.tf32, 'FLOP/s')}, FP32 {scaled(rates.fp32, 'FLOP/s')}, FP64 "
        f"{scaled(rates.fp64, 'FLOP/s')}, FP64 tensor {tensor}\nRates: {rates.source}"
    )


def notes(result: Roofline) -> list[str]:
    """How to read the table."""
    share = result.floor.read / result.total if result.total else 0.0
    return [
        f"Floor {duration(result.total)}: Gram stage {duration(result.gram)}, count stage "
        f"{duration(result.floor.count)} (lambda_max {duration(result.floor.lambda_max)}, one LDLt a layer "
        f"{duration(result.floor.ldlt)}); reading alone is {share:.0%} of it.",
        "A Gram layer takes the longer of reading and multiplying. Arithmetic only: no latency, no launches.",
    ]


def as_json(result: Roofline, settings: dict[str, Any]) -> dict[str, Any]:
    """All that the table shows, in bytes, operations and seconds."""
    return {
        "schema": SCHEMA,
        "kind": "roofline",
        "settings": settings,
        "device": {"name": result.device.name, "sms": result.device.sms, "l2_bytes": result.device.l2_bytes},
        "rates": asdict(result.rates),
        "layers": [
            {
                "name": line.name,
                "times": line.times,
                **asdict(line.work),
                "k": line.work.k,
                "seconds": _seconds(line.floor, line.floor.gram, line.floor.total),
                "bound": line.floor.bound,
            }
            for line in result.lines
        ],
        "total": {
            "layers": result.layers,
            "bytes_read": result.bytes_read,
            "seconds": _seconds(result.floor, result.gram, result.total),
            "bound": result.floor.bound,
        },
    }


def _seconds(floor: Any, gram: float, total: float) -> dict[str, float]:
    return {**asdict(floor), "gram": gram, "count": floor.count, "total": total}


class _Parser(argparse.ArgumentParser):
    """A mistake is one sentence, as everywhere on our command line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="bsgap roofline", description="Bytes, operations and floor times of tracking a model."
    )
    parser.add_argument("--model", required=True, help=", ".join(MODELS))
    parser.add_argument(
        "--batch", type=int, default=1, help="images, or sequences of TOKENS; default %(default)s"
    )
    parser.add_argument("--device", default="h200", help=", ".join(d.key for d in DEVICES))
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(DTYPE_BYTES))
    parser.add_argument("--unfold", default="channel", help=", ".join(UNFOLDS))
    parser.add_argument(
        "--measured",
        nargs="?",
        const=CEILINGS,
        metavar="FILE",
        help="rates from a result of bsgap bench --device cuda; without FILE: known ceilings",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON too")
    options = parser.parse_args(arguments)
    if not 1 <= options.batch <= 2**40:
        raise ValueError(f"batch: got {options.batch}, expected a positive number")
    for name, known in (("dtype", tuple(DTYPE_BYTES)), ("unfold", UNFOLDS)):
        if getattr(options, name) not in known:
            raise ValueError(f"{name}: got {getattr(options, name)!r}, expected one of {', '.join(known)}")
    return options


def _rates(device: Device, measured: str | None) -> Rates:
    if measured is None:
        return device.datasheet
    if measured != CEILINGS:
        return read_measured(Path(measured), device)
    if device.ceilings is None:
        raise ValueError(f"measured: no ceilings are known of {device.name}, expected a FILE")
    return device.ceilings


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 for a mistake."""
    try:
        options = _options(arguments)
        device = device_named(options.device)
        rates = _rates(device, options.measured)
        sites = model_sites(options.model)
        result = roofline(sites, options.batch, options.unfold, options.dtype, device, rates)
        settings = {name: getattr(options, name) for name in ("model", "batch", "device", "dtype", "unfold")}
        if options.json is not None:
            content = json.dumps(as_json(result, settings), indent=1, ensure_ascii=False) + "\n"
            options.json.write_text(content, encoding="utf-8")
    except ValueError as error:
        print(f"bsgap roofline: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"bsgap roofline: {error.filename}: {error.strerror or error}", file=sys.stderr)
        return 2
    title = f"{options.model}, batch {options.batch}, {options.dtype}, unfold {options.unfold}"
    print(text(result, title=title))
    return 0


if __name__ == "__main__":
    sys.exit(main())
