"""All that only a GPU can show, in two commands on one machine without a network.

benchmarks/gpu_check.sh first --out DIR     # at most 7 minutes: libraries, smoke, `gpu` tests, benchmark
benchmarks/gpu_check.sh second --out DIR    # at most 4 minutes: sanitizers, error of device sums, overhead

Needs python3 (PYTHON names another) with torch, Triton, pytest and NumPy; libraries that were built before
are used, else nvcc builds them. So are Triton kernels in TRITON_CACHE_DIR (build/triton unless it is set),
where gpu_compile.py puts them beforehand on any machine with the same Triton (3.8 or later). Every step
writes into DIR as it goes, and after each one summary.json and results.tar.gz (all JSON) are written again:
what is cut off leaves what it had. A step that fails does not stop the next. --dry-run runs what the CPU can
run of it.
Exit code: 0 all well, 1 a step failed, 2 wrong usage, 3 no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"first": 415, "second": 235}
"""Seconds of a command, all its steps together."""
LOAD = (
    "from pathlib import Path; from bsgap_kernels import _core, _native; "
    "paths = [_core.__file__, _native.CUDA_LIBRARY_PATH]; print(*paths); "
    "assert all(path and Path(path).is_relative_to(Path.cwd()) for path in paths), 'not of this checkout'"
)
FAMILIES = (
    "sides up to 32",
    "sides up to 128",
    "sides beyond 128",
    "spectra",
    "bounds",
    "probes",
    "groups",
    "hook path",
    "large sides",
)
"""Of kernels, in gpu_cases.py: a process each."""
LIMIT = "LIMIT"
"""In a command, the seconds in which a step may begin something: its limit but for what it takes to end."""
ENDING = 15
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


@dataclass(frozen=True)
class Step:
    """One program: at most `limit` seconds, and `reserve` seconds are kept for the steps after it."""

    name: str
    command: Sequence[str]
    limit: int
    reserve: int = 0
    device: bool = True  # needs a GPU
    cpu: bool = False  # a dry run has it work on the CPU
    unless: str = ""  # not run if the step of this name went well


def steps_of(part: str, out: Path) -> list[list[Step]]:
    """Steps in order; those of an inner list run side by side."""
    python = sys.executable
    cases = [python, "benchmarks/gpu_cases.py", "--device", "cuda"]
    bsgap = [python, "-m", "bsgap_kernels"]
    if part == "first":
        tests = [
            python,
            "benchmarks/gpu_tests.py",
            str(out / "tests.jsonl"),
            "--device",
            "cuda",
            "--seconds",
            LIMIT,
        ]
        bench = [
            *bsgap,
            "bench",
            "--device",
            "cuda",
            "--json",
            str(out / "bench.json"),
            "--time-limit",
            "120",
        ]
        build = [python, "setup.py", "build_ext", "--inplace"]
        compile_ahead = [python, "benchmarks/gpu_compile.py", "--seconds", LIMIT]
        return [
            [Step("load", [python, "-c", LOAD], 30, 385, device=False)],
            [Step("build", build, 150, 235, device=False, unless="load")],
            [Step("compile", compile_ahead, 50, 185, device=False)],
            [Step(f"smoke, {family}", [*cases, family], 30, 155, cpu=True) for family in FAMILIES],
            [Step("tests", tests, 150, 80, cpu=True)],
            [Step("benchmark", bench, 150)],
        ]
    sanitize = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", SANITIZER, "--error-exitcode", "9"]
    # Our CUDA C++ kernels only, by a part of their mangled names: Triton's would take too long.
    ours = ["--kernel-name", "kernel_substring=bsgap"]
    overhead = [*bsgap, "overhead", "--device", "cuda", "--model", "resnet56", "--quick", "--budget", "3"]
    reduced = [*cases, "--reduced"]
    sums = [
        python,
        "benchmarks/gram_error.py",
        "--device",
        "cuda",
        "--json",
        str(out / "gram_error-cuda.json"),
    ]
    return [
        # Compiles what the sanitizers run, whom the compiler would keep busy too.
        [Step("cases", reduced, 30, 200, cpu=True)],
        [Step("memcheck", [*sanitize, "--tool", "memcheck", *reduced], 60, 140)],
        [Step("racecheck", [*sanitize, "--tool", "racecheck", *ours, *reduced], 60, 85)],
        [Step("device sums", sums, 30, 55)],
        *(
            [
                Step(
                    f"overhead {n}",
                    [*overhead, "--batch", str(n), "--json", str(out / f"overhead-{n}.json")],
                    40,
                    left,
                )
            ]
            for n, left in ((8192, 20), (1024, 0))
        ),
    ]


class Check:
    """One command: its steps, what came of them, and the files that say so."""

    def __init__(self, part: str, out: Path, gpu: str, dry: bool, limit: float) -> None:
        self.part, self.out, self.gpu, self.dry = part, out, gpu, dry
        self.ends = time.monotonic() + limit
        self.began = time.monotonic()
        self.done: list[dict[str, object]] = []
        found = os.environ.get("PYTHONPATH")
        self.environment = {"TRITON_CACHE_DIR": str(ROOT / "build" / "triton")} | os.environ
        self.environment["PYTHONPATH"] = f"{ROOT}:{found}" if found else str(ROOT)

    def run(self, steps: Sequence[Step]) -> None:
        """Run steps side by side and write the summary."""
        well = {row["step"] for row in self.done if row["rc"] == 0}
        limits, running = {}, {}
        for step in steps:
            left = self.ends - time.monotonic() - step.reserve
            if step.unless in well:
                continue
            if step.device and not self.gpu and not (self.dry and step.cpu):
                self.note(step, None, 0, "no GPU")
            elif left < 5:
                self.note(step, None, 0, "no time left")
            else:
                limits[step.name] = min(step.limit, left)
                print(f"== {step.name} (at most {limits[step.name]:.0f} s)", flush=True)
                running[step.name] = (step, self.start(step, limits[step.name]), time.monotonic())
        for name, (step, process, began) in running.items():
            try:
                process.wait(max(0.1, limits[name] - (time.monotonic() - began)))
                said = ""
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
                process.wait()
                said = f"more than {limits[name]:.0f} s"
            self.note(step, process.returncode, time.monotonic() - began, said)
        self.write()

    def log_of(self, step: Step) -> Path:
        """Return the file that takes the output of a step while it runs."""
        return self.out / f"{self.part}-{step.name.replace(', ', '-').replace(' ', '-')}.log"

    def start(self, step: Step, limit: float) -> subprocess.Popen[bytes]:
        """Start a step in a process group of its own."""
        said = {LIMIT: f"{max(limit - ENDING, 1):.0f}"} | ({"cuda": "cpu"} if self.dry else {})
        command = [said.get(word, word) for word in step.command]
        with self.log_of(step).open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def note(self, step: Step, rc: int | None, seconds: float, said: str) -> None:
        """Remember and print what came of a step; rc None: it did not run."""
        self.done.append({"step": step.name, "rc": rc, "seconds": round(seconds, 1), "said": said})
        word = "skipped" if rc is None else "ok" if rc == 0 else "FAILED"
        print(f"{word:8}{step.name} {seconds:.1f} s {said}", flush=True)
        if rc:
            lines = self.log_of(step).read_text(errors="replace").splitlines()[-8:]
            print("".join(f"   | {line[:160]}\n" for line in lines), end="", flush=True)

    def write(self) -> None:
        """Write summary.json, each command's part of it, and the archive of all JSON."""
        path = self.out / "summary.json"
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            summary = {"schema": 2}
        summary["gpu"] = self.gpu
        summary[self.part] = {"seconds": round(time.monotonic() - self.began, 1), "steps": self.done}
        tests = self.out / "tests.jsonl"
        if tests.exists():
            rows = [
                json.loads(line)
                for line in tests.read_text(encoding="utf-8").splitlines()
                if line.endswith("}")
            ]
            kinds = ("passed", "failed", "skipped", "error", "not run")
            summary["tests"] = {kind: sum(row["outcome"] == kind for row in rows) for kind in kinds}
            summary["tests"]["names_of_failed"] = [
                row["test"] for row in rows if row["outcome"] in ("failed", "error")
            ]
        written = path.with_suffix(".partial")
        written.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        written.replace(path)
        with tarfile.open(self.out / "results.tar.gz", "w:gz") as archive:
            for file in sorted(self.out.glob("*.json*")):
                archive.add(file, file.name)

    @property
    def failed(self) -> bool:
        """Return true if a step failed, but for loading libraries that were then built."""
        well = {row["step"] for row in self.done if row["rc"] == 0}
        bad = {row["step"] for row in self.done if row["rc"]}
        return bool(bad - ({"load"} if "build" in well else set()))


def gpu_name() -> str:
    """The GPU, as the driver's tool names it, which is no CUDA call of ours; empty if there is none."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description="Everything that only a GPU can show, in two commands.")
    parser.add_argument("part", choices=LIMITS)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU, without the steps that need a GPU"
    )
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: cannot make the folder {options.out}: {error.strerror}")
    gpu = "" if options.dry_run else gpu_name()
    if not gpu and not options.dry_run:
        print("gpu_check: nvidia-smi names no GPU, so what needs one is skipped", flush=True)
    check = Check(options.part, options.out.resolve(), gpu, options.dry_run, LIMITS[options.part])
    for steps in steps_of(options.part, check.out):
        check.run(steps)
    print(f"gpu_check: {options.part} on {gpu or 'no GPU'}, {check.out / 'summary.json'}")
    if not gpu and not options.dry_run:
        print("gpu_check: nvidia-smi names no GPU, so nothing was measured")
        return 3
    return int(check.failed)


if __name__ == "__main__":
    sys.exit(main())
