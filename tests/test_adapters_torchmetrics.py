"""NearRank against the real torchmetrics: chunks, ranks, collections and conversions change no number."""

from __future__ import annotations

import copy
import doctest
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("torchmetrics", reason="needs torchmetrics: pip install 'bsgap_kernels[torchmetrics]'")

import torchmetrics

from bsgap_kernels import reference
from bsgap_kernels.tracking.adapters import torchmetrics as adapter
from bsgap_kernels.tracking.adapters.torchmetrics import NearRank
from bsgap_kernels.tracking.sums import ROWS

RTOL = 1e-2
METRICS = (
    "near_rank",
    "ratio",
    "sigma_max",
    "stable_rank",
    "participation_ratio",
    "effective_rank",
    "srank",
    "saturation",
)


def rows(m: int, n: int, rank: int, seed: int = 0) -> Tensor:
    """`rank` singular values from 1 down to 10·RTOL, the others at RTOL / 10: none is near the threshold."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    sigma = torch.full((min(m, n),), RTOL / 10, dtype=torch.float64)
    sigma[:rank] = torch.logspace(0, math.log10(10 * RTOL), rank, dtype=torch.float64)
    return u[:, : sigma.numel()] * sigma @ v[: sigma.numel()]


def chunks(A: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    assert sum(sizes) == A.shape[0]
    return list(A.split(list(sizes)))


@pytest.mark.parametrize("sizes", [(40,), (1, 39), (13, 0, 20, 7)])
@pytest.mark.parametrize("center", [False, True])
def test_chunks_give_what_all_rows_at_once_give(sizes: tuple[int, ...], center: bool) -> None:
    A = rows(40, 12, rank=5) + 3.0 * center
    metric = NearRank(12, rtol=RTOL, center=center, metrics=METRICS)
    for chunk in chunks(A.float(), sizes):
        metric.update(chunk)
    found = metric.compute()
    sigma = reference.singular_values(A.float(), center=center)
    assert ((sigma / (RTOL * sigma[0]) - 1).abs() > 0.1).all()
    count = int((sigma > RTOL * sigma[0]).sum())
    assert (found.pop("near_rank"), found.pop("ratio")) == (count, count / 12)
    for name, value in found.items():
        options = {} if name == "saturation" else {"center": center}  # that one is always centred
        expected = getattr(reference, name)(A.float(), **options)
        torch.testing.assert_close(value, expected.double(), rtol=1e-6, atol=0)


def test_fewer_rows_than_features_and_leading_dimensions() -> None:
    A = rows(6, 20, rank=4)
    metric = NearRank(20, rtol=RTOL)
    metric.update(A.view(2, 3, 20))
    assert metric.compute() == 4 / 6


def test_forward_gives_the_batch_and_keeps_the_total() -> None:
    first, second = torch.eye(4)[:1], torch.eye(4)[1:3]
    metric = NearRank(4, metrics="near_rank")
    assert [int(metric(first)), int(metric(second)), int(metric.compute())] == [1, 2, 3]
    metric.reset()
    metric.update(second)
    assert metric.compute() == 2


def test_update_never_asks_for_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Tensor) -> None:
        raise AssertionError("the host waited for a value")

    metric = NearRank(4)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, fail)
    metric.update(torch.eye(4))


def _rank(rank: int, folder: Path, parts: list[Tensor]) -> None:
    store = dist.FileStore(str(folder / "store"), len(parts))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(parts))
    metric = NearRank(parts[0].shape[1], rtol=RTOL, metrics=METRICS)
    if parts[rank].numel():  # the other way to have no rows is never to update
        metric.update(parts[rank])
    found = metric.compute()
    torch.save((found, metric.totals), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*``compute`` method of metric")
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.skipif(torch.cuda.is_initialized(), reason="forks, which CUDA does not survive")
def test_uneven_and_empty_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    A = rows(30, 10, rank=6)
    parts = chunks(A, (21, 0, 9))
    # Forked, since a fresh process spends seconds on importing.
    ranks = torch.multiprocessing.start_processes(
        _rank, (tmp_path, parts), nprocs=len(parts), join=False, daemon=True, start_method="fork"
    )
    assert any(ranks.join(timeout=60) for _ in parts)
    alone = NearRank(10, rtol=RTOL, metrics=METRICS)
    alone.update(A)
    for rank, part in enumerate(parts):
        found, totals = torch.load(tmp_path / f"{rank}.pt")
        assert found["near_rank"] == reference.near_rank(A, rtol=RTOL) == 6
        for name, value in alone.compute().items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=0)
        assert totals[ROWS] == part.shape[0]  # each rank goes on with its own rows


@pytest.mark.filterwarnings("ignore:.*``compute`` method of metric")
def test_merge_state_dict_and_deepcopy_keep_the_rows() -> None:
    A = rows(30, 8, rank=5)
    first, second = NearRank(8, metrics="near_rank"), NearRank(8, metrics="near_rank")
    first.persistent(True)
    first.update(A[:17])
    second.update(A[17:])
    restored = NearRank(8, metrics="near_rank")
    restored.load_state_dict(copy.deepcopy(first).state_dict())
    restored.merge_state(second)
    assert restored.compute() == 5


@pytest.mark.parametrize("convert", ["half", "bfloat16", "to", "set_dtype"])
def test_the_state_stays_float64_when_the_model_is_converted(convert: str) -> None:
    holder = nn.ModuleList([NearRank(8, metrics="near_rank")])
    holder[0].update(rows(30, 8, rank=5)[:20])
    if convert == "set_dtype":
        holder[0].set_dtype(torch.float16)
    elif convert == "to":
        holder.to(torch.bfloat16)
    else:
        getattr(holder, convert)()
    holder[0].update(rows(30, 8, rank=5)[20:])
    assert holder[0].compute() == 5
    holder[0].reset()
    assert holder[0].gram.dtype == torch.float64


def test_the_state_moves_with_the_model() -> None:
    holder = nn.ModuleList([NearRank(8)]).to("meta")
    assert holder[0].gram.is_meta
    holder[0].reset()
    assert holder[0].gram.is_meta


def test_a_collection_computes_it_beside_others() -> None:
    collection = torchmetrics.MetricCollection(
        {"rank": NearRank(4, metrics="near_rank"), "spread": NearRank(4, metrics="stable_rank")}
    )
    collection.update(torch.eye(4)[:3])
    assert collection.compute() == {"rank": 3, "spread": pytest.approx(3.0)}


def test_zero_empty_and_non_finite_rows() -> None:
    metric = NearRank(3, metrics=METRICS)
    for A in (torch.zeros(0, 3), torch.zeros(5, 3)):
        metric.update(A)
        assert [float(value) for value in metric.compute().values()] == [0.0] * len(METRICS)
    metric.update(torch.full((1, 3), math.inf))
    found = metric.compute()
    assert found.pop("near_rank") == -1
    assert all(value.isnan() for value in found.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 0}, "num_features: got 0, expected an integer of at least 1"),
        ({"rtol": -1.0}, "rtol: got -1.0, expected a finite number"),
        ({"atol": math.nan}, "atol: got nan, expected a finite number"),
        ({"metrics": "rank"}, "metrics: got 'rank', expected names of ratio, near_rank"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NearRank(**{"num_features": 4, **options})


def test_units_that_never_fired_are_counted_over_all_rows() -> None:
    metric = NearRank(4, metrics="dormant_units")
    metric.update(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    metric.update(torch.tensor([[0.0, -1.0, 0.0, 0.0]]))
    assert metric.compute() == 2


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"A: got shape \(2, 3\), expected \(\*, 4\)"):
        NearRank(4).update(torch.ones(2, 3))


def test_the_docstring_runs() -> None:
    result = doctest.testmod(adapter)
    assert result.attempted > 0
    assert result.failed == 0
