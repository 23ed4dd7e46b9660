"""Each instruction set is measured in a process of its own, with the peers held to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bsgap_kernels import _core, build_info
from bsgap_kernels.bench import isa, main, overhead_command
from bsgap_kernels.bench.machine import processor

WIDE = ["avx512", "avx2", "generic"]


def test_what_is_measured_on_a_processor() -> None:
    assert isa.measured_sets(WIDE) == ["avx512", "avx2"]
    assert isa.measured_sets(["avx2", "generic"]) == ["avx2"]
    assert isa.measured_sets(["generic"]) == ["generic"]
    assert build_info()["instruction_set"] in _core.instruction_sets()
    assert _core.instruction_sets() == WIDE[WIDE.index(_core.instruction_sets()[0]) :]


def test_peers_are_held_below_the_best_and_choose_at_the_best() -> None:
    present = {
        "HOME": "here",
        "OPENBLAS_CORETYPE": "Prescott",
        "OPENBLAS_L2_SIZE": "9",
        "BSGAP_ISA": "generic",
    }
    assert isa.environment("avx512", WIDE, present) == {"HOME": "here", "BSGAP_ISA": "avx512"}
    assert isa.environment("avx2", WIDE[1:], present) == {"HOME": "here", "BSGAP_ISA": "avx2"}
    held = isa.environment("avx2", WIDE, present)
    assert held == {"HOME": "here", "BSGAP_ISA": "avx2", **isa.TAKEN_DOWN["avx2"]}
    assert held["OPENBLAS_CORETYPE"] == "Haswell"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], str]]:
    """Arguments and BSGAP_ISA of the processes that were asked for; their exit code is that of --seed."""
    calls: list[tuple[list[str], str]] = []

    def run(command: list[str], *, env: dict[str, str], check: bool) -> Any:
        calls.append((command[3:], env["BSGAP_ISA"]))
        code = int(command[command.index("--seed") + 1]) if "--seed" in command else 0
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(isa.subprocess, "run", run)
    monkeypatch.setattr(isa._core, "instruction_sets", lambda: WIDE)
    return calls


def test_the_command_starts_itself_for_each(started: list[tuple[list[str], str]]) -> None:
    assert main(["--quick", "--isa", "all", "--json", "x-{isa}.json"]) == 0
    assert started == [(["--quick", "--json", "x-{isa}.json"], name) for name in ("avx512", "avx2")]
    started.clear()
    assert main(["--isa=avx2", "--seed", "1"]) == 1
    assert started == [(["--seed", "1"], "avx2")]


def test_a_wrong_count_lets_the_others_go_on_and_a_mistake_does_not(
    started: list[tuple[list[str], str]],
) -> None:
    assert main(["--isa", "all", "--seed", "1"]) == 1
    assert len(started) == 2
    assert main(["--isa", "all", "--seed", "2"]) == 2
    assert len(started) == 3


def test_the_file_is_named_after_the_instruction_set() -> None:
    assert isa.path_for(None, "avx2") is None
    assert isa.path_for(Path("a/cpu-{isa}.json"), "avx2") == Path("a/cpu-avx2.json")


@pytest.mark.skipif("avx2" not in _core.instruction_sets(), reason="the processor has no AVX2")
def test_a_process_is_held_to_avx2_and_says_so() -> None:
    script = (
        "import json; from bsgap_kernels.bench.machine import describe; d = describe();"
        "print(json.dumps([d['machine'], d['peers']]))"
    )
    env = isa.environment("avx2", WIDE, os.environ)
    env["PYTHONPATH"] = str(Path(isa.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    machine, peers = json.loads(done.stdout)
    assert machine["instruction_set"] == "avx2"
    assert peers["torch"] == "AVX2"
    assert peers["openblas"] in ("Haswell", None)
    assert peers["environment"] == {"BSGAP_ISA": "avx2", **isa.TAKEN_DOWN["avx2"]}
    assert processor({"machine": machine}) == f"{machine['cpu']} with AVX2"


def test_the_overhead_command_starts_itself_for_each(
    started: list[tuple[list[str], str]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "lenet5", "--json", "x-{isa}.json"]
    assert overhead_command.main([*arguments, "--isa", "all"]) == 0
    assert started == [(["overhead", *arguments], name) for name in ("avx512", "avx2")]
    assert overhead_command.main(["--isa", "sse"]) == 2
    assert "isa must be one of all, avx512, avx2" in capsys.readouterr().err
