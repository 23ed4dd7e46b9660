"""The runs of a sweep side by side, by processes of our own and by Ray: the same runs, and nothing lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bsgap_kernels.cli import main
from bsgap_kernels.lab import launchers
from bsgap_kernels.lab.config import SweepConfig, TrainConfig, UserError
from bsgap_kernels.lab.data import load_data
from bsgap_kernels.lab.directories import locked
from bsgap_kernels.lab.launchers import Job, Outcome, launch
from bsgap_kernels.lab.objective import Objective
from bsgap_kernels.lab.stop import NEVER, Stop
from bsgap_kernels.lab.sweep import sweep
from bsgap_kernels.lab.train import train as lab_train

pytest.importorskip("sklearn")
OPTIONS: dict[str, Any] = {
    "batch_sizes": "64,128", "seeds": "0,1", "steps": 3, "probe_size": 32, "layers": "relu4", "threads": 1,
}  # fmt: skip


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.parent.name: json.loads(path.read_text())["weights_sha256"]
        for path in directory.glob("*/summary.json")
    }


@pytest.fixture
def quick_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forks of a process that has imported what they need, and not new interpreters."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "sklearn.datasets", launchers.__name__])
    monkeypatch.setattr(launchers, "multiprocessing", SimpleNamespace(get_context=lambda method: context))


@pytest.fixture(scope="module")
def ray_ends() -> Iterator[list[bool]]:
    """One session of Ray, which the first sweep starts; an end that a sweep asks for is noted here."""
    ray = pytest.importorskip("ray")
    asked: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "shutdown", lambda: asked.append(True))
        yield asked
    ray.shutdown()


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("sweep")
    sweep(SweepConfig(**OPTIONS), directory)
    return hashes(directory)


def test_runs_side_by_side_are_those_of_one_process(one_by_one: dict[str, str], tmp_path: Path) -> None:
    config = SweepConfig(**OPTIONS, jobs=2)
    summaries = sweep(config, tmp_path)
    assert [summary["run"] for summary in summaries] == [run.run for run in config.runs()]
    assert {summary["threads"] for summary in summaries} == {1}
    assert hashes(tmp_path) == one_by_one


@pytest.mark.usefixtures("quick_starts")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_is_ended_from_outside_costs_its_run_only(number: int, tmp_path: Path) -> None:
    config = SweepConfig(**{**OPTIONS, "seeds": "0", "steps": 100_000}, jobs=2)
    short = SweepConfig(**{**OPTIONS, "seeds": "1,2"}, jobs=2)
    jobs = [Job(run, tmp_path / run.run) for run in [config.runs()[0], *short.runs()]]
    killed: list[int] = []

    def kill_the_long_run() -> None:
        while not (tmp_path / "b64-s0" / "metrics.jsonl").exists():
            time.sleep(0.05)
        # Workers are started in the order of the jobs.
        first = min(multiprocessing.active_children(), key=lambda child: int(child.name.rpartition("-")[2]))
        killed.append(first.pid or 0)
        os.kill(first.pid or 0, number)

    killer = threading.Thread(target=kill_the_long_run)
    killer.start()
    outcomes = {outcome.run: outcome for outcome in launch(jobs, config, load_data("digits"), NEVER)}
    killer.join()
    assert killed
    ended = outcomes.pop("b64-s0")
    if number == signal.SIGKILL:
        assert ended.problem == "its process died with exit code -9"
    else:
        assert ended.stopped
        assert (ended.summary or {})["status"] == "stopped"
    assert sorted(outcomes) == ["b128-s1", "b128-s2", "b64-s1", "b64-s2"]
    assert all((outcome.summary or {})["status"] == "finished" for outcome in outcomes.values())


def test_a_sweep_says_that_a_run_was_stopped_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_job(job: Job, data: Any, stop: Stop) -> Outcome:
        if job.config.run == "b64-s1" and not (tmp_path / "b64-s1").exists():
            stop = Stop()
            stop.ask(signal.SIGTERM)
        return original(job, data, stop)

    original = launchers.run_job
    monkeypatch.setattr(launchers, "run_job", run_job)
    arguments = [f"--{name}={value}" for name, value in {**OPTIONS, "layers": "[relu4]"}.items()]
    arguments = ["sweep", *arguments, "--sharpness", "--sharpness-images=20", f"--out={tmp_path}"]
    assert main(arguments) == 143
    said = capsys.readouterr().err
    assert "bsgap sweep: 1 of 4 runs stopped (b64-s1: its process was asked to stop); the same" in said
    assert main(arguments) == 0
    assert len(list(tmp_path.glob("*/sharpness.json"))) == 4


@pytest.mark.parametrize("within", ["hessian_product", "reestimate"])
def test_a_stop_ends_a_measurement(within: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first run, and of the curves after all of them."""
    options = {**OPTIONS, "seeds": "0", "sharpness": True, "sharpness_images": 20}
    stop = Stop()
    original = getattr(Objective, within)

    def asking(self: Objective, *given: Any) -> Any:
        stop.ask(signal.SIGTERM)
        return original(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, within, asking)
        summaries = sweep(SweepConfig(**options), tmp_path, stop=stop)
    measured = {"hessian_product": 0, "reestimate": 2}[within]
    assert len(summaries) == max(1, measured)
    assert len(list(tmp_path.glob("*/sharpness.json"))) == measured
    assert not list(tmp_path.glob("curves/*"))
    assert len(sweep(SweepConfig(**options), tmp_path)) == 2
    assert len(list(tmp_path.glob("*/sharpness.json"))) == 2
    assert len(list(tmp_path.glob("curves/*"))) == 1


@pytest.mark.usefixtures("quick_starts")
def test_a_stop_reaches_every_process(tmp_path: Path) -> None:
    config = SweepConfig(**{**OPTIONS, "steps": 100_000}, jobs=2)
    stop = Stop()

    def ask() -> None:
        while len(list(tmp_path.glob("*/metrics.jsonl"))) < 2:
            time.sleep(0.05)
        time.sleep(0.3)
        stop.ask(signal.SIGTERM)

    asker = threading.Thread(target=ask)
    asker.start()
    summaries = sweep(config, tmp_path, stop=stop)
    asker.join()
    assert [summary["status"] for summary in summaries] == ["stopped"] * 2
    assert len(list(tmp_path.glob("*/checkpoints/*.pt"))) == 2
    assert len(list(tmp_path.glob("*/config.yaml"))) == 2  # the others were not begun


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    in_the_way = tmp_path / "b64-s1"
    in_the_way.mkdir()
    (in_the_way / "thesis.tex").write_text("x")
    (tmp_path / "sweep.yaml").write_text(json.dumps(SweepConfig(**OPTIONS).mapping()))
    with pytest.raises(UserError, match=r"1 of 4 runs failed \(b64-s1: out: .* is not empty"):
        sweep(SweepConfig(**OPTIONS), tmp_path)
    assert sorted(hashes(tmp_path)) == ["b128-s0", "b128-s1", "b64-s0"]


def test_a_failure_of_any_kind_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: TrainConfig, *given: Any, **options: Any) -> dict[str, Any]:
        if config.run == "b64-s1":
            raise RuntimeError("DefaultCPUAllocator:\n can't allocate memory")
        return lab_train(config, *given, **options)

    monkeypatch.setattr(launchers, "train", train)
    with pytest.raises(UserError, match=r"1 of 4 runs failed \(b64-s1: RuntimeError: Default.*: can't"):
        sweep(SweepConfig(**OPTIONS), tmp_path)
    assert sorted(hashes(tmp_path)) == ["b128-s0", "b128-s1", "b64-s0"]
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_starts")
def test_a_worker_that_died_while_idle_is_seen(tmp_path: Path) -> None:
    worker = launchers._Worker(1)
    worker._process.kill()
    worker._process.join()
    run = SweepConfig(**OPTIONS).runs()[0]
    worker.start(Job(run, tmp_path / run.run))
    assert worker.outcome().problem == "its process died with exit code -9"
    assert worker.dead
    worker.end()


def test_workers_of_a_killed_sweep_let_go_of_their_runs(tmp_path: Path) -> None:
    """So that the same sweep, begun again, is not told that another process is at work."""
    options = {**OPTIONS, "seeds": "0", "steps": 100_000, "jobs": 2}
    # A fork, which has all it needs imported; its own workers are new interpreters.
    process = multiprocessing.get_context("fork").Process(
        target=sweep, args=(SweepConfig(**options), tmp_path)
    )
    process.start()
    runs = [tmp_path / "b64-s0", tmp_path / "b128-s0"]
    while not all((run / "metrics.jsonl").exists() for run in runs):
        time.sleep(0.05)
    process.kill()
    process.join()
    deadline = time.monotonic() + 60
    for run in runs:
        while True:
            try:
                with locked(run):
                    break
            except UserError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert list(run.glob("checkpoints/step-*.json"))


def test_an_extended_sweep_does_only_what_is_new(
    one_by_one: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(SweepConfig(**{**OPTIONS, "seeds": "0"}), tmp_path)
    capsys.readouterr()
    summaries = sweep(SweepConfig(**OPTIONS, methods="sgd"), tmp_path)
    assert len(summaries) == 4
    assert capsys.readouterr().out.count("done already") == 2
    assert hashes(tmp_path) == one_by_one


def test_methods_are_swept_too(tmp_path: Path) -> None:
    options = {**OPTIONS, "batch_sizes": "64", "seeds": "0", "methods": "sgd,adam"}
    summaries = sweep(SweepConfig(**options), tmp_path)
    assert [(summary["run"], summary["method"], summary["lr"]) for summary in summaries] == [
        ("b64-s0", "sgd", 0.02), ("adam-b64-s0", "adam", 0.001),
    ]  # fmt: skip


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert launchers.cores() == 3


@pytest.mark.torch_free
def test_ray_runs_the_same_sweep(one_by_one: dict[str, str], ray_ends: list[bool], tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    started_before, ray_ends[:] = ray.is_initialized(), []
    summaries = sweep(SweepConfig(**OPTIONS, launcher="ray", jobs=2), tmp_path)
    # What a sweep starts it ends, and nothing else.
    assert ray_ends == ([] if started_before else [True])
    assert [summary["status"] for summary in summaries] == ["finished"] * 4
    assert hashes(tmp_path) == one_by_one


@pytest.mark.torch_free
def test_a_stop_reaches_the_tasks_of_ray(ray_ends: list[bool], tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    started_before, ray_ends[:] = ray.is_initialized(), []
    config = SweepConfig(**{**OPTIONS, "seeds": "0", "steps": 100_000}, launcher="ray", jobs=2)
    stop = Stop()

    def ask() -> None:
        while not list(tmp_path.glob("*/metrics.jsonl")):
            time.sleep(0.05)
        time.sleep(0.5)
        stop.ask(signal.SIGTERM)

    asker = threading.Thread(target=ask)
    asker.start()
    summaries = sweep(config, tmp_path, stop=stop)
    asker.join()
    assert ray_ends == ([] if started_before else [True])
    assert {summary["status"] for summary in summaries} == {"stopped"}
    for summary in summaries:
        saved = tmp_path / summary["run"] / "checkpoints" / f"step-{summary['steps']:09d}.json"
        assert saved.is_file()
