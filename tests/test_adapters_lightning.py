"""RankCallback against the real Lightning, as `lightning` and as `pytorch_lightning`."""

from __future__ import annotations

import copy
import doctest
import importlib
import itertools
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from adapter_oracle import Counts, Kept, hooks, near_rank
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("lightning", reason="needs lightning: pip install 'bsgap_kernels[lightning]'")


from lightning.pytorch import callbacks

from bsgap_kernels.tracking.adapters import lightning
from bsgap_kernels.tracking.adapters._holder import NewestRatios
from bsgap_kernels.tracking.adapters.lightning import RankCallback
from bsgap_kernels.tracking.rows import Row

RTOL = 0.05
LIBRARIES = ("lightning.pytorch", "pytorch_lightning")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Lightning's advice on workers, loggers and progress bars is about no test."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pytorch_)?lightning\.")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


class Net(nn.Module):
    """A convolution and a linear layer that share one ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.fc = nn.Linear(6 * 4 * 4, 12)
        self.act = nn.ReLU()
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        return self.head(self.act(self.fc(x.flatten(1))))


def make_module(library: ModuleType, through_module: bool = False) -> Any:
    """A LightningModule around Net that keeps what its ReLU gave in each optimizer step's batches."""

    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(19)  # no singular value of these tests is near the threshold
            self.net = Net()
            self.kept: dict[int, list[Tensor]] = {}
            self.fail_at: int | None = None

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if self.global_step == self.fail_at:
                raise KeyError("planned")
            kept = self.kept.setdefault(self.global_step, [])
            handle = self.net.act.register_forward_hook(
                lambda module, args, output: kept.append(
                    output.detach().movedim(1, -1).flatten(0, -2).clone()
                )
            )
            loss = (self(batch) if through_module else self.net(batch)).square().mean()
            handle.remove()
            return loss

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.train()  # as for dropout in validation: recorded unless the tracker is paused
            self(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def expected(module: Any, prefix: str = "net.") -> Counts:
    return {
        step: {f"{prefix}act#{call}": near_rank(kept[call::2], RTOL) for call in (0, 1)}
        for step, kept in module.kept.items()
    }


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def counts_of(rows: list[dict[str, Any]]) -> Counts:
    kept = Kept()
    kept.write([Row(row["step"], row["site"], row["metric"], row["value"]) for row in rows])
    return kept.counts()


def loader(batches: int = 5, size: int = 7) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(torch.randn(batches * size, 1, 6, 6, generator=generator), batch_size=size)


def make_trainer(library: ModuleType, folder: Path, callbacks: list[Any], **options: Any) -> Any:
    options = {"devices": 1, "logger": False, "enable_checkpointing": False, **options}
    return library.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.parametrize("through_module", [False, True])
@pytest.mark.parametrize("name", LIBRARIES)
def test_every_optimizer_step_is_counted_once(name: str, through_module: bool, tmp_path: Path) -> None:
    """Batches that are accumulated add up; the last step of an epoch has one batch where others have two."""
    library, sink = importlib.import_module(name), Kept()
    module = make_module(library, through_module)
    ranks = RankCallback(rtol=RTOL, sinks=[sink])
    trainer = make_trainer(library, tmp_path, [ranks], max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(module, loader(), loader(2))
    assert len(module.kept) == 6
    assert sink.counts() == expected(module)
    assert sink.closed
    assert hooks(module) == 0


class KeepRank(RankCallback):
    """Writes down what this rank's module kept."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        torch.save(pl_module.kept, Path(trainer.default_root_dir) / f"{trainer.global_rank}.pt")


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="forks, which CUDA does not survive")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_two_ranks_count_the_rows_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a forked pool of threads would hang
    library = importlib.import_module(LIBRARIES[0])
    ranks = KeepRank(rtol=RTOL, process_group="world", sinks=[tmp_path / "rows.jsonl"])
    trainer = make_trainer(
        library, tmp_path, [ranks], max_epochs=1, accumulate_grad_batches=2, devices=2, strategy="ddp_fork"
    )
    trainer.fit(make_module(library), loader())
    kept = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert not torch.equal(kept[0][0][0], kept[1][0][0])
    module = make_module(library)
    module.kept = {step: kept[0][step] + kept[1][step] for step in kept[0]}
    assert counts_of(read(tmp_path / "rows.jsonl")) == expected(module)


class Save(callbacks.Callback):
    """Makes a checkpoint after two optimizer steps, and notes which rows of the file outlive it."""

    def __init__(self, rows: Path) -> None:
        self.rows = rows
        self.written: list[int] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 2 and not self.written:
            trainer.save_checkpoint(self.rows.with_suffix(".ckpt"))
            self.written = [row["step"] for row in read(self.rows) if row["metric"] == "batch.ratio"]


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Two batches a step; the first run goes a step further than its checkpoint, the second does it again."""
    library, path = importlib.import_module(LIBRARIES[0]), tmp_path / "rows.jsonl"
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 2}
    save, modules = Save(path), [make_module(library) for _ in range(2)]
    ranks = RankCallback(rtol=RTOL, sinks=path)
    make_trainer(library, tmp_path, [ranks, save], max_steps=3, **options).fit(modules[0], loader(6))
    ranks = RankCallback(rtol=RTOL, sinks=path)
    make_trainer(library, tmp_path, [ranks], max_steps=5, **options).fit(
        modules[1], loader(6), ckpt_path=path.with_suffix(".ckpt")
    )
    assert save.written == [0, 0, 1, 1]
    rows = read(path)
    assert {row["step"]: row["attempt"] for row in rows if row["site"]} == {0: 0, 1: 0, 2: 1, 3: 1, 4: 1}
    del modules[0].kept[2]
    assert counts_of(rows) == expected(modules[0]) | expected(modules[1])


def test_a_checkpoint_of_a_run_without_it_gives_the_step(tmp_path: Path) -> None:
    library, sink = importlib.import_module(LIBRARIES[0]), Kept()
    trainer = make_trainer(library, tmp_path, [], max_steps=3)
    trainer.fit(make_module(library), loader())
    trainer.save_checkpoint(tmp_path / "without.ckpt")
    trainer = make_trainer(library, tmp_path, [RankCallback(rtol=RTOL, sinks=[sink])], max_steps=5)
    trainer.fit(make_module(library), loader(), ckpt_path=tmp_path / "without.ckpt")
    assert list(sink.counts()) == [3, 4]


def test_a_new_trainer_begins_at_the_first_step(tmp_path: Path) -> None:
    library = importlib.import_module(LIBRARIES[0])
    ranks = RankCallback(rtol=RTOL)
    for _ in range(2):
        ranks.options["sinks"] = sink = Kept()
        make_trainer(library, tmp_path, [ranks], max_steps=2).fit(make_module(library), loader())
        assert list(sink.counts()) == [0, 1]


def test_a_fit_that_does_nothing_leaves_nothing(tmp_path: Path) -> None:
    library, sink = importlib.import_module(LIBRARIES[0]), Kept()
    module = make_module(library)
    make_trainer(library, tmp_path, [RankCallback(sinks=sink)], max_steps=0).fit(module, loader())
    assert sink.closed
    assert hooks(module) == 0


@pytest.mark.parametrize("when", ["training", "sanity check"])
def test_an_exception_closes_the_tracker(when: str, tmp_path: Path) -> None:
    library, sink = importlib.import_module(LIBRARIES[0]), Kept()
    module = make_module(library)
    if when == "training":
        module.fail_at = 2
    else:
        module.validation_step = lambda batch, batch_idx: {}["planned"]
    ranks = RankCallback(rtol=RTOL, sinks=[sink])
    with pytest.raises(KeyError, match="planned"):
        make_trainer(library, tmp_path, [ranks], max_epochs=1).fit(module, loader(), loader(1))
    assert sink.closed
    assert hooks(module) == 0
    assert list(sink.counts()) == ([0, 1] if when == "training" else [])


def test_a_second_fit_goes_on_in_the_same_file(tmp_path: Path) -> None:
    library, path = importlib.import_module(LIBRARIES[0]), tmp_path / "rows.jsonl"
    module = make_module(library)
    trainer = make_trainer(library, tmp_path, [RankCallback(rtol=RTOL, sinks=path)], max_epochs=1)
    trainer.fit(module, loader(2))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(2))
    assert counts_of(read(path)) == expected(module)
    assert {row["step"]: row["attempt"] for row in read(path)} == {0: 0, 1: 0, 2: 1, 3: 1}
    assert hooks(module) == 0


def test_the_ratios_of_a_finished_step_reach_the_loggers(tmp_path: Path) -> None:
    library = importlib.import_module(LIBRARIES[0])

    class Log(library.loggers.logger.DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[int, dict[str, float]] = {}

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            assert step not in self.seen
            self.seen[step] = {key: value for key, value in metrics.items() if key != "epoch"}

    log, module, sink = Log(), make_module(library), Kept()
    ranks = RankCallback(rtol=RTOL, log=True, sinks=sink)
    make_trainer(library, tmp_path, [ranks], max_steps=5, logger=log, log_every_n_steps=2).fit(
        module, loader()
    )
    counts = expected(module)
    assert sink.counts() == counts
    # Which step is the newest that is counted when the logger's turn comes is up to the background thread.
    assert max(log.seen) == 4
    assert len(log.seen) <= 3
    for step, seen in log.seen.items():
        sides = [min(part.shape) for part in module.kept[step]]
        assert seen == {
            f"near_rank_ratio/{site}": count / side
            for (site, count), side in zip(counts[step].items(), sides, strict=True)
        }


def test_nothing_is_logged_unless_asked(tmp_path: Path) -> None:
    library = importlib.import_module(LIBRARIES[0])
    trainer = make_trainer(
        library, tmp_path, [RankCallback(rtol=RTOL)], max_steps=2, logger=library.loggers.CSVLogger(tmp_path)
    )
    trainer.log_every_n_steps = 1
    trainer.fit(make_module(library), loader())
    assert not list(tmp_path.rglob("metrics.csv"))


def test_the_ratios_of_a_step_are_taken_once() -> None:
    newest = NewestRatios()
    newest.write([Row(6, "a", "batch.ratio", 0.5), Row(7, "a", "batch.ratio", 0.25), Row(7, "", "loss", 1.0)])
    assert newest.take() == (7, {"near_rank_ratio/a": 0.25})
    assert newest.take() is None


@pytest.mark.parametrize("compiled", ["part", "whole"])
def test_a_compiled_module_is_tracked(compiled: str, tmp_path: Path) -> None:
    library, sink = importlib.import_module(LIBRARIES[0]), Kept()
    module = make_module(library)
    plain = copy.deepcopy(module)
    make_trainer(library, tmp_path, [], max_steps=3).fit(plain, loader())
    ranks = RankCallback(rtol=RTOL, sinks=[sink])
    module.training_step = lambda batch, batch_idx: module.net(batch).square().mean()
    if compiled == "part":
        module.net.compile(backend="eager")
    fitted = torch.compile(module, backend="eager") if compiled == "whole" else module
    make_trainer(library, tmp_path, [ranks], max_steps=3).fit(fitted, loader(), loader(1))
    assert sink.counts() == expected(plain)


def test_two_callbacks_keep_their_states_apart() -> None:
    keys = [
        RankCallback(part=part, unfold=unfold).state_key for part, unfold in itertools.product("ab", "cd")
    ]
    assert len(set(keys)) == 4
    assert RankCallback(part="a").state_key == RankCallback(part="a").state_key


def test_bad_options_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'rtoll'"):
        RankCallback(rtoll=1e-2)
    with pytest.raises(TypeError, match="part: got int, expected a submodule's name or a function"):
        RankCallback(part=3)
    library = importlib.import_module(LIBRARIES[0])
    with pytest.raises(ValueError, match=r"part: Module has no submodule 'nett'; it has net"):
        make_trainer(library, tmp_path, [RankCallback(part="nett")], max_steps=1).fit(
            make_module(library), loader()
        )


def test_the_docstring_runs(tmp_path: Path) -> None:
    library = importlib.import_module(LIBRARIES[0])
    quiet = {
        "default_root_dir": tmp_path,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
    }
    names = {"module": make_module(library), "loader": loader(), "quiet": quiet, "Trainer": library.Trainer}
    result = doctest.testmod(lightning, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0
