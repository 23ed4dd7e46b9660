"""Scenarios for test_distributed.py, in the way of ranks.py."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import Skip, alone, main, raises, same, scenario
from torch import Tensor, nn

from bsgap_kernels.tracking import METRICS, DistributedSpectra, RankTracker, SpectralAccumulator
from bsgap_kernels.tracking.records import ABOUT_THE_MEAN


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 24), nn.Tanh(), nn.Linear(24, 3)]
    return nn.Sequential(*layers)


def shards(step: int, world: int) -> list[Tensor]:
    """Each rank's share of a step: uneven, and empty on a rank that changes."""
    generator = torch.Generator().manual_seed(step)
    sizes = [7 * (rank + 1) if (rank + step) % 4 else 0 for rank in range(world)]
    if sum(sizes) == 0:
        sizes[0] = 5
    return [torch.randn(size, 1, 6, 6, generator=generator) for size in sizes]


@scenario(1, 2, 3, 4)
def whole_batch(rank: int, world: int, folder: Path) -> None:
    """All metrics, uneven and empty shards, and a rank that makes no forward pass at all."""
    model = network()
    center = world == 3
    metrics = [name for name in METRICS if not (center and name in ABOUT_THE_MEAN)]
    options = {"certify": True, "metrics": metrics, "center": center}
    with RankTracker(model, process_group="world", verbose=False, **options) as tracker:
        for step in range(5):
            parts = shards(step, world)
            if parts[rank].shape[0] > 0 or step % 2:
                model(parts[rank])
            same(tracker.collect(), alone(model, torch.cat(parts), **options))
        tracker.step()  # no rank has read anything
        assert tracker.collect() == {}
        with tracker.view("probe"):
            model(parts[rank])
        same(tracker.collect("probe"), alone(model, torch.cat(parts), **options))


@scenario(1, 2, 3)
def data_parallel(rank: int, world: int, folder: Path) -> None:
    """The tracker gets the wrapper; what it counts is what the optimizer has made of the model."""
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with RankTracker(model, process_group="world", certify=True, verbose=False) as tracker:
        for step in range(4):
            parts = shards(step, world)
            expected = alone(model.module, torch.cat(parts), certify=True)
            model(parts[rank]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            same(tracker.collect(), expected)
    assert "tracker" not in repr(model.state_dict().keys())


@scenario(2)
def fully_sharded(rank: int, world: int, folder: Path) -> None:
    """FSDP2, the tracker attached before or after the parameters are sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for before in (True, False):
        plain, model = network(), network()
        tracker = RankTracker(model, process_group="world", certify=True, verbose=False) if before else None
        try:
            for layer in (model[0], model[3]):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            model(torch.zeros(1, 1, 6, 6)).sum().backward()
        except (NotImplementedError, RuntimeError) as error:
            raise Skip(f"this torch has no FSDP2 on a CPU: {error}") from None
        model.zero_grad()
        tracker = tracker or RankTracker(model, process_group="world", certify=True, verbose=False)
        tracker.collect()
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
        for step in range(3):
            parts = shards(step + 1, world)
            expected = alone(plain, torch.cat(parts), certify=True)
            (model(parts[rank]).square().sum() * world).backward()  # averaged over the ranks
            plain(torch.cat(parts)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            same(tracker.collect(), expected)
        tracker.close()


class Branch(nn.Module):
    """A site that is there only when asked for, of any width."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.rare = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor, rare: Tensor | None = None) -> Tensor:
        return self.always(x) if rare is None else self.rare(rare).sum() + self.always(x)


@scenario(2, 3)
def late_site(rank: int, world: int, folder: Path) -> None:
    """A site that the last rank is the first to meet: a warning there, counted from the next step on."""
    model, x = Branch(), torch.randn(9, 4)
    with RankTracker(model, process_group="world", verbose=False) as tracker:

        def step(there: bool) -> tuple[list[str], list[str]]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model(x, x[:, :3] if there else None)
                found = tracker.collect()
            if "rare#0" in found:
                assert found["rare#0"].shape[1] == 3
            return sorted(found), [str(warning.message) for warning in caught]

        last = rank == world - 1
        assert step(False) == (["always#0"], [])
        sites, messages = step(last)
        assert sites == ["always#0"]
        assert len(messages) == last
        assert not last or "rare#0 first met on this rank after the ranks had agreed" in messages[0]
        assert step(last) == (["always#0", "rare#0"], [])
        assert step(False) == (["always#0"], [])
        assert step(True) == (["always#0", "rare#0"], [])


@scenario(2, 3)
def other_features(rank: int, world: int, folder: Path) -> None:
    """Ranks with other features: refused on all of them, at once or when a late site shows it."""
    with RankTracker(nn.ReLU(), process_group="world", verbose=False) as tracker:
        tracker._reader._model(torch.randn(9, 4 + (rank == 1)))
        raises(tracker.step, "ReLU#0", "n=5", "n=4", "same features")
    model, x = Branch(), torch.randn(9, 4)
    with RankTracker(model, process_group="world", verbose=False) as tracker, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(x, x if rank == 0 else None)
        assert sorted(tracker.collect()) == ["always#0", "rare#0"]
        model(x, x if rank == 0 else x[:, :3])
        assert tracker.collect()["rare#0"].shape == (9, 4)
        model(x)
        raises(lambda: [model(x, x if rank == 0 else x[:, :3]), tracker.collect()], "rare#0", "same features")


@scenario(2)
def budget_and_sketch(rank: int, world: int, folder: Path) -> None:
    """Too many bytes are refused on every rank, too many features too; a sketch is named in every row."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 12), nn.ReLU())
    parts = [torch.randn(25, 30), torch.randn(50, 30)]
    common = {"process_group": "world", "verbose": False}
    with RankTracker(model, comm_budget=6000, **common) as tracker:
        model(parts[rank])
        raises(tracker.step, "comm_budget: 2 sites need", "1#0 with 40 features", "sketch=")
    with RankTracker(model, max_features=16, **common):
        raises(lambda: model(parts[rank]), "1#0: 40 features are more than max_features = 16", "sketch=")
    path = folder / f"sketch{rank}.jsonl"
    options = {"max_features": 16, "sketch": 8}
    with RankTracker(model, comm_budget=6000, sinks=str(path), **common, **options) as tracker:
        model(parts[rank])
        found = tracker.collect()
        assert tracker._spectra.bytes_sent <= 6000
    assert found["1#0"].shape == (75, 8)
    same(found, alone(model, torch.cat(parts), micro_batches=2, **options))
    if rank == 0:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        notes = {row["site"]: row.get("note", "") for row in rows if "site" in row}
        assert "sketch 8 of 40" in notes["1#0"], notes
        assert "sketch" not in notes["3#0"], notes


@scenario(2, 3)
def same_cadence(rank: int, world: int, folder: Path) -> None:
    """One rank is slow, another's tracking is: all track the same steps, and a replay does so again."""

    def steps(**options: Any) -> tuple[list[int], list[tuple[int, int]]]:
        tracked = []
        with RankTracker(model, process_group="world", verbose=False, **options) as tracker:
            for step in range(40):
                model(x)
                time.sleep(0.004 if rank == 0 else 0.0)
                due = tracker._due
                tracked += [step] if due else []
                if step % 3 == 0:
                    tracker.step()
                else:
                    assert bool(tracker.collect()) == due, "numbers of a step that is not tracked"
            return tracked, tracker.state_dict()["cadence"]["log"]

    model, x = network(), torch.randn(8, 1, 6, 6)
    first = steps(max_overhead=0.02)
    again = steps(replay=first[1])
    assert again == first, (first, again)
    assert len(first[1]) > 1, first
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, first)
    assert everyone == [first] * world, everyone


@scenario(2, 3)
def micro_batches(rank: int, world: int, folder: Path) -> None:
    """Several passes before a step, a different number on each rank."""
    model = network()
    options = {"metrics": ["near_rank", "stable_rank"], "certify": True}
    with RankTracker(model, process_group="world", micro_batches=2, verbose=False, **options) as tracker:
        for step in range(3):
            parts = shards(step, world)
            for part in parts[rank].split(4):
                model(part)
            same(tracker.collect(), alone(model, torch.cat(parts), **options))


@scenario(1, 2)
def rows_of_rank_0(rank: int, world: int, folder: Path) -> None:
    """step() never waits for its own numbers; closing writes the last, also when the loop fails."""
    model, expected = network(), []
    path = folder / f"rows-{world}-{rank}.jsonl"
    try:
        with RankTracker(
            model, process_group="world", sinks=str(path), certify=True, verbose=False
        ) as tracker:
            for step in range(4):
                parts = shards(step, world)
                model(parts[rank])
                expected.append(alone(model, torch.cat(parts), certify=True))
                tracker.step()
            raise KeyError("the training loop fails with a step under way")
    except KeyError:
        pass
    assert path.exists() == (rank == 0)
    if rank > 0:
        return
    found = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row.get("metric") in ("batch.near_rank", "batch.lower"):
            found[row["step"], row["site"], row["metric"]] = row["value"]
    for step, records in enumerate(expected):
        for site, record in records.items():
            assert found.pop((step, site, "batch.near_rank")) == record.near_rank
            assert found.pop((step, site, "batch.lower")) == record.lower
    assert not found


@scenario(3)
def sums_by_hand(rank: int, world: int, folder: Path) -> None:
    """DistributedSpectra adds up the sums of accumulators; the bound of the result holds."""
    parts = [torch.randn(5 + rank, 4, generator=torch.Generator().manual_seed(rank)) for rank in range(world)]
    own = SpectralAccumulator(center=True).update(parts[rank])
    spectra = DistributedSpectra()
    work = spectra.start({"a": own.sums}, torch.device("cpu"), numbers=(float(rank), 1.0))
    sent = own.sums.gram.clone()
    own.update(torch.full((3, 4), 1e6))  # what was sent does not change any more
    found, numbers = work.wait()
    assert numbers == [1.0, 1.0]
    assert spectra.bytes_sent == 8 * (3 + 1 + 3 + 4 + 10)
    A = torch.cat(parts).double()
    sums = found["a"]
    assert torch.allclose(sums.gram.tril(), (A.T @ A).tril(), rtol=1e-12)
    assert torch.allclose(sums.sums, A.sum(0), rtol=1e-12, atol=1e-12)
    assert sums.totals[0] == len(A)
    assert not torch.equal(sent, own.sums.gram)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # What is imported at first use, once for all ranks to come.
    alone(network(), torch.zeros(2, 1, 6, 6), metrics=METRICS)
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel

    main()
