"""Sums of all ranks: one packed asynchronous all-reduce a tracked step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bsgap_kernels.tracking.sums import ADDITIONS, Sums

COMM_BUDGET = 256 << 20
"""Bytes a rank may send a tracked step, unless told otherwise."""

# What precedes the sites: two numbers of the caller's (seconds), whether some rank has a site that the agreed
# layout lacks, and then for each site how many ranks have read it.
_CALLERS, _LACKING, _HEADER = 2, 2, 3


@dataclass(frozen=True)
class Shape:
    """What a site's sums consist of; the same on every rank."""

    n: int
    sums: bool
    magnitudes: bool
    note: str

    @property
    def elements(self) -> int:
        """float64 numbers in the buffer: totals, vectors, one triangle."""
        return 3 + self.n * (self.sums + self.magnitudes) + self.n * (self.n + 1) // 2


@dataclass
class Reduction:
    """An all-reduce under way."""

    work: Any
    buffer: Tensor
    layout: dict[str, Shape]
    owner: DistributedSpectra

    def wait(self) -> tuple[dict[str, Sums], list[float]]:
        """Sums over all ranks of the sites that some rank has read, and the caller's numbers, rank averages.

        On a GPU the current stream waits, the host does so only to read the header.
        """
        self.work.wait()
        world = self.owner.world
        place = _HEADER + len(self.layout)
        header = self.buffer[:place].tolist()
        if header[_LACKING] > 0:
            self.owner.settled = False  # the same on every rank: all agree anew before the next one
        found = {}
        for (name, shape), readers in zip(self.layout.items(), header[_HEADER:], strict=True):
            part = self.buffer[place : place + shape.elements]
            place += shape.elements
            if readers == 0:
                continue
            sums = Sums.zeros(shape.n, part.device, sums=shape.sums, magnitudes=shape.magnitudes)
            vectors = sums.tensors()[1:]
            taken = 0
            for vector in vectors:
                vector.copy_(part[taken : taken + vector.numel()])
                taken += vector.numel()
            sums.gram.view(-1)[_triangle(shape.n, part.device)] = part[taken:]
            sums.totals[ADDITIONS] += world
            found[name] = sums
        return found, [value / world for value in header[:_CALLERS]]


class DistributedSpectra:
    """Adds up the sums of sites over the ranks of a process group.

    Every rank calls `start` once a tracked step, also one that has read nothing: ranks agree on the sites
    (one blocking exchange at the first step, and after one at which a rank met a new site), and a rank
    without rows adds zeros. One buffer of float64 is sent: of each site its totals, sums, and the triangle of
    its Gram matrix, 8·(n² + n)/2 bytes and little more, so that counts are those of one process on all rows,
    and certificates hold.

    Args:
        group: a process group; None makes one of all ranks, apart from the one that the training uses.
        comm_budget: bytes to send a step at most.

    Raises:
        ValueError: of `start`, on every rank: more bytes than `comm_budget`, or a site whose features differ
            between ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, comm_budget: int = COMM_BUDGET) -> None:
        made: Any = dist.new_group() if group is None else group
        self.group: dist.ProcessGroup = made
        self.world: int = self.group.size()
        self.rank: int = self.group.rank()
        self.comm_budget = comm_budget
        self.layout: dict[str, Shape] = {}
        self.settled = False
        self.lost = 0

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank puts into the all-reduce of a step; 0 before the first."""
        return _bytes_of(self.layout) if self.layout else 0

    def start(
        self,
        sites: Mapping[str, Sums],
        device: torch.device,
        notes: Mapping[str, str] | None = None,
        numbers: tuple[float, float] = (0.0, 0.0),
    ) -> Reduction:
        """Begin to add up the sums of this step; they may change as soon as this returns."""
        own = {
            name: Shape(s.n, s.sums is not None, s.magnitudes is not None, (notes or {}).get(name, ""))
            for name, s in sites.items()
        }
        if not self.settled:
            self.layout = self._agree({**self.layout, **own})
            self.settled = bool(self.layout)
        # A site that came with other features is refused where all ranks hear of it: when they agree anew.
        lacking = [name for name, shape in own.items() if self.layout.get(name) != shape]
        if lacking:
            self.lost += len(lacking)
            warnings.warn(
                f"bsgap_kernels: {', '.join(lacking)} first met on this rank after the ranks had agreed on "
                f"the sites; not counted in this step ({self.lost} so lost in all), counted from the next on",
                stacklevel=2,
            )
        read = [float(own.get(name) == shape) for name, shape in self.layout.items()]
        parts = [torch.tensor([*numbers, float(bool(lacking)), *read], dtype=torch.float64).to(device)]
        for name, shape in self.layout.items():
            if own.get(name) != shape:
                parts.append(torch.zeros(shape.elements, dtype=torch.float64, device=device))
                continue
            gram, *vectors = sites[name].tensors()
            parts += [x.to(device) for x in (*vectors, gram.view(-1)[_triangle(shape.n, gram.device)])]
        buffer = torch.cat(parts)
        return Reduction(dist.all_reduce(buffer, group=self.group, async_op=True), buffer, self.layout, self)

    def _agree(self, own: dict[str, Shape]) -> dict[str, Shape]:
        every: list[dict[str, Shape]] = [{} for _ in range(self.world)]
        dist.all_gather_object(every, own, group=self.group)
        layout: dict[str, Shape] = {}
        for rank, shapes in enumerate(every):
            for name, shape in shapes.items():
                if layout.setdefault(name, shape) != shape:
                    raise ValueError(
                        f"{name}: {shape} on rank {rank}, but {layout[name]} on another; ranks must unfold "
                        "to the same features"
                    )
        needed = _bytes_of(layout)
        if needed > self.comm_budget:
            widest = max(layout, key=lambda name: layout[name].n)
            raise ValueError(
                f"comm_budget: {len(layout)} sites need {needed / 2**20:.1f} MiB a rank and step, more than "
                f"the {self.comm_budget / 2**20:.1f} MiB allowed; the widest is {widest} with "
                f"{layout[widest].n} features. Unfold by channel, choose layers, raise comm_budget, or name "
                "sketch= with a smaller max_features="
            )
        return layout


def _bytes_of(layout: Mapping[str, Shape]) -> int:
    return 8 * (_HEADER + sum(1 + shape.elements for shape in layout.values()))


@lru_cache(maxsize=256)
def _triangle(n: int, device: torch.device) -> Tensor:
    """Places of the lower triangle in an n × n matrix."""
    rows, columns = torch.tril_indices(n, n, device=device)
    return rows * n + columns
