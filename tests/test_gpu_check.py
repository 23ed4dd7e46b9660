"""The GPU command without a GPU: its steps, limits and summary, driven by stand-ins for its programs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_sanitize
import gpu_summary
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

OVERHEAD = [f"overhead {batch} {way}" for batch in (1024, 8192) for way in ("eager", "--compile")]


# What stands for python: notes its arguments, fails where it is told to, and runs only the summary.
PYTHON = f"""#!/usr/bin/env bash
if [ "$1" = benchmarks/gpu_summary.py ]; then exec {sys.executable} "$@"; fi
echo "$*" >> "$CALLS"
case "$*" in
  *--junitxml=*) for a in "$@"; do case $a in --junitxml=*) cp "$JUNIT" "${{a#*=}}" ;; esac; done ;;
esac
if [ -n "${{FAILING:-}}" ]; then case "$*" in *"$FAILING"*) echo "it broke"; exit 7 ;; esac; fi
"""
JUNIT = """<testsuites><testsuite><testcase classname="tests.test_gpu" name="good"/>
<testcase classname="tests.test_gpu" name="bad"><failure message="x"/></testcase>
<testcase classname="tests.test_gpu" name="absent"><skipped/></testcase></testsuite></testsuites>"""


def executable(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")
    path.chmod(0o755)


def check(
    tmp_path: Path, *arguments: str, gpu: str = "", failing: str = "", sanitizer: bool = False
) -> tuple[int, str, dict[str, Any], list[str]]:
    """Runs the script with stand-ins; returns exit code, output, summary and the calls of python."""
    programs = tmp_path / "bin"
    programs.mkdir()
    executable(programs / "python3", PYTHON)
    executable(
        programs / "nvidia-smi", f"#!/bin/sh\ncase $* in *=name*) echo '{gpu}' ;; *cap*) echo 9.0 ;; esac\n"
    )
    if sanitizer:
        executable(programs / "compute-sanitizer", '#!/bin/sh\necho "sanitizer $*" >> "$CALLS"\n')
    (tmp_path / "junit.xml").write_text(JUNIT, encoding="utf-8")
    calls = tmp_path / "calls"
    calls.touch()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "TORCH_CUDA_ARCH_LIST")} | {
        "PATH": f"{programs}:/usr/bin:/bin",
        "CALLS": str(calls),
        "JUNIT": str(tmp_path / "junit.xml"),
        "FAILING": failing,
    }
    out = tmp_path / "out"
    done = subprocess.run(
        [str(SCRIPT), "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    found = out / "summary.json"
    summary = json.loads(found.read_text(encoding="utf-8")) if found.exists() else {}
    return done.returncode, done.stdout + done.stderr, summary, calls.read_text().splitlines()


def test_bash_reads_it() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_without_a_gpu_it_says_so_after_the_dry_run(tmp_path: Path) -> None:
    code, said, summary, calls = check(tmp_path)
    assert code == 3
    assert "no GPU here (nvidia-smi names none), so this was a dry run: nothing was measured." in said
    assert [s["step"] for s in summary["steps"]] == [
        "build",
        "collect gpu tests",
        "sanitizer script, cpu",
        "import benchmark",
        "roofline",
    ]
    assert summary["dry_run"] == "yes"
    assert summary["tests"] is None
    assert not any("--device cuda" in call for call in calls)
    assert any("--collect-only" in c and "tests/test_gpu.py" in c for c in calls)


def test_a_build_that_does_not_load_is_made(tmp_path: Path) -> None:
    code, _, summary, calls = check(
        tmp_path, "--dry-run", gpu="NVIDIA H200", failing="import bsgap_kernels, "
    )
    assert code == 0
    assert calls[1] == "setup.py build_ext --inplace"
    assert (summary["steps"][0]["step"], summary["steps"][0]["rc"]) == ("build", 0)


def test_a_step_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    code, said, summary, calls = check(
        tmp_path, "--quick", gpu="NVIDIA H200", failing="-m pytest", sanitizer=True
    )
    assert code == 1
    steps = {s["step"]: s for s in summary["steps"]}
    assert list(steps) == [
        "build",
        "gpu tests",
        "benchmark",
        *OVERHEAD,
        "memcheck",
        "racecheck",
        "synccheck",
        "initcheck",
    ]
    assert [s["rc"] for s in steps.values()] == [0, 7, *[0] * (len(steps) - 2)]
    assert "| it broke" in said
    assert summary["gpu"] == "NVIDIA H200"
    assert summary["tests"] == {
        "run": 2,
        "failed": 1,
        "skipped": 1,
        "names_of_failed": ["tests.test_gpu::bad"],
    }
    assert "gpu tests: 2 run, 1 failed, 1 skipped" in said
    (benchmark,) = [c for c in calls if "bench --device cuda" in c]
    assert benchmark.endswith("--quick")
    tools = [c for c in calls if c.startswith("sanitizer")]
    assert len(tools) == 4
    assert [c.endswith("--small") for c in tools] == [False, True, True, True]
    assert (
        sum(s["limit_s"] for s in summary["steps"] if s["step"] in ("build", "gpu tests", "benchmark")) < 540
    )
    assert (tmp_path / "out" / "log.txt").stat().st_size < 1 << 20
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_all_well(tmp_path: Path) -> None:
    code, said, summary, _ = check(tmp_path, gpu="NVIDIA H200")
    assert code == 0
    assert [s["rc"] for s in summary["steps"]][:3] == [0, 0, 0]
    if (
        shutil.which("compute-sanitizer") is None
        and not Path("/usr/local/cuda/bin/compute-sanitizer").exists()
    ):
        assert "memcheck: skipped, no compute-sanitizer on PATH" in said


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--out"], "--out needs a folder"), ([], "--out is missing")]
)
def test_wrong_usage(arguments: list[str], said: str) -> None:
    done = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    done = subprocess.run([str(SCRIPT), "--fast"], capture_output=True, text=True, check=False)
    assert "unknown option --fast" in done.stderr


def test_words_of_the_summary() -> None:
    assert [gpu_summary.word(rc) for rc in (0, -1, 124, 137, 9)] == [
        "ok",
        "skipped",
        "TIMED OUT",
        "TIMED OUT",
        "FAILED (9)",
    ]
    assert gpu_summary.read_tests(ROOT / "no" / "such.xml") is None


def test_the_sanitizer_script_checks_its_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_sanitize.run(torch.device("cpu"), (5, 17), (33,)) == 2 * (4 * 3 + 8) + 2 + 3
    monkeypatch.setattr(gpu_sanitize.bsgap, "near_rank", lambda A, **_: torch.tensor(0))
    with pytest.raises(SystemExit, match="near_rank 5 torch.bfloat16 tall: counted 0, expected 3"):
        gpu_sanitize.run(torch.device("cpu"), (5,), ())
