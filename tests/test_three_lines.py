"""The three lines of the README on models of other libraries: counts equal float64 singular values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bsgap_kernels import RankTracker
from bsgap_kernels.tracking.sites import is_nonlinearity, unfold_activation

RTOL = 1e-2
STEPS = 2


def resnet() -> tuple[nn.Module, dict[str, Any]]:
    torchvision = pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    return torchvision.models.resnet18(num_classes=10), {"x": torch.randn(6, 3, 32, 32)}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40
    )
    model = transformers.BertForSequenceClassification(config)
    return model, {"input_ids": torch.randint(0, 50, (8, 16))}


def lightning_module() -> tuple[nn.Module, dict[str, Any]]:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    return Module(), {"x": torch.randn(40, 12)}


@pytest.mark.parametrize("build", [resnet, bert, lightning_module])
def test_counts_are_those_of_float64_singular_values(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(4)
    model, inputs = build()
    saved: list[Tensor] = []
    for module in model.modules():
        if is_nonlinearity(module):
            module.register_forward_hook(lambda m, a, output: saved.append(output.detach().clone()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    tracker = RankTracker(model, sinks=str(tmp_path / "rows.jsonl"), rtol=RTOL)
    expected = []
    for step in range(STEPS):
        saved.clear()
        output = model(**inputs) if "x" not in inputs else model(inputs["x"])
        getattr(output, "logits", output).square().mean().backward()
        optimizer.step()
        tracker.step()
        for activation in saved:
            sigma = torch.linalg.svdvals(unfold_activation(activation, "auto").double())
            ratio = sigma / (RTOL * sigma[0])
            # The band that rounding of float32 sums may move: README, "What a count certifies".
            expected.append((step, int((ratio > 1.01).sum()), int((ratio > 0.99).sum())))
    tracker.close()

    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    counts = [(row["step"], row["value"]) for row in lines if row["metric"] == "batch.near_rank"]
    assert len(counts) == len(expected) == STEPS * len(tracker.sites())
    for (step, count), (wanted_step, lower, upper) in zip(counts, expected, strict=True):
        assert step == wanted_step
        assert lower <= count <= upper
    assert sum(lower == upper for _, lower, upper in expected) > 0.8 * len(expected)
