"""Several thresholds at once, what comes with them for nothing, and what is said of saturated counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bsgap_kernels import reference
from bsgap_kernels.tracking import RankTracker, SiteRecord, SpectralAccumulator

RTOLS = (0.3, 0.03, 0.01)


def spread(m: int, n: int, *, mean: float = 0.05) -> Tensor:
    """Rows with singular values over four decades, none near a threshold, and a mean of some energy."""
    generator = torch.Generator().manual_seed(m + n)
    k = min(m, n)
    U, _ = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
    return ((U * torch.logspace(1, -3, k, dtype=torch.float64)) @ V.T + mean).float()


def tracked(A: Tensor, **options: Any) -> SiteRecord:
    """The record of one site whose activation is A."""
    model = nn.Sequential(nn.Linear(A.shape[1], A.shape[1], bias=False))
    with RankTracker(model, layers=["0"], verbose=False, **options) as tracker:
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(A.shape[1]))
        model(A)
        (record,) = tracker.collect().values()
    return record


def svd_count(A: Tensor, rtol: float, center: bool = False) -> int:
    sigma = torch.linalg.svdvals((A.double() - A.double().mean(0)) if center else A.double())
    return int((sigma > rtol * sigma[0]).sum())


@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("shape", [(90, 24), (150, 80), (12, 40)])
def test_each_threshold_is_counted(shape: tuple[int, int], certify: bool) -> None:
    A = spread(*shape)
    record = tracked(A, rtol=RTOLS, certify=certify)
    assert record.near_rank == svd_count(A, RTOLS[0])
    for rtol in RTOLS[1:]:
        expected = svd_count(A, rtol)
        assert record.summary[f"near_rank@{rtol:g}"] == expected
        if certify:
            assert record.summary[f"lower@{rtol:g}"] == record.summary[f"upper@{rtol:g}"] == expected
    for name in ("stable_rank", "participation_ratio"):
        expected = float(getattr(reference, name)(A.double()))
        assert record.summary[name] == pytest.approx(expected, rel=1e-4)
    assert record.summary["mean_energy"] == pytest.approx(float(reference.mean_energy(A.double())), abs=1e-5)
    for place, rtol in enumerate(RTOLS[: 3 if certify else 2]):
        name = f"centred_near_rank@{rtol:g}" if place else "centred_near_rank"
        assert record.summary[name] == svd_count(A, rtol, center=True)


def test_a_centred_count_that_float32_sums_do_not_resolve_is_left_out() -> None:
    A = spread(300, 20, mean=3.0)  # the mean's singular value is some 25 times the next
    names = [f"centred_near_rank@{rtol:g}" for rtol in (0.03, 0.01)]
    record = tracked(A, rtol=RTOLS)
    assert record.summary["mean_energy"] > 0.99
    assert not any(name in record.summary for name in names)
    exact = tracked(A, rtol=RTOLS, certify=True)
    for name, rtol in zip(names, (0.03, 0.01), strict=True):
        assert exact.summary[name] == svd_count(A, rtol, center=True)
    accumulated = (
        SpectralAccumulator(rtol=RTOLS, certify=False, metrics=["centred_near_rank"]).update(A).compute()
    )
    assert accumulated.summary[names[1]] == exact.summary[names[1]]  # its sums are float64


@pytest.mark.parametrize("A", [torch.zeros(9, 4), torch.full((9, 4), 0.7), torch.full((9, 4), torch.nan)])
def test_constant_and_non_finite_activations(A: Tensor) -> None:
    for certify in (False, True):
        record = tracked(A, rtol=RTOLS, certify=certify)
        nan = bool(A.isnan().any())
        zero = not nan and not bool(A.any())
        assert record.near_rank == record.summary["near_rank@0.03"] == (-1 if nan else 0 if zero else 1)
        assert record.summary["centred_near_rank"] == (-1 if nan else 0)
        assert record.summary["mean_energy"] == pytest.approx(math.nan if nan else 1.0 - zero, nan_ok=True)
        assert record.summary["participation_ratio"] == pytest.approx(
            math.nan if nan else 1.0 - zero, nan_ok=True
        )


def test_rows_carry_their_threshold(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    with RankTracker(model, sinks=tmp_path / "rows.jsonl", verbose=False) as tracker:
        model(torch.randn(30, 6))
        tracker.step()
        assert set(tracker.baseline()["1#0"].summary) >= {"near_rank@0.03", "near_rank@0.01"}
    text = (tmp_path / "rows.jsonl").read_text()
    for name in (
        "near_rank",
        "ratio",
        "near_rank@0.03",
        "near_rank@0.01",
        "centred_near_rank",
        "mean_energy",
    ):
        assert f'"batch.{name}"' in text


@pytest.mark.parametrize(
    ("rtol", "error", "words"),
    [
        ((), ValueError, "expected a number or several different ones"),
        ((0.1, 0.1), ValueError, "different"),
        ((0.1, 1.0), ValueError, "1.0 in (0.1, 1.0), expected less than 1"),
        ((0.1, -1e-2), ValueError, "at least 0"),
        ((0.1, math.nan), ValueError, "finite"),
        ((0.1, 1e-12), ValueError, "resolves no less"),
        (True, TypeError, "expected a number"),
        ("0.1", TypeError, "expected a number"),
        (("0.1",), TypeError, "expected a number"),
    ],
)
def test_a_bad_rtol_is_refused(rtol: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as raised:
        RankTracker(nn.ReLU(), rtol=rtol)
    assert words in str(raised.value)


def test_metrics_about_the_mean_are_refused_where_it_is_taken_off() -> None:
    with pytest.raises(ValueError, match="'mean_energy' with center=True"):
        RankTracker(nn.ReLU(), center=True, metrics=["mean_energy"])
    record = tracked(spread(30, 8), center=True)
    assert "centred_near_rank" not in record.summary


def test_the_first_reading_is_kept_and_says_what_is_saturated(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    with RankTracker(model, rtol=(0.5, 0.01)) as tracker:
        assert tracker.baseline() == {}
        first = None
        for scale in (1.0, 2.0):
            model(scale * torch.randn(60, 8))
            found = tracker.collect()
            first = first or found
        assert tracker.baseline() == first != found
    said = capsys.readouterr().err
    assert said.count("saturated") == 1
    assert "at rtol 0.01 at 2 of 2 sites" in said
    assert "near_rank at rtol 0.5 is at" in said
    with RankTracker(model, rtol=0.01, metrics=["near_rank", "participation_ratio"]) as tracker:
        model(torch.randn(60, 8))
        tracker.collect()
    assert "participation_ratio has no threshold" in capsys.readouterr().err
    with RankTracker(model, rtol=0.5) as tracker:
        model(torch.randn(60, 8))
        tracker.collect()
    assert "saturated" not in capsys.readouterr().err
