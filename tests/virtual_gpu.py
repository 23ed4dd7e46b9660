"""Runs the private ops of CUDA on CPU tensors: Triton's interpreter, then the host harness.

`install()` registers them for the CPU, so that every op on a CPU tensor takes the path that a CUDA tensor
takes, down to the source of each kernel. It must come before triton is first imported, and it is for good:
conftest.py calls it where BSGAP_VIRTUAL_GPU=1, and `test_virtual_gpu.py` runs tests of the ops that way.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import cuda_host
import torch
from torch import Tensor

from bsgap_kernels import _native, dispatch
from bsgap_kernels.ops import _cuda, _cuda_gram, _cuda_sums

_LIBRARY = torch.library.Library("bsgap", "IMPL")


def install() -> None:
    """Lets CPU tensors run the private ops of CUDA in this process."""
    os.environ["TRITON_INTERPRET"] = "1"
    kernels = _cuda.KERNELS | _cuda_gram.KERNELS | _cuda_sums.KERNELS
    of_cpu = {name: torch.library.get_kernel(f"bsgap::{name}", "CPU") for name in kernels}
    for name, kernel in kernels.items():
        _LIBRARY.impl(name, kernel, "CPU", allow_override=True)

    def on_host(op: str, *args: Any) -> Any:
        key = torch._C._dispatch_keys(torch.empty(0))
        return of_cpu[op].call_boxed(key, *args)

    _cuda.on_host = _cuda_gram.on_host = _cuda_sums.on_host = on_host
    dispatch.device_kind = lambda A: "cuda"
    _native.CUDA_LIBRARY_PATH = _native.LIBRARY_PATH  # the kernels are there, by another way
    for name, kernel in (
        ("_cuda_fill", _fill),
        ("_cuda_counts", cuda_host.count_grams),
        ("_cuda_summaries", cuda_host.summaries),
    ):
        _LIBRARY.impl(name, kernel, "CPU")
    # No graph is captured here.
    torch.cuda.is_current_stream_capturing = lambda: False
    _LIBRARY.impl("_cuda_exchange_capture_mode", lambda mode: mode, "BackendSelect")
    from bsgap_kernels.triton import gram, probe

    run, launch_probe = gram.Prepared.run, probe._launch

    def counted(call: gram.Prepared, *args: Any, **options: Any) -> None:
        _triton_launches.update(
            f"gram_kernel, sides {'beyond' if x.multi else 'within'} a tile" for x in call.plan.launches
        )
        run(call, *args, **options)

    def counted_probe(kernel: Any, *args: Any, **arguments: Any) -> None:
        _triton_launches[kernel.__name__] += 1
        launch_probe(kernel, *args, **arguments)

    gram.Prepared.run = counted  # type: ignore[method-assign]
    probe._launch = counted_probe


_triton_launches: Counter[str] = Counter()


def launches() -> Counter[str]:
    """How often each kernel was launched since `install`."""
    return _triton_launches + Counter(launch.kernel for launch in cuda_host.launches())


def _fill(out: Tensor, values: Sequence[int]) -> None:
    out.copy_(cuda_host.fill_table(values))
