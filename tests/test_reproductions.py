"""Every reproduction has a quick form, so that the scripts behind the tables cannot rot."""

import json
import runpy
import sys
from pathlib import Path

import pytest

REPRODUCTIONS = Path(__file__).parent.parent / "reproductions"


@pytest.mark.parametrize("name", ["random_walk"])
def test_quick_form_runs_and_leaves_the_results_alone(name, monkeypatch, capsys):
    script = REPRODUCTIONS / name / "run.py"
    before = {p: p.read_bytes() for p in script.parent.iterdir() if p.is_file()}
    monkeypatch.setattr(sys, "argv", [str(script), "--quick"])
    runpy.run_path(str(script), run_name="__main__")
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{\n") :])["seeds"] == [0]
    assert before == {p: p.read_bytes() for p in script.parent.iterdir() if p.is_file()}
