"""Training by several processes: what torchrun sets, each rank's share of a batch, and errors told to all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bsgap_kernels.lab.checks import UserError

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for one that has stopped without a word (on its own node torchrun is quicker)."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one network together; by default the only one."""

    rank: int = 0
    world: int = 1
    group: Any = None
    """A process group of the tracker's own, beside the default one of the training."""

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """This rank's contiguous part of so many rows; sizes differ by one at most, and may be 0."""
        return slice(self.rank * rows // self.world, (self.rank + 1) * rows // self.world)

    def total(self, values: Tensor) -> Tensor:
        """Sums over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def from_main(self, value: T) -> T:
        """What rank 0 gave, on every rank."""
        if self.world == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model to train: itself, or wrapped so that gradients are averaged over the ranks."""
        if self.world == 1:
            return model
        ids = [torch.cuda.current_device()] if device.type == "cuda" else None
        # Buffers are equal on all ranks: batch norm takes its statistics over all of them.
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)

    def together(self, work: Callable[[], T]) -> T:
        """Do some work on every rank; a mistake on one becomes a mistake on all, and nobody waits for it.

        Raises:
            UserError: on every rank, with the sentence of the first rank that had one.
            RuntimeError: on ranks where nothing was wrong, if another failed with anything else.
        """
        if self.world == 1:
            return work()
        failed: Exception | None = None
        result: T | None = None
        try:
            result = work()
        except Exception as error:
            failed = error
        mine = None if failed is None else (isinstance(failed, (UserError, OSError)), str(failed))
        every: list[tuple[bool, str] | None] = [None] * self.world
        dist.all_gather_object(every, mine)
        if failed is not None and not isinstance(failed, (UserError, OSError)):
            raise failed
        for rank, found in enumerate(every):
            if found is not None and found[0]:
                raise UserError(found[1] if rank == 0 else f"{found[1]} (rank {rank})") from failed
            if found is not None:
                raise RuntimeError(f"rank {rank} failed: {found[1]}")
        return result  # type: ignore[return-value]


ALONE = Ranks()


@contextmanager
def launched(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started (gloo on a CPU, NCCL on CUDA), or this process alone.

    Where torch.distributed is initialised already it is used as it is, and stays so.

    Raises:
        UserError: torchrun's variables are not what is expected, the ranks do not find each other, or there
            are more processes on this node than CUDA devices.
    """
    if dist.is_available() and dist.is_initialized():
        yield _ranks()
        return
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield ALONE
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= devices:
            raise UserError(f"device: this node has {devices} CUDA devices, too few for its process {local}")
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:  # DistError is a RuntimeError
        raise UserError(f"torchrun: the ranks did not find each other: {error}") from error
    try:
        yield _ranks()
    except UserError:
        dist.destroy_process_group()  # every rank is here
        raise
    dist.destroy_process_group()


def _ranks() -> Ranks:
    world = dist.get_world_size()
    return Ranks(dist.get_rank(), world, dist.new_group()) if world > 1 else ALONE
