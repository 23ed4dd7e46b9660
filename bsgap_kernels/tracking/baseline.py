"""The first reading of a run: what later ones are compared with, and whether its counts can move at all."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from bsgap_kernels.tracking.records import Question, SiteRecord


def is_saturated(count: float, shape: tuple[int, int]) -> bool:
    """Return true for a count that is the largest possible, or at most 1: a ratio of 1, or the floor."""
    k = min(shape)
    return k > 1 and (count == k or 0 <= count <= 1)


def saturation_sentence(records: Mapping[str, SiteRecord], question: Question) -> str | None:
    """Return what to say of counts that are saturated at half of the sites or more, or None.

    It names the metric to look at instead: the threshold with the fewest such sites if they are under half,
    else one that has no threshold.
    """
    sites = len(records)
    found: dict[float, int] = {}
    for place, rtol in enumerate(question.rtols):
        name = f"near_rank@{rtol:g}"
        counts = [(r.summary[name] if place else r.near_rank, r) for r in records.values()]
        found[rtol] = sum(is_saturated(count, record.shape) for count, record in counts)
    bad = [rtol for rtol in found if 2 * found[rtol] >= sites > 0]
    if not bad:
        return None
    best = min(found, key=lambda rtol: found[rtol])
    free = [
        name for name in ("participation_ratio", "effective_rank", "stable_rank") if name in question.metrics
    ]
    if best not in bad:
        instead = f"near_rank at rtol {best:g} is at {found[best]}"
    elif free:
        instead = f"{free[0]} has no threshold and can"
    else:
        instead = "a larger rtol, or metrics=['participation_ratio'], can"
    each = " and ".join(f"at rtol {rtol:g} at {found[rtol]} of {sites} sites" for rtol in bad)
    what = f"near_rank is saturated (all of min(m, n), or at most 1) {each}"
    return f"{what}: it cannot show a change there; {instead}"


def tell_saturation(question: Question, records: Mapping[str, SiteRecord]) -> None:
    """Print that sentence, if there is one, to standard error."""
    sentence = saturation_sentence(records, question)
    if sentence is not None:
        print(f"RankTracker: {sentence}", file=sys.stderr, flush=True)
