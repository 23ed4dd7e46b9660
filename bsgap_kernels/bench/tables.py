"""Tables from a result file: plain text after a run, markdown for the README."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .contenders import INTERVAL, MATRIX_RANK, NEAR_RANK, TRACKER
from .machine import BUSY, processor
from .result import quickest, right_by_construction

COLUMNS = ((NEAR_RANK, "`near_rank`"), (INTERVAL, "`near_rank_interval`"), (TRACKER, "`RankTracker`, a step"))
SPREAD = ("rounds", "lower_quartile_ms", "upper_quartile_ms")
"""Fields of a measured row that a table leaves out."""


def milliseconds(value: float) -> str:
    """Three digits, as they are read."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def ratio(value: float | None) -> str:
    """How many times as fast; '-' where there is nothing to compare with."""
    if value is None:
        return "-"
    return f"{value:.{2 if value < 0.995 else 1 if value < 9.95 else 0}f}×"


def ceilings(found: dict[str, Any]) -> str:
    """What the processor reached."""

    def rates(suffix: str) -> str:
        float32, float64, read = (
            f"{found[name + suffix] / 1e9:.0f}" for name in ("fp32_flops", "fp64_flops", "read_bytes_per_s")
        )
        return f"float32 {float32} and float64 {float64} GFLOP/s, read {read} GB/s"

    gemm = " and ".join(f"{name} {rate / 1e9:.0f}" for name, rate in found["gemm_flops"].items())
    return (
        f"Measured on {found['threads']} threads: {rates('')}; on one: {rates('_per_core')}{_busy(found)}\n"
        f"float32 products of the peers: {gemm} GFLOP/s"
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, the first and the last column to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i in (0, len(row) - 1) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def text_table(case: dict[str, Any]) -> str:
    """One case, one row a contender, with what its counts were worth."""
    heads = ["", "median ms", "quartiles", "rounds", "floor ms", "of floor", "vs matrix_rank"]
    rows = [[*heads, "vs best peer", "counts"]]
    for c in case["contenders"]:
        name = ("* " if c["ours"] else "  ") + c["name"]
        if "error" in c:
            rows.append([name, "-", "-", "0", *["-"] * 4, f"FAILED ({c['error']})"])
            continue
        floor = case["floors_ms"].get(c["name"])
        rows.append(
            [
                name,
                milliseconds(c["median_ms"]),
                f"{milliseconds(c['lower_quartile_ms'])} - {milliseconds(c['upper_quartile_ms'])}",
                str(c["rounds"]),
                milliseconds(floor["total"]) if floor else "-",
                f"{c['fraction_of_floor']:.0%}" if floor else "-",
                ratio(c["vs_matrix_rank"]),
                ratio(c["vs_best_peer"]),
                verdict(c["check"], case["matrices"])
                + ("" if right_by_construction(c, case["rtol"]) else ", not by construction"),
            ]
        )
    head = f"{case['name']} ({case['about']}), rtol {case['rtol']:g}{_busy(case)}"
    return "\n".join([head, *aligned(rows), *phase_lines(case)])


def _busy(measured: dict[str, Any]) -> str:
    share = measured["other_work"] or 0
    return f"  [BUSY MACHINE: {share:.0%} of it went to other processes]" if share > BUSY else ""


def measurement_table(name: str, found: dict[str, Any]) -> str:
    """What was measured beside the cases, a row a row."""
    head = f"{name}{_busy(found)}"
    if "error" in found:
        return f"{head}: FAILED ({found['error']})"
    shown = [{k: v for k, v in row.items() if k not in SPREAD} for row in found["rows"]]
    rows = [list(shown[0]), *([_field(k, v) for k, v in row.items()] for row in shown)] if shown else [[head]]
    return "\n".join([head, *aligned(rows)])


def _field(name: str, value: object) -> str:
    if name.endswith("_ms") and isinstance(value, float):
        return milliseconds(value)
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value / 2**20:.1f} MiB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def targets_table(rows: Sequence[dict[str, Any]]) -> str:
    """The targets and what was reached, and how many were not measured."""
    lines = []
    for row in rows:
        if row["met"] is not None:
            bound, unit = row["unit"].split(", ", 1)
            word = "met" if row["met"] else "MISSED"
            reached = f"{row['value']:.4g} ({bound} {row['limit']:.4g} {unit})"
            lines.append(f"{word:>6}  {row['target']}: {reached}")
    missing = len(rows) - len(lines)
    return "\n".join([*lines, *([f"Targets that were not measured: {missing}"] if missing else [])])


def phase_lines(case: dict[str, Any]) -> list[str]:
    """Where the time of our ops goes, for the cases where that was measured."""
    return [
        f"    {p['op']}: {p['phase']} {milliseconds(max(p['median_ms'], 0))} ms ({p['share']:.0%})"
        for p in case.get("profile", ())
    ]


def verdict(check: dict[str, Any], matrices: int) -> str:
    """What the counts were worth, in a few words."""
    of = f" of {matrices}" if matrices > 1 else ""
    if check["wrong"]:
        return f"WRONG: {check['wrong']}{of}"
    if check["proven"] is not None:
        if check["proven"] == matrices:
            return "proven"
        return f"hold, {check['proven']} of {matrices} proven, widest {check['widest']}"
    return f"equal but {check['near_tau']}{of} near tau" if check["near_tau"] else "equal"


def markdown_tables(result: dict[str, Any]) -> str:
    """Tables for a page: one of the first threshold with every column, a compact one of each further."""
    cases = result["cases"]
    first, *further = dict.fromkeys(case["rtol"] for case in cases)
    parts = [f"**{processor(result)}**, {result['threads']['torch']} thread(s), at rtol {first:g}:"]
    parts.append(_table([case for case in cases if case["rtol"] == first]))
    for rtol in further:
        parts.append(f"At rtol {rtol:g}:")
        parts.append(_compact_table([case for case in cases if case["rtol"] == rtol]))
    return "\n\n".join([*parts, *_foot(result)])


def _table(cases: Sequence[dict[str, Any]]) -> str:
    """A row a case: medians in ms, the best peer, the ratios."""
    lines = _head(
        "matrix", *(title for _, title in COLUMNS), "`matrix_rank`", "best peer", "`near_rank` vs both"
    )
    for case in cases:
        shape, by_name = case["name"].replace("x", "×"), _by_name(case)
        ours = by_name.get(NEAR_RANK, {})
        lines.append(
            _row(
                f"{shape}, {case['about']}" if case["about"] else shape,
                *(_cell(by_name.get(name)) for name, _ in COLUMNS),
                _cell(by_name.get(MATRIX_RANK)),
                _named(by_name.get(case["best_peer"] or "")),
                f"{ratio(ours.get('vs_matrix_rank'))}, {ratio(ours.get('vs_best_peer'))}",
            )
        )
    return "\n".join(lines)


def _compact_table(cases: Sequence[dict[str, Any]]) -> str:
    """Counts and bounds beside the best peer, and beside the quickest that is not right by construction."""
    titles = (title for _, title in COLUMNS[:2])
    lines = _head("matrix", *titles, "best peer", "`near_rank` vs it", "quickest float32 Gram ‡")
    for case in cases:
        by_name = _by_name(case)
        unsafe = quickest(
            row
            for row in case["contenders"]
            if "error" not in row and not right_by_construction(row, case["rtol"])
        )
        lines.append(
            _row(
                case["name"].replace("x", "×"),
                *(_cell(by_name.get(name)) for name, _ in COLUMNS[:2]),
                _named(by_name.get(case["best_peer"] or "")),
                ratio(by_name.get(NEAR_RANK, {}).get("vs_best_peer")),
                _named(unsafe),
            )
        )
    return "\n".join(lines)


def _by_name(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {c["name"]: c for c in case["contenders"]}


def _head(*titles: str) -> list[str]:
    return [_row(*titles), "|" + "|".join(["---", *["--:"] * (len(titles) - 3), "---", "---"]) + "|"]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _named(contender: dict[str, Any] | None) -> str:
    return f"{_cell(contender)} ({contender['name']})" if contender else "-"


def _cell(contender: dict[str, Any] | None) -> str:
    if contender is None:
        return "-"
    if "error" in contender:
        return "failed"
    return milliseconds(contender["median_ms"]) + (" †" if contender["check"]["wrong"] else "")


def _foot(result: dict[str, Any]) -> list[str]:
    """How it was measured, what the peers were, which counts were wrong."""
    versions, cases = result["versions"], result["cases"]
    commit = (result["commit"] or "none")[:12] + (" with changes" if result["modified"] else "")
    warm = dict.fromkeys(case["name"].replace("x", "×") for case in cases if case["cache"] == "warm")
    warm_note = f" ({', '.join(warm)}: warm)" if warm else ""
    names = dict.fromkeys(c["name"] for case in cases for c in case["contenders"] if not c["ours"])
    software = f"torch {versions['torch']} ({versions['torch_blas']}), NumPy {versions['numpy']}"
    foot = [
        f"Medians in ms of interleaved, cache-cold calls{warm_note}, float32; counts checked against float64 "
        f"SVD in the same run. {software}{_peers(result.get('peers'))}, commit {commit}, "
        f"{result['date'][:10]}. Best peer: the quickest, of {', '.join(names)}, whose counts are right here "
        "and by construction. "
        "How: `benchmarks/NOTES.md`."
    ]
    if any(not right_by_construction(c, case["rtol"]) for case in cases for c in case["contenders"]):
        foot.append(
            "‡ Not right by construction: at this threshold rounding to float32 can move a singular value by "
            "more than 1 % of τ. Such a count is right on some matrices and wrong on others."
        )
    wrong = [
        f"{c['name']} counted {c['check']['wrong']} of {case['matrices']} wrong on {case['name']} "
        f"at rtol {case['rtol']:g}"
        for case in cases
        for c in case["contenders"]
        if "check" in c and c["check"]["wrong"]
    ]
    if wrong:
        foot.append("**Wrong counts (†):** " + "; ".join(wrong) + ".")
    busy = [case["other_work"] for case in cases if (case["other_work"] or 0) > BUSY]
    if busy:
        foot.append(f"**Taken on a busy machine:** other processes had up to {max(busy):.0%} of it.")
    return foot


def _peers(peers: dict[str, Any] | None) -> str:
    """Which kernels torch and OpenBLAS took, and what held them to it."""
    if peers is None:
        return ""
    held = " ".join(f"{name}={value}" for name, value in peers["environment"].items() if name != "BSGAP_ISA")
    openblas = f", OpenBLAS {peers['openblas']}" if peers["openblas"] else ""
    return f" (torch {peers['torch']}{openblas}{f'; `{held}`' if held else ''})"
