"""Runs the engine of CUDA on CPU tensors: Triton's interpreter forms Gram matrices, the host harness counts.

`install()` makes every op on a CPU tensor take the path that a CUDA tensor takes, down to the source of each
kernel. It must come before triton is first imported, and it is for good: conftest.py calls it where
BSGAP_VIRTUAL_GPU=1, and `test_virtual_gpu.py` runs tests of the ops that way.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import cuda_host
import torch
from torch import Tensor

from bsgap_kernels import _native
from bsgap_kernels.ops import _cuda, _register

_LIBRARY = torch.library.Library("bsgap", "IMPL")


def install() -> None:
    """Lets CPU tensors run the engine of CUDA in this process."""
    os.environ["TRITON_INTERPRET"] = "1"
    _register.ENGINES["CPU"] = _cuda
    _native.CUDA_LIBRARY_PATH = _native.LIBRARY_PATH  # the kernels are there, by another way
    for name, kernel in (
        ("_cuda_fill", _fill),
        ("_cuda_counts", cuda_host.count_grams),
        ("_cuda_summaries", cuda_host.summaries),
    ):
        _LIBRARY.impl(name, kernel, "CPU")
    from bsgap_kernels.triton import gram, probe

    launch, launch_probe = gram._launch, probe._launch

    def counted(call: gram.Prepared, *args: Any) -> None:
        _triton_launches.update(
            f"gram_kernel, sides {'beyond' if x.multi else 'within'} a tile" for x in call.plan.launches
        )
        launch(call, *args)

    def counted_probe(kernel: Any, *args: Any, **arguments: Any) -> None:
        _triton_launches[kernel.__name__] += 1
        launch_probe(kernel, *args, **arguments)

    gram._launch, probe._launch = counted, counted_probe


_triton_launches: Counter[str] = Counter()


def launches() -> Counter[str]:
    """How often each kernel was launched since `install`."""
    return _triton_launches + Counter(launch.kernel for launch in cuda_host.launches())


def _fill(out: Tensor, values: Sequence[int]) -> None:
    out.copy_(cuda_host.fill_table(values))
