"""The tables of the quality benchmark: failures named, intervals written, the page true to its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality_report


def _record(identity: float, **more: Any) -> dict[str, Any]:
    scores = dict.fromkeys(quality_report.QUALITY, 0.5) | {"identity": identity}
    timing = {"train_seconds": 20.0, "draw_seconds": 9.0, "score_seconds": 1.0, "final_loss": 0.1}
    return {"failed": None, "scores": scores, **timing, "expert_similarity": None, "routing_entropy": None, **more}


def test_summary_leaves_failures_out_and_names_them() -> None:
    failed = _record(0.0, failed="loss nan and gradient norm nan at step 7", scores={}, final_loss=None)
    results = {
        "lora": {("a", 0): _record(0.4), ("a", 1): _record(0.6), ("b", 0): _record(0.5)},
        "token-zero": {("a", 0): _record(0.5), ("a", 1): failed, ("b", 0): _record(0.7)},
    }
    summary = quality_report.summarise(results)
    ours = summary["token-zero"]
    assert quality_report._label("token-zero", ours) == "ours (token, zero) (2 of 3 cells)"
    assert quality_report._label("lora", summary["lora"]) == "PEFT LoRA"
    assert ours["cells"] == 3 and ours["failed"] == {"a, seed 1": "loss nan and gradient norm nan at step 7"}
    assert ours["metrics"]["identity"]["mean"] == pytest.approx(0.6) and ours["metrics"]["identity"]["n"] == 2
    assert ours["metrics"]["eval_seconds"]["mean"] == 10.0 and ours["metrics"]["expert_similarity"] is None
    assert ours["differences"]["identity"]["cells"]["mean"] == pytest.approx(0.15)
    assert summary["lora"]["metrics"]["identity"]["mean"] == pytest.approx(0.5)  # of the subjects: 0.5 and 0.5
    assert summary["lora"]["differences"] == {}


def test_intervals_are_written_with_their_half() -> None:
    assert quality_report.format_interval({"mean": 0.5, "half": 0.0214, "n": 3}) == "0.500 ± 0.021"
    assert quality_report.format_interval({"mean": 0.04, "half": None, "n": 1}, signed=True) == "+0.040"
    assert quality_report.format_interval({"mean": 23.46, "half": 1.04, "n": 9}) == "23.5 ± 1.0"
    assert quality_report.format_interval(None) == "-"


def test_the_page_shows_the_figures_of_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = Path(__file__).parents[1] / "docs"
    monkeypatch.setattr("sys.argv", ["quality_report", str(docs / "quality.json")])
    quality_report.main()
    tables = capsys.readouterr().out
    assert "## Budget: LoRA r=4" in tables and tables in (docs / "quality.md").read_text(), (
        "paste: python -m benchmarks.quality_report docs/quality.json"
    )
    monkeypatch.setattr("sys.argv", ["quality_report", str(tmp_path / "gone.json")])
    with pytest.raises(SystemExit):
        quality_report.main()
    assert "gone.json cannot be read" in capsys.readouterr().err
