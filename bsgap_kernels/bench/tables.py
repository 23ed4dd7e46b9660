"""Tables from a result file: plain text after a run, markdown for the README."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .contenders import MATRIX_RANK

BUSY = 0.05
"""Other processes above this share of the machine: the figures are marked."""
COLUMNS = (
    ("near_rank", "`near_rank`"),
    ("near_rank_interval", "`near_rank_interval`"),
    ("record of the tracker", "all the tracker logs"),
)


def milliseconds(value: float) -> str:
    """Three digits, as they are read."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def ratio(value: float | None) -> str:
    """How many times as fast; '-' where there is nothing to compare with."""
    if value is None:
        return "-"
    return f"{value:.{2 if value < 0.995 else 1 if value < 9.95 else 0}f}×"


def text_table(case: dict[str, Any]) -> str:
    """One case, one row a contender, with what its counts were worth."""
    rows = [["", "median ms", "quartiles", "rounds", "vs matrix_rank", "vs best peer", "counts"]]
    for c in case["contenders"]:
        name = ("* " if c["ours"] else "  ") + c["name"]
        if "error" in c:
            rows.append([name, "-", "-", "0", "-", "-", f"FAILED ({c['error']})"])
            continue
        rows.append(
            [
                name,
                milliseconds(c["median_ms"]),
                f"{milliseconds(c['lower_quartile_ms'])} - {milliseconds(c['upper_quartile_ms'])}",
                str(c["rounds"]),
                ratio(c["vs_matrix_rank"]),
                ratio(c["vs_best_peer"]),
                verdict(c["check"], case["matrices"]),
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
    head = f"{case['name']} ({case['about']}), rtol {case['rtol']:g}"
    if (case["other_work"] or 0) > BUSY:
        head += f"  [BUSY MACHINE: {case['other_work']:.0%} of it went to other processes]"
    return "\n".join([head, *lines, *phase_lines(case)])


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


def markdown_table(result: dict[str, Any]) -> str:
    """The README's table: a row a case, medians in ms, the quickest peer with right counts, the ratios."""
    heads = ["matrix", *(title for _, title in COLUMNS), "`matrix_rank`", "best peer", "`near_rank` vs both"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * len(COLUMNS) + "--:|---|---|"]
    notes = []
    for case in result["cases"]:
        by_name = {c["name"]: c for c in case["contenders"]}
        best = by_name.get(case["best_peer"] or "")
        cells = [f"{case['name'].replace('x', '×')}, {case['about']}" if case["about"] else case["name"]]
        cells += [_cell(by_name.get(name)) for name, _ in COLUMNS]
        cells.append(_cell(by_name.get(MATRIX_RANK)))
        cells.append(f"{_cell(best)} ({best['name']})" if best else "-")
        ours = by_name.get("near_rank", {})
        cells.append(f"{ratio(ours.get('vs_matrix_rank'))}, {ratio(ours.get('vs_best_peer'))}")
        lines.append("| " + " | ".join(cells) + " |")
        notes += [
            f"{c['name']} counted {c['check']['wrong']} of {case['matrices']} wrong on {case['name']}"
            for c in case["contenders"]
            if "check" in c and c["check"]["wrong"]
        ]
    busy = [case["other_work"] for case in result["cases"] if (case["other_work"] or 0) > BUSY]
    foot = _foot(result)
    if notes:
        foot.append("**Wrong counts (†):** " + "; ".join(notes) + ".")
    if busy:
        foot.append(f"**Taken on a busy machine:** other processes had up to {max(busy):.0%} of it.")
    return "\n".join(lines) + "\n\n" + "\n\n".join(foot)


def _cell(contender: dict[str, Any] | None) -> str:
    if contender is None:
        return "-"
    if "error" in contender:
        return "failed"
    return milliseconds(contender["median_ms"]) + (" †" if contender["check"]["wrong"] else "")


def _foot(result: dict[str, Any]) -> list[str]:
    machine, versions, threads = result["machine"], result["versions"], result["threads"]
    rtols: Sequence[str] = sorted({f"{case['rtol']:g}" for case in result["cases"]})
    commit = (result["commit"] or "none")[:12] + (" with changes" if result["modified"] else "")
    warm = [case["name"].replace("x", "×") for case in result["cases"] if case["cache"] == "warm"]
    warm_note = f" ({', '.join(warm)}: warm)" if warm else ""
    return [
        f"Medians in ms of interleaved, cache-cold calls{warm_note}; "
        f"float32, rtol {', '.join(rtols)}; counts checked against float64 SVD in the same run. "
        f"{machine['cpu']}, {threads['torch']} thread(s), torch {versions['torch']} "
        f"({versions['torch_blas']}), NumPy {versions['numpy']}, commit {commit}, "
        f"{result['date'][:10]}. Best peer: the quickest of torch's "
        "or NumPy's Gram matrix + eigvalsh, svdvals and torch.cov + eigvalsh whose counts are right. "
        "`make bench` measures it again; see [benchmarks/NOTES.md](benchmarks/NOTES.md)."
    ]
