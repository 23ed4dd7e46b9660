"""Who is timed where, what each counts, and which peer is the one to beat."""

from __future__ import annotations

import pytest
import torch

from bsgap_kernels.bench import Case
from bsgap_kernels.bench.contenders import (
    CONTENDERS,
    MATRIX_RANK,
    NEAR_RANK,
    PROBED,
    TRACKER,
    finest_rtol,
    taking_part,
)
from bsgap_kernels.bench.result import compare
from bsgap_kernels.bench.truth import judge, truth


def test_centred_contenders_are_checked_against_the_centred_matrix() -> None:
    A = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 100
    (covariance,) = [c for c in CONTENDERS if c.centred]
    assert int(truth([A], 0.1).counts) == 1
    assert int(truth([A], 0.1, centred=True).counts) == 6
    assert judge(covariance([A], 0.1), truth([A], 0.1, centred=True)).equal == 1


def names(case: Case, rtols: list[float]) -> list[set[str]]:
    return [{c.name for c in some} for some in taking_part(CONTENDERS, case, rtols).values()]


def test_who_is_timed_where() -> None:
    doubles = {c.name for c in CONTENDERS if "float64" in c.name}
    coarse, fine = names(Case("", "", ((9000, 500),)), [1e-2, 1e-3])
    assert coarse == {c.name for c in CONTENDERS} - doubles
    assert coarse - fine == {PROBED, TRACKER}
    assert fine - coarse == doubles
    slow, again = names(Case("", "", ((2049, 2049),), slow=True), [1e-2, 1e-3])
    assert coarse - slow == {"torch.cov + eigvalsh", "NumPy Gram + eigvalsh"}
    assert MATRIX_RANK in slow - again
    (batch,) = names(Case("", "", ((3, 9, 14),)), [1e-2])
    assert coarse - batch == {PROBED, TRACKER}


def test_a_step_of_the_tracker_counts_what_passed_its_hooks() -> None:
    (tracker,) = [c for c in CONTENDERS if c.name == TRACKER]
    for case in (
        Case("tall", "", ((40, 12),)),
        Case("list", "", ((40, 12), (30, 5)), grouped=True),
        Case("wide", "", ((5, 30),)),
    ):
        inputs = case.make()
        for _ in range(2):  # one tracker serves all steps
            counts = tracker(inputs, 0.1)
            assert isinstance(counts, torch.Tensor)
            assert torch.equal(counts.flatten(), truth(inputs, 0.1).counts)


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_a_float32_gram_matrix_is_right_by_construction_at_one_threshold_only(library: str) -> None:
    A = torch.randn(65536, 64, generator=torch.Generator().manual_seed(0))
    gram = A.T @ A if library == "torch" else torch.from_numpy(A.numpy().T @ A.numpy())
    exact = A.double().T @ A.double()
    error = float(torch.linalg.matrix_norm(gram - exact, 2) / torch.linalg.matrix_norm(exact, 2))
    assert error / (2 * 1e-2**2) < 0.01 < error / (2 * 1e-3**2)
    assert 1e-3 < finest_rtol(torch.float32) < 1e-2


def test_the_best_peer_is_right_by_construction() -> None:
    check = {"wrong": 0}
    rows = [
        {"name": NEAR_RANK, "ours": True, "median_ms": 2.0, "check": check},
        {"name": "float32", "ours": False, "median_ms": 1.0, "check": check, "finest_rtol": 0.005},
        {"name": "float64", "ours": False, "median_ms": 8.0, "check": check, "finest_rtol": 1e-6},
    ]
    for rtol, peer, times in ((0.005, "float32", 0.5), (1e-3, "float64", 4)):
        record = {"rtol": rtol, "contenders": [dict(row) for row in rows]}
        compare(record)
        assert record["best_peer"] == peer
        assert record["contenders"][0]["vs_best_peer"] == times
