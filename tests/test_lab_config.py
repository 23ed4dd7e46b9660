"""Options of runs and sweeps: defaults, and the sentence for every mistake."""

import pytest

from bsgap_kernels.lab import config as options
from bsgap_kernels.lab.config import SweepConfig, TrainConfig, UserError
from bsgap_kernels.lab.data_options import MAX_PROCEDURAL_CLASSES
from bsgap_kernels.lab.models import REGISTRY
from bsgap_kernels.tracking.sites import UNFOLDS


def test_names_agree_with_the_modules_that_hold_them() -> None:
    # config.py repeats the names so that the command line can check them without importing torch.
    assert set(options.MODELS) == set(REGISTRY)
    assert set(UNFOLDS) - set(options.UNFOLDS) == {"token"}  # of sequences; the lab has images


def test_procedural_options_from_a_mapping_and_defaults() -> None:
    options.ProceduralOptions(classes=MAX_PROCEDURAL_CLASSES, difficulty=2)
    config = SweepConfig(data="procedural", procedural={"classes": 5, "label_noise": 0.5})
    expected = options.ProceduralOptions(classes=5, label_noise=0.5)
    assert config.procedural == expected
    assert [run.procedural for run in config.runs()] == [expected] * 3
    # Defaults are written out, so that a config.yaml says what was drawn.
    assert TrainConfig(data="procedural").procedural == options.ProceduralOptions()
    assert TrainConfig().procedural is None


def test_budget() -> None:
    assert TrainConfig().budget == f"{options.DEFAULT_EPOCHS} epochs"
    assert TrainConfig(steps=7).budget == "7 steps"
    assert TrainConfig(steps=7).epochs is None


def test_sweep_lists_from_text_and_from_lists() -> None:
    text = SweepConfig(batch_sizes="16, 128,full", seeds="0,1")
    assert text == SweepConfig(batch_sizes=[16, 128, "full"], seeds=[0, 1])
    assert [run.run for run in text.runs()] == [
        "b16-s0", "b16-s1", "b128-s0", "b128-s1", "bfull-s0", "bfull-s1",
    ]  # fmt: skip
    assert SweepConfig(batch_sizes=8, seeds=3).runs()[0].run == "b8-s3"


def test_models_of_torchvision_are_looked_up_when_built() -> None:
    # Its names are torchvision's, which the command line does not import to check its options.
    assert TrainConfig(model="torchvision:resnet18").model == "torchvision:resnet18"


def test_layers_from_text() -> None:
    assert TrainConfig(layers="relu1, fc*").layers == ["relu1", "fc*"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"data": "imagenet"},
            "data: got 'imagenet', expected one of digits, procedural, mnist, fashion-mnist, cifar10",
        ),
        (
            {"data": "mnist"},
            "data_root: got none, expected the directory that holds torchvision's files of mnist",
        ),
        ({"model": "vgg"}, "model: got 'vgg', expected one of lenet5"),
        ({"model": "torchvision"}, "model: got 'torchvision', expected one of lenet5"),
        ({"model": 3}, "model: got 3, expected one of lenet5"),
        ({"lr": -0.1}, "lr: got -0.1, expected a finite number of at least 0"),
        ({"lr": float("nan")}, "lr: got nan, expected"),
        ({"lr_rule": "cubic"}, "lr_rule: got 'cubic', expected one of fixed, linear, sqrt"),
        (
            {"hyper": {"sgd": {"momentum": 1.0}}},
            "sgd.momentum: got 1.0, expected a finite number of at least 0 and below 1",
        ),
        ({"rtol": -1e-3}, "rtol: got -0.001, expected a finite number of at least 0"),
        ({"atol": -1.0}, "atol: got -1.0, expected"),
        ({"unfold": "rows"}, "unfold: got 'rows', expected one of auto, flatten, channel, pool"),
        ({"epochs": 3, "steps": 4}, "epochs, steps: got both 3 and 4, expected one of the two budgets"),
        ({"epochs": 0}, "epochs: got 0, expected an integer of at least 1"),
        ({"steps": 2.5}, "steps: got 2.5, expected an integer of at least 1"),
        ({"probe_every": 0}, "probe_every: got 0, expected an integer of at least 1"),
        ({"every": True}, "every: got True, expected an integer of at least 1"),
        ({"max_probes": 0}, "max_probes: got 0, expected an integer of at least 1"),
        ({"layers": []}, "layers: got [], expected patterns"),
        ({"layers": [3]}, "layers: got [3], expected patterns"),
        ({"lr": 10**400}, "lr: got 1"),
        (
            {"threads": 2**40},
            "threads: got 1099511627776, expected an integer of at least 1 and at most 4096",
        ),
        (
            {"hyper": {"sgd": {"nesterov": "false"}}},
            "sgd.nesterov: got 'false', expected true or false",
        ),
        ({"overwrite": "yes"}, "overwrite: got 'yes', expected true or false"),
        ({"download": 1}, "download: got 1, expected true or false"),
        ({"procedural": {}}, "procedural: got options of the procedural set, but data is digits"),
        *(
            ({"data": "procedural", "procedural": given}, message)
            for given, message in (
                (3, "procedural: got 3, expected options such as classes: 10"),
                ({"size": 3}, "procedural.size: unknown option, expected one of train, test, classes"),
                ({"train": 0}, "procedural.train: got 0, expected an integer of at least 1"),
                ({"test": 1.5}, "procedural.test: got 1.5, expected an integer of at least 1"),
                (
                    {"classes": 1},
                    "procedural.classes: got 1, expected an integer of at least 2 and at most 64",
                ),
                (
                    {"classes": 65},
                    "procedural.classes: got 65, expected an integer of at least 2 and at most",
                ),
                ({"seed": -1}, "procedural.seed: got -1, expected an integer of at least 0 and at most"),
                (
                    {"seed": 2**63},
                    "procedural.seed: got 9223372036854775808, expected an integer of at least 0",
                ),
                (
                    {"difficulty": 2.5},
                    "procedural.difficulty: got 2.5, expected a finite number of at least 0 and at most 2",
                ),
                ({"difficulty": float("nan")}, "procedural.difficulty: got nan, expected a finite number"),
                (
                    {"label_noise": 1.0},
                    "procedural.label_noise: got 1.0, expected a finite number of at least",
                ),
            )
        ),
    ],
)
def test_mistakes_name_option_value_and_expectation(given: dict[str, object], message: str) -> None:
    for kind in (TrainConfig, SweepConfig):
        with pytest.raises(UserError) as caught:
            kind(**given)
        assert str(caught.value).startswith(message)


def test_a_seed_that_torch_does_not_take() -> None:
    TrainConfig(seed=2**63 - 1)
    with pytest.raises(UserError, match="seed: got 9223372036854775808, expected an integer"):
        TrainConfig(seed=2**63)
    for seeds in ("0,9223372036854775808", "9" * 5000):
        with pytest.raises(UserError, match="seeds: got '9.*expected integers of at least 0 and at most"):
            SweepConfig(seeds=seeds)


@pytest.mark.parametrize("value", [0, -1, "half", 1.5, True, "", "9" * 5000])
def test_bad_batch_size(value: object) -> None:
    with pytest.raises(UserError, match="batch_size: got .*, expected an integer of at least 1, or full"):
        TrainConfig(batch_size=value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_sizes": "16,16"}, "batch_sizes: got \\[16, 16\\], expected each value once"),
        ({"batch_sizes": ""}, "batch_sizes: got an empty list"),
        ({"batch_sizes": "16,x"}, "batch_sizes: got 'x'"),
        ({"seeds": "-1"}, "seeds: got '-1', expected integers of at least 0"),
        ({"seeds": []}, "seeds: got an empty list"),
    ],
)
def test_bad_sweep_lists(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SweepConfig(**given)


def test_bad_seed() -> None:
    with pytest.raises(UserError, match="seed: got -1, expected an integer of at least 0"):
        TrainConfig(seed=-1)
