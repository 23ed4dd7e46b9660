"""What the numbers say, as sentences that a reader can check: differences with their intervals, no causes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from bsgap_kernels.lab.report.figures_batch import ratio
from bsgap_kernels.lab.report.figures_curves import pairs
from bsgap_kernels.lab.report.figures_sharpness import kind_text, kinds, phi, train_loss
from bsgap_kernels.lab.report.figures_speed import reached_targets, seconds_to
from bsgap_kernels.lab.report.landscape import Curve
from bsgap_kernels.lab.report.runs import PLAIN_METHOD, Results, Run
from bsgap_kernels.lab.report.statistics import Estimate, estimate, paired_difference
from bsgap_kernels.lab.report.style import significant

_MINUS = "−"
_UNTOLD = "no difference distinguishable at these seeds"


def findings(results: Results) -> list[str]:
    """Every sentence: method by method, then what is said of no method alone."""
    return [sentence for sentences in findings_by_method(results).values() for sentence in sentences]


def findings_by_method(results: Results) -> dict[str, list[str]]:
    """The sentences of each method, smallest against largest batch size; under "" all others."""
    sentences: dict[str, list[str]] = {}
    for method in results.methods:
        # The method stands before the sentence, so a batch size needs no more than its number.
        groups = [(size, runs[0].batch_label, runs) for size, _, runs in results.sized(method)]
        found = [
            *_fitted(groups),
            *_near_rank(results, groups),
            *_accuracy(_sound(groups)),
            *_sharpness(results, groups),
            *_time_to_accuracy(results, groups),
        ]
        prefix = f"{method}: " if len(results.methods) > 1 else ""
        sentences[method] = [prefix + sentence for sentence in found]
    return sentences | {"": [*_gradients(results), *_curves(results.curves), *_cost(results)]}


Groups = list[tuple[int, str, list[Run]]]
Measure = Callable[[Run], float | None]


def _sound(groups: Groups) -> Groups:
    """The groups without a run that diverged: an accuracy is compared with no other."""
    return [group for group in groups if not _diverged(group[2])]


def _diverged(runs: list[Run]) -> bool:
    return any(run.diverged for run in runs)


def number(value: float, digits: int, factor: float = 1.0) -> str:
    """A number as text; minus as its own sign."""
    return f"{factor * value:.{digits}f}".replace("-", _MINUS)


def mean_of(runs: list[Run], measure: Measure) -> float | None:
    """Mean over the runs that have a value."""
    found = estimate([value for run in runs if (value := measure(run)) is not None])
    return None if found is None else found.mean


def difference(first: list[Run], last: list[Run], measure: Measure) -> Estimate | None:
    """Mean over common seeds of last − first."""
    sides = [
        {run.seed: value for run in runs if run.seed is not None and (value := measure(run)) is not None}
        for runs in (first, last)
    ]
    return paired_difference(*sides)


def difference_text(found: Estimate | None, say: Callable[[float], str]) -> str:
    """The difference with its interval over seeds, or why there is none."""
    if found is None:
        return "no seed in common"
    if found.half is None:
        return "one seed in common: no interval"
    ends = f"{say(found.lower)} to {say(found.upper)}"
    what = f"difference {say(found.mean)}, 95 % interval over {found.count} seeds {ends}"
    return f"{what}: {_UNTOLD}" if found.covers_zero else what


def _fitted(groups: Groups) -> list[str]:
    """Of runs that were to train until fitted: in how many updates, and which did not get there."""
    runs = [run for _, _, found in groups for run in found if run.until_fitted is not None]
    targets = {run.until_fitted for run in runs}
    if len(targets) != 1 or len(runs) < sum(len(found) for _, _, found in groups):
        return []
    target = f"{100 * (runs[0].until_fitted or 0.0):g} % train accuracy"
    short = [run for run in runs if run.unfitted]
    if short:
        names = ", ".join(f"{run.name} ({_end(run)})" for run in short)
        return [
            f"{len(short)} of {len(runs)} runs did not reach {target}, at which they were to end: {names}. "
            "These networks are not equally well trained."
        ]
    updates = [run.steps for run in runs if run.steps is not None]
    if not updates:
        return []
    took = f"{min(updates):,} to {max(updates):,}" if min(updates) < max(updates) else f"{updates[0]:,}"
    return [f"Every run was trained until it reached {target}, which took {took} updates."]


def _end(run: Run) -> str:
    accuracy = "unknown" if run.train_accuracy is None else f"{100 * run.train_accuracy:.1f} %"
    return f"{accuracy}, {run.ended or 'not at its end'}"


def _near_rank(results: Results, groups: Groups) -> list[str]:
    if len(groups) < 2:
        return []
    (_, first, first_runs), (_, last, last_runs) = groups[0], groups[-1]
    changes = []
    for layer in results.sites:
        ends = [mean_of(runs, functools.partial(ratio, layer)) for runs in (first_runs, last_runs)]
        if ends[0] is not None and ends[1] is not None:
            changes.append((ends[1] - ends[0], layer, ends[0], ends[1]))
    if not changes:
        return []
    falls = sum(change < 0 for change, *_ in changes)
    rises = sum(change > 0 for change, *_ in changes)
    _, layer, start, end = max(changes, key=lambda entry: abs(entry[0]))
    found = difference(first_runs, last_runs, functools.partial(ratio, layer))
    several = found is not None and found.half is not None
    kind = f"means over seeds, {difference_text(found, _two_digits)}" if several else "at the end of training"
    parts = [f"{verb} in {count}" for verb, count in (("falls", falls), ("rises", rises)) if count]
    how = " and ".join(parts) or "stays the same in all"
    sentences = [
        f"From batch size {first} to {last}, the near-rank ratio on the probe {how} of {len(changes)} "
        f"layers; the largest change is in {layer}, from {start:.2f} to {end:.2f} ({kind})."
    ]
    told = [
        found
        for _, layer, *_ in changes
        if (found := difference(first_runs, last_runs, functools.partial(ratio, layer))) is not None
        and found.half is not None
    ]
    if told:
        clear = sum(not found.covers_zero for found in told)
        sentences.append(
            f"Layer by layer, the 95 % interval of that difference over seeds excludes 0 in {clear} of "
            f"{len(told)} layers."
        )
    return sentences


def _two_digits(value: float) -> str:
    return number(value, 2)


def _points(value: float) -> str:
    return number(value, 1, 100)


def _accuracy(groups: Groups) -> list[str]:
    ends: list[tuple[str, float, float, float | None, list[Run]]] = []
    for _, label, runs in groups:
        train, test = mean_of(runs, lambda run: run.train_accuracy), mean_of(runs, _test_accuracy)
        updates = mean_of(runs, lambda run: None if run.steps is None else float(run.steps))
        if train is not None and test is not None:
            ends.append((label, train, test, updates, runs))
    if len(ends) < 2:
        return []
    (first, train, test, _, first_runs), (last, last_train, last_test, _, last_runs) = ends[0], ends[-1]
    found = difference(first_runs, last_runs, _test_accuracy)
    gap = difference(first_runs, last_runs, lambda run: run.gap)
    several = found is not None and found.half is not None
    sentences = [
        f"Between batch sizes {first} and {last}, test accuracy goes from {100 * test:.1f} % to "
        f"{100 * last_test:.1f} %{f' ({difference_text(found, _points)})' if several else ''}, "
        f"the generalisation gap from {_points(train - test)} to "
        f"{_points(last_train - last_test)} percentage points"
        f"{f' ({difference_text(gap, _points)})' if several else ''}."
    ]
    steps = [entry[3] for entry in ends if entry[3]]
    equal_end = all(run.until_fitted is not None for *_, runs in ends for run in runs)
    if not equal_end and steps and max(steps) > 1.5 * min(steps):
        sentences.append(
            f"The runs had between {min(steps):,.0f} and {max(steps):,.0f} updates, so batch size and "
            "number of updates change together here: compare with a sweep at equal steps before blaming the "
            "batch size."
        )
    if max(entry[1] for entry in ends) - min(entry[1] for entry in ends) > 0.05:
        sentences.append(
            "Train accuracy differs by more than 5 points between batch sizes: the networks are not "
            "equally well trained."
        )
    return sentences


def _test_accuracy(run: Run) -> float | None:
    return run.test_accuracy


def _sharpness(results: Results, groups: Groups) -> list[str]:
    """φ of the smallest and the largest batch that have one, per space at its largest ε."""
    sentences = []
    largest: dict[str, tuple[str, float]] = {}
    for space, epsilon in kinds(results):
        largest.setdefault(space, (space, epsilon))
    for kind in largest.values():
        measure = functools.partial(phi, kind)
        known = [group for group in groups if mean_of(group[2], measure) is not None]
        if len(known) < 2:
            continue
        (_, first, first_runs), (_, last, last_runs) = known[0], known[-1]
        ends = [mean_of(runs, measure) or 0.0 for runs in (first_runs, last_runs)]
        losses = [mean_of(runs, functools.partial(train_loss, kind)) for runs in (first_runs, last_runs)]
        at = [f", f(x) = {significant(loss)}" if loss is not None else "" for loss in losses]
        said = difference_text(difference(first_runs, last_runs, measure), _signed)
        sentences.append(
            f"Sharpness φ ({kind_text(*kind)}) goes from {significant(ends[0])} (batch {first}{at[0]}) to "
            f"{significant(ends[1])} (batch {last}{at[1]}); {said}."
        )
    return sentences


def _signed(value: float) -> str:
    text = significant(abs(value))
    return _MINUS + text if value < 0 else text


def _time_to_accuracy(results: Results, groups: Groups) -> list[str]:
    """The highest target that both ends reached; failing that, the highest that any run did."""
    sound = _sound(groups)
    if len(sound) < 2:
        return []
    (_, first, first_runs), (_, last, last_runs) = sound[0], sound[-1]
    for target in reversed(reached_targets(results)):
        measure = functools.partial(seconds_to, target)
        ends = mean_of(first_runs, measure), mean_of(last_runs, measure)
        if ends[0] is None or ends[1] is None:
            continue
        runs = [*first_runs, *last_runs]
        never = [run.name for run in runs if target in run.time_to_accuracy and measure(run) is None]
        missing = f" Not reached by {', '.join(never)}." if never else ""
        said = difference_text(difference(first_runs, last_runs, measure), _signed)
        return [
            f"{100 * target:g} % test accuracy took {significant(ends[0])} s of training at batch {first} "
            f"and {significant(ends[1])} s at batch {last} ({said}).{missing}"
        ]
    targets = [target for target in reached_targets(results) if _reached_by(groups, target)]
    if not targets:
        return []
    reached = ", ".join(_reached_by(groups, targets[-1]))
    return [f"{100 * targets[-1]:g} % test accuracy was reached at batch {reached} only."]


def _reached_by(groups: Groups, target: float) -> list[str]:
    return [label for _, label, runs in groups if any(seconds_to(target, run) is not None for run in runs)]


def _curves(curves: list[Curve]) -> list[str]:
    """Where the train loss is largest between two runs on the straight line, against its ends."""
    sentences = []
    for (first, last), found in pairs(curves).items():
        for curve in found:
            # α is rounded, so that a written 0.9999999999 is the end that it means.
            loss = {
                round(alpha, 6): value
                for alpha, value in zip(curve.alpha, curve.values["train_loss"], strict=True)
            }
            between = {
                alpha: value for alpha, value in loss.items() if 0 <= alpha <= 1 and math.isfinite(value)
            }
            ends = between.get(0.0), between.get(1.0)
            if curve.kind != "linear" or ends[0] is None or ends[1] is None or len(between) < 3:
                continue
            place = max(between, key=lambda alpha: between[alpha])
            at = "at an end" if place in (0.0, 1.0) else f"at α = {place:.2f}"
            sentences.append(
                f"On the straight line from {first} to {last} the train loss is largest {at} "
                f"({significant(between[place])}; {significant(ends[0])} and {significant(ends[1])} at the "
                "ends)."
            )
    return sentences[:4]


def _gradients(results: Results) -> list[str]:
    """Methods whose gradients were of another number of images than plain SGD's of the same budget."""
    plain = results.sized(PLAIN_METHOD)
    sentences = []
    for method in results.methods:
        if method == PLAIN_METHOD:
            continue
        told = []
        for size, _, runs in results.sized(method):
            budgets = {run.facts.get("budget") for run in runs}
            alike = [entry for entry in plain if {run.facts.get("budget") for run in entry[2]} == budgets]
            if alike:
                # Plain SGD at the same batch size, failing that at the closest.
                closest = min(alike, key=lambda entry: abs(math.log(entry[0] / size)))
                told += _gradients_beside(method, runs, closest[2])
        sentences += [told[0], told[-1]] if len(told) > 2 else told
    return sentences


def _gradients_beside(method: str, runs: list[Run], plain: list[Run]) -> list[str]:
    """One sentence, or none where plain SGD cost the same, in all and at the same batch size an update."""
    images = [mean_of(group, _gradient_images) for group in (runs, plain)]
    updates = [mean_of(group, _updates) for group in (runs, plain)]
    if not images[0] or not images[1]:
        return []
    each = [count / made if made else 0.0 for count, made in zip(images, updates, strict=True) if count]
    same_size = runs[0].batch_size == plain[0].batch_size
    per_update = same_size and not math.isclose(each[0], each[1], rel_tol=1e-6)
    if math.isclose(images[0], images[1], rel_tol=1e-6) and not per_update:
        return []
    often = f" ({each[0]:,.0f} an update beside {each[1]:,.0f})" if per_update and all(each) else ""
    accuracies = [mean_of(group, _test_accuracy) for group in (runs, plain)]
    reached = ""
    if accuracies[0] is not None and accuracies[1] is not None and not _diverged([*runs, *plain]):
        found = difference(plain, runs, _test_accuracy)
        said = f" ({difference_text(found, _points)})" if found is not None and found.half is not None else ""
        reached = f"; test accuracy {100 * accuracies[0]:.1f} % beside {100 * accuracies[1]:.1f} %{said}"
    return [
        f"{method} at batch {runs[0].batch_label}: gradients of {images[0]:,.0f} images, "
        f"{significant(images[0] / images[1])} times plain SGD's {images[1]:,.0f} at batch "
        f"{plain[0].batch_label}{often}{reached}."
    ]


def _gradient_images(run: Run) -> float | None:
    return None if run.gradient_images is None else float(run.gradient_images)


def _updates(run: Run) -> float | None:
    return None if run.steps is None else float(run.steps)


def _cost(results: Results) -> list[str]:
    percents = [run.metric_percent for run in results.runs if run.metric_percent is not None]
    times = [run.metric_ms for run in results.runs if run.metric_ms is not None]
    if not percents or not times:
        return []
    layers = len(results.sites)
    plural = "s" * (layers != 1)
    what = f"{_what_was_read(results)} of {layers} layer{plural} on the training batch"
    if len(percents) == 1:
        said = f"{significant(times[0])} ms per step, {significant(percents[0])} % of the step"
    else:
        said = f"{significant(min(times))} to {significant(max(times))} ms per step, "
        said += f"{significant(min(percents))} % to {significant(max(percents))} % of the step"
    slowest = max(results.runs, key=lambda run: run.metric_ms or 0.0)
    floor = ""
    if slowest.floor_ms and slowest.metric_ms:
        floor = (
            f"; at batch {slowest.batch_label} the Gram matrices alone need "
            f"{significant(slowest.floor_ms)} of the {significant(slowest.metric_ms)} ms at the float32 peak "
            "of the cores"
        )
    return [f"{what} took {said}{floor}."]


def _what_was_read(results: Results) -> str:
    """What was asked of training batches, where the options of all runs say so."""
    metrics = {run.options.get("metrics") for run in results.runs}
    certify = {run.options.get("certify") for run in results.runs}
    if metrics == {"near_rank"} and certify == {"False"}:
        return "Near-rank"
    if metrics in ({"all"}, {None}) and certify in ({"True"}, {None}):  # runs that do not say read everything
        return "Near-rank, interval and spectral summary"
    return "The metrics"
