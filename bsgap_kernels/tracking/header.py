"""Facts that the numbers of a site depend on: what its header row says beside its shape."""

from __future__ import annotations

import torch
from torch import nn

from bsgap_kernels.tracking.reading import SiteHead
from bsgap_kernels.tracking.records import Question
from bsgap_kernels.tracking.sums import Sums


def facts_of(head: SiteHead, sums: Sums, question: Question) -> dict[str, object]:
    """Return unfolding, thresholds, centring, dtype and the side of the Gram matrix that is counted."""
    return {
        "unfold": head.unfold,
        "rtol": list(question.rtols),
        "atol": question.atol,
        "center": question.center,
        "certify": question.certify,
        "side": sums.side,
        "dtype": head.dtype,
    }


def model_facts(model: nn.Module) -> dict[str, object]:
    """Return the class of the model and the versions in use."""
    from bsgap_kernels import __version__

    return {"model": type(model).__name__, "bsgap_kernels": __version__, "torch": torch.__version__}
