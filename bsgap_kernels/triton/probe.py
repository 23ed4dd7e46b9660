"""A bound of a Gram matrix's error that assumes nothing of how it was rounded (docs/certificates.md, 6).

Z = Xᵀ(XΩ) is formed in float64 by two reads of X. The first cannot be the Gram kernel's: each of its programs
sees two blocks of columns, and XΩ needs whole rows of `side` numbers. The second could only be saved by
keeping what was read, which at these sides exceeds a multiprocessor's memory. Rows of XΩ take 128 bytes,
against the at least 848 of a row of X (dispatch.CUDA_PROBED_MIN_SIDE).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..rounding import UNIT_ROUNDOFF, gamma
from . import config
from .config import PROBE_COLUMNS
from .gram import GramSet, processors_of
from .table import MatrixView, Orientation, describe, orient

PROBE_FACTOR = 7.978845608028655
"""10 √(2/π), rounded up."""
BLOCK_OUT, BLOCK_SUM = 128, 32
OMEGA_BLOCK = 64
# A split of fewer blocks than this costs more in partial sums than it brings in parallelism.
MIN_SPLIT_BLOCKS = 4


@dataclass(frozen=True)
class Product:
    """One launch of the product kernel: a pure function of the view and of the number of processors."""

    layout: int
    tiles: int  # blocks of BLOCK_OUT rows of the result
    blocks: int  # blocks of BLOCK_SUM terms that a row sums up
    splits: int

    @property
    def roundings(self) -> int:
        """Most sequential roundings that a term of the result passes through, in any order of these.

        Its product and the sums of its block: at most BLOCK_SUM together; one a block of its split; the
        splits' sum; two to spare.
        """
        return BLOCK_SUM + -(-self.blocks // self.splits) + self.splits - 1 + 2


def plan_product(
    view: MatrixView, o: Orientation, transposed: bool, processors: int, splits: int | None = None
) -> Product:
    """Two programs a processor at least, where there are enough blocks. splits overrides the heuristic."""
    depth = BLOCK_SUM if transposed else BLOCK_OUT
    itemsize = view.tensor.element_size()
    layout = config.layout_of(o, view.tensor.data_ptr(), view.stride_batch, itemsize, depth)
    along_depth = config.block_count(o, layout, depth)
    along_side = -(-o.side // (BLOCK_OUT if transposed else BLOCK_SUM))
    tiles, blocks = (along_side, along_depth) if transposed else (along_depth, along_side)
    wanted = splits or min(-(-2 * processors // (tiles * view.count)), blocks // MIN_SPLIT_BLOCKS)
    return Product(layout, tiles, blocks, max(1, min(wanted, blocks, config.MAX_SPLITS)))


def probe_vectors(count: int, side: int, seed: int, device: torch.device) -> Tensor:
    """Ω of every matrix, (count, side, PROBE_COLUMNS) float64: matrix i has the vectors of seed + i."""
    from .probe_kernel import omega_kernel

    omega = torch.empty(count, side, PROBE_COLUMNS, dtype=torch.float64, device=device)
    grid = (count, -(-side // OMEGA_BLOCK))
    _launch(omega_kernel, grid, device, omega_ptr=omega, seed=seed, side=side, **omega_constants())
    return omega


def omega_constants() -> dict[str, Any]:
    """Compile-time constants of the kernel of Ω, and the compiler's options."""
    return {"BLOCK": OMEGA_BLOCK, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def thin_product(
    view: MatrixView, thin: Tensor, *, transposed: bool, splits: int | None = None
) -> tuple[Tensor, Tensor, Product]:
    """X thin, or Xᵀ thin, in float64 (count, rows, PROBE_COLUMNS), and ‖X‖_F² (count,) of the former.

    X is depth x side of the orientation that the Gram matrix has. Both results by two-stage sums in a fixed
    order.
    """
    from .probe_kernel import product_kernel

    device, o = view.tensor.device, orient(view, False)
    processors, architecture = processors_of(device)
    plan = plan_product(view, o, transposed, processors, splits)
    slots = view.count * plan.splits
    out = thin.new_empty(view.count, plan.splits, o.side if transposed else o.depth, PROBE_COLUMNS)
    squares = thin.new_empty(view.count, plan.splits * plan.tiles)
    _launch(
        product_kernel,
        (slots * plan.tiles,),
        device,
        x_ptr=view.tensor,
        thin_ptr=thin,
        out_ptr=out,
        squares_ptr=squares,
        side=o.side,
        outer=o.outer,
        inner=o.inner,
        stride_batch=view.stride_batch,
        stride_outer=o.stride_outer,
        stride_inner=o.stride_inner,
        stride_side=o.stride_side,
        tiles=plan.tiles,
        splits=plan.splits,
        **product_constants(plan.layout, view.tensor.dtype, transposed, architecture),
    )
    return out[:, 0] if plan.splits == 1 else out.sum(1), squares.sum(1), plan


def product_constants(layout: int, dtype: torch.dtype, transposed: bool, architecture: int) -> dict[str, Any]:
    """Compile-time constants of the product kernel, and the compiler's options.

    Two stages where no float64 tensor core leaves the registers for three: compute capability 12.
    """
    return {
        "LAYOUT": layout,
        "TRANSPOSED": transposed,
        "VECTOR": config.VECTOR_BYTES // dtype.itemsize,
        "BLOCK_OUT": BLOCK_OUT,
        "BLOCK_SUM": BLOCK_SUM,
        "num_warps": 8,
        "num_stages": 2 if architecture == 12 else 3,
        "enable_fp_fusion": True,
    }


def probe_error(view: MatrixView, found: GramSet, seed: int) -> Tensor:
    """Bounds (count,) of ‖Ĝ - XᵀX‖, each false with probability at most 1e-9 over the seed.

    found: the Gram matrices Ĝ of this view alone, formed from float32 or 16-bit input in any way. Infinite
    where anything is not finite. Launches on the current stream and does not synchronise. It costs two reads
    of X and one of Ĝ.
    """
    G = found.gram(0)
    count, k = G.shape[:2]
    depth = orient(view, False).depth
    g_view = describe(G, batch=True)
    assert g_view is not None
    omega = probe_vectors(count, k, seed, G.device)
    y, x_squares, first = thin_product(view, omega, transposed=False)
    z, _, second = thin_product(view, y, transposed=True)
    g_omega, g_squares, third = thin_product(g_view, omega, transposed=False)

    # Computed sums of n squares and their roots, in any order: below what they stand for by less than
    # 2 γ_{n+8}. The last factor covers the roundings of these lines, fewer than 24 in a row.
    own = 1 + 2 * gamma(k + 8)
    frobenius = g_squares.sqrt() * (1 + 2 * gamma(k * k + 8))
    rounding = frobenius * gamma(third.roundings) + x_squares * (
        gamma(first.roundings + second.roundings) * (1 + 2 * gamma(k * depth + 8))
    )
    length = torch.linalg.vector_norm(omega, dim=1) * own
    difference = torch.linalg.vector_norm(g_omega - z, dim=1) * own
    # 2^-537: the square of an entry may have underflowed.
    worst = (difference + rounding[:, None] * length).amax(1) + k**0.5 * 2.0**-537
    bound = worst * (PROBE_FACTOR * (1 + 64 * UNIT_ROUNDOFF))
    return torch.where(torch.isfinite(bound), bound, torch.inf)


def _launch(kernel: Any, grid: tuple[int, ...], device: torch.device, **arguments: Any) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments)
