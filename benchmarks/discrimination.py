"""Which metrics tell steps, layers and batch sizes apart on networks that people train.

python benchmarks/discrimination.py CIFAR10.npz         # about an hour on two cores; all models, or some
python benchmarks/discrimination.py --pages [--check]   # writes, or compares, the table in docs/metrics.md

Each model is trained twice from one initialisation, with a small and a large batch, for as many examples.
CIFAR10.npz has Keras's names (x_train, y_train); text is the standard library's own sources, as bytes. Each
site is read on one fixed probe in training mode, before and after, unfolded as `RankTracker` does by default.

A metric is constant at a site if its three readings (initialisation, both ends) lie within 2 % of the
largest; it is saturated if all three are the largest possible (k of counts and ranks) or at most 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import marked
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsgap_kernels import RankTracker
from bsgap_kernels.bench.machine import describe, processor
from bsgap_kernels.lab.models import build_model

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "discrimination.json"
PAGE = ROOT / "docs" / "metrics.md"
RTOLS = (1e-1, 3e-2, 1e-2, 1e-3)
METRICS = (
    "near_rank", "stable_rank", "participation_ratio", "effective_rank", "mean_energy", "centred_near_rank"
)  # fmt: skip
CONSTANT = 0.02
IMAGES, PROBE, WINDOW = 4096, 256, 64  # of text: sequences of WINDOW bytes


class Setting(NamedTuple):
    """How a model is made and trained."""

    make: Callable[[], nn.Module]
    text: bool
    small: int
    large: int
    epochs: int
    rate: float
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD


class ByteLSTM(nn.Module):
    """Next byte from two LSTM layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.lstm = nn.LSTM(64, 128, num_layers=2, batch_first=True)
        self.hidden, self.act, self.head = nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, 256)."""
        hidden, _ = self.lstm(self.embedding(tokens))
        return self.head(self.act(self.hidden(hidden)))


class Logits(nn.Module):
    """A Hugging Face language model that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, 256)."""
        logits: Tensor = self.model(tokens).logits
        return logits


def gpt2() -> nn.Module:
    """GPT-2 from its configuration: four layers of width 128 on bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256, n_positions=WINDOW, n_embd=128, n_layer=4, n_head=4, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0,
    )  # fmt: skip
    return Logits(GPT2LMHeadModel(config))


def vit() -> nn.Module:
    """torchvision's VisionTransformer: patches of 4×4, six layers of width 128."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=32, patch_size=4, num_layers=6, num_heads=4, hidden_dim=128, mlp_dim=512, num_classes=10
    )


def lab(name: str) -> Callable[[], nn.Module]:
    """A maker of one of the lab's models."""
    return lambda: build_model(name, torch.Size((3, 32, 32)), 10)


ADAM = torch.optim.Adam
MODELS = {
    "resnet18": Setting(lab("resnet18"), False, 32, 512, 3, 0.02),
    "vgg16": Setting(lab("vgg16-bn"), False, 32, 512, 4, 0.02),
    "resnet56": Setting(lab("resnet56"), False, 32, 512, 4, 0.05),
    "gpt2": Setting(gpt2, True, 16, 256, 4, 1e-3, ADAM),
    "vit": Setting(vit, False, 32, 512, 12, 1e-3, ADAM),
    "lstm": Setting(ByteLSTM, True, 16, 256, 6, 2e-3, ADAM),
}


def images(path: Path) -> tuple[Tensor, Tensor]:
    """IMAGES + PROBE normalised images with their labels."""
    with np.load(path) as data:
        x, y = data["x_train"][: IMAGES + PROBE], data["y_train"][: IMAGES + PROBE]
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    mean, std = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
    return ((pixels - mean) / std).contiguous(), torch.from_numpy(y).flatten().long()


def text() -> tuple[Tensor, Tensor]:
    """IMAGES + PROBE sequences of the standard library's sources, and the bytes that follow."""
    library = Path(sysconfig.get_paths()["stdlib"])
    wanted = (IMAGES + PROBE) * WINDOW + 1
    data = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))[:wanted]
    codes = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    return codes[:-1].view(-1, WINDOW), codes[1:].view(-1, WINDOW)


def readings(model: nn.Module, probe: Tensor) -> dict[str, dict[str, float]]:
    """Every metric of every site on the probe; ranks beside their largest value k."""
    with RankTracker(model, rtol=RTOLS, metrics=METRICS, verbose=False) as tracker:
        model(probe)
        records = tracker.collect()
    return {
        site: {f"near_rank@{RTOLS[0]:g}": record.near_rank, "k": min(record.shape), **record.summary}
        for site, record in records.items()
    }


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of an epoch."""
    yield from torch.randperm(count, generator=generator).split(size)


def trained(setting: Setting, batch: int, x: Tensor, y: Tensor) -> tuple[nn.Module, float]:
    """A model after its epochs, and its accuracy over the last one."""
    torch.manual_seed(0)
    model, generator = setting.make(), torch.Generator().manual_seed(1)
    options = {"momentum": 0.9} if setting.optimizer is torch.optim.SGD else {}
    optimizer = setting.optimizer(model.parameters(), lr=setting.rate, **options)  # type: ignore[arg-type]
    right = seen = 0
    for _ in range(setting.epochs):
        right = seen = 0
        for index in batches(len(x), batch, generator):
            logits, target = model(x[index]).flatten(0, -2), y[index].flatten()
            loss = F.cross_entropy(logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right += int((logits.argmax(-1) == target).sum())
            seen += len(target)
    return model, right / seen


def measured(name: str, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Readings of one model: at initialisation and after training with the small and the large batch."""
    setting, begin = MODELS[name], time.perf_counter()
    torch.manual_seed(0)
    found: dict[str, Any] = {"batches": [setting.small, setting.large], "epochs": setting.epochs}
    # In training mode, and on a copy: batch norm moves its averages.
    found["readings"] = [readings(setting.make(), x[IMAGES:])]
    found["accuracy"] = []
    for batch in found["batches"]:
        model, accuracy = trained(setting, batch, x[:IMAGES], y[:IMAGES])
        found["readings"].append(readings(model, x[IMAGES:]))
        found["accuracy"].append(round(accuracy, 4))
    found["seconds"] = round(time.perf_counter() - begin, 1)
    return found


# The table


def metric_names(found: dict[str, Any]) -> list[str]:
    """Metrics of a model's readings, thresholds apart, in order of definition."""
    names = dict.fromkeys(name for reading in found["readings"] for site in reading.values() for name in site)
    order = {name: place for place, name in enumerate(METRICS)}
    wanted = [name for name in names if name != "k"]
    first = f"@{RTOLS[0]:g}"
    return sorted(
        (name if "@" in name or "near_rank" not in name else name + first for name in wanted),
        key=lambda name: order[name.partition("@")[0]],
    )


def judged(found: dict[str, Any], metric: str) -> tuple[float, float, float]:
    """Shares of sites at which a metric is constant and saturated, and the median of its relative ranges."""
    constant = saturated = 0
    ranges: list[float] = []
    name = metric if metric.startswith("near_rank") else metric.removesuffix(f"@{RTOLS[0]:g}")
    for site in found["readings"][0]:
        values = [reading[site].get(name) for reading in found["readings"]]
        if any(value is None for value in values):
            continue  # not resolved
        largest = max(abs(value) for value in values)
        spread = (max(values) - min(values)) / largest if largest > 0 else 0.0
        ranges.append(spread)
        constant += spread <= CONSTANT
        k = found["readings"][0][site]["k"]
        saturated += "rank" in metric and all(v <= 1 or v >= k - 1 for v in values)
    n = len(ranges)
    if n == 0:
        return 1.0, 0.0, 0.0
    return constant / n, saturated / n, statistics.median(ranges)


def table(result: dict[str, Any]) -> str:
    """Share of sites at which each metric is constant, model by model."""
    models = result["models"]
    lines = [
        "| metric | " + " | ".join(models) + " |",
        "|---|" + "--:|" * len(models),
        "| sites | " + " | ".join(str(len(found["readings"][0])) for found in models.values()) + " |",
    ]
    for metric in metric_names(next(iter(models.values()))):
        cells = []
        for found in models.values():
            constant, saturated, spread = judged(found, metric)
            cells.append(f"{constant:.0%} ({saturated:.0%}), {spread:.0%}")
        lines.append(f"| `{metric}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def about(result: dict[str, Any]) -> str:
    """How the models were trained, and where."""
    runs = "; ".join(
        f"{name}: {found['epochs']} epochs, batch {found['batches'][0]} to {found['accuracy'][0]:.0%}, batch "
        f"{found['batches'][1]} to {found['accuracy'][1]:.0%}"
        for name, found in result["models"].items()
    )
    return (
        f"Training accuracy in the last epoch: {runs}. {processor(result)}, commit {result['commit'][:12]}."
    )


def written(result: dict[str, Any]) -> dict[Path, str]:
    """The page with the result's table in it."""
    page = marked.replaced(PAGE.read_text(encoding="utf-8"), "discrimination", table(result))
    return {PAGE: marked.replaced(page, "discrimination-about", about(result))}


def main(arguments: list[str]) -> int:
    """Measure, or write the page."""
    if arguments[:1] == ["--pages"]:
        return marked.write(written(json.loads(RESULT.read_text(encoding="utf-8"))), arguments[1:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="CIFAR-10 as an .npz file with x_train and y_train")
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    options = parser.parse_args(arguments)
    result = describe() | {"models": {}}
    if RESULT.exists():
        result["models"] = json.loads(RESULT.read_text(encoding="utf-8"))["models"]
    pictures, bytes_ = images(options.data), text()
    for name in options.models:
        result["models"][name] = measured(name, *(bytes_ if MODELS[name].text else pictures))
        print(name, result["models"][name]["accuracy"], result["models"][name]["seconds"], flush=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
