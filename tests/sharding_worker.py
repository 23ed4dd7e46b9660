"""Scenarios for test_sharding.py, in the way of ranks.py: tensor parallelism against one process.

Right numbers are those of `torch.linalg.svdvals` of the whole activation in float64, of a copy of the model
that no rank shares.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import main, raises, scenario
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from bsgap_kernels.tracking import RankTracker, SiteRecord, SpectralAccumulator
from bsgap_kernels.tracking.reader import _projection

RTOL = 0.05
OPTIONS: dict[str, Any] = {"certify": True, "verbose": False, "rtol": RTOL}
Matrices = dict[str, Tensor]


def right(matrix: Tensor, center: bool = False) -> int:
    """The count of a whole matrix in one process."""
    A = matrix.detach().double()
    A = A - A.mean(0) if center else A
    values = torch.linalg.svdvals(A)
    gap = (values / values[0] / RTOL).log().abs().min()
    assert gap > 1e-3, "the scenario's own matrix has a singular value at the threshold"
    return int(torch.linalg.matrix_rank(A, rtol=RTOL))


def same(found: dict[str, SiteRecord], expected: Matrices, **options: Any) -> None:
    assert list(found) == list(expected), (list(found), list(expected))
    for site, record in found.items():
        matrix = expected[site]
        assert record.shape == tuple(matrix.shape), (site, record.shape, matrix.shape)
        counted = (record.lower, record.near_rank, record.upper)
        assert counted == (right(matrix, **options),) * 3, (site, counted, right(matrix, **options))


def at(x: Tensor, rank: int, world: int, dim: int = 0) -> Tensor:
    return x.tensor_split(world, dim)[rank]


def low_rank(*shape: int, rank: int = 5, seed: int = 0) -> Tensor:
    """Rows of a given rank, so that a wrong share of them has another count."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.Size(shape[:-1]).numel()
    left, right = (torch.randn(*s, generator=generator) for s in ((rows, rank), (rank, shape[-1])))
    return (left @ right).reshape(shape)


class Perceptron(nn.Module):
    """Two layers, the second nonlinearity a function."""

    def __init__(self, n: int = 10, k: int = 7) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.one, self.act, self.two, self.three = (
            nn.Linear(6, n),
            nn.Tanh(),
            nn.Linear(n, k),
            nn.Linear(k, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.three(F.relu(self.two(self.act(self.one(x)))))

    def matrices(self, x: Tensor) -> Matrices:
        hidden = self.act(self.one(x))
        return {"act#0": hidden, "three:input#0": F.relu(self.two(hidden))}


PLAN = {"one": ColwiseParallel(), "two": RowwiseParallel()}


@scenario(2)
def eyes(rank: int, world: int, folder: Path) -> None:
    """Colwise then Rowwise of the identity: 8 of (8, 8), neither half the features nor rows twice."""
    mesh = init_device_mesh("cpu", (world,))
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU())
    for layer in (model[0], model[2]):
        nn.init.eye_(layer.weight)
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with RankTracker(model, process_group="world", **OPTIONS) as tracker:
        for _ in range(2):
            model(torch.eye(8)).sum().backward()
            same(tracker.collect(), {"1#0": torch.eye(8), "3#0": torch.eye(8)})


@scenario(2, 3)
def perceptron(rank: int, world: int, folder: Path) -> None:
    """Rows that do not divide, other batches later, attached before and after, in each dtype."""
    mesh = init_device_mesh("cpu", (world,))
    for before in (False, True):
        for dtype in (torch.float64, torch.bfloat16):
            plain = Perceptron(5 * world).to(dtype)  # local outputs have to divide, for torch itself
            model = copy.deepcopy(plain)
            model = model if before else parallelize_module(model, mesh, PLAN)
            with RankTracker(model, process_group="world", **OPTIONS) as tracker:
                model = parallelize_module(model, mesh, PLAN) if before else model
                for rows in (11, 1, 16):
                    x = low_rank(rows, 6, rank=4, seed=rows).to(dtype)
                    model(x).sum().backward()
                    same(tracker.collect(), plain.matrices(x))
                with tracker.view("probe"), torch.no_grad():  # known from passes with a graph
                    model(x)
                assert tracker.collect("probe")["act#0"].shape == (16, 5 * world)


@scenario(2)
def groups(rank: int, world: int, folder: Path) -> None:
    """Without other ranks in the group each one reads whole rows with all features."""
    mesh = init_device_mesh("cpu", (world,))
    plain, x = Perceptron(), low_rank(11, 6)
    model = parallelize_module(copy.deepcopy(plain), mesh, PLAN)
    alone = [dist.new_group([i]) for i in range(world)][rank]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trackers = [RankTracker(model, process_group=group, **OPTIONS) for group in (None, alone)]
    model(x).sum().backward()
    for tracker in trackers:
        same(tracker.collect(), plain.matrices(x))
        tracker.close()


@scenario(2)
def counted_once(rank: int, world: int, folder: Path) -> None:
    """Centring, summaries, a sketch, sampled rows and a padding mask, of rows that ranks share out."""
    mesh = init_device_mesh("cpu", (world,))
    plain, x = Perceptron(), low_rank(12, 6) + 3
    model = parallelize_module(copy.deepcopy(plain), mesh, PLAN)
    hidden = plain.matrices(x)["act#0"]

    def read(**options: Any) -> SiteRecord:
        with RankTracker(model, process_group="world", layers=["act"], **OPTIONS, **options) as tracker:
            model(x).sum().backward()
            return tracker.collect()["act#0"]

    same({"a": read(center=True)}, {"a": hidden}, center=True)
    same({"a": read(sample_rows=3)}, {"a": hidden[::3]})
    values = torch.linalg.svdvals(hidden.double())
    found = read(metrics=["sigma_max", "frobenius_norm"]).summary
    assert torch.allclose(torch.tensor(found["sigma_max"]).double(), values[0], rtol=1e-5)
    assert torch.allclose(torch.tensor(found["frobenius_norm"]).double(), hidden.double().norm(), rtol=1e-5)
    sketched = read(max_features=9, sketch=6)
    same({"a": sketched}, {"a": hidden @ _projection(10, 6, torch.float32, hidden.device)})


class Tokens(nn.Module):
    """A gated block of a transformer over (B, T, D), which takes a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.norm = nn.LayerNorm(8)
        self.after = nn.Tanh()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act, self.last = nn.SiLU(), nn.GELU()
        self.body = nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.body(self.after(self.norm(x)))
        return self.last(self.down(self.act(self.gate(h)) * self.up(h)))

    def matrices(self, x: Tensor, valid: Tensor) -> Matrices:
        h = self.after(self.norm(x))
        gate = self.act(self.gate(h))
        sites = {"after#0": h, "act#0": gate, "last#0": self.last(self.down(gate * self.up(h)))}
        return {site: activation[valid] for site, activation in sites.items()}


@scenario(2, 3)
def sequence_parallel(rank: int, world: int, folder: Path) -> None:
    """Tokens sharded by sequence around a gated block sharded by features, with and without a mask."""
    mesh = init_device_mesh("cpu", (world,))
    plan = {
        "norm": SequenceParallel(use_local_output=True),
        "body": PrepareModuleInput(
            input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True
        ),
        "gate": ColwiseParallel(),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    B, T = 4, 3 * world
    plain, x = Tokens(), low_rank(B, T, 8, rank=3)
    valid = torch.arange(T) < torch.tensor([[T], [1], [4], [2]])
    for masked in (False, True):
        model = parallelize_module(copy.deepcopy(plain), mesh, plan)
        mask = {"mask": "mask"} if masked else {}
        with RankTracker(model, process_group="world", unfold="token", **mask, **OPTIONS) as tracker:
            for _ in range(2):
                model(at(x, rank, world, 1), mask=valid).sum().backward()
                same(tracker.collect(), plain.matrices(x, valid if masked else valid.new_ones(B, T)))


class Scaled(nn.Module):
    """Sharded features times a replicated gate of each row, from either side."""

    def __init__(self, gate_first: bool) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.gate_first = gate_first
        self.gate, self.up, self.act = nn.Linear(6, 1), nn.Linear(6, 8), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        return self.act(gate * up if self.gate_first else up * gate)


@scenario(2)
def broadcast(rank: int, world: int, folder: Path) -> None:
    """What is replicated is broadcast against what is sharded."""
    mesh = init_device_mesh("cpu", (world,))
    x = low_rank(11, 6)
    plan = {"gate": ColwiseParallel(output_layouts=Replicate()), "up": ColwiseParallel()}
    for gate_first in (False, True):
        plain = Scaled(gate_first)
        model = parallelize_module(copy.deepcopy(plain), mesh, plan)
        with RankTracker(model, process_group="world", **OPTIONS) as tracker:
            model(x).sum().backward()
            same(tracker.collect(), {"act#0": plain(x)})


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.act(x)


@scenario(2, 4)
def masked(rank: int, world: int, folder: Path) -> None:
    """A padding mask of all rows, for tokens of which each rank has some, or some features."""
    mesh = init_device_mesh("cpu", (world,) if world == 2 else (2, 2))
    x = low_rank(3, 5, 6, rank=3)
    mask = torch.arange(5) < torch.tensor([[5], [1], [4]])
    kinds = [Replicate(), Shard(0), Shard(1), Shard(2)]
    with RankTracker(Masked(), mask="mask", unfold="token", process_group="world", **OPTIONS) as tracker:
        model = tracker._reader._model
        for placements in [(a, b) for a in kinds for b in kinds] if mesh.ndim == 2 else [(a,) for a in kinds]:
            y = distribute_tensor(x, mesh, placements).requires_grad_()
            model(y, mask=mask)
            same(tracker.collect(), {"act#0": torch.tanh(x)[mask]})


@scenario(2)
def prepared(rank: int, world: int, folder: Path) -> None:
    """PrepareModuleInput and -Output, and outputs that stay DTensors."""
    mesh = init_device_mesh("cpu", (world,))
    plain, x = Perceptron(), low_rank(11, 6)
    sharded = {
        "one": ColwiseParallel(use_local_output=False),
        "two": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
        "three": PrepareModuleInput(
            input_layouts=Shard(0), desired_input_layouts=Replicate(), use_local_output=True
        ),
    }
    gathered = {
        "one": ColwiseParallel(use_local_output=False),
        "act": PrepareModuleOutput(output_layouts=Shard(-1), desired_output_layouts=Replicate()),
        "two": ColwiseParallel(output_layouts=Replicate()),
    }
    for plan in (sharded, gathered):
        model = parallelize_module(copy.deepcopy(plain), mesh, plan)
        with RankTracker(model, process_group="world", **OPTIONS) as tracker:
            model(x).sum().backward()
            same(tracker.collect(), plain.matrices(x))


@scenario(4)
def two_dimensions(rank: int, world: int, folder: Path) -> None:
    """Data parallel × tensor parallel: DDP and FSDP2 by batch, over all ranks and over one dimension."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plain, x = Perceptron(), low_rank(13, 6)
    mine = at(x, mesh["dp"].get_local_rank(), 2)
    for wrap in ("fsdp", "ddp"):
        model = parallelize_module(copy.deepcopy(plain), mesh["tp"], PLAN)
        if wrap == "fsdp":
            wrapped = fully_shard(model, mesh=mesh["dp"])
        else:
            wrapped = nn.parallel.DistributedDataParallel(model, device_mesh=mesh["dp"])
        for group in ("world", mesh["dp"].get_group()):
            with RankTracker(wrapped, process_group=group, **OPTIONS) as tracker:
                wrapped(mine).sum().backward()
                same(tracker.collect(), plain.matrices(x))
        with RankTracker(wrapped, process_group=mesh["tp"].get_group(), **OPTIONS) as tracker:
            wrapped(mine).sum().backward()
            same(tracker.collect(), plain.matrices(mine))


@scenario(2, 4)
def placed(rank: int, world: int, folder: Path) -> None:
    """DTensors of every placement, as matrices, tokens and images under each unfolding."""
    mesh = init_device_mesh("cpu", (world,) if world == 2 else (2, 2))
    A, images = low_rank(13, 9), low_rank(5 * 4 * 3, 6).reshape(5, 4, 3, 6).permute(0, 3, 1, 2)
    channels = images.permute(0, 2, 3, 1).reshape(-1, 6)
    unfoldings: list[tuple[Tensor, str, int, Tensor]] = [
        (A, "auto", 2, A),
        (A.reshape(1, 13, 9), "token", 3, A),
        (images, "channel", 4, channels),
        (images, "flatten", 4, images.reshape(5, -1)),
        (images, "pool", 2, images.mean((2, 3))),
    ]
    for x, unfold, dims, expected in unfoldings if mesh.ndim == 1 else unfoldings[::3]:
        model = nn.Sequential(nn.Identity())
        dim = {"features_dim": 1} if unfold in ("channel", "pool") else {}
        options = {"layers": ["0"], "unfold": unfold, "process_group": "world", **dim, **OPTIONS}
        kinds = [Replicate(), *(Shard(d) for d in range(dims))]
        pairs = [(a, b) for a in kinds for b in kinds] if mesh.ndim == 2 else [(a,) for a in kinds]
        with RankTracker(model, **options) as tracker:
            for placements in pairs:  # of one site, as they come
                model(distribute_tensor(x, mesh, placements))
                same(tracker.collect(), {"0#0": expected})
    options |= {"unfold": "pool", "features_dim": 1}
    with RankTracker(model, **options) as tracker:
        y = distribute_tensor(images, mesh, [Shard(3)] * mesh.ndim)
        raises(lambda: model(y), "0#0: positions are sharded", "unfold='pool'")
    with RankTracker(model, layers=["0"], process_group="world", **OPTIONS) as tracker:
        x = DTensor.from_local(A, mesh, [Partial()] * mesh.ndim, run_check=False)
        raises(lambda: model(x), "0#0: got an activation placed as Partial", "after parallelize_module")
    accumulator = SpectralAccumulator()
    accumulator.update(distribute_tensor(A, mesh, [Shard(0)] * mesh.ndim))
    assert accumulator.compute().shape[0] < 13
    raises(
        lambda: accumulator.update(distribute_tensor(A, mesh, [Shard(1)] * mesh.ndim)),
        "A: got a DTensor placed as",
        "no rank has whole rows",
    )


class Halves(torch.autograd.Function):
    """Tensor parallelism that leaves no trace: this rank's half of the columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return at(x, dist.get_rank(), dist.get_world_size(), -1).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.new_zeros(ctx.shape)


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@scenario(2)
def by_hand(rank: int, world: int, folder: Path) -> None:
    """Nothing tells of parts made by hand: refused next to a parallel style, read as the arguments say."""
    mesh = init_device_mesh("cpu", (world,))
    x = low_rank(11, 6)
    first = nn.Linear(6, 8)
    for parameter in first.parameters():
        dist.broadcast(parameter.data, 0)
    model = nn.Sequential(first, Apply(Halves.apply), nn.Tanh())
    styled = nn.Sequential(*model, nn.Linear(4, 4))
    parallelize_module(styled, mesh, {"3": ColwiseParallel()})
    marked = copy.deepcopy(model)
    marked[0].weight.tensor_model_parallel = True
    named = {"process_group": "world", **OPTIONS}
    sentence = "2#0: ranks [0, 1] have different numbers", "pass device_mesh= and placements={'2': Shard(-1)}"
    with RankTracker(styled, **named):
        raises(lambda: styled(x), *sentence)
    with RankTracker(model, device_mesh=mesh, **named):
        raises(lambda: model(x), *sentence)
    with RankTracker(marked, **named):
        raises(lambda: marked(x), "2#0: the model has weights marked tensor_model_parallel", "device_mesh=")
    expected = {"2#0": torch.tanh(first(x))}
    for pattern, placement in (("2", Shard(-1)), ("*", [Shard(1)])):
        with RankTracker(model, device_mesh=mesh, placements={pattern: placement}, **named) as tracker:
            model(x)
            same(tracker.collect(), expected)
    raises(lambda: RankTracker(model, placements={"2": Shard(-1)}), "placements: given without device_mesh=")
    raises(
        lambda: RankTracker(model, device_mesh=mesh, placements={"2": [Shard(0), Shard(1)]}),
        "placements: '2' has",
        "expected 1 of Shard, Replicate",
    )


@scenario(2)
def untold(rank: int, world: int, folder: Path) -> None:
    """Without a graph: replicas are known by their numbers, parts are refused, dead replicas asked again."""
    mesh = init_device_mesh("cpu", (world,))
    x = low_rank(11, 6)
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh())
    plain = copy.deepcopy(model)
    parallelize_module(model, mesh, {"2": ColwiseParallel()})
    with RankTracker(model, process_group="world", layers=["1"], **OPTIONS) as tracker:
        for scale in (0.0, 1.0):  # first a layer without a living unit
            with torch.no_grad():
                for module in (plain[0], model[0]):
                    module.weight.fill_(0.0) if scale == 0 else module.weight.copy_(low_rank(8, 6, seed=3))
                    module.bias.zero_()
            model(x).sum().backward()
            record = tracker.collect()["1#0"]
            assert record.shape == (11, 8)
            assert record.near_rank == (right(plain[:2](x)) if scale else 0)
    tracker = RankTracker(model, process_group="world", **OPTIONS)
    with tracker, torch.no_grad(), tracker.view("probe"):
        raises(lambda: model(x), "3#0: ranks [0, 1] have different numbers")
    tracker = RankTracker(model, process_group="world", **OPTIONS)
    with tracker, torch.no_grad(), tracker.view("probe"):
        model[2].weight.zero_()
        model[2].bias.zero_()
        model(x)
        assert tracker.collect("probe")["3#0"].near_rank == 0
        model[2].bias += 1 + rank
        raises(lambda: model(x), "3#0: ranks [0, 1] have different numbers")
    dropped = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.ReLU())
    parallelize_module(dropped, mesh, {"0": ColwiseParallel(output_layouts=Replicate())})
    torch.manual_seed(rank)
    with RankTracker(dropped, process_group="world", **OPTIONS):
        raises(lambda: dropped(x), "2#0: ranks [0, 1] have different numbers")


@scenario(2)
def compiled(rank: int, world: int, folder: Path) -> None:
    """In compiled code DTensors are read, parts of them as the arguments say, else refused."""
    mesh = init_device_mesh("cpu", (world,))
    x = low_rank(11, 6)
    torch.manual_seed(5)
    plain = nn.Sequential(nn.Linear(6, 10), nn.Tanh())
    expected = {"1#0": plain(x)}

    def read(way: ColwiseParallel, **options: Any) -> dict[str, SiteRecord]:
        torch.compiler.reset()
        model = parallelize_module(copy.deepcopy(plain), mesh, {"0": way})
        with RankTracker(model, **{"process_group": "world", **OPTIONS, **options}) as tracker:
            torch.compile(model, backend="aot_eager")(x)
            return tracker.collect()

    for layout in (Shard(-1), Replicate()):
        same(read(ColwiseParallel(output_layouts=layout, use_local_output=False)), expected)
        part = read(ColwiseParallel(output_layouts=layout), device_mesh=mesh, placements={"1": layout})
        same(part, expected)
    raises(lambda: read(ColwiseParallel()), "1#0: ranks [0, 1] have different numbers")
    group = [dist.new_group([i]) for i in range(world)][rank]
    whole = ColwiseParallel(use_local_output=False)
    raises(lambda: read(whole, process_group=group), "1#0: a DTensor in compiled code", "'world'")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
