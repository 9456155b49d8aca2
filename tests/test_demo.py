"""The demonstration, cut short: every file it promises is there, and a second one replaces it."""

import hashlib
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from qvgpt.demo import DemoConfig, demo
from qvgpt.errors import QvgptError
from qvgpt.models.value_model import ValueModel


def test_demo_leaves_model_summary_and_report(tmp_path):
    config = DemoConfig(output=str(tmp_path / "demo"), steps=3, samples=1, walks=20)
    for _ in range(2):
        found = demo(config, Console(file=io.StringIO()))
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary == found
    assert summary["optimal_return"] == pytest.approx(1.0)
    assert -1 <= summary["q_spearman"] <= 1
    expected = (summary["guided_return"] - summary["data_return"]) / (1 - summary["data_return"])
    assert summary["normalised_guided"] == pytest.approx(expected)
    assert "<svg" in (tmp_path / "demo" / "report.html").read_text()
    assert ValueModel.from_pretrained(tmp_path / "demo").info.recommended_guidance["beta"] > 0
    card = (tmp_path / "demo" / "README.md").read_text()
    assert "by `qvgpt demo`" in card
    for name, rows in (("walks.jsonl", 20), ("held_out.jsonl", 5)):
        data = (tmp_path / "demo" / name).read_bytes()
        assert data.count(b"\n") == rows
        digest = hashlib.sha256(data).hexdigest()
        assert f"| {name} | {len(data):,} | `{digest}` |" in card
    base, guided, _ = summary["rows"]
    assert (base["mean"], base["delta"]) == (pytest.approx(summary["base_return"]), 0)
    assert guided["mean"] == pytest.approx(summary["guided_return"])
    for row in summary["rows"]:
        low, high = row["ci95"]
        assert low <= row["mean"] <= high
        assert f"| {row['method']} | {row['mean']:.4g} [{low:.4g}, {high:.4g}] |" in card
    for bad in ({"steps": 0}, {"walks": 0}, {"samples": 0}):
        with pytest.raises(QvgptError, match="must be at least 1"):
            demo(replace(config, **bad), Console(file=io.StringIO()))
    assert (tmp_path / "demo" / "report.html").exists()


def test_demo_replaces_nothing_but_a_demo(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(QvgptError, match="something other than a demo"):
        demo(DemoConfig(output=str(tmp_path)), Console(file=io.StringIO()))
    assert (tmp_path / "thesis.tex").exists()
