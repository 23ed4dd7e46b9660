"""What tests/test_lab_distributed.py runs on two ranks: `torchrun lab_ranks.py DIRECTORY`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lab_data import small_data
from torch import nn

from bsgap_kernels import cli
from bsgap_kernels.lab import setup
from bsgap_kernels.lab.batch_norm import GlobalBatchNorm1d, GlobalBatchNorm2d, use_global_batch_norm
from bsgap_kernels.lab.config import TrainConfig, UserError
from bsgap_kernels.lab.distributed import Ranks, launched
from bsgap_kernels.lab.train import train

COMMON: dict[str, Any] = {
    "unfold": "channel",
    "probe_size": 23,
    "lr": 0.05,
    "hyper": {"sgd": {"momentum": 0.5}},
}
CASES: dict[str, dict[str, Any]] = {
    "uneven": {**COMMON, "batch_size": 15, "steps": 4, "every": 2, "probe_every": 3},
    "empty": {**COMMON, "batch_size": 1, "steps": 2, "probe_size": 1},
    "residual": {**COMMON, "batch_size": 5, "steps": 2, "lr": 1e-4, "model": "resnet56", "layers": ["relu"]},
    "blocks": {**COMMON, "batch_size": 15, "steps": 3, "method": "fb-reg", "hyper": {"fb-reg": {"block": 4}}},
    "recurrent": {
        **COMMON,
        "batch_size": 15,
        "steps": 3,
        "method": "legw",
        "model": "lstm",
        "micro_batch": 4,
    },
}
COMMAND = ["train", "--steps", "2", "--batch-size", "9", "--probe-size", "11", "--unfold", "channel"]


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def normalising(flat: bool) -> nn.Sequential:
    """A layer with batch norm for (B, 2, 3, 3), or flat for (B, 2); the same weights each time."""
    torch.manual_seed(2)
    if flat:
        return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh()).double()
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()).double()


def batch_norm_error(ranks: Ranks, rows: int, flat: bool = False) -> float:
    """Largest difference of outputs, gradients and buffers from those of one process on the whole batch."""
    torch.manual_seed(1)
    positions = () if flat else (3, 3)
    x, weights = 3 + torch.randn(rows, 2, *positions, dtype=torch.float64), torch.randn(rows, 4, *positions)
    whole, parts = normalising(flat), normalising(flat)
    use_global_batch_norm(parts)
    assert type(parts[1]) is (GlobalBatchNorm1d if flat else GlobalBatchNorm2d)
    parallel = ranks.parallel(parts, torch.device("cpu"))
    share = ranks.share(rows)
    expected, found = whole(x), parallel(x[share])
    (expected * weights).sum().backward()
    ((found * weights[share]).sum() * ranks.world).backward()
    pairs = list(zip(gradients(parts), gradients(whole), strict=True))
    pairs += list(zip(parts.buffers(), whole.buffers(), strict=True))
    pairs += [(found, expected[share])] if len(found) else []
    return max(float((a - b).abs().max()) for a, b in pairs)


def bfloat16_error(ranks: Ranks) -> float:
    """Of rows whose mean is far from 0: largest difference from one process, which sums in float32."""
    torch.manual_seed(1)
    x = (10 + torch.randn(64, 2)).bfloat16()
    whole, parts = nn.Sequential(nn.BatchNorm1d(2)), nn.Sequential(nn.BatchNorm1d(2))
    use_global_batch_norm(parts)
    share = ranks.share(64)
    expected, found = whole(x)[share], parts(x[share])
    assert found.dtype == expected.dtype == torch.bfloat16
    return float((found.double() - expected.double()).abs().max())


def sentence(ranks: Ranks, directory: Path, **options: Any) -> str:
    try:
        train(TrainConfig(**options), directory, data=small_data(), ranks=ranks)
    except UserError as error:
        return str(error)
    return ""


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with launched("cpu") as ranks:
        for name, options in CASES.items():
            train(TrainConfig(**options), out / name, data=small_data(), ranks=ranks)
        said = {
            "refused": sentence(ranks, out / "refused", batch_size=49),
            "one-sided": sentence(
                ranks, out / "uneven", batch_size=16, steps=1, unfold="channel", probe_size=9
            ),
            "wide": sentence(ranks, out / "wide", batch_size=16, steps=1, probe_size=9, unfold="flatten"),
        }
        # The command, as `torchrun -m bsgap_kernels train ...` calls it.
        setup.load_data = lambda *arguments, **options: small_data()
        codes = [cli.main([*COMMAND, "--out", str(out / "command")]), cli.main(["train", "--lr", "abc"])]
        found = {
            "codes": codes,
            "said": said,
            "batch_norm": [
                batch_norm_error(ranks, rows, flat) for rows, flat in ((5, False), (1, False), (5, True))
            ],
            "bfloat16": bfloat16_error(ranks),
        }
        every: list[Any] = [None] * ranks.world
        dist.all_gather_object(every, found)
        if ranks.main:
            (out / "found.json").write_text(json.dumps(every))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
