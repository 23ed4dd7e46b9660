"""Second derivatives, forward mode and torch.func's transforms, against torch.linalg and exact formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import bsgap_kernels as bsgap

COLUMNS = ("sigma_max", "frobenius_norm", "stable_rank", "participation_ratio", "effective_rank")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(A: Tensor) -> Tensor:
    return A.mT @ A


def covariance(A: Tensor) -> Tensor:
    return torch.cov(A.mT)


def summary(A: Tensor) -> Tensor:
    """The first five columns from torch's singular values, which it differentiates where they differ."""
    sigma = torch.linalg.svdvals(A)
    p = sigma / sigma.sum()
    energy = (sigma**2).sum()
    return torch.stack(
        (
            sigma[0],
            energy.sqrt(),
            energy / sigma[0] ** 2,
            energy**2 / (sigma**4).sum(),
            (-(p * p.log()).sum()).exp(),
        )
    )


PAIRS: tuple[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], ...] = (
    (bsgap.gram, gram),
    (lambda A: bsgap.gram(A, center=True), lambda A: gram(A - A.mean(0))),
    (bsgap.covariance, covariance),
    (lambda A: bsgap.spectral_summary(A)[..., :5], summary),
    (lambda A: bsgap.spectral_summary(A, center=True)[..., :5], lambda A: summary(A - A.mean(0))),
)
each_op = pytest.mark.parametrize(
    ("ours", "theirs"), PAIRS, ids=["gram", "centred", "cov", "summary", "about"]
)


@each_op
@pytest.mark.parametrize("shape", [(5, 3), (4, 4), (3, 5)])
def test_every_transform_against_torch(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], shape: tuple[int, int]
) -> None:
    A, T = random(*shape), random(*shape, seed=1)
    if shape[0] <= shape[1] and ours is PAIRS[4][0]:
        pytest.skip("centring takes a row: σ = 0, where torch has no derivative")

    def near(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    def scalar(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: (f(x) * torch.arange(1, f(x).numel() + 1).view(f(x).shape)).sin().sum()

    near(jvp(ours, (A,), (T,))[1], jvp(theirs, (A,), (T,))[1])
    expected = jacrev(theirs)(A)
    near(jacfwd(ours)(A), expected)
    near(jacrev(ours)(A), expected)
    near(grad(scalar(ours))(A), grad(scalar(theirs))(A))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(ours(forward_ad.make_dual(A, T))).tangent
    assert tangent is not None
    near(tangent, jvp(theirs, (A,), (T,))[1])
    second = hessian(scalar(theirs))(A)
    for outer, inner in ((jacfwd, jacrev), (jacrev, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
        near(outer(inner(scalar(ours)))(A), second)
    many = random(3, *shape, seed=2)
    near(vmap(grad(scalar(ours)))(many), torch.stack([grad(scalar(theirs))(x) for x in many]))
    near(vmap(ours, in_dims=2)(many.movedim(0, 2)), torch.stack([theirs(x) for x in many]))


@each_op
def test_gradgradcheck(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]) -> None:
    A = random(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(ours, A, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(ours, A, check_fwd_over_rev=True)


def second_derivative(A: Tensor, column: str, T: Tensor) -> Tensor:
    index = COLUMNS.index(column)
    return jvp(grad(lambda x: bsgap.spectral_summary(x)[index]), (A,), (T,))[1]


def difference(A: Tensor, column: str, T: Tensor) -> Tensor:
    """The same by central differences of the gradient, at two steps extrapolated."""
    first = grad(lambda x: bsgap.spectral_summary(x)[COLUMNS.index(column)])
    slopes = [(first(A + h * T) - first(A - h * T)) / (2 * h) for h in (2e-3, 1e-3)]
    return (4 * slopes[1] - slopes[0]) / 3


@pytest.mark.parametrize("column", ["frobenius_norm", "participation_ratio", "effective_rank"])
@pytest.mark.parametrize("side", [(6, 3), (3, 6)])
def test_second_derivatives_at_equal_singular_values(column: str, side: tuple[int, int]) -> None:
    Q = torch.linalg.qr(random(6, 3))[0]
    A = Q if side == (6, 3) else Q.mT.contiguous()
    for matrix in (A, 3 * torch.eye(3, dtype=torch.float64)):
        T = random(*matrix.shape, seed=4)
        # Equal values drive apart as the matrix moves, so the gradients of the difference are of simple ones.
        torch.testing.assert_close(
            second_derivative(matrix, column, T), difference(matrix, column, T), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("column", COLUMNS)
def test_second_derivatives_of_a_dead_unit(column: str) -> None:
    # A column of 0 that stays 0: the derivatives are those of the matrix without it.
    A, T = random(6, 4), random(6, 4, seed=5)
    A[:, 2] = T[:, 2] = 0
    left = [0, 1, 3]
    found = second_derivative(A, column, T)
    assert found.isfinite().all()
    expected = hessian(lambda x: summary(x)[COLUMNS.index(column)])(A[:, left])
    torch.testing.assert_close(found[:, left], (expected * T[:, left]).sum((-2, -1)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("column", COLUMNS)
def test_second_derivatives_where_there_are_none(column: str) -> None:
    T = random(4, 4, seed=6)
    for A in (
        torch.zeros(4, 4, dtype=torch.float64),
        torch.eye(4, dtype=torch.float64),
        torch.ones(4, 4).double(),
    ):
        assert second_derivative(A, column, T).isfinite().all()
    assert (second_derivative(torch.zeros(4, 4, dtype=torch.float64), column, T) == 0).all()
    batch = torch.stack((random(4, 4), torch.full((4, 4), torch.nan, dtype=torch.float64))).requires_grad_()
    (first,) = torch.autograd.grad(bsgap.spectral_summary(batch)[0].sum(), batch, create_graph=True)
    (second,) = torch.autograd.grad(first[0].square().sum(), batch)
    assert second[0].isfinite().all()


def test_vmap_of_every_op() -> None:
    As, tolerances = random(3, 5, 8, 6), torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    each = [bsgap.near_rank(As[i], rtol=float(tolerances[i])) for i in range(3)]
    assert (
        vmap(lambda A, r: bsgap.near_rank(A, rtol=r))(As, tolerances).tolist() == torch.stack(each).tolist()
    )
    ratios = vmap(lambda A, r: bsgap.near_rank_ratio(A, rtol=r, center=True), in_dims=(1, None))
    assert ratios(As, tolerances[:, None][0, 0]).shape == (5, 3)
    own = vmap(lambda r: bsgap.near_rank(As[0], rtol=r))(tolerances)
    assert own.tolist() == [bsgap.near_rank(As[0], rtol=float(r)).tolist() for r in tolerances]
    for call in (lambda A, t: bsgap.near_rank(A, t), lambda A, t: torch.ops.bsgap.near_rank.tensor(A, t)):
        found = vmap(call)(As[:, 0], 9 * tolerances)
        assert found.tolist() == torch.linalg.matrix_rank(As[:, 0], 9 * tolerances).tolist()
    square = As[..., :6, :]
    right = torch.linalg.matrix_rank(square[:, 0], tolerances, True)
    assert vmap(lambda A, t: bsgap.near_rank(A, t, True))(square[:, 0], tolerances).tolist() == right.tolist()
    found = vmap(lambda A: torch.ops.bsgap.near_rank(A, None, True, rtol=0.3))(square)
    assert found.tolist() == torch.linalg.matrix_rank(square, rtol=0.3, hermitian=True).tolist()
    found = vmap(lambda A: torch.ops.bsgap.near_rank(A, 3.0))(As)
    assert found.tolist() == torch.linalg.matrix_rank(As, 3.0).tolist()
    wide = vmap(lambda A, r: bsgap.near_rank(A, rtol=r))(As[:, 0], tolerances[:, None].expand(3, 4))
    assert wide.tolist() == [
        [int(bsgap.near_rank(As[i, 0], rtol=float(tolerances[i])))] * 4 for i in range(3)
    ]

    assert vmap(bsgap.near_rank)(As).tolist() == bsgap.near_rank(As).tolist()
    assert vmap(vmap(bsgap.near_rank))(As).tolist() == bsgap.near_rank(As).tolist()
    assert vmap(bsgap.near_rank, in_dims=3)(As.movedim(0, 3)).tolist() == bsgap.near_rank(As).tolist()
    for bound in range(2):
        found = vmap(lambda A: bsgap.near_rank_interval(A, rtol=0.2))(As)[bound]
        assert found.tolist() == bsgap.near_rank_interval(As, rtol=0.2)[bound].tolist()

    thresholds = torch.rand(3, 2, generator=torch.Generator().manual_seed(7))
    for A, t, dims in (
        (As, thresholds, (0, 0)),
        (As, thresholds[0], (0, None)),
        (As[0], thresholds, (None, 0)),
    ):
        found = vmap(bsgap.singular_value_counts, in_dims=dims)(A, t)
        for i in range(3):
            pick = [x[i] if dim == 0 else x for x, dim in zip((A, t), dims, strict=True)]
            assert found[i].tolist() == bsgap.singular_value_counts(*pick).tolist()

    B = random(4, 7)
    grouped = vmap(lambda A: bsgap.near_rank_grouped([A, B, A[0]], rtol=0.3))(As)
    assert grouped.tolist() == [bsgap.near_rank_grouped([A, B, A[0]], rtol=0.3).tolist() for A in As]

    def accumulated(A: Tensor, state: Tensor) -> Tensor:
        return bsgap.gram_accumulate_(state, A, torch.zeros(6, dtype=torch.float64))

    states = torch.zeros(3, 7, 7, dtype=torch.float64)
    vmap(accumulated)(As[:, 0], states)
    torch.testing.assert_close(states[:, 1:, 1:], As[:, 0].mT @ As[:, 0], rtol=1e-13, atol=1e-13)
    with pytest.raises(RuntimeError, match="needs a state of its own for each"):
        vmap(accumulated, in_dims=(0, None))(As[:, 0], states[0])


@pytest.mark.parametrize("op", [bsgap.gram, bsgap.covariance, bsgap.spectral_summary])
def test_compiled_transforms(op: Callable[[Tensor], Tensor]) -> None:
    A, T = random(6, 4), random(6, 4, seed=1)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(op, (x,), (T,))[1], grad(lambda y: op(y)[..., :4].sum())(x)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(A)
    for found, expected in zip(compiled, both(A), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("column", ["sigma_max", "stable_rank", "effective_rank"])
def test_third_derivatives_are_refused(column: str) -> None:
    A = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    place = bsgap.SUMMARY_COLUMNS.index(column)

    def metric(x: Tensor) -> Tensor:
        return bsgap.spectral_summary(x)[..., place].sum()

    (first,) = torch.autograd.grad(metric(A), A, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), A, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives are not supported"):
        torch.autograd.grad(second.square().sum(), A)
