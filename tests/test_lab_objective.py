"""The loss as a function of a flat vector, and the Hessian's largest eigenvalue, against torch's own."""

from __future__ import annotations

import copy
import importlib.util

import numpy as np
import pytest
import torch
from gpu_support import DEVICE
from torch import Tensor, nn
from torch.func import functional_call, hessian

from bsgap_kernels.lab.curvature import max_eigenvalue
from bsgap_kernels.lab.models import LeNet5
from bsgap_kernels.lab.objective import Objective

needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="needs SciPy")
ROWS = 23


class Reader:
    """Random images of two channels with labels; remembers which rows were read."""

    def __init__(self, rows: int = ROWS, shape: tuple[int, ...] = (2, 3, 3)) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(rows, *shape, generator=generator) + 0.5
        self.labels = torch.randint(4, (rows,), generator=generator)
        self.read: list[slice] = []

    def __call__(self, rows: slice) -> tuple[Tensor, Tensor]:
        self.read.append(rows)
        return self.images[rows], self.labels[rows]


def network(seed: int = 0, *, dropout: float = 0.5) -> nn.Sequential:
    """Smooth, so that it has a Hessian everywhere; with batch norm whose statistics are not its batch's."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(12, 4),
    )
    with torch.no_grad():
        model[1].running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
        model[1].running_var.copy_(torch.tensor([0.5, 1.5, 2.5]))
        model[1].num_batches_tracked.fill_(100)
    return model


def plain_loss(model: nn.Module, reader: Reader) -> Tensor:
    dtype = next(model.parameters()).dtype
    return nn.functional.cross_entropy(model(reader.images.to(dtype)).double(), reader.labels)


def flat(tensors: list[Tensor]) -> np.ndarray:
    return torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors]).numpy()


@pytest.mark.parametrize("chunk", [ROWS, 10, 1])
def test_value_and_gradient_in_float64(chunk: int) -> None:
    reader, model = Reader(), network()
    objective = Objective(model, reader, ROWS, chunk=chunk, double=True)
    value, gradient = objective(objective.parameters())
    exact = copy.deepcopy(model).eval().double()
    loss = plain_loss(exact, reader)
    expected = flat(list(torch.autograd.grad(loss, list(exact.parameters()))))
    assert value == pytest.approx(loss.item(), rel=1e-13)
    assert gradient == pytest.approx(expected, rel=1e-11, abs=1e-14)
    assert (objective.dtype, gradient.dtype) == (torch.float64, np.float64)


def test_runs_in_the_networks_precision_unless_told() -> None:
    reader, model = Reader(), network()
    single, double = (Objective(model, reader, ROWS, double=double) for double in (False, True))
    x = single.parameters()
    assert single.dtype == torch.float32
    value, gradient = single(x)
    exact, slope = double(x)
    assert value == plain_loss(copy.deepcopy(model).eval(), reader).item()
    assert value != exact
    assert value == pytest.approx(exact, rel=1e-6)
    assert gradient == pytest.approx(slope, abs=1e-6)


def test_at_another_point() -> None:
    reader, model = Reader(), network()
    objective = Objective(model, reader, ROWS, double=True)
    x = objective.parameters() + 0.1 * np.random.default_rng(0).standard_normal(objective.dimension)
    moved = copy.deepcopy(model).eval().double()
    nn.utils.vector_to_parameters(torch.from_numpy(x), moved.parameters())
    assert objective(x)[0] == pytest.approx(plain_loss(moved, reader).item(), rel=1e-13)


def test_never_reads_more_than_a_chunk_and_every_row_once() -> None:
    reader = Reader()
    objective = Objective(network(), reader, ROWS, chunk=11)
    objective(objective.parameters())
    rows = [list(range(ROWS)[part]) for part in reader.read]
    assert [row for part in rows for row in part] == list(range(ROWS))
    # Two chunks of 11 and one of 1 would leave batch norm a chunk without a variance.
    assert [len(part) for part in rows] == [7, 8, 8]


def test_the_model_given_is_left_alone() -> None:
    reader, model = Reader(), network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objective = Objective(model, reader, ROWS, double=True)
    x = objective.parameters()
    start = x.copy()
    objective(x + 1)
    objective.hessian_product(x, x)
    objective.evaluate(x, objective.reestimate(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    assert np.array_equal(x, start)
    assert np.array_equal(objective.parameters(), start)


def test_eval_mode_without_dropout_and_with_running_statistics() -> None:
    reader, model = Reader(), network().train()
    objective = Objective(model, reader, ROWS)
    x = objective.parameters()
    assert objective(x)[0] == plain_loss(copy.deepcopy(model).eval(), reader).item()
    without = Objective(network(dropout=0.0), reader, ROWS)
    assert objective(x)[0] == without(x)[0]
    batch = plain_loss(network(dropout=0.0).train(), reader).item()
    assert abs(objective(x)[0] - batch) > 1e-3


def test_only_what_requires_a_gradient_is_in_x() -> None:
    reader, model = Reader(), network()
    model[0].requires_grad_(False)
    objective = Objective(model, reader, ROWS, double=True)
    assert list(objective.shapes()) == ["1.weight", "1.bias", "5.weight", "5.bias"]
    assert objective.dimension == 3 + 3 + 48 + 4 == len(objective.parameters())
    exact = copy.deepcopy(model).eval().double()
    trained = [p for p in exact.parameters() if p.requires_grad]
    expected = flat(list(torch.autograd.grad(plain_loss(exact, reader), trained)))
    assert objective(objective.parameters())[1] == pytest.approx(expected, rel=1e-11, abs=1e-14)
    assert set(objective.frozen()) == {"0.weight", "0.bias"}
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        Objective(model.requires_grad_(False), reader, ROWS)


def test_shared_and_unused_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(18, 18, bias=False)
            self.again = nn.Linear(18, 18, bias=False)
            self.again.weight = self.first.weight
            self.idle = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.again(torch.tanh(self.first(x.flatten(1)))))

    torch.manual_seed(0)
    reader, model = Reader(), Odd()
    objective = Objective(model, reader, ROWS, double=True)
    assert objective.dimension == 18 * 18 + 2
    x = objective.parameters()
    exact = model.double()
    expected = torch.autograd.grad(plain_loss(exact, reader), [exact.first.weight])
    gradient = objective(x)[1]
    by_name = dict(
        zip(objective.shapes(), np.split(gradient, np.cumsum(_sizes(objective))[:-1]), strict=True)
    )
    assert by_name["first.weight"] == pytest.approx(flat(list(expected)), rel=1e-11, abs=1e-14)
    assert not by_name["idle"].any()
    product = objective.hessian_product(x, x)
    assert product.any()
    assert np.isfinite(product).all()


def _sizes(objective: Objective) -> list[int]:
    return [shape.numel() for shape in objective.shapes().values()]


def test_repeats_bit_for_bit_and_agrees_with_the_evaluation() -> None:
    reader = Reader()
    objective = Objective(network(), reader, ROWS, chunk=5)
    x = objective.parameters()
    first, second = objective(x), objective(x)
    assert first[0] == second[0]
    assert np.array_equal(first[1], second[1])
    found = objective.evaluate(x)
    assert found.loss == first[0]
    model = network().eval()
    right = (model(reader.images).argmax(1) == reader.labels).double().mean().item()
    assert found.accuracy == pytest.approx(right, abs=1e-12)
    assert objective.evaluations == 2


def test_tiny_losses_keep_their_digits() -> None:
    # logits (30, 0): the loss is log(1 + e^-30) = 9.4e-14, which float32's softmax rounds to 0.
    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([30.0, 0.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.logits.expand(len(x), 2)

    objective = Objective(Sure(), lambda rows: (torch.zeros(3, 1)[rows], torch.zeros(3).long()[rows]), 3)
    assert objective(objective.parameters())[0] == pytest.approx(np.log1p(np.exp(-30.0)), rel=1e-12)


def test_mistakes() -> None:
    for options, sentence in (({"images": 0}, "images: got 0"), ({"chunk": 0}, "chunk: got 0")):
        with pytest.raises(ValueError, match=sentence):
            Objective(network(), Reader(), **{"images": ROWS, **options})
    with pytest.raises(ValueError, match=r"x: got shape \(3,\)"):
        Objective(network(), Reader(), ROWS)(np.zeros(3))


# -- batch norm


def test_reestimated_statistics_are_the_average_of_the_chunks() -> None:
    reader, model = Reader(24), network()
    objective = Objective(model, reader, 24, chunk=8)
    x = objective.parameters()
    buffers = objective.reestimate(x)
    assert buffers is not None
    assert set(buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    activations = [model[0](reader.images[rows]) for rows in (slice(0, 8), slice(8, 16), slice(16, 24))]
    mean = torch.stack([part.mean((0, 2, 3)) for part in activations]).mean(0)
    variance = torch.stack([part.var((0, 2, 3)) for part in activations]).mean(0)
    torch.testing.assert_close(buffers["1.running_mean"], mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(buffers["1.running_var"], variance, rtol=1e-5, atol=1e-6)
    assert int(buffers["1.num_batches_tracked"]) == 3
    # They take the place of the network's own where they are given, and there alone.
    stood_in = copy.deepcopy(model).eval()
    stood_in.load_state_dict({**model.state_dict(), **buffers})
    expected = plain_loss(stood_in, reader).item()
    assert objective.evaluate(x, buffers).loss == pytest.approx(expected, rel=1e-6)
    assert objective.evaluate(x).loss == objective(x)[0]
    assert abs(expected - objective(x)[0]) > 1e-3


def test_reestimation_leaves_dropout_off_and_repeats() -> None:
    reader = Reader(24)
    # Dropout before the batch norm: were it on, the statistics would depend on the draw.
    model = nn.Sequential(nn.Dropout(0.5), *network())
    objective = Objective(model, reader, 24, chunk=8)
    x = objective.parameters()
    first, second = objective.reestimate(x), objective.reestimate(x)
    without = Objective(nn.Sequential(nn.Identity(), *network()), reader, 24, chunk=8).reestimate(x)
    assert first is not None
    assert second is not None
    assert without is not None
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert torch.equal(value, without[name])


def test_a_network_without_batch_norm_has_no_statistics() -> None:
    objective = Objective(nn.Sequential(nn.Flatten(), nn.Linear(18, 4)), Reader(), ROWS)
    assert objective.reestimate(objective.parameters()) is None
    assert not objective.has_batch_norm


# -- second derivatives


def exact_hessian(model: nn.Module, reader: Reader, x: np.ndarray) -> np.ndarray:
    exact = copy.deepcopy(model).eval().double()
    parameters = dict(exact.named_parameters())

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in parameters.values()])
        state = {n: part.view(p.shape) for (n, p), part in zip(parameters.items(), parts, strict=True)}
        logits = functional_call(exact, state, (reader.images.double(),))
        return nn.functional.cross_entropy(logits, reader.labels)

    return hessian(loss)(torch.from_numpy(x)).detach().numpy()


@pytest.mark.parametrize("chunk", [ROWS, 6])
def test_hessian_product(chunk: int) -> None:
    reader, model = Reader(), network()
    objective = Objective(model, reader, ROWS, chunk=chunk, double=True)
    x = objective.parameters()
    exact = exact_hessian(model, reader, x)
    v = np.random.default_rng(1).standard_normal(objective.dimension)
    assert objective.hessian_product(x, v) == pytest.approx(exact @ v, rel=1e-10, abs=1e-12)
    assert objective.products == 1


@needs_scipy
def test_largest_eigenvalue_of_a_network() -> None:
    reader, model = Reader(), network()
    objective = Objective(model, reader, ROWS, double=True)
    x = objective.parameters()
    eigenvalues = np.linalg.eigvalsh(exact_hessian(model, reader, x))
    found = max_eigenvalue(lambda v: objective.hessian_product(x, v), objective.dimension, rtol=1e-8)
    assert found.max_eigenvalue == pytest.approx(eigenvalues[-1], rel=1e-10)
    assert found.residual is not None
    assert found.residual < 1e-6 * eigenvalues[-1]
    assert found.products == objective.products == found.iterations + 1
    single = Objective(model, reader, ROWS)
    rough = max_eigenvalue(lambda v: single.hessian_product(x, v), objective.dimension)
    assert rough.max_eigenvalue == pytest.approx(eigenvalues[-1], rel=1e-5)


@needs_scipy
@pytest.mark.parametrize("diagonal", [[3.0], [0.0], [-7.0, 2.0], [1.0, -5.0, 0.5], [-4.0, -3.0, -2.0, -9.0]])
def test_largest_means_algebraically_largest(diagonal: list[float]) -> None:
    values = np.array(diagonal)
    found = max_eigenvalue(lambda v: values * v, len(values))
    assert found.max_eigenvalue == pytest.approx(values.max(), rel=1e-9)
    assert found.residual == pytest.approx(0.0, abs=1e-6)


@needs_scipy
def test_residual_bounds_the_error() -> None:
    values = np.concatenate([np.linspace(-1, 1, 200), [1.3]])
    found = max_eigenvalue(lambda v: values * v, len(values), rtol=1e-2)
    assert found.max_eigenvalue is not None
    assert found.residual is not None
    assert 0 < found.residual <= 1e-2 * 1.3
    assert np.abs(values - found.max_eigenvalue).min() <= found.residual


@needs_scipy
def test_zero_matrix() -> None:
    found = max_eigenvalue(lambda v: 0 * v, 50)
    assert (found.max_eigenvalue, found.residual) == (0.0, 0.0)


@needs_scipy
def test_no_convergence_and_products_that_are_not_finite_give_none() -> None:
    values = np.linspace(0, 1, 2000)
    found = max_eigenvalue(lambda v: values * v, len(values), rtol=1e-12, restarts=1)
    assert (found.max_eigenvalue, found.residual) == (None, None)
    assert "not converged within 1 restarts" in found.message
    assert found.products > 10
    found = max_eigenvalue(lambda v: v * np.nan, 50)
    assert found.max_eigenvalue is None
    assert "not finite" in found.message


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.flatten(2))[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, activation="gelu")
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.flatten(2)).mean(1))


@pytest.mark.parametrize("kind", [Recurrent, Attention])
def test_layers_with_kernels_of_their_own(kind: type[nn.Module]) -> None:
    """Fused attention has no second derivative, and in eval mode a fast path without a first one."""
    torch.manual_seed(0)
    reader, model = Reader(shape=(3, 2, 3)), kind()
    objective = Objective(model, reader, ROWS, double=True)
    x = objective.parameters()
    v = np.random.default_rng(1).standard_normal(objective.dimension)
    step = 1e-5
    slopes = [objective(x + sign * step * v)[1] for sign in (1, -1)]
    expected = (slopes[0] - slopes[1]) / (2 * step)
    assert objective.hessian_product(x, v) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert objective.evaluate(x).loss == objective(x)[0]


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    """Bit-identical from call to call, in full float32 where cuDNN would take TF32."""
    torch.manual_seed(0)
    reader, model = Reader(300, (1, 28, 28)), LeNet5()
    there, here = (
        Objective(model, reader, 300, chunk=128, device=torch.device(device), double=double)
        for device, double in ((DEVICE, False), ("cpu", True))
    )
    x = there.parameters()
    (value, gradient), (again, repeated) = there(x), there(x)
    assert there.device.type == DEVICE.type
    assert value == again == there.evaluate(x).loss
    assert np.array_equal(gradient, repeated)
    exact, slope = here(x)
    assert value == pytest.approx(exact, rel=1e-6)
    # TF32 would miss this by a factor of about 100.
    assert np.abs(gradient - slope).max() < 1e-5 * np.abs(slope).max()
    product, expected = (objective.hessian_product(x, slope) for objective in (there, here))
    assert np.abs(product - expected).max() < 1e-4 * np.abs(expected).max()
