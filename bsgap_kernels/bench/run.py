"""Runs the benchmark: every case, every contender, one result that is printed and written as JSON."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import Any

from torch import Tensor

from . import machine, measure, tables
from .cases import CASES, Case, select_cases
from .ceilings import SECONDS, measure_ceilings
from .config import BenchConfig
from .contenders import CONTENDERS, PHASES, Contender, Result, taking_part
from .floors import Rates, floor
from .measurements import MEASUREMENTS, Row, Setting, measured
from .progress import Progress
from .result import compare, contender_row, write_result
from .targets import targets
from .truth import Verdict, judge, singular_values, truth_at

SCHEMA = 2
"""Version of the JSON written; it goes up when a reader would have to change."""


def run(
    config: BenchConfig,
    *,
    contenders: Sequence[Contender] = CONTENDERS,
    cases: Sequence[Case] | None = None,
    measurements: Mapping[str, Callable[[Setting], list[Row]]] = MEASUREMENTS,
    ceiling_seconds: float = SECONDS,
    ceiling_bytes: int | None = None,
    out: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Times and checks every case, prints tables through `out`, writes `config.json`, returns the result.

    `cases`, `contenders` and `measurements` replace those of the package, `ceiling_seconds` and
    `ceiling_bytes` what the ceilings are measured with. Raises ValueError for settings that make no sense.
    """
    wrong = config.problem(CASES)
    if wrong is not None:
        raise ValueError(wrong)
    if config.threads is not None:
        machine.set_threads(config.threads)
    chosen = select_cases(config.cases, quick=config.quick) if cases is None else cases
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "complete": False,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **machine.describe(),
        "settings": config.recorded(),
        "ceilings": measure_ceilings(seconds=ceiling_seconds, size=ceiling_bytes),
        "cases": [],
        "measurements": {},
    }
    flush = measure.CacheFlush()
    out(_headline(result))
    out(tables.ceilings(result["ceilings"]))
    rates = Rates.of_ceilings(result["ceilings"])
    for number, case in enumerate(chosen, 1):
        progress = Progress(f"[{number}/{len(chosen)}] {case.name}")
        for record in measure_case(case, config, contenders, rates, flush, progress):
            progress.done()
            result["cases"].append(record)
            write_result(config.json, result)
            out("\n" + tables.text_table(record))
    for name in config.other_measurements:
        progress = Progress(name)
        setting = Setting(
            config.most_rounds, config.seconds, config.seed, config.thresholds, chosen, flush, progress
        )
        others = machine.OtherWork()
        found = measured(measurements[name], setting)
        progress.done()
        result["measurements"][name] = {**found, "other_work": others.share()}
        write_result(config.json, result)
        out("\n" + tables.measurement_table(name, result["measurements"][name]))
    result["targets"] = targets(result)
    result["complete"] = True
    write_result(config.json, result)
    out("\n" + tables.targets_table(result["targets"]))
    if config.json is not None:
        out(f"\nWritten: {config.json}")
    return result


def measure_case(
    case: Case,
    config: BenchConfig,
    contenders: Sequence[Contender],
    rates: Rates,
    flush: Callable[[], None],
    progress: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """One record a threshold of one case; the input and its singular values are made once."""
    progress("input")
    inputs = case.make(config.seed)
    chosen = taking_part(contenders, case, config.thresholds)
    spectra: dict[bool, list[Tensor]] = {}
    for centred in sorted({c.centred for some in chosen.values() for c in some}):
        progress("float64 SVD" + (", centred" if centred else ""))
        spectra[centred] = singular_values(inputs, centred=centred)
    timing = partial(
        measure.interleave,
        rounds=config.most_rounds,
        budget_s=config.seconds,
        calls=case.calls,
        flush=flush,
        progress=progress,
        seed=config.seed,
    )
    for rtol, some in chosen.items():
        yield _measure_threshold(case, inputs, spectra, rtol, some, rates, timing)


def _measure_threshold(
    case: Case,
    inputs: list[Tensor],
    spectra: Mapping[bool, list[Tensor]],
    rtol: float,
    contenders: Sequence[Contender],
    rates: Rates,
    timing: Callable[..., dict[str, measure.Samples]],
) -> dict[str, Any]:
    """The timed rounds, the verdict on every contender, and the floors of ours."""
    expected = {centred: truth_at(values, rtol) for centred, values in spectra.items()}
    verdicts: dict[str, Verdict] = {}
    by_name = {c.name: c for c in contenders}

    def check(name: str, result: object) -> None:
        answer: Result = result  # type: ignore[assignment]
        verdicts[name] = judge(answer, expected[by_name[name].centred])

    others = machine.OtherWork()
    samples = timing({c.name: partial(c, inputs, rtol) for c in contenders}, on_result=check)
    record: dict[str, Any] = {
        "name": case.name,
        "about": case.about,
        "shapes": [list(shape) for shape in case.shapes],
        "matrices": case.matrices,
        "dtype": str(case.dtype).removeprefix("torch."),
        "rtol": rtol,
        "cache": "warm" if case.calls > 1 else "cold",
        "counts": {
            "lowest": int(expected[False].counts.min()) if False in expected else None,
            "highest": int(expected[False].counts.max()) if False in expected else None,
        },
        "floors_ms": {},
        "contenders": [contender_row(c, samples[c.name], verdicts.get(c.name)) for c in contenders],
    }
    compare(record)
    for row in record["contenders"]:
        shortest = floor(row["name"], case.shapes, case.dtype, rtol, rates)
        if shortest is not None:
            record["floors_ms"][row["name"]] = shortest.milliseconds()
            if "median_ms" in row:
                row["fraction_of_floor"] = round(shortest.total * 1e3 / row["median_ms"], 4)
    if case.profile:
        phases = {f: partial(f, inputs[0], rtol) for p in PHASES for f in (p.upto, p.less) if f}
        parts = timing({f.__name__: call for f, call in phases.items()})
        record["profile"] = profile_rows(parts)
    record["other_work"] = others.share()
    return record


def profile_rows(parts: dict[str, measure.Samples]) -> list[dict[str, Any]]:
    """Median milliseconds of each phase of our ops and its share of the op, without phases that failed."""
    rows: list[dict[str, Any]] = []
    for phase in PHASES:
        needed = [parts[f.__name__] for f in (phase.upto, phase.less) if f]
        if any(samples.error is not None for samples in needed):
            continue
        medians = [samples.quartiles[1] for samples in needed]
        rows.append(
            {"op": phase.op, "phase": phase.name, "median_ms": round(medians[0] - sum(medians[1:]), 5)}
        )
    for row in rows:
        # A difference of medians can come out below 0 where the phase is shorter than the noise.
        whole = sum(max(other["median_ms"], 0) for other in rows if other["op"] == row["op"])
        row["share"] = round(max(row["median_ms"], 0) / whole, 4) if whole > 0 else 0.0
    return rows


def _headline(result: dict[str, Any]) -> str:
    threads, versions = result["threads"], result["versions"]
    line = (
        f"{result['machine']['cpu']}, {result['machine']['cores']} cores; torch {versions['torch']} on "
        f"{threads['torch']} threads, NumPy {versions['numpy']} on {threads['numpy'] or 'unknown'}"
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        line += f"\nWarning: the load is {load:.1f} already; figures taken beside other work are distorted."
    return line
