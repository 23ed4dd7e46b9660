"""RankTracker: near-rank of a model's activations at every step, read by forward hooks."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from bsgap_kernels.tracking import padding
from bsgap_kernels.tracking.alarms import Alarm, AlarmSink
from bsgap_kernels.tracking.background import BackgroundWriter
from bsgap_kernels.tracking.baseline import tell_saturation
from bsgap_kernels.tracking.cadence import Cadence
from bsgap_kernels.tracking.clock import StepClock
from bsgap_kernels.tracking.distributed import COMM_BUDGET, Reduction
from bsgap_kernels.tracking.header import facts_of, model_facts
from bsgap_kernels.tracking.joining import FIRST, UNAWARE, JoinedSteps
from bsgap_kernels.tracking.options import (
    check_counts,
    checked_model,
    checked_question,
    device_of,
    spectra_of,
)
from bsgap_kernels.tracking.padding import MASK_TRUE, MaskTrue
from bsgap_kernels.tracking.reader import TRAINING, ReadOptions, SiteReader
from bsgap_kernels.tracking.reading import Reading, SiteHead
from bsgap_kernels.tracking.records import DEFAULT_RTOLS, SiteRecord
from bsgap_kernels.tracking.rows import OVERHEAD, Row
from bsgap_kernels.tracking.sharding import Layouts, Placements
from bsgap_kernels.tracking.sinks import open_sinks
from bsgap_kernels.tracking.sites import UNFOLDS, Layers
from bsgap_kernels.tracking.sums import Sums


class RankTracker:
    """Count the near-rank of every nonlinearity's output at every training step.

        tracker = RankTracker(model, sinks="near_rank.jsonl")
        for x, y in batches:
            ...                                      # forward, backward, optimizer.step()
            tracker.step()

    A site is named `module#call`: a module called several times in one forward pass gives #0, #1, ...; where
    the nonlinearity is a function, the site is the input of the layer that consumes it, `module:input#call`.
    Each hook reduces its activation at once to a Gram matrix, so an in-place operation that follows cannot
    spoil the count and no activation is kept alive; `step` counts all sites together. Gradients are as
    without the tracker. Copies and pickles of the model have no hooks; where the model holds the tracker,
    theirs is a closed one, without sinks and numbers, whose `step` does nothing.

    Forward passes between two calls of `step` are micro-batches of one step and add up. Passes in eval mode
    or without gradients are not read unless inside `view`; passes that activation checkpointing repeats are
    not read twice.

    Args:
        model: the network, before `torch.compile` or data parallelism wraps it (DistributedDataParallel is
            unwrapped).
        layers: glob patterns over module names (`*` stops at a dot, `**` does not), regular expressions, or a
            function of name and module; None reads the outputs of all nonlinearities.
        unfold: `auto`, `flatten`, `channel`, `pool` or `token` (see `unfold_activation`).
        features_dim: the dimension of activations that holds their features (C or D of `unfold_activation`),
            at every site. Default: as the layer says that made the activation, or takes it: last of Linear,
            LayerNorm and embeddings, before the spatial dimensions of convolutions, second of batch and
            group norms. Without a graph of autograd the kinds of layers in the model decide.
        every: track every so many steps.
        rtol, atol: the threshold is max(atol, rtol·σ_max). Of several rtol the first is that of `near_rank`
            and `ratio`, the others give `near_rank@0.03` and the like.
        center: subtract the column means first.
        certify: prove every count. Without, `lower` and `upper` are 0 and min(shape), and float32 and 16-bit
            activations are summed in float32 with float64 promotion if rtol ≥ 8.3e-3, on a GPU 9.95e-3.
        metrics: names of `METRICS`, or "all" for near-rank and the columns of `spectral_summary`. Default:
            what one Gram matrix gives without eigenvalues, `DEFAULT_METRICS`.
        mask: name of the model's keyword argument that holds the padding mask (B, T): rows of `token` sites
            that are padding do not count. Masks that are added to scores, of 0 and −inf or far below 0, are
            known as such.
        mask_true: what true or 1 stands for in any other mask, `valid` tokens or `padding`. Default: padding
            for torch's `key_padding_mask`, else valid. In a model with an encoder and a decoder a mask tells
            of the encoder's tokens, or of the decoder's if its name begins with `decoder` or `tgt`.
        micro_batches: forward passes in a step. Above 1, or with a process group, a site with fewer rows than
            features holds its n × n Gram matrix, because only that adds up (see `max_features`).
        sample_rows: read only every so many examples of the batch. It shifts what is counted; rows say so.
        max_features: sites with more features than this are refused where their Gram matrix must add up,
            unless `sketch` says to how many features they are projected first (a Gaussian sketch: counts and
            bounds are the sketch's, and rows say so).
        max_overhead: track as often as takes no more than this share of a step (0.01: 1 %), instead of
            `every` step; only the cadence changes, alike on every rank, and each change is a row
            `cadence.every`.
        replay: [(step, every), ...] of an earlier run, to track the steps that it tracked.
        process_group: "world" or a group: numbers are of the rows of all ranks. Each rank calls `step` each
            time (but for ranks that have run out of input inside `Join([model, tracker])` of
            torch.distributed.algorithms.join); one asynchronous all-reduce of at most `comm_budget` bytes a
            tracked step, whose numbers are there at the next one. Sinks and alarms are those of rank 0.
        device_mesh, placements: for models whose tensor parallelism is made by hand: the mesh, and how
            activations lie on it, by patterns of site names: {"*.act": Shard(-1)}. Others tell by themselves
            (see `Layouts`), and activations that nothing tells of are refused. With its features on p ranks,
            an activation of m·n numbers costs one exchange a pass: m·n·(p − 1)/p² numbers sent by each rank,
            or (p − 1)/p times m·n where `process_group` does not hold them all. Replicas send nothing: each
            of their ranks reads a p-th of the rows.
        sinks: where rows go in the background: "file.jsonl", "file.parquet", "tensorboard:dir", ... or a
            list.
        alarms: see `Alarm`.
        run, attempt, first_step: names of the rows; a resumed run gives its attempt and the step it starts
            at.
        verbose: print sites and bytes once.
        example: an input (or tuple of inputs) on which functional nonlinearities are looked for at once;
            needed for those of a model that is compiled from its first step on.

    Raises:
        ValueError, TypeError: an option out of range, or a pattern that matches nothing (nearest names are
            listed).
        RuntimeError: of `step`, if no hook ever fired: the model was not called in training mode, or it was
            compiled before the tracker was attached.

    Cost: a Gram matrix a site and pass, a count a site and step. On a GPU nothing waits but `collect` and,
    with a process group, the step after a tracked one: for that one's all-reduce, whose header it reads.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Layers | None = None,
        unfold: str = "auto",
        features_dim: int | None = None,
        every: int = 1,
        rtol: float | Sequence[float] = DEFAULT_RTOLS,
        atol: float | None = None,
        center: bool = False,
        certify: bool = False,
        metrics: Sequence[str] | str | None = None,
        mask: str | None = None,
        mask_true: MaskTrue | None = None,
        micro_batches: int = 1,
        sample_rows: int = 1,
        max_features: int = 4096,
        sketch: int | None = None,
        max_overhead: float | None = None,
        replay: Sequence[tuple[int, int]] | None = None,
        process_group: dist.ProcessGroup | Literal["world"] | None = None,
        comm_budget: int = COMM_BUDGET,
        device_mesh: DeviceMesh | None = None,
        placements: Placements | None = None,
        sinks: Any = (),
        alarms: Sequence[Alarm] = (),
        run: str = "run",
        attempt: int = 0,
        first_step: int = 0,
        verbose: bool = True,
        example: Any = None,
    ) -> None:
        model = checked_model(model)
        check_counts(
            every=every, micro_batches=micro_batches, sample_rows=sample_rows, max_features=max_features,
            sketch=1 if sketch is None else sketch,
        )  # fmt: skip
        if unfold not in UNFOLDS:
            raise ValueError(f"unfold: got {unfold!r}, expected one of {', '.join(UNFOLDS)}")
        if features_dim is not None and (isinstance(features_dim, bool) or not isinstance(features_dim, int)):
            raise TypeError(f"features_dim: got {features_dim!r}, expected an int or None")
        if features_dim is not None and unfold in ("flatten", "token"):
            raise ValueError(f"features_dim: got {features_dim}, which unfold={unfold!r} has no use of")
        if mask_true is not None and mask_true not in MASK_TRUE:
            raise ValueError(f"mask_true: got {mask_true!r}, expected one of {', '.join(MASK_TRUE)}")
        if max_overhead is not None and not 0 < max_overhead < math.inf:
            raise ValueError(f"max_overhead: got {max_overhead!r}, expected a positive share such as 0.01")
        question = checked_question(rtol, atol, center, certify, metrics)
        self.question = question
        self._verbose = verbose
        self._spectra = spectra_of(process_group, comm_budget)
        options = ReadOptions(
            unfold=unfold,
            features_dim=features_dim,
            mask_true=padding.meaning_of(mask or "", mask_true),
            question=question,
            adds_up=micro_batches > 1 or self._spectra is not None,
            sample_rows=sample_rows,
            max_features=max_features,
            sketch=sketch,
        )
        timed = max_overhead is not None or self._spectra is not None
        self._clock = StepClock(device_of(model)) if timed else None
        group = None if self._spectra is None else self._spectra.group
        layouts = Layouts(model, group, device_mesh, placements)
        self._reader = SiteReader(model, layers, options, mask, example, self._clock, layouts)
        try:
            self._writer = self._open_writer(sinks, alarms, run, attempt, first_step)
        except BaseException:
            self._reader.close()
            raise
        self._cadence = Cadence(every, max_overhead, replay)
        self._step = first_step
        self._passes = 0  # until the last step
        self._passes_a_step = micro_batches
        self._join_config: Any = None  # set by Join
        self._join_group = process_group
        self._closed = False
        self._enabled = True
        self._detached = False
        self._due = self._cadence.due(first_step)
        self._flight: _Flight | None = None
        self._announced = False
        self._firsts: dict[str, Reading] = {}
        self._described: set[tuple[str, str]] = set()  # views and sites whose header is written
        self._model_facts = model_facts(model)
        self._stepped: Reading | None = None  # of the last `step`, for `collect`
        self._listen()

    def _open_writer(
        self,
        sinks: Any,
        alarms: Sequence[Alarm],
        run: str,
        attempt: int,
        first_step: int,
    ) -> BackgroundWriter | None:
        rank = 0 if self._spectra is None else self._spectra.rank
        opened = list(open_sinks(sinks, run=run, attempt=attempt, first_step=first_step)) if rank == 0 else []
        if rank == 0 and (opened or alarms):  # values that are not finite are always said
            opened.insert(0, AlarmSink(alarms, rank=rank))
        return BackgroundWriter(opened) if opened else None

    def __enter__(self) -> RankTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_reader"):
            self._reader.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> RankTracker:
        return _closed()

    def __reduce__(self) -> tuple[Any, ...]:
        return _closed, ()

    def close(self) -> None:
        """Remove every hook from the model and write what is left; what was read stays readable.

        With a process group every rank has to close: the last step is still on its way.
        """
        self._closed = True
        self._reader.close()
        try:
            self._land()
        finally:
            self._close_writer()

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def sites(self) -> list[str]:
        """Names of the sites met so far, in forward order (empty before the first forward pass)."""
        return self._reader.names()

    @property
    def every(self) -> int:
        """The present interval between tracked steps."""
        return self._cadence.every

    @contextmanager
    def view(self, label: str) -> Iterator[None]:
        """Record under another label inside the block, such as `probe` for a fixed batch, in any mode."""
        previous, self._reader.view = self._reader.view, label
        self._listen()
        if self._detached:
            self._reader.attach()
        try:
            yield
        finally:
            self._reader.view = previous
            self._listen()
            if self._detached and previous is None:
                self._reader.detach()

    @contextmanager
    def paused(self, when: bool = True) -> Iterator[None]:
        """Record nothing inside the block (evaluation passes), or go on as before if `when` is false."""
        previous, self._enabled = self._enabled, self._enabled and not when
        self._listen()
        try:
            yield
        finally:
            self._enabled = previous
            self._listen()

    @contextmanager
    def detached(self, when: bool = True) -> Iterator[None]:
        """Have no hooks on the model inside the block but inside `view`: for training that is not tracked.

        A pause leaves the hooks on; without them a pass costs what it does without a tracker. For models that
        are not compiled, and with functional nonlinearities that `example` has shown. If `when` is false,
        nothing changes.
        """
        previous, self._detached = self._detached, self._detached or when
        if self._detached:
            self._reader.detach()
        try:
            yield
        finally:
            self._detached = previous
            if not previous:
                self._reader.attach()

    def _listen(self) -> None:
        self._reader.recording = self._enabled and (self._due or self._reader.view is not None)

    def begin_pass(self) -> None:
        """Say that a forward pass begins where parts of the model are called and the whole is not.

        The calls of each module are numbered from 0 in each pass.
        """
        self._reader.begin(None, torch.is_grad_enabled(), False)

    def flush(self, timeout: float | None = None) -> None:
        """Wait until the sinks hold every row so far, as where a checkpoint is made; on every rank."""
        self._land()
        if self._writer is not None:
            self._writer.flush(timeout)

    def step(self) -> None:
        """End a training step: count what was read since the last one, and hand the numbers on.

        Call it once after the optimizer's step, on every rank. Does not wait for the device, unless a process
        group has an earlier step under way.
        """
        if self._closed:
            return
        if not self._reader.passes and self._due and self._enabled and self._spectra is None:
            raise RuntimeError(_never_fired())
        self._stepped = self._own_step()

    def collect(self, view: str = TRAINING) -> dict[str, SiteRecord]:
        """End a step, or the reading of another view, and wait for its numbers: records by site.

        After `step`, and before another forward pass, the records are those of the step that it ended. With a
        process group no rank knows whether others have read on: there that call counts as a step without
        reads.
        """
        if view != TRAINING:
            reading = self._finish(view)
        elif self._stepped is not None and self._spectra is None and self._reader.passes == self._passes:
            reading = self._stepped
        else:
            reading = self._own_step()
            self._stepped = None
        if self._flight is not None:
            landed, reading = reading, self._land()
            if reading is not None and not reading.heads:
                reading = landed
        return {} if reading is None else reading.records()

    def join_hook(self, **_: Any) -> JoinedSteps:
        """Return the hook of `torch.distributed.algorithms.join.Join([model, tracker])`."""
        return JoinedSteps(self._end_step, lambda: self._passes_a_step)

    @property
    def join_device(self) -> torch.device:
        """The device of the model."""
        return self._reader.device

    @property
    def join_process_group(self) -> Any:
        """The process group as it was given: `Join` wants that of the model."""
        named = self._join_group is None or self._join_group == "world"
        return dist.group.WORLD if named else self._join_group

    def _own_step(self) -> Reading | None:
        """End a step at which this rank has read its part."""
        config = self._join_config
        if self._spectra is not None and self._reader.in_join and not (config and config.enable):
            raise RuntimeError(UNAWARE)
        if config is not None and config.enable and config.is_first_joinable:
            raise RuntimeError(FIRST)
        passes = self._reader.passes
        self._passes, self._passes_a_step = passes, max(1, passes - self._passes)
        return self._end_step()

    def _end_step(self) -> Reading | None:
        tracked = self._due and self._enabled
        clock = self._clock
        beginning = None if clock is None else clock.begin()
        if tracked:
            reading = self._finish(TRAINING)
        else:
            reading = None
            self._reader.forget(TRAINING)  # read before a pause in which the step ends: of no tracked step
            self._land()  # of an earlier step: its rows are written, they are no numbers of this one
        if not self._reader.settled:
            self._reader.end_step()
        if clock is not None and beginning is not None:
            clock.end(beginning)
            clock.end_step(tracked=tracked)
            clock.device = self._reader.device  # models may move
            known = clock.finished()
            if self._spectra is None:
                for step_seconds, own_seconds in known:
                    self._set_cadence(step_seconds, own_seconds)
        self._step += 1
        due = self._cadence.due(self._step)
        if due != self._due:
            self._due = due
            self._listen()
        return reading

    def _finish(self, view: str) -> Reading | None:
        """Count what a view has read; with other ranks: send it, and count what was under way before."""
        sites = self._reader.take(view)
        if self._spectra is None:
            if not sites:
                return None
            heads, seconds = [site.head for site in sites], [site.seconds for site in sites]
            reading = self._count(self._step, view, heads, seconds, [site.sums for site in sites])
            self._reader.release(sites)
            if not self._announced:
                self._announce()
            return reading
        landed = self._land()
        work = self._spectra.start(
            {site.head.name: site.sums for site in sites},
            sites[0].sums.gram.device if sites else self._reader.device,
            {site.head.name: site.head.note for site in sites},
            (0.0, 0.0) if self._clock is None else self._clock.latest,
        )
        spent = {site.head.name: site.seconds for site in sites}
        self._flight = _Flight(self._step, view, work, spent, {site.head.name: site.head for site in sites})
        self._reader.release(sites)
        self._announce()
        return landed

    def _land(self) -> Reading | None:
        """Count what the all-reduce under way, if any, has added up."""
        if self._flight is None:
            return None
        flight, self._flight = self._flight, None
        found, (step_seconds, own_seconds) = flight.work.wait()
        if step_seconds > 0:
            self._set_cadence(step_seconds, own_seconds)
        heads = []
        for name, sums in found.items():
            # A rank's own site may differ from what the ranks have agreed upon, or be missing.
            own = flight.heads.get(name, SiteHead(name, sums.n, ""))
            heads.append(own._replace(n=sums.n, note=flight.work.layout[name].note))
        seconds = [flight.seconds.get(name, 0.0) for name in found]
        return self._count(flight.step, flight.view, heads, seconds, list(found.values()))

    def _count(
        self, step: int, view: str, heads: list[SiteHead], seconds: list[float], sums: list[Sums]
    ) -> Reading:
        reading = Reading(step, view, heads, seconds, sums, self.question)
        if view not in self._firsts:
            self._firsts[view] = reading
            speaks = self._verbose and (self._spectra is None or self._spectra.rank == 0)
            if view == TRAINING and speaks:
                reading.tell = partial(tell_saturation, self.question)
        if self._writer is not None:
            for head, own in zip(heads, sums, strict=True):
                if (view, head.name) not in self._described:
                    self._described.add((view, head.name))
                    reading.described[head.name] = facts_of(head, own, self.question) | self._model_facts
            self._writer.put(reading.rows)
        return reading

    def _set_cadence(self, step_seconds: float, own_seconds: float) -> None:
        before = self._cadence.every
        if self._writer is not None:
            share = Row(self._step, "", OVERHEAD, own_seconds / max(step_seconds - own_seconds, 1e-9))
            self._writer.put(lambda: [share])
        self._cadence.observe(self._step, step_seconds, own_seconds)
        if self._cadence.every != before and self._writer is not None:
            row = Row(self._step, "", "cadence.every", self._cadence.every)
            self._writer.put(lambda: [row])

    def _announce(self) -> None:
        """Say once what tracking holds and sends, as soon as the sites are known."""
        if self._announced or not self._verbose or not self._reader.names():
            return
        self._announced = True
        if self._spectra is None or self._spectra.rank == 0:
            missing = "; functional nonlinearities in compiled code are found by example= only"
            note = missing if self._reader.unsearched else ""
            print(f"RankTracker: {self.cost()}{note}", file=sys.stderr, flush=True)

    def baseline(self, view: str = TRAINING) -> dict[str, SiteRecord]:
        """Return the records of the first reading of a view, which later ones are compared with; or {}.

        Waits for the device. A resumed run has its own.
        """
        first = self._firsts.get(view)
        return {} if first is None else first.records()

    def cost(self) -> str:
        """Sites, bytes held and bytes sent a tracked step, in one line."""
        sent = 0 if self._spectra is None else self._spectra.bytes_sent
        return (
            f"{len(self._reader.names())} sites, {_size(self._reader.nbytes)} held"
            + (f", {_size(sent)} sent by each rank a tracked step" if self._spectra is not None else "")
            + (", every step" if self._cadence.every == 1 else f", every {self._cadence.every} steps")
        )

    def state_dict(self) -> dict[str, Any]:
        """Step and cadence, for a run that is resumed; plain numbers."""
        return {"step": self._step, "due": self._due, "cadence": self._cadence.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the step, and with the cadence, of the run that saved the state."""
        self._step = int(state["step"])
        self._cadence.load_state_dict(state["cadence"])
        # Not asked of the cadence again: it has said so of this step already, and tells each step once.
        self._due = bool(state["due"])
        self._listen()


def _closed() -> RankTracker:
    """What a tracker becomes where it is copied or pickled: files and threads have no copies."""
    tracker = RankTracker(nn.ReLU(), verbose=False)
    tracker.close()
    return tracker


@dataclass(frozen=True)
class _Flight:
    """A step whose sums are on their way through the other ranks."""

    step: int
    view: str
    work: Reduction
    seconds: dict[str, float]
    heads: dict[str, SiteHead]


def _never_fired() -> str:
    return (
        "RankTracker: no forward pass was seen in this step. Call the model in training mode and with "
        "gradients (others are read only inside view()), and attach the tracker before the first compiled "
        "call of the model, or of another of its class: hooks added to code that is compiled already do not "
        "fire (torch.compiler.reset() after attaching has it compiled anew)"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.1f} KiB"
