"""Activations that tensor parallelism spreads over ranks: each row is read once, with all its features."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

Placements = Mapping[str, Any]
"""Patterns of site names, and the placement, or one for each mesh dimension, of what is read there."""

_DEPTH = 24
_SAMPLE = 1 << 14  # numbers of an activation that ranks compare
# Operations of autograd's graph that leave every number in its place: what went in sharded comes out so.
_ELEMENTWISE = re.compile(
    r"^(Relu|LeakyRelu|Prelu|Rrelu|Elu|Selu|Celu|Gelu|Silu|Mish|Sigmoid|LogSigmoid|Hardsigmoid|Tanh|Hardtanh|"
    r"Hardswish|Softplus|Softshrink|Hardshrink|Threshold|Glu|Clamp|Pow|Maximum|Minimum|Abs|Neg|Exp|Log|Sqrt|Rsqrt|"
    r"Erf|Sign|Where|MaskedFill|NativeDropout|FusedDropout|Clone|Alias|ToCopy|Contiguous|"
    r"(Add|Sub|Mul|Div|Addcmul|Addcdiv)Backward|RegisterPostBackward)"
)


@dataclass(frozen=True)
class Spread:
    """How the ranks of one mesh dimension share an activation whose rows are not shared out yet.

    dim: the dimension, from the end, along which each rank has a part of the features; None: all have
    everything. sizes: length of each rank's part. split: each rank is to read its share of the rows;
    otherwise each reads all of them.
    """

    group: Any
    dim: int | None
    sizes: tuple[int, ...]
    split: bool

    def part(self, x: Tensor, rows: int) -> Tensor:
        """This rank's share of the rows of x, which all ranks of the group have."""
        return x.tensor_split(self.group.size(), rows)[self.group.rank()] if self.split else x

    def whole(self, x: Tensor, rows: int, features: int, name: str) -> Tensor:
        """The rows that this rank is to read, with their features of all ranks."""
        if self.dim is None:
            return self.part(x, rows)
        rank, world = self.group.rank(), self.group.size()
        if x.shape[features] != self.sizes[rank]:
            raise ValueError(
                f"{name}: rank {rank} has {x.shape[features]} features of an activation of which it had "
                f"{self.sizes[rank]}; sites of varying size need unfold='channel' or 'pool'"
            )
        sent = x.tensor_split(world, rows) if self.split else (x,) * world
        shape = list(sent[rank].shape)
        shapes = [[*shape[:features], size, *shape[features + 1 :]] for size in self.sizes]
        counts = [torch.Size(s).numel() for s in shapes]
        received = x.new_empty(sum(counts))
        dist.all_to_all_single(
            received,
            torch.cat([piece.reshape(-1) for piece in sent]),
            counts,
            [piece.numel() for piece in sent],
            group=self.group,
        )
        parts = [part.view(s) for part, s in zip(received.split(counts), shapes, strict=True)]
        return torch.cat(parts, features)


@dataclass(frozen=True)
class Layout:
    """How an activation lies over ranks.

    source: mesh and placements of the DTensor that it is; None of a plain tensor. row_shards: mesh dimensions
    along which ranks have rows of their own, as (group, dimension among those of rows).
    """

    name: str
    source: Any
    spreads: tuple[Spread, ...]
    row_shards: tuple[tuple[Any, int], ...]
    settled: bool = True

    def whole(self, matrix: Tensor, first: int, last: int, pooled: bool) -> Tensor:
        """The rows of a local activation with features [first, last) that this rank is to read."""
        rows = 0 if first > 0 else last
        for spread in self.spreads:
            dim = first if pooled or spread.dim is None else matrix.ndim + spread.dim
            matrix = spread.whole(matrix, rows, dim, self.name)
        return matrix

    def part(self, x: Tensor) -> Tensor:
        """The same share of something whose first dimension is the first of the rows."""
        for spread in self.spreads:
            x = spread.part(x, 0)
        return x

    def valid(
        self, mask: Tensor, rows: torch.Size, fitted: Callable[[Tensor, torch.Size], Tensor | None]
    ) -> Tensor | None:
        """Of a mask (B, T) of all ranks' rows, the part for this rank's; None where it does not fit them."""
        for whole in {mask.shape, mask.shape[::-1]} if self.row_shards and len(rows) == 2 else ():
            valid = fitted(mask, whole)
            if valid is None:
                continue
            for group, dim in self.row_shards:
                size = -(-valid.shape[dim] // group.size())  # as DTensor cuts
                start = min(group.rank() * size, valid.shape[dim])
                valid = valid.narrow(dim, start, min(size, valid.shape[dim] - start))
            if valid.shape == rows:
                return valid
        return None


class Layouts:
    """Asks how activations lie over ranks: a DTensor itself, the arguments, or autograd's graph.

    The graph of an activation leads back, through elementwise operations, to the DTensor whose local part it
    is computed from: `parallelize_module`'s styles end with such a `to_local`. Where it leads nowhere, in a
    model that has tensor-parallel parts, the ranks compare samples of the activation, once: equal ones are
    replicas, others are refused.

    Args:
        model: the network.
        group: the process group over which the numbers of sites are added up; None: of no other rank.
        device_mesh: the mesh of `placements`, or of a model whose parts tell none.
        placements: see `Placements`.
    """

    def __init__(
        self,
        model: nn.Module,
        group: Any = None,
        device_mesh: Any = None,
        placements: Placements | None = None,
    ) -> None:
        self._model = model
        self._ranks = None if group is None else frozenset(dist.get_process_group_ranks(group))
        self._mesh = device_mesh
        self._placements = placements or {}
        self._known: dict[Any, Layout | None] = {}
        if self._placements and self._mesh is None:
            raise ValueError("placements: given without device_mesh=, the mesh whose dimensions they are for")
        if self._mesh is not None and not isinstance(device_mesh, DeviceMesh):
            raise TypeError(f"device_mesh: got {type(device_mesh).__name__}, expected a DeviceMesh")
        for pattern, placement in self._placements.items():
            given = _listed(placement)
            if len(given) != self._mesh.ndim or not all(hasattr(p, "is_shard") for p in given):
                raise ValueError(
                    f"placements: {pattern!r} has {placement!r}, expected {self._mesh.ndim} of Shard, "
                    "Replicate, one for each dimension of device_mesh"
                )

    def of(
        self, key: Any, activation: Tensor, name: str, features: range, only_rows: int | None
    ) -> Layout | None:
        """The layout of an activation; None of one that no other rank has a part of, as far as is known.

        key: of the site; what was found once holds. features: dimensions of features. only_rows: the one
        dimension of rows, where the others are averaged over.

        Raises:
            ValueError: nothing says how the parts belong together, or they cannot be put together.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return None
        source = _source(activation)
        if key in self._known:
            found = self._known[key]
            if (None if found is None else found.source) == source and (found is None or found.settled):
                return found
        found = self._find(source, activation, name, features, only_rows)
        self._known[key] = found
        return found

    def check_own_rows(self, name: str, features: range, masked: bool) -> None:
        """Refuse what a DTensor in compiled code, its rows shared out over all ranks, does not serve."""
        if self._ranks is None or len(self._ranks) < dist.get_world_size() or 0 in features or masked:
            raise ValueError(
                f"{name}: a DTensor in compiled code is shared out by its first dimension over all ranks, so "
                "it needs process_group='world', features in another dimension, and no mask; or leave it out "
                "by layers="
            )

    def _find(
        self, source: Any, activation: Tensor, name: str, features: range, only_rows: int | None
    ) -> Layout | None:
        from torch.distributed.tensor import Shard

        local = local_of(activation)
        placed, settled = self._placed(source, activation, local, name)
        if not placed:
            return None
        spreads, row_shards = [], []
        lengths = list(local.shape)
        for group, placement, ndim in placed:
            if group.size() == 1:
                continue
            inside = self._ranks is not None and self._ranks.issuperset(dist.get_process_group_ranks(group))
            if placement.is_replicate():
                spreads.append(Spread(group, None, (), inside))
                continue
            if type(placement) is not Shard:
                raise ValueError(
                    f"{name}: got an activation placed as {placement!r}, of which no rank has a row; attach "
                    "the tracker after parallelize_module, or choose by layers= the module behind"
                )
            dim = placement.dim - ndim if placement.dim >= 0 else placement.dim
            place = local.ndim + dim
            if place in features:
                sizes = _everyone(lengths[place], group)
                lengths[place] = sum(sizes)
                spreads.append(Spread(group, dim, tuple(sizes), inside))
            elif only_rows not in (None, place):
                raise ValueError(
                    f"{name}: positions are sharded over ranks (dimension {place}), and unfold='pool' "
                    "averages over them; use unfold='channel' or 'token'"
                )
            elif not inside and self._ranks is not None:
                raise ValueError(
                    f"{name}: rows are sharded over ranks that process_group leaves out; pass "
                    "process_group='world', or a group with all ranks of the device mesh"
                )
            else:
                row_shards.append((group, place if place < features.start else place - len(features)))
        return Layout(name, source, tuple(spreads), tuple(row_shards), settled)

    def _placed(
        self, source: Any, activation: Tensor, local: Tensor, name: str
    ) -> tuple[list[tuple[Any, Any, int]], bool]:
        """(group, placement, dimensions of what is so placed) of each mesh dimension; whether it is sure."""
        if source is not None:
            mesh, placements = source
            return _by_dimension(mesh, placements, activation.ndim), True
        for pattern, placement in self._placements.items():
            if fnmatchcase(name.rpartition("#")[0], pattern):
                return _by_dimension(self._mesh, _listed(placement), local.ndim), True
        placed = _merged(local_sources(activation), name)
        if any(not placement.is_replicate() for _, placement, _ in placed):
            return placed, True
        from torch.distributed.tensor import Replicate

        if self._mesh is None and any(
            getattr(p, "tensor_model_parallel", False) for p in self._model.parameters()
        ):
            raise ValueError(
                f"{name}: the model has weights marked tensor_model_parallel, which say nothing of "
                "activations; pass device_mesh= (of size 1 where nothing is split) and placements="
            )
        meshes = {self._mesh} if self._mesh is not None else set(tensor_meshes(self._model))
        groups = {frozenset(dist.get_process_group_ranks(group)): group for group, _, _ in placed}
        for group in (mesh.get_group(i) for mesh in meshes for i in range(mesh.ndim)):
            if group.size() > 1:
                groups.setdefault(frozenset(dist.get_process_group_ranks(group)), group)
        settled = True
        for ranks in sorted(groups, key=sorted):
            same, sure = _alike(local, groups[ranks])
            settled = settled and sure
            if not same:
                raise ValueError(
                    f"{name}: ranks {sorted(ranks)} have different numbers here, and neither a DTensor nor "
                    "autograd's graph says how they belong together; pass device_mesh= and placements="
                    f"{{{name.rpartition('#')[0]!r}: Shard(-1)}} (features are split), Shard(0) (rows are), "
                    "or leave the site out by layers="
                )
        return [(group, Replicate(), local.ndim) for group in groups.values()], settled


def local_of(activation: Tensor) -> Tensor:
    """This rank's part of a DTensor, arrived; another tensor as it is, but for one that is on its way."""
    local: Any = activation
    if getattr(local, "placements", None) is not None:
        local = local.to_local()
    arrived: Tensor = local.wait() if type(local).__name__ == "AsyncCollectiveTensor" else local
    return arrived


def local_sources(activation: Tensor) -> Iterator[Any]:
    """Specs of the DTensors whose local parts an activation is made of by elementwise operations."""
    level: list[Any] = [activation.grad_fn]
    met: set[Any] = {None}
    for _ in range(_DEPTH):
        parents: list[Any] = []
        for node in level:
            if node in met:
                continue
            met.add(node)
            spec = getattr(node, "dtensor_spec", None)
            if spec is not None:
                yield spec
            elif _ELEMENTWISE.match(node.name()):
                parents += [parent for parent, _ in node.next_functions]
        level = parents


def tensor_meshes(model: nn.Module) -> Iterator[Any]:
    """Device meshes of tensor parallelism: those that modules' hooks and forwards hold, and DTensor weights'.

    `distribute_module`, and so each style of `parallelize_module`, leaves hooks whose closure holds the mesh;
    transformers replaces `forward` by such a closure. Weights that FSDP shards are no sign: in a model of
    those the closures alone tell.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    fully_sharded = fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in model.modules())
    for module in model.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        for function in (*hooks, module.__dict__.get("forward")):
            cells = getattr(function, "__closure__", None) or ()
            yield from (x for x in map(_content, cells) if isinstance(x, DeviceMesh))
        weights: list[Any] = [] if fully_sharded else list(module.parameters(recurse=False))
        yield from (
            weight.device_mesh for weight in weights if getattr(weight, "placements", None) is not None
        )


def _content(cell: Any) -> Any:
    with suppress(ValueError):  # of an empty cell
        return cell.cell_contents
    return None


def _listed(placement: Any) -> tuple[Any, ...]:
    return tuple(placement) if isinstance(placement, Sequence) else (placement,)


def _source(activation: Any) -> Any:
    placements = getattr(activation, "placements", None)
    return None if placements is None else (activation.device_mesh, tuple(placements))


def _by_dimension(mesh: Any, placements: Sequence[Any], ndim: int) -> list[tuple[Any, Any, int]]:
    return [(mesh.get_group(i), placement, ndim) for i, placement in enumerate(placements)]


def _merged(specs: Iterator[Any], name: str) -> list[tuple[Any, Any, int]]:
    """One placement for each mesh dimension; what is replicated is broadcast against what is sharded."""
    merged: dict[frozenset[int], tuple[Any, Any, int]] = {}
    for spec in specs:
        for group, placement, ndim in _by_dimension(spec.mesh, spec.placements, len(spec.shape)):
            ranks = frozenset(dist.get_process_group_ranks(group))
            _, before, before_ndim = merged.get(ranks, (group, placement, ndim))
            if before.is_replicate() or ranks not in merged:
                merged[ranks] = group, placement, ndim
            elif not placement.is_replicate() and (
                type(before) is not type(placement)
                or getattr(before, "dim", 0) - before_ndim != getattr(placement, "dim", 0) - ndim
            ):
                raise ValueError(
                    f"{name}: made of parts of DTensors placed as {before!r} and as {placement!r}, which no "
                    "one placement describes; pass device_mesh= and placements=, or leave it out by layers="
                )
    return list(merged.values())


def _everyone(mine: Any, group: Any) -> list[Any]:
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, mine, group=group)
    return values


def _alike(local: Tensor, group: Any) -> tuple[bool, bool]:
    """Whether the ranks have the same numbers but for rounding, by a sample; whether that proves anything.

    Numbers that are all one constant do not tell a replica from a shard.
    """
    values = local.detach().reshape(-1)
    if values.numel() > _SAMPLE:
        generator = torch.Generator().manual_seed(values.numel())
        places = torch.randint(values.numel(), (_SAMPLE,), generator=generator)
        values = values[places.to(values.device)]
    sampled = values.cpu().double()
    samples = _everyone((tuple(local.shape), str(local.dtype), sampled), group)
    shape, dtype, first = samples[0]
    if any((other[0], other[1]) != (shape, dtype) for other in samples):
        return False, True
    if first.numel() == 0:
        return True, False
    tolerance = torch.finfo(local.dtype).eps ** 0.5 * first.abs().nan_to_num(0, 0, 0).max()
    near = all(
        torch.allclose(other[2], first, rtol=0, atol=float(tolerance), equal_nan=True) for other in samples
    )
    return near, bool(first.min() != first.max())
