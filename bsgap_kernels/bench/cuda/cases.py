"""The matrices that are timed on a GPU, each defined once."""

from __future__ import annotations

import torch

from ..cases import Case, resnet56_channel_shapes

RESNET56 = "resnet56-8192"
WIDE = "8192x65536"
BATCHED = "500x100x100"
SMALL = "64x64"

GPU_CASES = (
    Case(SMALL, "overhead of a call", ((64, 64),)),
    Case("65536x512", "tall", ((65536, 512),)),
    Case(BATCHED, "batch of 500", ((500, 100, 100),)),
    Case("4096x256x32", "batch of 4096", ((4096, 256, 32),)),
    Case(
        RESNET56,
        "55 layers of ResNet-56, batch 8192, one call",
        resnet56_channel_shapes(8192),
        grouped=True,
        dtype=torch.bfloat16,
        image_batch=8192,
    ),
    Case("32768x4096", "a transformer layer", ((32768, 4096),), slow=True, dtype=torch.bfloat16),
    Case(WIDE, "wide", ((8192, 65536),), slow=True, dtype=torch.bfloat16),
)
