"""The training loss as a function of one flat vector of parameters: value, gradient, Hessian products."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsgap_kernels.lab.stop import NEVER, Stop

CHUNK = 256
"""Images of one pass: about 1.5 GB for the gradient of ResNet-56 on 32×32 images."""

Vector = NDArray[np.float64]
Buffers = Mapping[str, Tensor]
Read = Callable[[slice], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy (nats) and accuracy over all images."""

    loss: float
    accuracy: float


class Objective:
    """Mean cross-entropy f(x) of a network over a set of images; x holds its parameters, flat.

    x is float64 of length `dimension`: the parameters that require a gradient, in the order of
    `named_parameters`, a shared one once. All others, and the buffers, stay as they are. The network runs in
    eval mode: dropout is off, and batch norm normalises by the run's running statistics. (`buffers` gives
    other statistics, `reestimate` makes them.) It runs in its own precision, or in float64 with `double`;
    the softmax, the sum over images and the gradient's sum over chunks are float64 always, so that losses of
    1e-6 still have digits.

    Images are read and evaluated `chunk` at a time, so memory depends on `chunk` and not on their number. The
    chunk is part of the rounding: value and gradient are bit-identical for the same chunk, machine and
    thread count. The model given is copied and never changed.

    Args:
        model: network that maps (B, C, H, W) images to (B, classes) logits.
        read: (images, labels) of a slice of rows: floats the network takes, and int64 class labels (B,).
        images: number of rows that f is the mean over.
        chunk: rows of one pass.
        double: run the network in float64.
        device: where f runs; the model's own if None.
        stop: looked at before every pass; once it is set, whatever is computed ends in a StoppedError.

    Raises:
        ValueError: no images, no chunk, or no parameter that requires a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        read: Read,
        images: int,
        *,
        chunk: int = CHUNK,
        double: bool = False,
        device: torch.device | None = None,
        stop: Stop = NEVER,
    ) -> None:
        for name, value in (("images", images), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.images = images
        self.evaluations = 0
        """Calls for value and gradient so far."""
        self.products = 0
        """Hessian-vector products so far."""
        self._read = read
        self._stop = stop
        self._model = copy.deepcopy(model).eval().to(device, torch.float64 if double else None)
        self._parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError("model: got no parameter that requires a gradient, expected at least one")
        first = next(iter(self._parameters.values()))
        self.device, self.dtype = first.device, first.dtype
        self.dimension = sum(p.numel() for p in self._parameters.values())
        # As even as they come: batch norm's statistics are averaged over chunks, and a last chunk of one row
        # has no variance.
        count = math.ceil(images / chunk)
        self._chunks = [slice(i * images // count, (i + 1) * images // count) for i in range(count)]
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in self._model.modules())

    @property
    def has_batch_norm(self) -> bool:
        """Whether f depends on running statistics."""
        return bool(self._batch_norms())

    def parameters(self) -> Vector:
        """The network's own parameters as x."""
        with torch.no_grad():
            return _flat(list(self._parameters.values())).cpu().numpy()

    def frozen(self) -> dict[str, Tensor]:
        """What is no part of x: parameters without gradient, and the buffers that are not batch norm's."""
        fixed = {name: p for name, p in self._model.named_parameters() if name not in self._parameters}
        own = self._batch_norm_buffers()
        return {**fixed, **{name: b for name, b in self._model.named_buffers() if name not in own}}

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter in x, in order."""
        return {name: parameter.shape for name, parameter in self._parameters.items()}

    def __call__(self, x: Vector) -> tuple[float, Vector]:
        """f(x) and its gradient, float64 of x's length. Waits for the device; one pass and its backward."""
        self.evaluations += 1
        parameters = self._unflatten(x, gradient=True)
        leaves = list(parameters.values())
        value = torch.zeros((), dtype=torch.float64, device=self.device)
        gradient = torch.zeros(self.dimension, dtype=torch.float64, device=self.device)
        with self._exact():
            for chunk in self._passes():
                loss = self._loss(parameters, chunk)
                gradient += _flat(torch.autograd.grad(loss, leaves, materialize_grads=True))
                value += loss.detach()
        return float(value), gradient.cpu().numpy()

    def hessian_product(self, x: Vector, v: Vector) -> Vector:
        """∇²f(x) v by a second backward through the gradient; about 4 passes' time, 2 to 3 times its memory.

        Where f has kinks (ReLU, max pooling) it is the Hessian of the smooth piece that x lies in.
        """
        self.products += 1
        parameters = self._unflatten(x, gradient=True)
        leaves = list(parameters.values())
        directions = list(self._unflatten(v, gradient=False).values())
        product = torch.zeros(self.dimension, dtype=torch.float64, device=self.device)
        with self._exact():
            for chunk in self._passes():
                loss = self._loss(parameters, chunk)
                gradient = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
                slope = sum((g * d).sum() for g, d in zip(gradient, directions, strict=True))
                # A gradient that depends on no parameter, as a linear f's, has no graph to go back through.
                if isinstance(slope, Tensor) and slope.requires_grad:
                    product += _flat(torch.autograd.grad(slope, leaves, materialize_grads=True))
        return product.cpu().numpy()

    def evaluate(self, x: Vector, buffers: Buffers | None = None) -> Evaluation:
        """Loss and accuracy at x, without a gradient; `buffers` stand in for the network's own."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        # Not under no_grad: without gradients torch takes other kernels for some layers, and f(x) would
        # differ from the one that comes with the gradient in its last digits.
        parameters = self._unflatten(x, gradient=True)
        with self._exact():
            for chunk in self._passes():
                logits, labels = self._logits(parameters, chunk, buffers)
                logits = logits.detach()
                totals[0] += self._mean_share(logits, labels)
                totals[1] += (logits.argmax(1) == labels).sum()
        loss, correct = totals.tolist()
        return Evaluation(loss, correct / self.images)

    def reestimate(self, x: Vector) -> Buffers | None:
        """Batch norm's statistics at x, from one pass over the images; None for a network without any.

        Batch norm alone is in train mode for that pass (dropout stays off). Its running statistics are reset
        and become the plain average of the chunks' (momentum None), each chunk normalised by its own.
        """
        own = self._batch_norm_buffers()
        if not own:
            return None
        layers = list(self._batch_norms().values())
        buffers = {name: buffer.clone() for name, buffer in own.items()}
        for name, buffer in buffers.items():
            buffer.fill_(1 if name.endswith("running_var") else 0)
        momenta = [layer.momentum for layer in layers]
        parameters = self._unflatten(x, gradient=True)
        try:
            for layer in layers:
                layer.train()
                layer.momentum = None
            with self._exact():
                for chunk in self._passes():
                    self._logits(parameters, chunk, buffers)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.eval()
                layer.momentum = momentum
        return buffers

    # -- the network

    def _passes(self) -> Iterator[slice]:
        for chunk in self._chunks:
            self._stop.check()
            yield chunk

    def _unflatten(self, x: Vector, *, gradient: bool) -> dict[str, Tensor]:
        if x.shape != (self.dimension,):
            raise ValueError(f"x: got shape {x.shape}, expected ({self.dimension},)")
        flat = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)).to(self.device)
        parts = flat.split([p.numel() for p in self._parameters.values()])
        return {
            # A copy: the caller's vector is not torch's to keep.
            name: part.view(p.shape).to(p.dtype, copy=True).requires_grad_(gradient)
            for (name, p), part in zip(self._parameters.items(), parts, strict=True)
        }

    def _logits(
        self, parameters: dict[str, Tensor], chunk: slice, buffers: Buffers | None = None
    ) -> tuple[Tensor, Tensor]:
        images, labels = self._read(chunk)
        state = {**parameters, **(buffers or {})}
        logits = functional_call(self._model, state, (images.to(self.device, self.dtype),))
        return logits.double(), labels.to(self.device)

    def _mean_share(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, reduction="sum") / self.images

    def _loss(self, parameters: dict[str, Tensor], chunk: slice) -> Tensor:
        return self._mean_share(*self._logits(parameters, chunk))

    def _batch_norms(self) -> dict[str, Any]:
        return {
            name: module
            for name, module in self._model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        }

    def _batch_norm_buffers(self) -> dict[str, Tensor]:
        return {
            f"{name}.{buffer}" if name else buffer: value
            for name, module in self._batch_norms().items()
            for buffer, value in module.named_buffers(recurse=False)
        }

    @contextmanager
    def _exact(self) -> Iterator[None]:
        """Deterministic kernels in full float32, each with a second derivative."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            # cuDNN's recurrent layers have no backward in eval mode; its convolutions use TF32 by default,
            # whose 10 bits would drown a φ of 1.
            stack.enter_context(
                torch.backends.cudnn.flags(
                    enabled=not self._recurrent, benchmark=False, deterministic=True, allow_tf32=False
                )
            )
            # The fused attentions have no second derivative, and their backward is not deterministic.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield


def _flat(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1).to(torch.float64) for tensor in tensors])
