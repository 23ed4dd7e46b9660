"""Whose tokens a padding mask tells of, packed sequences, and passes that are none of a training step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tracker_models import RTOL, svd_count

from bsgap_kernels import RankTracker

LENGTHS = torch.tensor([6, 2, 5, 4])
PADDING = torch.arange(6)[None, :] >= LENGTHS[:, None]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def watch(model: nn.Module, **options: Any) -> RankTracker:
    return RankTracker(model, rtol=RTOL, metrics=["near_rank"], verbose=False, **options)


def rows(model: nn.Module, *inputs: Any, options: dict[str, Any], **kwargs: Any) -> dict[str, int]:
    """Rows of each site in one step."""
    with watch(model, **options) as tracker:
        model(*inputs, **kwargs)
        return {site.partition(".")[0]: record.shape[0] for site, record in tracker.collect().items()}


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("src_key_padding_mask", {"encoder": 17, "decoder": 24}),
        ("tgt_key_padding_mask", {"encoder": 24, "decoder": 17}),
    ],
)
def test_a_mask_of_one_side_leaves_the_other_alone(mask: str, expected: dict[str, int]) -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
    x = torch.randn(4, 6, 8)
    found = rows(model, x, torch.randn(4, 6, 8), options={"mask": mask}, **{mask: PADDING})
    assert found == expected


@pytest.mark.parametrize(
    ("mask", "expected"), [("attention_mask", (17, 24)), ("decoder_attention_mask", (24, 17))]
)
def test_t5(mask: str, expected: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).train()
    tokens, labels = torch.randint(1, 30, (4, 6)), torch.randint(1, 30, (4, 6))
    found = rows(model, options={"mask": mask}, input_ids=tokens, labels=labels, **{mask: (~PADDING).long()})
    assert (found["encoder"], found["decoder"]) == expected


def test_a_site_of_neither_side_is_refused() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.Tanh()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.act(self.decoder(self.encoder(x)))

    model = Both()
    refused = pytest.raises(ValueError, match="act#0: as many tokens as the encoder's mask has")
    with watch(model, mask="attention_mask"), refused:
        model(torch.randn(4, 6, 8), ~PADDING)


def test_what_is_true_in_a_mask_follows_from_its_name_or_is_asked_for() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, options = torch.randn(4, 6, 8), {"mask": "src_key_padding_mask"}
    assert set(rows(model, x, options=options, src_key_padding_mask=PADDING).values()) == {17}
    stated = options | {"mask_true": "valid"}
    assert set(rows(model, x, options=stated, src_key_padding_mask=~PADDING).values()) == {17}

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Tanh()

        def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
            return self.act(x)

    with pytest.raises(ValueError, match="'padding_mask' leaves open which is true"):
        watch(Named(), mask="padding_mask")


def test_a_mask_that_is_added_to_scores_may_have_their_dimensions() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act = nn.Linear(8, 8), nn.Tanh()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.act(self.up(x))

    added = torch.zeros(4, 1, 1, 6).masked_fill(PADDING[:, None, None], torch.finfo(torch.float32).min)
    assert rows(Block(), torch.randn(4, 6, 8), added, options={"mask": "attention_mask"}) == {"act#0": 17}


def test_packed_sequences_are_read_without_padding() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(8, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
            self.packed, _ = self.rnn(packed)
            return nn.utils.rnn.pad_packed_sequence(self.packed, batch_first=True)[0]

    model = Recurrent()
    with watch(model, layers=["rnn"]) as tracker:
        output = model(torch.randn(4, 6, 8)).detach()
        (record,) = tracker.collect().values()
    assert record.shape == (17, 5)
    assert record.near_rank == svd_count(output[~PADDING])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inputs_that_want_gradients_make_no_pass_a_training_step(context: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    x = torch.randn(9, 4, requires_grad=True)
    with watch(model) as tracker:
        with context():
            model(x)
        model(torch.randn(5, 4))
        assert tracker.collect()["1#0"].shape == (5, 6)
