"""The words about a report's runs: head and notices, from the results alone, HTML-escaped."""

from __future__ import annotations

from html import escape

from bsgap_kernels.lab.report.runs import PLAIN_METHOD, Results

# Said wherever the data shows that was drawn, not taken.
SYNTHETIC = "synthetic images"


def title(results: Results) -> tuple[str, str]:
    """The page's title and the line below it, which says where images are synthetic."""
    runs = results.runs
    models = joined(results, "model") or "a network"
    data = data_text(results) or "unnamed data"
    count = len(results.batch_labels)
    methods = len(results.methods)
    parts = [f"{count} batch size{'s' * (count != 1)}"]
    parts += [f"{methods} methods"] if methods > 1 else []
    parts.append(f"{len(runs)} run{'s' * (len(runs) != 1)}")
    head = "Near-rank of activations" + (" across batch sizes" if count > 1 else "")
    return head, f"{models} on {data}: {', '.join(parts)}."


def joined(results: Results, key: str) -> str | None:
    """A fact of the runs; one that differs between them lists its values."""
    values = dict.fromkeys(run.facts[key] for run in results.runs if key in run.facts)
    return ", ".join(values) or None


def data_text(results: Results) -> str | None:
    """The names of the data, with what is synthetic named so."""
    names = {run.facts["data"]: run.synthetic for run in results.runs if "data" in run.facts}
    synthetic = {run.facts["data"] for run in results.runs if run.synthetic and "data" in run.facts}
    words = [f"{name} ({SYNTHETIC})" if name in synthetic else name for name in names]
    if not words and any(run.synthetic for run in results.runs):
        words = [SYNTHETIC]
    return ", ".join(words) or None


def facts(results: Results) -> list[tuple[str, str]]:
    """What the experiment is: (name, value) pairs; a fact that differs between runs lists its values."""
    runs = results.runs
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    shapes = dict.fromkeys(
        site.probe_shape for run in runs for site in run.sites.values() if site.probe_shape
    )
    rows = sorted({shape[0] for shape in shapes})
    rates = joined(results, "lr")
    if rates and len(results.methods) == 1 and joined(results, "momentum"):
        rates += f" (momentum {joined(results, 'momentum')})"
    tolerance = joined(results, "rtol")
    if tolerance and joined(results, "atol"):
        tolerance += f" (atol {joined(results, 'atol')})"
    augment = joined(results, "augment")
    pairs = [
        ("Model", joined(results, "model")),
        ("Data", data_text(results)),
        ("Augmentation", None if augment == "none" else augment),
        ("Method", None if results.methods == [PLAIN_METHOD] else ", ".join(results.methods)),
        ("Batch sizes", ", ".join(results.batch_labels)),
        ("Seeds", ", ".join(map(str, seeds)) or None),
        ("Budget of a run", joined(results, "budget")),
        ("Learning rate", rates),
        ("Tolerance rtol", tolerance),
        ("Unfolding", joined(results, "unfold")),
        (_rows_name(joined(results, "unfold")), ", ".join(map(str, rows)) or None),
        ("Ran on", _machine_text(results)),
        ("Versions", joined(results, "versions")),
    ]
    return [(name, value) for name, value in pairs if value]


def _rows_name(unfold: str | None) -> str:
    """What the rows of the matrices are: samples, but where pixels or tokens are rows too."""
    return "Probe batch, samples" if unfold in ("flatten", "pool") else "Rows of the probe, by layer"


def _machine_text(results: Results) -> str | None:
    """Device, threads and precision, where the runs say how they were computed."""
    precision, threads = joined(results, "precision"), joined(results, "threads")
    if precision is None and threads is None:
        return None
    plural = "" if threads == "1" else "s"
    words = [joined(results, "device"), f"{threads} thread{plural}" if threads else None, precision]
    return ", ".join(word for word in words if word)


def facts_html(pairs: list[tuple[str, str]]) -> str:
    """The head's list of (name, value) facts."""
    entries = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{"".join(entries)}</dl>'


def notices_html(results: Results) -> str:
    """The box that says what is missing or damaged; empty where nothing is."""
    lines = [escape(problem) for problem in results.problems]
    unfinished = [run for run in results.runs if run.status != "finished"]
    for run in results.runs:
        lines += [f"<b>{escape(run.name)}</b>: {escape(problem)}" for problem in run.problems]
        if run.status != "finished" and not run.problems:
            lines.append(f"<b>{escape(run.name)}</b>: its summary does not say that it finished.")
    if not lines:
        return ""
    intro = "Something is missing or could not be read; the report shows what is there."
    if unfinished:
        intro += f" {len(unfinished)} of {len(results.runs)} runs did not finish (marked * in the table)."
    items = "".join(f"<li>{line}</li>" for line in lines)
    heading = "<h2>Incomplete results</h2>"
    return f'<section class="notice" role="note">{heading}<p>{intro}</p><ul>{items}</ul></section>'
