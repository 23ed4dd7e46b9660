"""The numbers of one finished step on their way to the host."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bsgap_kernels.tracking.clock import beside_captures
from bsgap_kernels.tracking.records import Numbers, Question, SiteRecord, ask, record_of
from bsgap_kernels.tracking.rows import HEADER, Row
from bsgap_kernels.tracking.sums import Sums


class SiteHead(NamedTuple):
    """What is known of a site once and for all."""

    name: str
    n: int
    note: str  # what is not as it stands: sampling, sketch
    unfold: str = ""
    dtype: str = ""


class Reading:
    """Every site of one step: counted on the device, brought to the host when asked for.

    A copy to the host is started at once and waited for by `records` alone, on whichever thread that is.
    """

    def __init__(
        self,
        step: int,
        view: str,
        heads: Sequence[SiteHead],
        seconds: Sequence[float],
        sums: Sequence[Sums],
        question: Question,
    ) -> None:
        self.step = step
        self.view = view
        self.heads = heads
        self.seconds = seconds
        self.question = question
        self._groups: list[tuple[list[int], Numbers]] = []
        self._events: list[torch.cuda.Event] = []
        self._records: dict[str, SiteRecord] | None = None
        self.described: dict[str, dict[str, object]] = {}  # facts of the sites whose header is due
        self.tell: Callable[[dict[str, SiteRecord]], None] | None = None  # once, when they are there
        self._lock = threading.Lock()
        by_device: dict[torch.device, list[int]] = {}
        for index, site in enumerate(sums):
            by_device.setdefault(site.gram.device, []).append(index)
        for device, members in by_device.items():
            numbers = ask([sums[i] for i in members], question, float32_sums=True)
            self._groups.append(
                (members, numbers if device.type == "cpu" else self._to_host(numbers, device))
            )

    def _to_host(self, numbers: Numbers, device: torch.device) -> Numbers:
        def copy(x: Tensor) -> Tensor:
            host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
            return host.copy_(x, non_blocking=True)

        moved = numbers.map(copy)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        self._events.append(event)
        return moved

    def _wait(self) -> None:
        if self._events:
            with beside_captures():
                for event in self._events:
                    event.synchronize()

    def records(self) -> dict[str, SiteRecord]:
        """The record of each site, in forward order; waits for the device. For several threads at once."""
        with self._lock:
            if self._records is None:
                self._wait()
                found: dict[int, SiteRecord] = {}
                for members, numbers in self._groups:
                    for place, index in enumerate(members):
                        n, seconds = self.heads[index].n, self.seconds[index]
                        found[index] = record_of(place, numbers, n, self.question, seconds)
                self._records = {self.heads[index].name: found[index] for index in sorted(found)}
                self._groups.clear()
                if self.tell is not None:
                    self.tell(self._records)
            return self._records

    def rows(self) -> list[Row]:
        """The same as rows: headers where due, near_rank, ratio, bounds if certified, others by name."""
        notes = {head.name: head.note for head in self.heads}
        result = []
        for site, record in self.records().items():
            if site in self.described:
                (m, n), note = record.shape, notes[site]
                header = {"m": m, "n": n, **self.described[site], **({"note": note} if note else {})}
                result.append(Row(self.step, site, f"{self.view}.{HEADER}", 1.0, json.dumps(header)))
            values: dict[str, float] = {"near_rank": record.near_rank, "ratio": record.ratio}
            if self.question.certify:
                values |= {"lower": record.lower, "upper": record.upper}
            for metric, value in (values | record.summary).items():
                result.append(Row(self.step, site, f"{self.view}.{metric}", value, notes[site]))
        return result
