"""RankCallback against the real Hugging Face Trainer, on models made from a configuration."""

from __future__ import annotations

import doctest
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_oracle import Counts, Kept, hooks, near_rank
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs transformers: pip install 'bsgap_kernels[transformers]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install 'bsgap_kernels[transformers]'")

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from bsgap_kernels.tracking.adapters import transformers
from bsgap_kernels.tracking.adapters.transformers import RankCallback

RTOL = 0.15
TOKENS = 9


def gpt2() -> nn.Module:
    torch.manual_seed(3)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=2, n_head=2, n_inner=48)
    )


def bert() -> nn.Module:
    torch.manual_seed(7)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=16,
        )
    )


def examples(kind: str, count: int = 40) -> list[dict[str, Tensor]]:
    """Sentences of 4 to 9 tokens, padded at the end."""
    generator = torch.Generator().manual_seed(3)
    data = []
    for index in range(count):
        mask = (torch.arange(TOKENS) < 4 + index % 6).long()
        tokens = torch.randint(1, 30, (TOKENS,), generator=generator) * mask
        labels = torch.where(mask.bool(), tokens, -100) if kind == "gpt2" else torch.tensor(index % 2)
        data.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return data


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        **{"save_strategy": "no", **options},
    )


class Oracle(TrainerCallback):
    """Keeps what the named modules give in training, with padding and without, by optimizer step."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.steps: list[dict[str, list[tuple[Tensor, Tensor]]]] = [{}]
        self.handles: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **more: Any) -> None:
        self.handles.append(model.register_forward_pre_hook(self.begin, with_kwargs=True))
        for name in self.names:
            read = partial(self.read, model, name)
            self.handles.append(model.get_submodule(name).register_forward_hook(read))

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
        self.mask = kwargs["attention_mask"].bool()

    def read(self, model: nn.Module, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if model.training:
            valid = output[self.mask] if output.ndim == 3 else output
            both = output.detach().flatten(0, -2).clone(), valid.detach().clone()
            self.steps[-1].setdefault(f"{name}#0", []).append(both)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.steps.append({})

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def counts(self, *, masked: bool) -> Counts:
        return {
            step: {site: near_rank([pair[masked] for pair in pairs], RTOL) for site, pairs in kept.items()}
            for step, kept in enumerate(self.steps[:-1])
        }


MODELS = {
    "gpt2": (gpt2, ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]),
    "bert": (
        bert,
        [
            "bert.encoder.layer.0.intermediate.intermediate_act_fn",
            "bert.encoder.layer.1.intermediate.intermediate_act_fn",
            "bert.pooler.activation",
        ],
    ),
}


@pytest.mark.parametrize(
    ("kind", "mask"), [("gpt2", "attention_mask"), ("bert", "attention_mask"), ("gpt2", None)]
)
def test_every_optimizer_step_is_counted(kind: str, mask: str | None, tmp_path: Path) -> None:
    """10 batches of 4 sentences, 3 accumulated: the last of 4 steps has one batch. Evaluated after each."""
    make, names = MODELS[kind]
    model, oracle, sink = make(), Oracle(names), Kept()
    ranks = RankCallback(rtol=RTOL, mask=mask, sinks=[sink])
    options = {"gradient_accumulation_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    Trainer(
        model,
        arguments(tmp_path, num_train_epochs=1, **options),
        train_dataset=examples(kind),
        eval_dataset=examples(kind, 5),
        callbacks=[oracle, ranks],
    ).train()
    assert len(oracle.steps) == 5
    assert sink.counts() == oracle.counts(masked=mask is not None)
    assert oracle.counts(masked=True) != oracle.counts(masked=False)
    assert sink.closed
    assert hooks(model) == 0


def test_an_exception_closes_the_tracker_in_a_with_block(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 2:
                raise KeyError("planned")

    model, sink = gpt2(), Kept()
    with pytest.raises(KeyError, match="planned"), RankCallback(rtol=RTOL, sinks=[sink]) as ranks:
        Trainer(
            model, arguments(tmp_path), train_dataset=examples("gpt2"), callbacks=[ranks, Fails()]
        ).train()
    assert sink.closed
    assert hooks(model) == 0
    assert list(sink.counts()) == [0, 1]


class Written(TrainerCallback):
    """Which steps' rows are in the file when a checkpoint has been made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: list[list[int]] = []

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.steps.append(sorted({row["step"] for row in read(self.path)}))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(folder: Path, callbacks: list[TrainerCallback], steps: int, **resume: Any) -> None:
    Trainer(
        gpt2(),
        arguments(folder, max_steps=steps, save_strategy="steps", save_steps=3),
        train_dataset=examples("gpt2"),
        callbacks=callbacks,
    ).train(**resume)


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """The file has each step once, as if the run had not been cut."""
    options: dict[str, Any] = {"rtol": RTOL, "mask": "attention_mask", "every": 2}
    cut, whole = tmp_path / "cut.jsonl", tmp_path / "whole.jsonl"
    written = Written(cut)
    train(tmp_path, [RankCallback(sinks=cut, **options), written], 5)
    assert written.steps == [[0, 2], [0, 2, 4]]
    last = str(tmp_path / "checkpoint-3")
    train(tmp_path, [RankCallback(sinks=cut, **options)], 7, resume_from_checkpoint=last)
    train(tmp_path, [RankCallback(sinks=whole, **options)], 7)
    rows = [row for row in read(cut) if row["site"] and "header" not in row["metric"]]
    assert {row["step"]: row.pop("attempt") for row in rows} == {0: 0, 2: 0, 4: 1, 6: 1}
    assert rows == [
        {key: row[key] for key in row if key != "attempt"}
        for row in read(whole)
        if "header" not in row["metric"]
    ]


def test_a_checkpoint_of_a_run_without_it_gives_the_step(tmp_path: Path) -> None:
    train(tmp_path, [], 3)
    sink, last = Kept(), str(tmp_path / "checkpoint-3")
    train(tmp_path, [RankCallback(rtol=RTOL, sinks=sink)], 5, resume_from_checkpoint=last)
    assert list(sink.counts()) == [3, 4]


def begin(ranks: RankCallback, model: nn.Module, folder: Path) -> None:
    ranks.on_train_begin(arguments(folder), TrainerState(), TrainerControl(), model=model)


def test_a_run_after_a_failed_one_closes_its_tracker(tmp_path: Path) -> None:
    model = gpt2()
    ranks = RankCallback(rtol=RTOL)
    begin(ranks, model, tmp_path)
    attached = hooks(model)
    begin(ranks, model, tmp_path)
    assert attached > 0
    assert hooks(model) == attached
    ranks.close()
    assert hooks(model) == 0


def test_the_model_inside_its_wrappers_is_tracked(tmp_path: Path) -> None:
    model = gpt2()
    ranks = RankCallback(rtol=RTOL)
    begin(ranks, nn.parallel.DataParallel(torch.compile(model, backend="eager")), tmp_path)
    model(**{key: value[None] for key, value in examples("gpt2")[0].items()})
    assert ranks.tracker is not None
    assert ranks.tracker.sites() == ["transformer.h.0.mlp.act#0", "transformer.h.1.mlp.act#0"]
    ranks.close()


def test_a_misspelt_option_is_told_at_once() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'rtoll'"):
        RankCallback(rtoll=1e-2)


def test_the_docstring_runs(tmp_path: Path) -> None:
    def silent_trainer(*args: Any, **options: Any) -> Trainer:
        trainer = Trainer(*args, **options)
        trainer.remove_callback(PrinterCallback)
        return trainer

    names = {
        "model": gpt2(),
        "arguments": arguments(tmp_path, max_steps=2),
        "data": examples("gpt2"),
        "Trainer": silent_trainer,
    }
    result = doctest.testmod(transformers, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0


def test_what_the_trainer_logs_holds_the_ratios(tmp_path: Path) -> None:
    ranks = RankCallback(rtol=RTOL, log=True)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True
    )
    trainer = Trainer(gpt2(), arguments, train_dataset=examples("gpt2"), callbacks=[ranks])
    trainer.train()
    logged = [
        entry for entry in trainer.state.log_history if "near_rank_ratio/transformer.h.0.mlp.act#0" in entry
    ]
    assert logged
    assert all(0 < entry["near_rank_ratio/transformer.h.1.mlp.act#0"] <= 1 for entry in logged)
