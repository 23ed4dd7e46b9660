"""The README's tables are what the committed results say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import kernel_tables
import lab_tables
import marked
import overhead_table
import pytest
import readme_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("cpu-*.json"))


def contender(name: str, ours: bool, median: float, **changes: Any) -> dict[str, Any]:
    check = {"equal": 1, "near_tau": 0, "wrong": 0, "proven": None, "verdict": "equal"}
    row = {"name": name, "ours": ours, "rounds": 3, "median_ms": median, "check": check}
    return {**row, "vs_matrix_rank": 100.0 / median, "vs_best_peer": 12.0 / median, **changes}


@pytest.fixture
def result() -> dict[str, Any]:
    wrong = {"equal": 0, "near_tau": 0, "wrong": 1, "proven": None, "verdict": "WRONG"}
    return {
        "schema": 2,
        "complete": True,
        "date": "2025-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
        "modified": False,
        "machine": {"cpu": "A processor", "instruction_set": "avx512"},
        "versions": {"torch": "2.15.0", "torch_blas": "MKL", "numpy": "2.4.0"},
        "threads": {"torch": 2, "numpy": 2},
        "cases": [
            {
                "name": "30x20",
                "about": "small",
                "rtol": 0.01,
                "matrices": 1,
                "cache": "cold",
                "best_peer": "slow peer",
                "other_work": 0.0,
                "contenders": [
                    contender("near_rank", True, 4.0),
                    contender("torch.linalg.matrix_rank", False, 100.0),
                    contender("slow peer", False, 12.0),
                    contender("quick peer", False, 1.0, check=wrong, finest_rtol=0.005),
                ],
            }
        ],
    }


@pytest.fixture
def pages(tmp_path: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A README and a page with stale text between the markers, beside a result for AVX-512."""
    found = tmp_path / "README.md", tmp_path / "cpu.md"
    for path in found:
        path.write_text("# Title\n<!-- cost-table:begin -->\nstale\n<!-- cost-table:end -->\nafter\n")
    for name, value in zip(("README", "PAGE", "RESULTS"), (*found, tmp_path), strict=True):
        monkeypatch.setattr(readme_table, name, value)
    save(tmp_path, result)
    return found


def save(folder: Path, result: dict[str, Any], isa: str = "avx512") -> None:
    machine = {**result["machine"], "instruction_set": isa}
    (folder / f"cpu-{isa}.json").write_text(json.dumps({**result, "machine": machine}))


def test_the_pages_match_the_committed_results() -> None:
    assert readme_table.main(["--check"]) == 0


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_committed_result_covers_every_case_without_a_wrong_count_of_ours(path: Path) -> None:
    from bsgap_kernels.bench import CASES

    committed = json.loads(path.read_text(encoding="utf-8"))
    rtols = committed["settings"]["rtol"]
    assert [(case["name"], case["rtol"]) for case in committed["cases"]] == [
        (case.name, rtol) for case in CASES for rtol in rtols
    ]
    ours = [c for case in committed["cases"] for c in case["contenders"] if c["ours"]]
    assert not [c for c in ours if "error" in c or c["check"]["wrong"]]


def test_write_then_check(pages: tuple[Path, Path]) -> None:
    readme, page = pages
    assert readme_table.main(["--check"]) == 1
    assert "stale" in readme.read_text()
    assert readme_table.main([]) == 0
    text = readme.read_text()
    assert "stale" not in text
    assert text.startswith("# Title\n")
    assert text.endswith("\nafter\n")
    assert "**A processor with AVX-512**, 2 thread(s), at rtol 0.01:" in text
    assert "| 30×20, small | 4.00 | - | - | 100 | 12.0 (slow peer) | 25×, 3.0× |" in text
    assert "No other instruction set was measured yet." in page.read_text()
    assert readme_table.main(["--check"]) == 0


def test_the_page_shows_the_other_instruction_sets(
    pages: tuple[Path, Path], tmp_path: Path, result: dict[str, Any]
) -> None:
    peers = {"torch": "AVX2", "openblas": "Haswell", "environment": {"BSGAP_ISA": "avx2", "A": "b"}}
    save(tmp_path, {**result, "peers": peers}, "avx2")
    assert readme_table.main([]) == 0
    readme, page = (path.read_text() for path in pages)
    assert "AVX2" not in readme
    assert "**A processor with AVX2**" in page
    assert "NumPy 2.4.0 (torch AVX2, OpenBLAS Haswell; `A=b`), commit" in page
    assert "AVX-512" not in page
    (tmp_path / "cpu-avx512.json").unlink()
    assert readme_table.main([]) == 0
    assert "**A processor with AVX2**" in pages[0].read_text()


def test_a_second_threshold_gets_a_compact_table(
    pages: tuple[Path, Path], tmp_path: Path, result: dict[str, Any]
) -> None:
    (first,) = result["cases"]
    result["cases"].append({**first, "rtol": 0.001})
    save(tmp_path, result)
    assert readme_table.main([]) == 0
    text = pages[0].read_text()
    assert "| 30×20, small | 4.00 | - | - | 100 | 12.0 (slow peer) | 25×, 3.0× |" in text
    assert "At rtol 0.001:\n\n| matrix | `near_rank` | `near_rank_interval` | best peer |" in text
    assert "| 30×20 | 4.00 | - | 12.0 (slow peer) | 3.0× | 1.00 † (quick peer) |" in text
    assert "of torch.linalg.matrix_rank, slow peer, quick peer, whose counts are right" in text
    assert "‡ Not right by construction" in text


def test_a_changed_figure_or_a_hand_edit_is_noticed(
    pages: tuple[Path, Path], tmp_path: Path, result: dict[str, Any]
) -> None:
    readme, _ = pages
    assert readme_table.main([]) == 0
    written = readme.read_text()
    assert "‡" not in written
    readme.write_text(written.replace("25×", "26×"))
    assert readme_table.main(["--check"]) == 1
    readme.write_text(written)
    result["cases"][0]["contenders"][0]["median_ms"] = 5.0
    save(tmp_path, result)
    assert readme_table.main(["--check"]) == 1


def test_wrong_counts_and_a_busy_machine_show(
    pages: tuple[Path, Path], tmp_path: Path, result: dict[str, Any]
) -> None:
    result["cases"][0]["other_work"] = 0.5
    result["cases"][0]["contenders"][0]["check"] = {"wrong": 1}
    save(tmp_path, result)
    assert readme_table.main([]) == 0
    text = pages[0].read_text()
    assert "4.00 †" in text
    assert "quick peer counted 1 of 1 wrong on 30x20 at rtol 0.01" in text
    assert "busy machine" in text


@pytest.mark.parametrize("change", [{"complete": False}, {"schema": 0}])
def test_results_that_cannot_be_used(
    pages: tuple[Path, Path], tmp_path: Path, result: dict[str, Any], change: dict[str, Any]
) -> None:
    save(tmp_path, {**result, **change})
    assert readme_table.main([]) == 2


def test_a_result_of_another_instruction_set_is_refused(
    pages: tuple[Path, Path], tmp_path: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cpu-avx2.json").write_text(json.dumps(result))
    assert readme_table.main([]) == 2
    assert "cpu-avx2.json holds figures of avx512" in capsys.readouterr().err


def test_missing_markers_or_files(
    pages: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages[1].write_text("no markers")
    assert readme_table.main([]) == 2
    assert "cost-table:begin" in capsys.readouterr().err
    (tmp_path / "cpu-avx512.json").unlink()
    assert readme_table.main([]) == 2
    assert "no cpu-*.json" in capsys.readouterr().err


def test_the_overhead_tables_are_those_of_the_committed_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = overhead_table.PAGE.read_text(encoding="utf-8")
    results = overhead_table.load()
    assert overhead_table.written(results) == text
    monkeypatch.setattr(overhead_table, "RESULTS", tmp_path)
    for isa, factor in (("avx2", 2.0), ("avx512", 1.0)):
        result = copy.deepcopy(results[0])
        result["machine"]["instruction_set"] = isa
        result["models"][0]["ways"][0]["median_ms"] = factor * 1234
        (tmp_path / f"overhead-{isa}.json").write_text(json.dumps(result), encoding="utf-8")
    both = overhead_table.written(overhead_table.load())
    places = [both.index(part) for part in ("with AVX-512:", "| 1234 |", "with AVX2:", "| 2468 |")]
    assert places == sorted(places)
    (tmp_path / "overhead-avx512.json").write_text(
        json.dumps(result | {"machine": {"instruction_set": "avx2"}})
    )
    with pytest.raises(ValueError, match=r"overhead-avx512.json holds figures of avx2"):
        overhead_table.load()


@pytest.mark.parametrize("text", ["", "<!-- a:end --><!-- a:begin -->", 2 * "<!-- a:begin --><!-- a:end -->"])
def test_markers_have_to_be_there_once_in_order(text: str) -> None:
    assert (
        marked.replaced("<!-- a:begin --><!-- a:end -->.", "a", "b") == "<!-- a:begin -->\nb\n<!-- a:end -->."
    )
    with pytest.raises(ValueError, match="<!-- a:begin -->"):
        marked.replaced(text, "a", "b")


def test_pages_are_compared_or_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("old")
    assert marked.write({page: "new"}, ["--check"]) == 1
    assert page.read_text() == "old"
    assert marked.write({page: "new"}, []) == 0
    assert page.read_text() == "new"
    assert marked.write({page: "new"}, ["--check"]) == 0


def test_the_kernel_tables_are_those_of_the_committed_results() -> None:
    text = kernel_tables.PAGE.read_text(encoding="utf-8")
    assert kernel_tables.with_tables(text) == text
    with pytest.raises(ValueError, match="proven:begin"):
        kernel_tables.with_tables(text.replace("<!-- proven:begin -->", ""))


def test_the_lab_tables_are_those_of_the_committed_results() -> None:
    text = lab_tables.PAGE.read_text(encoding="utf-8")
    assert lab_tables.written(text) == text
    with pytest.raises(ValueError, match="kill-table:begin"):
        lab_tables.written(text.replace("<!-- kill-table:begin -->", ""))


def test_every_killed_run_of_the_committed_test_is_the_undisturbed_one() -> None:
    result = json.loads((lab_tables.RESULTS / "kill_test.json").read_text(encoding="utf-8"))
    assert not result["modified"]
    assert sum(len(run["kills"]) for run in result["killed"]) >= 50
    for run in (*result["killed"], *result["stopped"]):
        assert run["identical"]
        assert run["weights_sha256"] == run["weights_file_sha256"] == result["undisturbed"]["weights_sha256"]
