"""The GPU commands without a GPU: steps, limits, summary and the runner of tests, driven by stand-ins."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_check
import gpu_tests
import pytest
import torch
from gpu_check import Step

ROOT = Path(__file__).resolve().parents[1]


def program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[list[Step]], *options: str, gpu: str = "H200"
) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(gpu_check, "gpu_name", lambda: gpu)
    monkeypatch.setattr(gpu_check, "steps_of", lambda part, out: steps)
    code = gpu_check.main(["first", "--out", str(tmp_path / "out"), *options])
    return code, json.loads((tmp_path / "out" / "summary.json").read_text())


def outcomes(summary: dict[str, Any]) -> dict[str, int | None]:
    return {step["step"]: step["rc"] for step in summary["first"]["steps"]}


def test_a_step_that_fails_or_is_cut_off_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "out" / "bench.json"
    hangs = (
        f"import time; from pathlib import Path; Path({str(result)!r}).write_text('[1]'); "
        "print('half', flush=True); time.sleep(60)"
    )
    summary_file = str(tmp_path / "out" / "summary.json")
    seen = f"import json; print(len(json.load(open({summary_file!r}))['first']['steps']))"
    steps = [
        [Step("breaks", program("print('why'); raise SystemExit(7)"), 20)],
        [Step("hangs", program(hangs), 3)],
        [Step("last", program(seen), 20)],
    ]
    code, summary = run(tmp_path, monkeypatch, steps)
    assert code == 1
    assert outcomes(summary) == {"breaks": 7, "hangs": -9, "last": 0}
    assert "   | why" in capsys.readouterr().out
    assert (tmp_path / "out" / "first-hangs.log").read_text() == "half\n"
    assert (tmp_path / "out" / "first-last.log").read_text() == "2\n"  # the summary was there after each step
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert set(archive.getnames()) == {"bench.json", "summary.json"}


# Ends well once all three steps have begun.
MEET = """
import sys, time
from pathlib import Path
folder = Path(sys.argv[1])
(folder / sys.argv[2]).touch()
while len(list(folder.iterdir())) < 3: time.sleep(0.01)
"""


def test_steps_side_by_side_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    steps = [Step(f"smoke {i}", [*program(MEET), str(meeting), str(i)], 20) for i in range(3)]
    code, summary = run(tmp_path, monkeypatch, [steps])
    assert code == 0
    assert outcomes(summary) == {"smoke 0": 0, "smoke 1": 0, "smoke 2": 0}


@pytest.mark.parametrize("loads", [True, False])
def test_the_library_is_built_only_if_it_does_not_load(
    loads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [
        [Step("load", program(f"raise SystemExit({int(not loads)})"), 20, device=False)],
        [Step("build", program(""), 20, device=False, unless="load")],
    ]
    code, summary = run(tmp_path, monkeypatch, steps)
    assert code == 0
    assert outcomes(summary) == ({"load": 0} if loads else {"load": 1, "build": 0})


def test_no_time_is_taken_from_later_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_check.LIMITS, "first", 30)
    code, summary = run(
        tmp_path, monkeypatch, [[Step("long", program(""), 20, 27)], [Step("short", program(""), 20)]]
    )
    assert code == 0
    assert outcomes(summary) == {"long": None, "short": 0}


def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [[Step("cases", [*program("import sys; print(sys.argv[1:])"), "cuda"], 20, cpu=True)]]
    code, summary = run(tmp_path, monkeypatch, steps, gpu="")
    assert (code, outcomes(summary)) == (3, {"cases": None})
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("gpu_check: nvidia-smi names no GPU")
    assert last.endswith("nothing was measured")
    code, summary = run(tmp_path, monkeypatch, steps, "--dry-run")
    assert (code, outcomes(summary)) == (0, {"cases": 0})
    assert (tmp_path / "out" / "first-cases.log").read_text() == "['cpu']\n"


@pytest.mark.parametrize("part", ["first", "second"])
def test_the_real_steps_fit_their_time(part: str, tmp_path: Path) -> None:
    steps = gpu_check.steps_of(part, tmp_path)
    left = gpu_check.LIMITS[part]
    for group in steps:
        # Every step gets at least half its limit, however long those before it take.
        for step in group:
            assert left - step.reserve >= step.limit / 2, step.name
        left -= min(max(step.limit for step in group), left - group[0].reserve)
    assert left >= 0
    assert sum(gpu_check.LIMITS.values()) <= 11 * 60
    for step in (step for group in steps for step in group):
        scripts = [word for word in step.command if re.match(r"(benchmarks/\w+|setup)\.py$", word)]
        assert all((ROOT / script).is_file() for script in scripts)


def test_families_are_those_of_the_cases() -> None:
    assert tuple(gpu_cases.FAMILIES) == gpu_check.FAMILIES
    assert set(gpu_cases.REDUCED) <= set(gpu_cases.FAMILIES)


def test_the_script_of_the_shell_is_executable() -> None:
    script = ROOT / "benchmarks" / "gpu_check.sh"
    assert os.access(script, os.X_OK)
    assert "gpu_check.py" in script.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["first"], "--out"),
        (["third", "--out", "x"], "invalid choice"),
        (["first", "--out", "/dev/null/x"], "cannot make"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_the_cases_check_their_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_cases.main(["--device", "cpu", "sides up to 32", "hook path"]) == 0
    monkeypatch.setattr(gpu_cases.bsgap, "near_rank", lambda A, **_: torch.tensor(0))
    with pytest.raises(SystemExit, match="near_rank 1 torch.bfloat16 tall: counted 0, expected 1"):
        gpu_cases.main(["--device", "cpu", "sides up to 32"])


# Answers as a worker does: its process number, and what the name of the test asks for.
STAND_IN = """
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    test = line.strip()
    if "hang" in test: time.sleep(60)
    if "die" in test: os._exit(11)
    lost = "sticky" in test
    said = "CUDA error: an illegal memory access was encountered" if lost else str(os.getpid())
    found = {"outcome": "failed" if lost else "passed", "message": said, "seconds": 0}
    print(json.dumps(found), flush=True)
"""


def test_a_worker_whose_context_is_lost_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "WORK", program(STAND_IN))
    tests = ["a", "b", "sticky", "c", "die", "d", "hang", "e"]
    found = gpu_tests.run(tests, tmp_path / "tests.jsonl", workers=1, limit=3)
    assert found == {"passed": 5, "failed": 3}
    rows = [json.loads(line) for line in (tmp_path / "tests.jsonl").read_text().splitlines()]
    assert [row["test"] for row in rows] == tests
    of = {row["test"]: row["message"] for row in rows}
    assert of["a"] == of["b"]
    assert len({of[name] for name in "bcde"}) == 4  # another process after each
    assert of["die"] == "its process ended"
    assert of["hang"] == "more than 3 s"


def test_a_slow_start_is_not_taken_from_the_first_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = STAND_IN.replace("print(", "time.sleep(3)\nprint(", 1)
    monkeypatch.setattr(gpu_tests, "WORK", program(slow))
    assert gpu_tests.run(["a"], tmp_path / "tests.jsonl", workers=1, limit=2) == {"passed": 1}
    monkeypatch.setattr(gpu_tests, "START_LIMIT", 1)
    assert gpu_tests.run(["a"], tmp_path / "tests.jsonl", workers=1, limit=3) == {"failed": 1}
    last = json.loads((tmp_path / "tests.jsonl").read_text().splitlines()[-1])
    assert last["message"] == "no process for it: more than 1 s"


def test_no_test_is_begun_when_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = STAND_IN.replace("    lost =", "    time.sleep(1)\n    lost =")
    monkeypatch.setattr(gpu_tests, "WORK", program(slow))
    found = gpu_tests.run(["a", "b", "c"], tmp_path / "tests.jsonl", workers=1, limit=20, seconds=0.5)
    assert found == {"passed": 1, "not run": 2}
    assert len((tmp_path / "tests.jsonl").read_text().splitlines()) == 3


def test_libraries_of_another_checkout_do_not_count(tmp_path: Path) -> None:
    load = [sys.executable, "-c", gpu_check.LOAD]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    elsewhere = subprocess.run(load, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert elsewhere.returncode == 1
    assert "not of this checkout" in elsewhere.stderr


def test_a_step_is_told_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [[Step("told", [*program("import sys; print(sys.argv[1])"), gpu_check.LIMIT], 30)]]
    code, _ = run(tmp_path, monkeypatch, steps)
    assert code == 0
    assert (tmp_path / "out" / "first-told.log").read_text() == "15\n"


def test_the_worker_runs_tests_of_pytest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSGAP_GPU_TEST_DEVICE", "cpu")
    test = "tests/test_gpu.py::test_counts_in_every_regime[5-float16-0.3-tall]"
    skipped = "tests/test_gpu_runtime.py::test_singular_values_under_capture_are_a_clear_error"
    found = gpu_tests.run([test, skipped, test], tmp_path / "tests.jsonl", workers=1, limit=120)
    assert found == {"passed": 2, "skipped": 1}, (tmp_path / "tests.log").read_text()[-3000:]
