"""The device table: how matrices lie in memory and where their results go. Pure Python, no GPU.

One row of int64 describes equal-shaped matrices. `csrc/cuda/table.cuh` holds the same columns in this order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from ..strides import joined_dimensions

COLUMNS = (
    "first_item",  # prefix sum of Gram work items within the row's launch group
    "first_matrix",  # prefix sum of matrices, table order
    "count",  # matrices in the row
    "offset",  # bytes from the call's origin (the first tensor's address) to the first element
    "stride_batch",  # this and all strides in elements
    "side",  # k: the Gram matrix is k x k
    "outer",  # depth = outer * inner: d -> (d // inner, d % inner)
    "inner",
    "stride_outer",
    "stride_inner",
    "stride_side",
    "splits",  # ranges of depth
    "first_gram",  # element offset of the row's first matrix in the Gram buffer
    "first_partial",  # element offset in the partials buffer
    "layout",  # code of the Gram kernel: launch group, class of side, memory layout (config.py)
    "first_result",  # index of the first matrix in the caller's order
    "roundings",  # most sequential float64 roundings that a term of an entry passes through
    "m",  # observations
    "n",  # features
    "first_vector",  # element offset of the row's first per-feature vector (shift, sums), caller's order
)


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of the table, and what the host knows of them."""

    rows: list[dict[str, int]]  # table order
    order: list[int]  # table row -> index of the view

    @functools.cached_property
    def sides(self) -> tuple[int, ...]:
        """Of table rows."""
        return tuple(row["side"] for row in self.rows)

    @functools.cached_property
    def batches(self) -> tuple[int, ...]:
        """Matrices of table rows."""
        return tuple(row["count"] for row in self.rows)

    @functools.cached_property
    def matrices(self) -> int:
        """Matrices in all rows."""
        return sum(self.batches)

    @property
    def values(self) -> list[int]:
        """The rows' values back to back, as the device reads them."""
        return [row[column] for row in self.rows for column in COLUMNS]


@dataclass(frozen=True)
class MatrixView:
    """Equal-shaped matrices (observations x features) inside one tensor, which it keeps alive.

    Observation r of a matrix stands at (r // row_inner) * stride_row_outer + (r % row_inner) *
    stride_row_inner; strides are in elements and 0 along dimensions of one element.
    """

    tensor: Tensor
    count: int
    stride_batch: int
    row_outer: int
    row_inner: int
    stride_row_outer: int
    stride_row_inner: int
    n: int
    stride_column: int

    @property
    def geometry(self) -> tuple[int, ...]:
        """All but the tensor."""
        return (
            self.count,
            self.stride_batch,
            self.row_outer,
            self.row_inner,
            self.stride_row_outer,
            self.stride_row_inner,
            self.n,
            self.stride_column,
        )

    @property
    def m(self) -> int:
        """Observations."""
        return self.row_outer * self.row_inner


@dataclass(frozen=True)
class Orientation:
    """A view as the Gram kernel reads it: the Gram matrix's side, and the depth that is summed over."""

    side: int
    outer: int
    inner: int
    stride_outer: int
    stride_inner: int
    stride_side: int

    @property
    def depth(self) -> int:
        """Terms of each entry."""
        return self.outer * self.inner


def describe(A: Tensor, *, batch: bool, features_side: bool = False) -> MatrixView | None:
    """The matrices of A (*, m, n), n features last: leading dimensions count matrices, or observations.

    Observations are taken in any order (sums over them do not depend on it), so a permuted or sliced view of
    NCHW is read in place. None where strides leave more levels than a row of the table has: at most two of
    observations (one if fewer than features, unless `features_side`), one of matrices. Then the caller makes
    A contiguous. A must not be empty.
    """
    sizes, strides = list(A.shape), list(A.stride())
    n, stride_column = sizes[-1], strides[-1]
    split = len(sizes) - 2 if batch else 0
    matrices = joined_dimensions(list(zip(sizes[:split], strides[:split], strict=True)))
    rows = list(zip(sizes[split:-1], strides[split:-1], strict=True))
    rows = joined_dimensions(sorted(rows, key=lambda row: -row[1]))
    m = 1
    for size, _ in rows:
        m *= size
    levels = 1 if m < n and not features_side else 2
    if len(matrices) > 1 or len(rows) > levels:
        return None
    count, stride_batch = matrices[0] if matrices else (1, 0)
    inner, stride_inner = rows[-1] if rows else (1, 0)
    outer, stride_outer = rows[0] if len(rows) == 2 else (1, 0)
    return MatrixView(
        tensor=A,
        count=count,
        stride_batch=stride_batch,
        row_outer=outer,
        row_inner=inner,
        stride_row_outer=stride_outer,
        stride_row_inner=stride_inner,
        n=n,
        stride_column=stride_column if n > 1 else 0,
    )


def orient(view: MatrixView, features_side: bool) -> Orientation:
    """The smaller side, or the features' if asked, against the rest."""
    if features_side or view.n <= view.m:
        return Orientation(
            side=view.n,
            outer=view.row_outer,
            inner=view.row_inner,
            stride_outer=view.stride_row_outer,
            stride_inner=view.stride_row_inner,
            stride_side=view.stride_column,
        )
    if view.row_outer != 1:
        raise ValueError("bsgap: a wide matrix needs one stride for its observations; make it contiguous")
    return Orientation(
        side=view.m,
        outer=1,
        inner=view.n,
        stride_outer=0,
        stride_inner=view.stride_column,
        stride_side=view.stride_row_inner,
    )
