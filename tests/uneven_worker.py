"""Scenarios for test_uneven.py, in the way of ranks.py: uneven numbers of batches, moving models.

Right numbers are those of `torch.linalg.matrix_rank` of all rows in float64.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import main, scenario
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bsgap_kernels.tracking import RankTracker

RTOL = 0.05
OPTIONS: dict[str, Any] = {"certify": True, "verbose": False, "rtol": RTOL, "process_group": "world"}


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))


def batch(rank: int, step: int) -> Tensor:
    """A rank's rows of a step, of another number and rank in each; the last are few."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    rows, k = 2 + (3 * rank + step) % 5, 1 + (rank + step) % 2
    return torch.randn(rows, k, generator=generator) @ torch.randn(k, 6, generator=generator)


def right(rows: list[Tensor]) -> tuple[tuple[int, ...], int]:
    """Of a model without a tracker, which takes rows of any dtype."""
    with torch.no_grad():
        A = network()[:2].to(rows[0].dtype)(torch.cat(rows)).double()
    return tuple(A.shape), int(torch.linalg.matrix_rank(A, rtol=RTOL))


@scenario(2, 3)
def joined(rank: int, world: int, folder: Path) -> None:
    """Ranks run out one by one, rank 0 too: every step has the rows of those that go on."""
    for passes in (1, 2):
        for first_out in (0, world - 1):
            steps = [3 + 2 * ((r - first_out) % world) for r in range(world)]
            model = network()
            path = folder / f"joined-{world}-{passes}-{first_out}-{rank}.jsonl"
            wrapped = nn.parallel.DistributedDataParallel(model)
            options = {**OPTIONS, "micro_batches": passes, "sinks": str(path)}
            with RankTracker(model, **options) as tracker, Join([wrapped, tracker]):
                for step in range(steps[rank]):
                    for i in range(passes):
                        wrapped(batch(rank, passes * step + i)).sum().backward()
                    if step % 2:
                        tracker.step()
                    else:
                        found = tracker.collect()["1#0"]
                        rows = [
                            batch(r, passes * step + i)
                            for r in range(world)
                            if step < steps[r]
                            for i in range(passes)
                        ]
                        assert (found.shape, found.near_rank) == right(rows), (step, found)
            if rank == 0:
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                counts = {x["step"]: x["value"] for x in lines if x.get("metric") == "batch.near_rank"}
                expected = {}
                for step in range(max(steps)):
                    owners = [r for r in range(world) if step < steps[r]]
                    rows = [batch(r, passes * step + i) for r in owners for i in range(passes)]
                    expected[step] = right(rows)[1]
                assert counts == expected, (counts, expected)


@scenario(2)
def not_joined(rank: int, world: int, folder: Path) -> None:
    """Where step() could wait for ranks that will not come it refuses; ends of all at once are fine."""
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model)
    with RankTracker(model, **OPTIONS) as tracker, wrapped.join():
        wrapped(batch(rank, 0)).sum().backward()
        with pytest.raises(RuntimeError, match=re.escape("`with Join([model, tracker]):`")):
            tracker.step()
    with RankTracker(model, **OPTIONS) as tracker, Join([tracker]):
        model(batch(rank, 0)).sum().backward()
        with pytest.raises(RuntimeError, match=re.escape("the first of Join([...])")):
            tracker.step()
        dist.all_reduce(torch.ones(1))  # in the place of Join's own, which a first member has to tell of
    with RankTracker(model, **OPTIONS) as tracker:
        ended = "of its own accord"
        try:
            with wrapped.join(throw_on_early_termination=True):
                for step in range(2 + rank):
                    wrapped(batch(rank, step)).sum().backward()
                    found = tracker.collect()["1#0"]
                    assert (found.shape, found.near_rank) == right([batch(r, step) for r in range(world)])
        except RuntimeError as error:
            ended = str(error)
        assert "exhausted" in ended
        assert tracker._step == 2


@scenario(2)
def moved(rank: int, world: int, folder: Path) -> None:
    """A model on no device at attachment, sharded or not, and one that changes its dtype between steps."""
    mesh = init_device_mesh("cpu", (world,))
    for sharded in (False, True):
        with torch.device("meta"):
            model = network()
        with RankTracker(model, max_overhead=0.9, **OPTIONS) as tracker:
            if sharded:
                fully_shard(model[0], mesh=mesh)
                fully_shard(model, mesh=mesh)
            model.to_empty(device="cpu")
            source = network()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    value = source.get_parameter(name)
                    own = value.chunk(world)[rank] if sharded else value
                    (parameter.to_local() if sharded else parameter).copy_(own)
            for step in range(3):
                # A rank without a pass has to know the device by the model; FSDP wants a pass of each.
                active = range(1, world) if step == 0 and not sharded else range(world)
                if rank in active:
                    model(batch(rank, step)).sum().backward()
                found = tracker.collect()["1#0"]
                assert (found.shape, found.near_rank) == right([batch(r, step) for r in active])
    model = network()
    with RankTracker(model, **OPTIONS) as tracker:
        for step, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16, torch.float32)):
            model.to(dtype)
            model(batch(rank, step).to(dtype)).sum().backward()
            found = tracker.collect()["1#0"]
            assert (found.shape, found.near_rank) == right([batch(r, step).to(dtype) for r in range(world)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
