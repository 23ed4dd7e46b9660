"""Numbers of the tracker: without padding, of sampled rows, every metric, certified bounds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import metric_rtol
from torch import Tensor, nn
from tracker_models import RTOL, assert_equal_to_svd, svd_count

from bsgap_kernels import RankTracker, dispatch, reference
from bsgap_kernels.tracking import METRICS, sums
from bsgap_kernels.tracking.records import ABOUT_THE_MEAN


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def watch(model: nn.Module, **options: Any) -> RankTracker:
    return RankTracker(model, rtol=RTOL, verbose=False, **options)


class Sequence(nn.Module):
    """Tokens (B, T, D) with a padding mask, then a head on the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 6)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh())

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.down(self.act(self.up(x)))[:, 0])


LENGTHS = torch.tensor([7, 2, 5, 1, 6, 7])
VALID = torch.arange(7)[None, :] < LENGTHS[:, None]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("way", ["by name", "by place", "compiled"])
@pytest.mark.parametrize("options", [{}, {"center": True}, {"certify": True, "metrics": "all"}])
def test_padding_does_not_count(dtype: torch.dtype, way: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = Sequence()
    x = torch.randn(6, 7, 6)
    x[~VALID] = torch.nan
    mask = VALID.to(dtype)
    with watch(model, mask="attention_mask", **options) as tracker:
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if way == "compiled" else model
        hidden = run(x, mask) if way == "by place" else run(x, attention_mask=mask)
        assert hidden.shape == (6, 5)
        records = tracker.collect()
        rows = F.gelu(model.up(x[VALID])).detach()
    record = records["act#0"]
    expected = svd_count(rows, center="center" in options)
    assert record.shape == (int(LENGTHS.sum()), 20)
    assert record.near_rank == expected
    assert 0 < expected < 20
    if "certify" in options:
        assert record.lower <= expected <= record.upper
        assert record.summary["effective_rank"] == pytest.approx(
            float(reference.effective_rank(rows)), rel=1e-6
        )
    assert records["head.1#0"].shape == (6, 5)


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any]]] = {
    "true for padding": (lambda valid: ~valid, {"mask_true": "padding"}),
    "1 for padding": (lambda valid: (~valid).long(), {"mask_true": "padding"}),
    "1.0 for padding": (lambda valid: (~valid).float(), {"mask_true": "padding"}),
    "-inf added": (lambda valid: torch.zeros(valid.shape).masked_fill(~valid, -torch.inf), {}),
    "far below 0 added": (
        lambda valid: torch.zeros(valid.shape).masked_fill(~valid, torch.finfo(torch.float32).min),
        {"mask_true": "padding"},
    ),
}


@pytest.mark.parametrize("all_valid", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_masks(form: str, all_valid: bool) -> None:
    make, options = FORMS[form]
    valid = torch.ones_like(VALID) if all_valid else VALID
    model, x = Sequence(), torch.randn(6, 7, 6)
    with watch(model, mask="attention_mask", **options) as tracker:
        model(x, attention_mask=make(valid))
        record = tracker.collect()["act#0"]
    assert record.shape == (int(valid.sum()), 20)
    assert record.near_rank == svd_count(F.gelu(model.up(x[valid])).detach())


class SequenceFirst(nn.Module):
    """Tokens (T, B, D) inside, a mask (B, T) with true for padding outside, as nn.Transformer has it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 20, activation=nn.ReLU(), dropout=0.0)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        return self.layer(x, src_key_padding_mask=src_key_padding_mask)


def test_a_mask_of_sequences_that_come_second() -> None:
    torch.manual_seed(0)
    model, x = SequenceFirst(), torch.randn(7, 6, 6)
    saved: list[Tensor] = []
    model.layer.activation.register_forward_hook(lambda module, args, output: saved.append(output.detach()))
    with watch(
        model, mask="src_key_padding_mask", mask_true="padding", layers=["layer.activation"]
    ) as tracker:
        model(x, src_key_padding_mask=~VALID)
        (record,) = tracker.collect().values()
        assert record.shape == (int(LENGTHS.sum()), 20)
        assert record.near_rank == svd_count(saved[0][VALID.T])
        with pytest.raises(ValueError, match="6 sequences of as many tokens, .* could be"):
            model(x[:6], src_key_padding_mask=~VALID[:, :6])


def test_masks_of_other_passes_are_forgotten() -> None:
    model = Sequence()
    x = torch.randn(6, 7, 6)
    with watch(model, mask="attention_mask", sample_rows=2, micro_batches=2) as tracker:
        model(x, attention_mask=VALID)
        model(x)
        assert tracker.collect()["act#0"].shape == (int(VALID[::2].sum()) + 21, 20)
        model(x)
        assert tracker.collect()["act#0"].shape == (21, 20)


def test_bad_masks() -> None:
    model = Sequence()
    with pytest.raises(ValueError, match="mask: got 'pads', .* forward, which has x, attention_mask"):
        watch(model, mask="pads")
    with pytest.raises(ValueError, match="mask_true: got 'pad', expected one of valid, padding"):
        watch(model, mask="attention_mask", mask_true="pad")
    assert not model._forward_pre_hooks
    with watch(model, mask="attention_mask") as tracker:
        with pytest.raises(
            ValueError, match=r"attention_mask is a tensor of shape \(6, 1, 7, 7\), expected .*B, T"
        ):
            model(torch.randn(6, 7, 6), attention_mask=torch.ones(6, 1, 7, 7))
        model(torch.randn(6, 7, 6), attention_mask=torch.ones(6, 9))
        with pytest.warns(UserWarning, match=r"no site has rows \(6, 9\) as the padding mask has"):
            tracker.step()
        model(torch.randn(6, 7, 6), attention_mask=torch.ones(6, 9))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tracker.step()


def test_sampled_rows() -> None:
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU())
    x = torch.randn(9, 2, 6, 6)
    with watch(model, sample_rows=4) as tracker:
        saved = {"1#0": model(x).detach()[::4]}
        assert_equal_to_svd(tracker.collect(), saved)


@pytest.mark.parametrize("metric", [name for name in METRICS if name != "near_rank"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("rows", [60, 7])
def test_metrics_are_those_of_the_reference(metric: str, center: bool, rows: int) -> None:
    if center and metric in ABOUT_THE_MEAN:
        pytest.skip("refused")
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU())
    with torch.no_grad():
        model[0].bias[:3] = -100.0  # three units that never fire
    x = torch.randn(rows, 12) * torch.logspace(0, -1, 12)
    with watch(model, metrics=[metric], center=center, micro_batches=2) as tracker:
        A = torch.cat([model(x), model(2 * x)]).detach()
        (record,) = tracker.collect().values()
    oracle = getattr(reference, metric.removeprefix("centred_"))
    of_values = metric in ("dormant_units", "mean_energy")
    about_mean = center or metric in ("saturation", "centred_near_rank")
    arguments: dict[str, Any] = {} if of_values else {"center": about_mean}
    if metric == "centred_near_rank":
        arguments["rtol"] = RTOL
    expected = float(oracle(A.double(), **arguments))
    assert record.summary == {
        metric: pytest.approx(expected, rel=50 * metric_rtol(A.dtype, *A.shape), nan_ok=True)
    }
    assert record.near_rank == svd_count(A, center=center)
    if metric == "dormant_units":
        assert expected >= 3


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-5])
def test_certified_bounds_hold(rtol: float, micro_batches: int) -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh())
    x = torch.randn(100, 40) * torch.logspace(0, -6, 40)
    with RankTracker(model, rtol=rtol, certify=True, micro_batches=micro_batches, verbose=False) as tracker:
        A = torch.cat([model(part) for part in x.split(100 // micro_batches)]).detach()
        (record,) = tracker.collect().values()
    sigma = torch.linalg.svdvals(A.double())
    count = int((sigma > rtol * sigma[0]).sum())
    assert record.lower <= count <= record.upper
    assert record.upper - record.lower <= (0 if rtol > 1e-4 else 3)
    assert record.lower <= record.near_rank <= record.upper


@pytest.mark.parametrize(
    ("options", "gram", "certificate"),
    [
        ({}, "float32", "none"),
        ({"rtol": 1e-3}, "float64", "none"),
        ({"center": True}, "float64", "none"),
        ({"metrics": ["stable_rank", "centred_near_rank"]}, "float32", "none"),
        ({"metrics": ["effective_rank"]}, "float64", "none"),
        ({"certify": True}, "float64", "rigorous"),
    ],
)
def test_the_plan_that_is_printed_is_what_a_site_adds_up(
    options: dict[str, Any],
    gram: str,
    certificate: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BSGAP_PRINT_CONFIG", "1")
    dispatch.plan_of_sums.cache_clear()
    added: list[bool] = []
    op = sums._accumulate_gram
    monkeypatch.setattr(sums, "_accumulate_gram", lambda *args: added.append(args[-2]) or op(*args))
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    with RankTracker(model, verbose=False, **{"rtol": RTOL, **options}) as tracker:
        model(torch.randn(30, 6))
        tracker.collect()
    dispatch.plan_of_sums.cache_clear()
    assert added == [gram == "float32"]
    said = capsys.readouterr().err
    assert f"gram='{gram}', count='kernels', certificate='{certificate}'" in said
