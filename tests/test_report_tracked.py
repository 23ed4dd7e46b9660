"""`bsgap report` of what RankTracker wrote in any loop."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from bsgap_kernels import RankTracker
from bsgap_kernels.cli import main

pytest.importorskip("bokeh", reason="needs bokeh: pip install 'bsgap_kernels[lab]'")


def tracked(path: Path, run: str = "run", scale: float = 1.0) -> Path:
    """Three steps of a network, whose second layer loses rank, and a reading of a probe."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    with RankTracker(
        model, sinks=path, verbose=False, run=run, rtol=(0.1, 0.01), max_overhead=9.0
    ) as tracker:
        for _ in range(3):
            model(scale * torch.randn(40, 6))
            tracker.step()
            with torch.no_grad():
                model[2].weight[4:] *= 1e-4
                model[2].bias[4:] = 0
        with tracker.view("probe"):
            model(torch.randn(20, 6))
        tracker.collect("probe")
    return path


def text_of(path: Path) -> str:
    return re.sub(r"<script.*?</script>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_one_file_becomes_a_page_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tracked(tmp_path / "mine.jsonl")
    assert main(["report", str(path)]) == 0
    assert str(tmp_path / "mine.html") in capsys.readouterr().out
    page = text_of(tmp_path / "mine.html")
    for expected in (
        "Sequential: 1 run, 2 sites.",
        "<dd>0.1, 0.01</dd>",
        "<dd>flatten</dd>",
        "Tracking, share of a step",
        "near_rank at rtol 0.01",
        "participation_ratio",
        "<td>40 × 8</td>",
        "run, probe: first → last",
    ):
        assert expected in page, expected
    assert re.search(r"of 3#0 fell from \d", page)
    assert "batch size" not in page
    assert "run, probe: near_rank at rtol 0.01 is saturated at every step at 1 of 2 sites" in page
    assert "run, batch: near_rank at rtol 0.01 is saturated at every step at 1 of 2 sites" in page


def test_several_runs_are_compared(tmp_path: Path) -> None:
    one, two = tracked(tmp_path / "a.jsonl"), tracked(tmp_path / "b.parquet", scale=3.0)
    out = tmp_path / "both.html"
    assert main(["report", str(one), str(two), "--out", str(out)]) == 0
    page = text_of(out)
    assert "2 runs" in page
    assert "b: run, batch: first → last" in page
    assert main(["report", str(tmp_path)]) == 0
    assert "2 runs" in text_of(tmp_path / "report.html")


def test_names_are_text_and_not_markup(tmp_path: Path) -> None:
    path = tracked(tmp_path / "x.jsonl", run="</script><b>bold")
    assert main(["report", str(path)]) == 0
    whole = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "<b>bold" not in whole


@pytest.mark.parametrize(("name", "text"), [("bad.jsonl", "[]\n"), ("empty.jsonl", ""), ("no.txt", "x")])
def test_other_files_are_one_sentence(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert main(["report", str(path)]) != 0
    assert main(["report", str(tmp_path / "nothing")]) != 0
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2
    assert name in said[0]
    assert "found nothing" in said[1]
