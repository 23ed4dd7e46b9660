"""Copies and pickles of a model have no hooks, and a tracker that the model holds is closed in them."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bsgap_kernels import RankTracker


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.Tanh())


def rows() -> Tensor:
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def through_save(model: Any) -> Any:
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


COPIES: list[Callable[[Any], Any]] = [
    copy.deepcopy,
    lambda model: pickle.loads(pickle.dumps(model)),
    through_save,
    lambda model: AveragedModel(model).module,
]


def test_copies_are_not_tracked_and_the_original_still_is() -> None:
    model = mlp()
    keys = list(model.state_dict())
    with RankTracker(model, metrics="all", verbose=False) as tracker:
        assert list(model.state_dict()) == keys
        for make in COPIES:
            twin = make(model)
            assert torch.equal(twin(rows()), torch.compile(twin, backend="eager")(rows()))
        assert tracker.collect() == {}
        model(rows())
        assert len(tracker.collect()) == 2
        assert b"bsgap" not in pickle.dumps(model)


@pytest.mark.parametrize("make", COPIES, ids=["deepcopy", "pickle", "torch.save", "AveragedModel"])
def test_a_tracker_that_the_model_holds_is_closed_in_copies(
    make: Callable[[Any], Any], tmp_path: Path
) -> None:
    model: Any = mlp()
    path = tmp_path / "run.jsonl"
    model.tracker = RankTracker(model, sinks=path, verbose=False)
    model(rows())
    model.tracker.step()
    twin = make(model)
    twin(rows())
    twin.tracker.step()
    assert twin.tracker.sites() == []
    assert twin.tracker.collect() == {}
    twin.tracker.flush()
    twin.tracker.close()
    del twin  # takes no hook off the original
    model(rows())
    model.tracker.step()
    model.tracker.close()
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["step"] for row in written} == {0, 1}


def test_a_shallow_copy_of_a_tracker_takes_no_hook_off() -> None:
    model = mlp()
    with RankTracker(model, verbose=False) as tracker:
        del (twin := [copy.copy(tracker)])[0]
        assert twin == []
        model(rows())
        assert len(tracker.collect()) == 2
