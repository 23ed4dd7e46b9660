"""patch(): near_rank as torch.linalg.matrix_rank, also under PyTorch's own tests, of a given checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bsgap_kernels as bsgap
from bsgap_kernels import _patch

THEIRS = torch.linalg.matrix_rank
CHECKOUT = os.environ.get("BSGAP_PYTORCH_CHECKOUT")


def test_ours_is_there_inside_and_theirs_after() -> None:
    with bsgap.patch():
        assert torch.linalg.matrix_rank is _patch.matrix_rank
        with bsgap.patch():
            assert torch.linalg.matrix_rank is _patch.matrix_rank
        assert torch.linalg.matrix_rank is _patch.matrix_rank
        assert torch.linalg.matrix_rank(torch.eye(3).bfloat16(), rtol=0.1) == 3  # theirs refuses 16 bits
    assert torch.linalg.matrix_rank is THEIRS


def test_an_exception_and_a_refusal_bring_theirs_back() -> None:
    with pytest.raises(ZeroDivisionError), bsgap.patch(), bsgap.patch():
        raise ZeroDivisionError
    assert torch.linalg.matrix_rank is THEIRS
    with pytest.raises(RuntimeError, match="at least 2 dimensions"), bsgap.patch():  # their kind of error
        torch.linalg.matrix_rank(torch.ones(3))
    assert torch.linalg.matrix_rank is THEIRS


def test_a_block_inside_a_generator_of_another() -> None:
    outer, inner = bsgap.patch(), bsgap.patch()
    outer.__enter__()
    inner.__enter__()
    inner.__exit__(None, None, None)
    assert torch.linalg.matrix_rank is _patch.matrix_rank
    outer.__exit__(None, None, None)
    assert torch.linalg.matrix_rank is THEIRS


def test_every_way_to_call_it() -> None:
    A = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0))
    A = A + A.mT
    limits = torch.tensor([0.5, 2.0, 9.0])
    calls = [
        ((A,), {}),
        ((A, 1.5), {}),
        ((A, limits, True), {}),
        ((A,), {"tol": 1.5, "hermitian": True}),
        ((A,), {"atol": limits, "rtol": torch.tensor(0.1)}),
        ((A,), {"atol": 1.0, "rtol": 0.3, "hermitian": True}),
        ((), {"input": A, "rtol": 0.3}),
    ]
    for args, options in calls:
        right = THEIRS(*args, **options)
        with bsgap.patch():
            assert torch.equal(torch.linalg.matrix_rank(*args, **options), right)
            out = torch.empty(3, dtype=torch.int64)
            assert torch.linalg.matrix_rank(*args, **options, out=out) is out
        assert torch.equal(out, right)


def test_compiled_code_of_others() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.matrix_rank(x, rtol=0.3) + 1

    A = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    with bsgap.patch():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(A), THEIRS(A, rtol=0.3) + 1)


RUNNER = """
import sys, pytest, bsgap_kernels
from bsgap_kernels import _patch
ours, calls = _patch.matrix_rank, 0
def counted(*args, **options):
    global calls
    calls += 1
    return ours(*args, **options)
_patch.matrix_rank = counted
options = ["-k", "matrix_rank", "-q", "--noconftest", "-p", "no:xdist"]
with bsgap_kernels.patch():
    status = pytest.main([sys.argv[1], "-c", sys.argv[2], *options])
print(f"near_rank was called {calls} times")
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    CHECKOUT is None, reason="needs BSGAP_PYTORCH_CHECKOUT=DIR, a checkout of PyTorch's source"
)
def test_the_tests_of_pytorch_pass_inside(tmp_path: Path) -> None:
    assert CHECKOUT is not None
    settings = tmp_path / "pytest.ini"
    settings.write_text("[pytest]\n")
    file = Path(CHECKOUT).resolve() / "test" / "test_linalg.py"
    command = [sys.executable, "-c", RUNNER, str(file), str(settings)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    (passed,) = re.findall(r"(\d+) passed", run.stdout)
    (calls,) = re.findall(r"was called (\d+) times", run.stdout)
    assert int(passed) >= 20
    assert int(calls) >= 500
