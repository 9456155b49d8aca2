"""Every reproduction has a quick form, so that the scripts behind the tables cannot rot."""

import json
import runpy
import sys
from pathlib import Path

import pytest

REPRODUCTIONS = Path(__file__).parent.parent / "reproductions"


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("random_walk", {"optimality_mean", "optimality_min", "seeds", "seconds_per_seed"}),
        ("translation", {"bleu_greedy_base", "delta_ci95", "relative_decode_time", "rows"}),
    ],
)
def test_quick_form_runs_and_leaves_the_results_alone(name, figures, monkeypatch, capsys):
    script = REPRODUCTIONS / name / "run.py"
    before = {p: p.read_bytes() for p in script.parent.iterdir() if p.is_file()}
    monkeypatch.setattr(sys, "argv", [str(script), "--quick"])
    monkeypatch.syspath_prepend(str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
    out = capsys.readouterr().out
    assert figures <= set(json.loads(out[out.index("{\n") :]))
    assert before == {p: p.read_bytes() for p in script.parent.iterdir() if p.is_file()}
