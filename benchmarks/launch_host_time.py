"""Host time of one addition to a site's sums (the hook path on CUDA), with a driver that does nothing.

python benchmarks/launch_host_time.py    # needs gcc and an idle machine, no GPU

Tensors are on the CPU; a GPU's allocator and driver do more. Adds the installed Triton's figures to
benchmarks/results/launch_host_time.json: microseconds of a call, those of its calls of Triton's launcher and
the stub alone, kernels launched.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import stub_driver  # noqa: E402

STUB = stub_driver.install()

import torch  # noqa: E402

from bsgap_kernels.ops._cuda_sums import accumulate_gram  # noqa: E402
from bsgap_kernels.triton import launch  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "launch_host_time.json"
CALLS, SAMPLES = 300, 9
CASES: dict[str, tuple[tuple[int, ...], torch.dtype, bool, bool]] = {
    "64 channels, bfloat16, float32 sums": ((64, 64, 8, 8), torch.bfloat16, True, False),
    "64 channels, float32, column sums": ((64, 64, 8, 8), torch.float32, False, True),
    "256 channels, bfloat16, float32 sums": ((64, 256, 8, 8), torch.bfloat16, True, False),
}


def microseconds(call: Callable[[], Any]) -> float:
    """The least of the samples' means: what disturbs only adds."""
    means = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        means.append((time.perf_counter() - start) / CALLS * 1e6)
    return round(min(means), 2)


def measure(
    shape: tuple[int, ...], dtype: torch.dtype, float32_sums: bool, with_sums: bool
) -> dict[str, Any]:
    """One case."""
    A, n = torch.zeros(shape, dtype=dtype), shape[1]
    gram, totals, sums = (torch.zeros(s, dtype=torch.float64) for s in ((n, n), (3,), (n,)))

    def call() -> None:
        accumulate_gram(gram, totals, sums if with_sums else None, A, 1, 2, True, False, float32_sums, False)

    driver: list[tuple[Any, tuple[Any, ...]]] = []
    for _ in range(3):
        call()
    before = STUB.launches
    at = launch.Launch.at

    def noted(self: launch.Launch, *arguments: int) -> None:
        run = self._run

        def recorded(*args: Any) -> None:
            driver.append((run, args))
            run(*args)

        self._run = recorded
        at(self, *arguments)
        self._run = run

    launch.Launch.at = noted  # type: ignore[method-assign]
    call()
    launch.Launch.at = at  # type: ignore[method-assign]
    launched = STUB.launches - before
    whole = microseconds(call)
    alone = sum(microseconds(lambda run=run, args=args: run(*args)) for run, args in driver)
    return {"us": whole, "us_of_the_driver_call": round(alone, 2), "launches": launched}


def main() -> None:
    """Measure and write."""
    import triton

    torch.set_num_threads(1)
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    found[triton.__version__] = {name: measure(*case) for name, case in CASES.items()}
    print(json.dumps(found[triton.__version__], indent=1))
    RESULT.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
