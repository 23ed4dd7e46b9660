"""Which sites a tracker finds, and how it unfolds what it reads there."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracker_models import RTOL, assert_equal_to_svd

from bsgap_kernels import RankTracker


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def watch(model: nn.Module, **options: Any) -> RankTracker:
    return RankTracker(model, rtol=RTOL, verbose=False, **options)


def sites_of(model: nn.Module, *inputs: Tensor, **options: Any) -> list[str]:
    """Sites after one step, which are those of the next one, each read once."""
    with watch(model, **options) as tracker:
        model(*inputs)
        first = list(tracker.collect())
        model(*inputs)
        assert list(tracker.collect()) == first
        return first


class Written(nn.Module):
    """A model whose forward is a function of itself and the input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def linears(*names: str, width: int = 12) -> dict[str, nn.Module]:
    return {name: nn.Linear(width, width) for name in names}


def convolutions(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Conv2d(4, 4, 3, padding=1) for name in names}


def test_functional_nonlinearities_are_read_at_their_consumer() -> None:
    model = Written(
        lambda m, x: m.d(m.c(torch.tanh(m.b(F.relu(m.a(x))))).sigmoid()), **linears("a", "b", "c", "d")
    )
    x = torch.randn(30, 12)
    with watch(model) as tracker:
        for step in range(3):
            x = torch.randn(30, 12, generator=torch.Generator().manual_seed(step))
            model(x)
            records = tracker.collect()
            with tracker.paused():
                b = F.relu(model.a(x))
                c = torch.tanh(model.b(b))
                d = model.c(c).sigmoid()
            saved = {"b:input#0": b.detach(), "c:input#0": c.detach(), "d:input#0": d.detach()}
            assert_equal_to_svd(records, saved)


def test_an_output_that_a_module_gives_is_not_read_again() -> None:
    model = Written(
        lambda m, x: m.c(F.dropout(F.gelu(m.b(m.act(m.a(x)))), 0.1)), act=nn.ReLU(), **linears("a", "b", "c")
    )
    assert sites_of(model, torch.randn(20, 12)) == ["act#0", "c:input#0"]


def test_one_activation_that_feeds_two_layers_is_one_site() -> None:
    def residual(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        return m.d(F.relu(m.b(h) + m.c(h)))

    model = Written(residual, **convolutions("a", "b", "c", "d"))
    assert sites_of(model, torch.randn(2, 4, 6, 6)) == ["b:input#0", "d:input#0"]


def test_every_part_of_a_concatenation_counts() -> None:
    def dense(m: Any, x: Tensor) -> Tensor:
        first = F.relu(m.a(x))
        second = F.relu(m.b(first))
        return m.c(torch.cat([first, second], 1)[:, :12]) + m.d(torch.cat([second, first], 1)[:, 12:])

    # What c is given holds an activation that no layer was given before; what d is given does not.
    assert sites_of(Written(dense, **linears("a", "b", "c", "d")), torch.randn(20, 12)) == [
        "b:input#0",
        "c:input#0",
    ]


def test_gates_pooling_and_normalisation() -> None:
    gated = Written(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), **linears("gate", "up", "down"))
    assert sites_of(gated, torch.randn(3, 7, 12)) == ["down:input#0"]

    def pooled(m: Any, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(m.a(x)), 2)
        x = F.adaptive_avg_pool2d(F.leaky_relu(m.b(x)), 1)
        return m.fc(x.flatten(1))

    parts = convolutions("a", "b") | {"fc": nn.Linear(4, 3)}
    assert sites_of(Written(pooled, **parts), torch.randn(5, 4, 6, 6)) == ["b:input#0", "fc:input#0"]
    # A normalisation in between makes something else of it.
    normed = Written(lambda m, x: m.b(m.norm(F.relu(m.a(x)))), norm=nn.LayerNorm(12), **linears("a", "b"))
    with watch(normed) as tracker:
        normed(torch.randn(4, 12))
        with pytest.raises(RuntimeError, match="a forward pass was seen but no nonlinearity"):
            tracker.step()
    sorted_ = Written(lambda m, x: m.b(F.relu(m.a(x)).topk(12)[0]), **linears("a", "b"))
    with watch(sorted_) as tracker:
        sorted_(torch.randn(4, 12))
        with pytest.raises(RuntimeError, match="a forward pass was seen but no nonlinearity"):
            tracker.step()


def test_a_layer_whose_first_call_has_no_activation_keeps_the_numbers_of_calls() -> None:
    def recurrent(m: Any, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 12)
        for _ in range(2):
            h = torch.tanh(m.inner(h) + m.outer(x))
        return h

    model = Written(recurrent, **linears("inner", "outer"))
    with watch(model) as tracker:
        model(torch.randn(20, 12))
        for _ in range(3):
            assert list(tracker.collect()) == ["inner:input#1"]
            model(torch.randn(20, 12))


def test_discovery_waits_for_a_pass_with_a_graph() -> None:
    model = Written(lambda m, x: m.b(F.relu(m.a(x))), **linears("a", "b"))
    with watch(model) as tracker:
        with torch.no_grad(), tracker.view("probe"):
            model(torch.randn(9, 12))
        assert tracker.collect("probe") == {}
        tracker.step()
        model(torch.randn(9, 12))
        assert list(tracker.collect()) == ["b:input#0"]
        with torch.no_grad(), tracker.view("probe"):
            model(torch.randn(9, 12))
        assert list(tracker.collect("probe")) == ["b:input#0"]


def test_a_model_without_nonlinearities_is_refused_after_its_first_step() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 2))
    with watch(model) as tracker:
        model(torch.randn(9, 12))
        with pytest.raises(RuntimeError, match="no nonlinearity, .*; say by layers="):
            tracker.step()


@pytest.mark.parametrize(
    ("name", "options", "shape", "count", "some"),
    [
        ("resnet18", {}, (2, 3, 32, 32), 17, ["relu#0", "layer1.0.relu#1", "layer4.1.relu#1"]),
        ("vgg11_bn", {}, (2, 3, 32, 32), 10, ["features.2#0", "classifier.4#0"]),
        (
            "mobilenet_v3_small",
            {},
            (2, 3, 32, 32),
            42,
            ["features.1.block.1.scale_activation#0", "classifier.1#0"],
        ),
        # 57 ReLUs by function, of which the four that end an inception block come together in the next one.
        (
            "googlenet",
            {"aux_logits": False, "init_weights": False},
            (2, 3, 64, 64),
            30,
            ["conv2.conv:input#0", "inception3a.branch2.1.conv:input#0", "fc:input#0"],
        ),
        (
            "densenet121",
            {},
            (2, 3, 32, 32),
            121,
            ["features.relu0#0", "features.denseblock4.denselayer16.relu2#0", "classifier:input#0"],
        ),
        ("squeezenet1_1", {}, (2, 3, 32, 32), 26, ["features.12.expand3x3_activation#0", "classifier.2#0"]),
    ],
)
def test_models_of_torchvision(
    name: str, options: dict[str, Any], shape: tuple[int, ...], count: int, some: list[str]
) -> None:
    models = pytest.importorskip("torchvision.models")
    found = sites_of(getattr(models, name)(num_classes=5, **options), torch.randn(shape))
    assert len(found) == count
    assert set(some) <= set(found)


def test_a_vision_transformer() -> None:
    transformers = pytest.importorskip("torchvision.models.vision_transformer")
    model = transformers.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3
    )
    names = [f"encoder.layers.encoder_layer_{i}.mlp.1#0" for i in range(2)]
    assert sites_of(model, torch.randn(2, 3, 16, 16)) == names


@pytest.mark.parametrize(
    ("unfold", "shape", "expected"),
    [
        ("auto", (6, 5), (6, 5)),
        ("auto", (6, 5, 4), (30, 4)),
        ("auto", (6, 5, 4, 3), (72, 5)),
        ("auto", (3, 5, 4, 3, 2), (72, 5)),
        ("flatten", (6, 5, 4, 3), (6, 60)),
        ("channel", (6, 5, 4), (24, 5)),
        ("pool", (6, 5, 4, 3), (6, 5)),
        ("pool", (6, 5, 4), (6, 5)),
        ("token", (6, 5, 4), (30, 4)),
    ],
)
def test_unfolding(unfold: str, shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Softshrink(0.3))
    x = torch.randn(shape)
    # No layer says where the features are.
    said = {} if unfold in ("flatten", "token") else {"features_dim": -1 if shape[-1] == expected[1] else 1}
    with watch(model, unfold=unfold, **said) as tracker:
        saved = {"0#0": model(x)}
        records = tracker.collect()
    assert records["0#0"].shape == expected
    assert_equal_to_svd(records, saved, unfold=unfold)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(
    ("unfold", "expected"), [("auto", (126, 5)), ("channel", (126, 5)), ("token", (45, 14))]
)
def test_1d_convolutions(unfold: str, expected: tuple[int, int], recorded: bool) -> None:
    model = nn.Sequential(nn.Conv1d(2, 5, 3), nn.ReLU(), nn.Conv1d(5, 4, 3), nn.Tanh())
    with watch(model, unfold=unfold) as tracker:
        with tracker.view("probe"), torch.set_grad_enabled(recorded):
            model(torch.randn(9, 2, 16))
        assert tracker.collect("probe")["1#0"].shape == expected


def test_layers_by_regular_expression_and_function() -> None:
    model = nn.Sequential(
        nn.Linear(6, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 2)
    )
    x = torch.randn(9, 6)
    assert sites_of(model, x, layers=re.compile(r"^\d$")) == ["0#0", "1#0", "2#0", "3#0"]
    assert sites_of(model, x, layers=[re.compile("2."), "3"]) == ["2.0#0", "2.1#0", "3#0"]
    assert sites_of(model, x, layers=lambda name, module: isinstance(module, nn.Tanh)) == ["2.1#0"]
    with pytest.raises(ValueError, match="the function chose no module; the model has Sequential, 0"):
        watch(model, layers=lambda name, module: False)
    with pytest.raises(ValueError, match=r"the pattern '\^z' matches no module"):
        watch(model, layers=re.compile("^z"))
    with pytest.raises(TypeError, match=r"got a list with 3, expected glob patterns"):
        watch(model, layers=[3])


class Outputs(nn.Module):
    """Returns its activation in a container."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = nn.Linear(8, 8), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(torch.tanh(self.inner(x)))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, "more"),
        lambda x: [None, x],
        lambda x: {"loss": 3.0, "hidden": x},
        lambda x: pytest.importorskip("transformers.modeling_outputs").BaseModelOutput(last_hidden_state=x),
    ],
    ids=["tuple", "list", "dict", "ModelOutput"],
)
def test_activations_in_containers(wrap: Callable[[Tensor], Any]) -> None:
    model = nn.Sequential(Outputs(wrap))
    x = torch.randn(20, 8)
    with watch(model, layers=["0"]) as tracker:
        model(x)
        saved = {"0#0": torch.tanh(model[0].inner(x)).detach()}
        assert_equal_to_svd(tracker.collect(), saved)


def test_features_that_vary_are_refused_by_name() -> None:
    model = nn.Sequential(nn.ReLU())
    with watch(model, unfold="flatten") as tracker:
        model(torch.randn(60, 2, 3, 3))
        tracker.step()
        with pytest.raises(
            ValueError, match=r"0#0: an activation with 32 features came after one with 18; .*channel"
        ):
            model(torch.randn(60, 2, 4, 4))
    with watch(model, unfold="channel", features_dim=1) as tracker:
        for side in (3, 4):
            model(torch.randn(6, 2, side, side))
            assert tracker.collect()["0#0"].shape == (6 * side * side, 2)


def test_a_threshold_that_float64_sums_cannot_resolve_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(ValueError, match=r"rtol: got 1e-09, expected at least .*certify=True"):
        RankTracker(model, rtol=1e-9)
    RankTracker(model, rtol=1e-9, certify=True).close()
