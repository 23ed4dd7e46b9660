"""Runs the GPU benchmark: ceilings first, then every case, then what takes seconds a call."""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from .. import machine, measure
from ..cases import Case, select_cases
from ..config import BenchConfig
from ..contenders import Result
from ..devices import Rates, device_of_driver, measured_rates
from ..progress import Progress
from ..result import compare, contender_row, write_result
from ..roofline import floor_of_shapes
from ..tables import targets_table
from ..truth import Truth, Verdict, judge, truth_of_grams
from . import tables
from .cases import GPU_CASES
from .ceilings import GPU_BYTES, GPU_SIDE, gpu_description, measure_ceilings
from .clock import KERNELS_KEPT, Clock, launches
from .contenders import GPU_CONTENDERS, GpuContender
from .targets import targets

SCHEMA = 1
"""Version of the JSON written; it goes up when a reader would have to change."""
GRAPH = " [graph]"
BUDGET_S = 2.0
"""Most seconds of timed rounds of a contender in a case; --budget asks for less."""
HOST_CALLS = 20
Calls = dict[str, Callable[[], Result]]


def run(
    config: BenchConfig,
    *,
    device: str = "cuda",
    cases: Sequence[Case] | None = None,
    contenders: Sequence[GpuContender] = GPU_CONTENDERS,
    ceiling_bytes: int = GPU_BYTES,
    ceiling_side: int = GPU_SIDE,
    out: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures, checks, prints through `out`, writes `config.json`, returns the result.

    Late contenders (decompositions of large matrices) are called once each after all cases; past
    `config.time_limit` seconds nothing new is begun and the result says what was not reached.
    """
    started = time.monotonic()
    clock = Clock(torch.device(device))
    chosen = select_cases(config.cases, quick=config.quick, among=GPU_CASES) if cases is None else cases
    result = _head(config, clock)
    out(tables.headline(result))
    result["ceilings"] = measure_ceilings(clock, size=ceiling_bytes, side=ceiling_side)
    rates = _rates(result)
    result["rates"] = asdict(rates) if rates else None
    out(tables.ceilings(result["ceilings"]))

    def overdue() -> bool:
        return config.time_limit is not None and time.monotonic() - started > config.time_limit

    late: list[tuple[dict[str, Any], Case, GpuContender]] = []
    record: dict[str, Any]
    for number, case in enumerate(chosen, 1):
        taking_part = [c for c in contenders if c.serves(case)]
        if overdue():
            record = {"name": case.name, "about": case.about, "error": "not reached in time"}
            result["cases"].append(record)
            out("\n" + tables.text_table(record))
            continue
        progress = Progress(f"[{number}/{len(chosen)}] {case.name}")
        try:
            record = measure_case(case, config, taking_part, clock, rates, progress)
        except RuntimeError as error:  # out of memory, or a device that an earlier fault has stopped
            record = {"name": case.name, "about": case.about, "error": str(error).splitlines()[0]}
        progress.done()
        _release(clock)
        result["cases"].append(record)
        if "error" not in record and not config.quick:
            late += [(record, case, c) for c in taking_part if c.late(case)]
        result["targets"] = targets(result)
        write_result(config.json, result)
        out("\n" + tables.text_table(record))
    # Cheap ones first: matrix_rank of every case, then svdvals, in the order of the contenders and of size.
    for record, case, contender in sorted(
        late, key=lambda item: (contenders.index(item[2]), sum(_svd_work(s) for s in item[1].shapes))
    ):
        row = (
            {"name": contender.name, "ours": contender.ours, "error": "not reached in time"}
            if overdue()
            else measure_late(case, config, contender, clock)
        )
        record["contenders"].append(row)
        compare(record)
        result["targets"] = targets(result)
        write_result(config.json, result)
        out(tables.late_line(case.name, row))
    result["complete"] = True
    result["seconds"] = round(time.monotonic() - started, 1)
    result["targets"] = targets(result)
    write_result(config.json, result)
    out("\n" + targets_table(result["targets"]))
    if config.json is not None:
        out(f"\nWritten: {config.json}")
    return result


def measure_case(
    case: Case,
    config: BenchConfig,
    contenders: Sequence[GpuContender],
    clock: Clock,
    rates: Rates | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """One case: input, truth, timed rounds of calls and of graph replays, host times, kernels, floor."""
    progress("input")
    inputs = case.make(config.seed, clock.device)
    now = [c for c in contenders if not c.late(case)]
    expected: dict[bool, Truth] = {}
    for centred in sorted({c.centred for c in now}):
        progress("float64 truth")
        expected[centred] = truth_of_grams(inputs, _rtol(config), centred=centred)
    calls, rows = _prepare(case, config, now, inputs, clock, progress)
    verdicts: dict[str, Verdict] = {}
    centred_names = {c.name for c in now if c.centred}

    def check(name: str, answer: object) -> None:
        counts: Result = answer  # type: ignore[assignment]
        verdicts[name] = judge(_on_host(counts), expected[name in centred_names])

    samples = measure.interleave(
        dict(calls),
        rounds=config.most_rounds,
        budget_s=min(config.budget, BUDGET_S),
        flush=clock.flush,
        on_result=check,
        progress=progress,
        seed=config.seed,
        stopwatch=clock.seconds,
        settle_s=0.0,
    )
    floor = floor_of_shapes(case.shapes, case.dtype, rates, _l2(clock)) if rates else None
    record: dict[str, Any] = {
        "name": case.name,
        "about": case.about,
        "shapes": [list(shape) for shape in case.shapes],
        "matrices": case.matrices,
        "dtype": str(case.dtype).removeprefix("torch."),
        "rtol": _rtol(config),
        "floor_ms": {k: round(v * 1e3, 6) for k, v in asdict(floor).items()} if floor else None,
        "contenders": [],
    }
    if floor:
        record["floor_ms"] |= {"total": round(floor.total * 1e3, 6)}
    for c in now:
        row = contender_row(c, samples[c.name], verdicts.get(c.name)) if c.name in samples else rows[c.name]
        if c.ours:
            progress(f"host time, kernels: {c.name}")
            row |= _ours(c.name, calls, samples, verdicts, clock, rows)
        best = row.get("graph", row)
        if floor and "median_ms" in best:
            row["fraction_of_floor"] = round(floor.total * 1e3 / best["median_ms"], 4)
        record["contenders"].append(row)
    compare(record)
    return record


def _prepare(
    case: Case,
    config: BenchConfig,
    contenders: Sequence[GpuContender],
    inputs: list[Tensor],
    clock: Clock,
    progress: Callable[[str], None],
) -> tuple[Calls, dict[str, dict[str, Any]]]:
    """The calls to time, graphs of ours among them, and rows of what could not be prepared."""
    calls: Calls = {}
    failed: dict[str, dict[str, Any]] = {}
    for c in contenders:
        progress(f"prepare: {c.name}")
        try:
            calls[c.name] = c.prepare(case, inputs, _rtol(config))
        except Exception as error:  # what cannot be prepared is a result too
            failed[c.name] = {"name": c.name, "ours": c.ours, "error": _reason(error)}
            continue
        if not c.ours:
            continue
        try:
            replay = clock.captured(calls[c.name])
        except Exception as error:
            failed[c.name + GRAPH] = {"error": _reason(error)}
            continue
        if replay is not None:
            calls[c.name + GRAPH] = replay
    return calls, failed


def _ours(
    name: str,
    calls: Calls,
    samples: dict[str, measure.Samples],
    verdicts: dict[str, Verdict],
    clock: Clock,
    failed: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """What is recorded of our calls only: graph replay, host time to return, kernels."""
    found: dict[str, Any] = {}
    graph = name + GRAPH
    if graph in samples:
        verdict = verdicts.get(graph)
        replayed = samples[graph]
        if replayed.error is not None or verdict is None or not replayed.times_ms:
            found["graph"] = {"error": replayed.error or "not timed"}
        else:
            low, median, high = replayed.quartiles
            found["graph"] = {
                "median_ms": round(median, 5),
                "lower_quartile_ms": round(low, 5),
                "upper_quartile_ms": round(high, 5),
                "wrong": verdict.wrong,
            }
    elif graph in failed:
        found["graph"] = failed[graph]
    if name not in calls or samples[name].error is not None:
        return found
    host = [clock.host_seconds(calls[name]) for _ in range(HOST_CALLS)]
    found["host_us"] = round(statistics.median(host) * 1e6, 2)
    try:
        kernels = clock.kernels(calls[name])
    except RuntimeError as error:
        return {**found, "kernels_error": _reason(error)}
    if kernels:
        found |= {"launches": launches(kernels), "kernels": kernels[:KERNELS_KEPT]}
    return found


def measure_late(case: Case, config: BenchConfig, contender: GpuContender, clock: Clock) -> dict[str, Any]:
    """One call of a contender that takes seconds: its time, and its counts against the truth."""
    samples = measure.Samples()
    verdict: Verdict | None = None
    try:
        inputs = case.make(config.seed, clock.device)
        expected = truth_of_grams(inputs, _rtol(config), centred=contender.centred)
        small = Case("", "", tuple((64, 16) for _ in case.shapes[:2]), dtype=case.dtype)
        contender.prepare(small, small.make(0, clock.device), _rtol(config))()  # loads the library
        call = contender.prepare(case, inputs, _rtol(config))
        answers: list[Result] = []
        samples.times_ms.append(clock.seconds(lambda: answers.append(call())) * 1e3)
        verdict = judge(_on_host(answers[0]), expected)
    except Exception as error:
        samples.error = _reason(error)
    row = contender_row(contender, samples, verdict)
    _release(clock)
    return {**row, "late": True}


def _head(config: BenchConfig, clock: Clock) -> dict[str, Any]:
    described = machine.describe()
    described["machine"] |= {**gpu_description(clock.device), "driver": driver_version()}
    described["versions"] |= {
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "cupy": _version("cupy"),
    }
    # A working tree that was copied without its history: whoever copied it says what it is.
    described["commit"] = described["commit"] or os.environ.get("BSGAP_COMMIT")
    return {
        "schema": SCHEMA,
        "kind": "cuda",
        "complete": False,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **described,
        "settings": {**config.recorded(), "rtol": _rtol(config)},
        "cases": [],
    }


def driver_version() -> str | None:
    """The driver's version, or None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def _version(module: str) -> str | None:
    names = {"cupy": ("cupy", "cupy-cuda13x", "cupy-cuda12x")}.get(module, (module,))
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _rtol(config: BenchConfig) -> float:
    return config.thresholds[0]  # the only one that the configuration allows on a GPU


def _rates(result: dict[str, Any]) -> Rates | None:
    known = device_of_driver(str(result["machine"]["gpu"]))
    try:
        return measured_rates(result["ceilings"], known.datasheet if known else None)
    except ValueError:
        return None


def _l2(clock: Clock) -> int:
    return torch.cuda.get_device_properties(clock.device).L2_cache_size if clock.on_gpu else 0


def _svd_work(shape: tuple[int, ...]) -> float:
    return float(torch.Size(shape).numel()) * min(shape[-2:])


def _on_host(answer: Result) -> Result:
    return (answer[0].cpu(), answer[1].cpu()) if isinstance(answer, tuple) else answer.cpu()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _release(clock: Clock) -> None:
    """Gives the memory of the last case back before the next one takes its own."""
    gc.collect()
    if clock.on_gpu:
        torch.cuda.empty_cache()
