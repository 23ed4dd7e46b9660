"""What is timed on a GPU: our ops, and what a user could write with torch or CuPy."""

from __future__ import annotations

import importlib
import importlib.util
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..cases import COARSE_RTOL, Case
from ..contenders import (
    CONTENDERS,
    MATRIX_RANK,
    SVDVALS,
    TRACKER,
    Contender,
    Result,
    count_squares,
    finest_rtol,
    small_covariance,
)
from .hook import hook_path

CUPY = "mm float32 Gram + CuPy eigvalsh"
HOOK = "hook path"
LATE_VALUES = 1 << 14
"""Singular value decompositions of more entries take seconds to minutes: one call each, after all else."""


@dataclass(frozen=True)
class GpuContender:
    """One way to count. `prepare` does what is not timed and returns the call that is."""

    name: str
    ours: bool
    prepare: Callable[[Case, list[Tensor], float], Callable[[], Result]]
    centred: bool = False
    serves: Callable[[Case], bool] = lambda case: True
    late: Callable[[Case], bool] = lambda case: False
    finest_rtol: float = 0.0


def _prepared(contender: Contender) -> GpuContender:
    return GpuContender(
        contender.name,
        contender.ours,
        lambda case, inputs, rtol: partial(contender, inputs, rtol),
        contender.centred,
        late=_late if contender.name in (MATRIX_RANK, SVDVALS) else lambda case: False,
    )


def _late(case: Case) -> bool:
    return case.values > LATE_VALUES


def _svd_input(A: Tensor) -> Tensor:
    return A if A.dtype == torch.float64 else A.float()


def matrix_rank(A: Tensor, rtol: float) -> Tensor:
    """torch's own count; the 16-bit formats have none, so the user converts."""
    counts: Tensor = torch.linalg.matrix_rank(_svd_input(A), rtol=rtol)
    return counts


def singular_values(A: Tensor, rtol: float) -> Tensor:
    """Counts the singular values in float32."""
    sigma = torch.linalg.svdvals(_svd_input(A))
    return torch.sum(sigma > rtol * sigma[..., :1], -1)


def gram32(A: Tensor) -> Tensor:
    """The smaller Gram matrix in float32: of halves by exact products accumulated in float32."""
    left, right = (A.mT, A) if A.shape[-1] <= A.shape[-2] else (A, A.mT)
    if A.dtype == torch.float32:
        return left @ right
    if not A.is_cuda:  # torch has out_dtype on CUDA only
        return left.float() @ right.float()
    product = torch.mm if A.dim() == 2 else torch.bmm
    result: Tensor = product(left, right, out_dtype=torch.float32)
    return result


def stacked_eigenvalues(grams: list[Tensor], eigvalsh: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Eigenvalues of each, those of equal side in one batched call."""
    by_side: dict[int, list[int]] = defaultdict(list)
    for i, gram in enumerate(grams):
        by_side[gram.shape[-1]].append(i)
    found: dict[int, Tensor] = {}
    for members in by_side.values():
        if len(members) == 1:
            found[members[0]] = eigvalsh(grams[members[0]])
            continue
        for i, values in zip(members, eigvalsh(torch.stack([grams[i] for i in members])), strict=True):
            found[i] = values
    return [found[i] for i in range(len(grams))]


def _cupy_eigvalsh(gram: Tensor) -> Tensor:
    cupy: Any = importlib.import_module("cupy")
    stream = torch.cuda.current_stream(gram.device).cuda_stream
    with cupy.cuda.Device(gram.device.index or 0), cupy.cuda.ExternalStream(stream):
        values: Tensor = torch.utils.dlpack.from_dlpack(cupy.linalg.eigvalsh(cupy.from_dlpack(gram)))
        return values


def _gram_peer(eigvalsh: Callable[[Tensor], Tensor], form: Callable[[Tensor], Tensor]) -> Any:
    def prepare(case: Case, inputs: list[Tensor], rtol: float) -> Callable[[], Result]:
        def call() -> Result:
            counts = [
                count_squares(e, rtol).flatten()
                for e in stacked_eigenvalues([form(A) for A in inputs], eigvalsh)
            ]
            return torch.cat(counts)

        return call

    return prepare


def covariance32(A: Tensor) -> Tensor:
    """torch.cov in float32 (of bfloat16 it would round to bfloat16), a matrix at a time."""
    wide = _svd_input(A)
    if wide.dim() == 2:
        return torch.cov(wide.T)
    return torch.stack([torch.cov(X.T) for X in wide.flatten(0, -3)])


def _activations(case: Case, inputs: list[Tensor], channels_last: bool) -> list[Tensor]:
    """The (B, C, H, W) whose channel unfoldings the inputs are, in either layout."""
    images = []
    for A in inputs:
        side = round((A.shape[0] // case.image_batch) ** 0.5)
        image = A.view(case.image_batch, side, side, A.shape[1]).permute(0, 3, 1, 2)
        images.append(image if channels_last else image.contiguous())
    return images


def _hook(channels_last: bool) -> Any:
    def prepare(case: Case, inputs: list[Tensor], rtol: float) -> Callable[[], Result]:
        return hook_path(_activations(case, inputs, channels_last), rtol)

    return prepare


def _grouped_nchw(case: Case, inputs: list[Tensor], rtol: float) -> Callable[[], Result]:
    views = [image.movedim(1, -1) for image in _activations(case, inputs, False)]
    return lambda: ops.near_rank_grouped(views, rtol=rtol)


def _has_cupy(case: Case) -> bool:
    return importlib.util.find_spec("cupy") is not None


def _is_model(case: Case) -> bool:
    return case.image_batch > 0


# hermitian eigenvalues: torch <= 2.11 loops over a batch of sides above 32, CuPy does not.
GPU_CONTENDERS = (
    # The tracker's hooks are timed without its host work, which would wait for the device: HOOK.
    *(_prepared(c) for c in CONTENDERS if c.ours and c.name != TRACKER),
    GpuContender("near_rank_grouped, NCHW", True, _grouped_nchw, serves=_is_model),
    GpuContender(f"{HOOK}, channels_last", True, _hook(True), serves=_is_model),
    GpuContender(f"{HOOK}, NCHW", True, _hook(False), serves=_is_model),
    _prepared(Contender(MATRIX_RANK, False, matrix_rank)),
    _prepared(Contender(SVDVALS, False, singular_values)),
    GpuContender(
        "mm float32 Gram + eigvalsh",
        False,
        _gram_peer(torch.linalg.eigvalsh, gram32),
        finest_rtol=finest_rtol(torch.float32),
    ),
    GpuContender(
        CUPY,
        False,
        _gram_peer(_cupy_eigvalsh, gram32),
        serves=_has_cupy,
        finest_rtol=finest_rtol(torch.float32),
    ),
    GpuContender(
        "torch.cov + eigvalsh",
        False,
        _gram_peer(torch.linalg.eigvalsh, covariance32),
        centred=True,
        serves=lambda case: small_covariance(case, COARSE_RTOL),
        finest_rtol=finest_rtol(torch.float32),
    ),
)
