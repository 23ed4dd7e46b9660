"""A tracker that goes on from another's state tracks the steps that the other would have."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from adapter_oracle import Kept
from torch import nn

from bsgap_kernels.tracking import RankTracker


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("cut", [0, 1, 2, 3, 4])
def test_a_loaded_state_keeps_the_step_that_is_due(every: int, cut: int) -> None:
    model, sink = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), Kept()
    state = None
    for steps in (cut, 8 - cut):
        with RankTracker(model, every=every, sinks=[sink], verbose=False) as tracker:
            if state is not None:
                tracker.load_state_dict(state)
            for _ in range(steps):
                model(torch.randn(5, 4))
                tracker.step()
            tracker.flush()
            state = tracker.state_dict()
    assert list(sink.counts()) == list(range(0, 8, every))
    assert {tuple(counts) for counts in sink.counts().values()} == {("1#0",)}


def test_parts_called_one_by_one_are_numbered_from_each_pass() -> None:
    model, sink = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), Kept()
    with RankTracker(model, sinks=[sink], micro_batches=2, verbose=False) as tracker:
        for _ in range(2):
            tracker.begin_pass()
            model[1](model[0](torch.randn(2, 4)))
        tracker.step()
    assert list(sink.counts()[0]) == ["1#0"]


def test_what_is_on_its_way_through_the_ranks_is_flushed_too() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, sink = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), Kept()
        with RankTracker(model, process_group="world", sinks=[sink], verbose=False) as tracker:
            model(torch.randn(5, 4))
            tracker.step()
            tracker.flush()
            assert list(sink.counts()) == [0]
    finally:
        dist.destroy_process_group()
