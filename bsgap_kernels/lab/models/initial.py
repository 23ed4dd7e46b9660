"""Initial weights that several families share."""

from __future__ import annotations

from torch import nn


def he_initialise(model: nn.Module) -> None:
    """Weights of the convolutions of `model`, in place, normal with variance 2 / fan_in; biases 0.

    Source: He et al. 2015 (arXiv 1502.01852), section 2.2. Unlike PyTorch's default, whose variance of 1 / (3
    fan_in) divides an activation's second moment by 6 at every convolution and ReLU, it keeps that moment.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
