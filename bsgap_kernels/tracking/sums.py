"""What a site adds up: rows, Gram matrix and column sums, in float64 on the device of the activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bsgap_kernels.rounding import UNDERFLOW
from bsgap_kernels.strides import features_last
from bsgap_kernels.triton.memory import kept

# Without a frame of Python: after a training step all that a call touches is far from the processor.
_accumulate_gram: Callable[..., None] = torch.ops.bsgap._accumulate_gram_.default._op
_centred_gram: Callable[..., tuple[Tensor, Tensor]] = torch.ops.bsgap._centred_gram.default._op

ROWS, ERROR, ADDITIONS = range(3)
"""Elements of `totals`: rows added, bound of the Gram matrix's error, number of additions."""


@dataclass(eq=False)
class Sums:
    """Sums over the rows of activations with n features.

    With `features_side` gram is AᵀA (n, n): it adds up over chunks, micro-batches, steps and ranks. Without,
    it is AAᵀ (m, m) of one matrix with fewer rows than features. Its lower triangle counts, what stands above
    is unspecified. Memory: 8·side² bytes.
    """

    n: int
    features_side: bool
    gram: Tensor  # float64 (side, side)
    totals: Tensor  # float64 (3,)
    sums: Tensor | None  # float64 (n,): column sums, for centring
    magnitudes: Tensor | None  # float64 (n,): sums of absolute values, for dormant units

    @staticmethod
    def zeros(
        n: int,
        device: torch.device,
        *,
        rows: int | None = None,
        sums: bool = False,
        magnitudes: bool = False,
    ) -> Sums:
        """Nothing added yet. rows: the matrix's, if AAᵀ of one matrix is to be held."""
        side = n if rows is None else rows

        def new(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        def make() -> Sums:
            return Sums(
                n,
                rows is None,
                new(side, side),
                new(3),
                new(n) if sums and rows is None else None,
                new(n) if magnitudes else None,
            )

        # Out of inference mode, whose tensors nothing may change later.
        with torch.inference_mode(False):
            return kept(device, make)

    @property
    def side(self) -> int:
        """Rows and columns of gram."""
        return self.gram.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Everything that is added to."""
        return [t for t in (self.gram, self.totals, self.sums, self.magnitudes) if t is not None]

    def add(
        self,
        A: Tensor,
        first: int = -1,
        last: int = 0,
        center: bool = False,
        float32_sums: bool = False,
        fresh: bool = False,
    ) -> None:
        """Add the rows of A, whose dimensions [first, last) are features and all others observations.

        As a default the last dimension is the features. center: of AAᵀ only. fresh: put them in the place of
        what is there. Gradients of A are nobody's concern here.
        """
        if first < 0:
            first, last = A.ndim - 1, A.ndim
        _accumulate_gram(
            self.gram,
            self.totals,
            self.sums,
            A,
            first,
            last,
            self.features_side,
            center and not self.features_side,
            float32_sums,
            fresh,
        )
        if self.magnitudes is not None:
            with torch.no_grad():
                if fresh:
                    self.magnitudes.zero_()
                rows = features_last(A, first, last).flatten(0, -2)
                self.magnitudes += rows.abs().sum(0, dtype=torch.float64)

    def add_sums(self, other: Sums) -> None:
        """Add what another has summed up about the same features."""
        for own, more in zip(self.tensors(), other.tensors(), strict=True):
            own += more
        self.totals[ADDITIONS] += 1

    def fade(self, decay: float) -> None:
        """Multiply everything, the weight of the rows included, by decay."""
        error, additions = self.totals[ERROR].clone(), self.totals[ADDITIONS] + 1  # it rounds once more
        for tensor in self.tensors():
            tensor *= decay
        # Entries that underflow stop to fade, or vanish: without this a matrix of them would look exact.
        self.totals[ERROR] += (error > 0).to(error.dtype) * (self.side * UNDERFLOW)
        self.totals[ADDITIONS] = additions

    def to(self, device: torch.device) -> Sums:
        """The same on another device, or itself."""
        if self.gram.device == device:
            return self

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        return Sums(
            self.n,
            self.features_side,
            self.gram.to(device),
            self.totals.to(device),
            moved(self.sums),
            moved(self.magnitudes),
        )

    def centred(self) -> Sums:
        """The same about the column means: G - s sᵀ/m, or H G H of AAᵀ.

        Both err by less than 3 e + (4 γ_{side+2} + 32 u) tr G, e the bound of G (docs/certificates.md,
        section 8). What is no larger than that is rounding of equal rows, and becomes 0.
        """
        C, totals = _centred_gram(self.gram, self.totals, self.sums)
        return Sums(self.n, self.features_side, C, totals, None, self.magnitudes)
