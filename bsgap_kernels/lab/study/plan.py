"""The plan of a study: what is run, and what would count, declared before the run."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsgap_kernels.lab.checks import UserError, integer, number, one_of
from bsgap_kernels.lab.config import SweepConfig
from bsgap_kernels.lab.option_files import parse_options

PLAN = Path(__file__).with_name("plan.yaml")
MEASURES = (
    "near_rank_ratio",
    "test_accuracy",
    "train_accuracy",
    "generalization_gap",
    "log10_sharpness_full",
    "log10_sharpness_subspace",
    "log10_hessian",
)
DIRECTIONS = ("falls", "rises")


@dataclass(frozen=True)
class Experiment:
    """A model on data at some batch sizes, under each budget."""

    name: str
    options: dict[str, Any]
    batch_sizes: list[int | str]
    budgets: dict[str, dict[str, int]]

    def sweep(self, budget: str, plan: Plan) -> SweepConfig:
        """The sweep of this experiment under one budget."""
        return SweepConfig.from_mapping(
            {
                **plan.common,
                **self.options,
                **self.budgets[budget],
                "batch_sizes": self.batch_sizes,
                "seeds": plan.seeds,
            }
        )


@dataclass(frozen=True)
class Hypothesis:
    """A claim as a direction of an effect, and the smallest effect that counts.

    The effect is the slope of `measure` per doubling of the batch size, or with `against` Spearman's
    correlation of the two over the batch sizes, of one seed.
    """

    name: str
    claim: str
    source: str
    measure: str
    direction: str
    margin: float
    primary: bool
    against: str | None = None

    def __post_init__(self) -> None:
        one_of("measure", self.measure, MEASURES)
        one_of("direction", self.direction, DIRECTIONS)
        number("margin", self.margin, minimum=0.0)
        if self.against is not None:
            one_of("with", self.against, MEASURES)


@dataclass(frozen=True)
class Plan:
    """Everything that a study declares before its run; `sha256` is that of its file."""

    seeds: list[int]
    experiments: list[Experiment]
    common: dict[str, Any]
    alpha: float
    hypotheses: list[Hypothesis]
    equally_trained: float
    sha256: str

    @property
    def primary_tests(self) -> int:
        """Over how many tests the family-wise error is shared."""
        cells = sum(len(experiment.budgets) for experiment in self.experiments)
        return cells * sum(hypothesis.primary for hypothesis in self.hypotheses)

    def level(self, hypothesis: Hypothesis) -> float:
        """Confidence level of a hypothesis's intervals: 1 − alpha, for primary ones by Bonferroni's rule."""
        return 1 - self.alpha / (self.primary_tests if hypothesis.primary else 1)


def load_plan(path: Path = PLAN) -> Plan:
    """Read a plan and check all of it, its sweeps included.

    Raises:
        UserError: the file is missing, or something in it is; the message names it.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"plan: looked at {path} and found no such file") from None
    values = parse_options(content, path)
    try:
        plan = _plan(values, hashlib.sha256(content).hexdigest())
    except KeyError as error:
        raise UserError(f"plan: {path} lacks {error}") from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"plan: {path} is not of the form of a plan ({error})") from error
    except UserError as error:
        raise UserError(f"plan: {path}: {error}") from error
    return plan


def _plan(content: dict[str, Any], sha256: str) -> Plan:
    plan = Plan(
        seeds=list(content["seeds"]),
        experiments=[_experiment(dict(entry)) for entry in content["experiments"]],
        common=dict(content["common"]),
        alpha=content["alpha"],
        hypotheses=[_hypothesis(dict(entry)) for entry in content["hypotheses"]],
        equally_trained=content["equally_trained"],
        sha256=sha256,
    )
    number("alpha", plan.alpha, minimum=0.0, below=1.0)
    if not plan.alpha:
        raise UserError("alpha: got 0, expected a number above 0: every interval would be infinite")
    if not plan.seeds:
        raise UserError("seeds: got an empty list, expected at least one value")
    number("equally_trained", plan.equally_trained, minimum=0.0)
    for seed in plan.seeds:
        integer("seeds", seed, minimum=0)
    for experiment in plan.experiments:
        for budget in experiment.budgets:
            experiment.sweep(budget, plan)
    return plan


def _experiment(entry: dict[str, Any]) -> Experiment:
    own = {field.name for field in dataclasses.fields(Experiment)} - {"options"}
    fields = {name: entry.pop(name) for name in sorted(own)}
    return Experiment(options=entry, **fields)


def _hypothesis(entry: dict[str, Any]) -> Hypothesis:
    return Hypothesis(against=entry.pop("with", None), **entry)
