import json
import signal
import threading

import pytest
from rich.console import Console

from qvgpt.errors import QvgptError
from qvgpt.run import Interruption, RunProgress, flatten, open_run, print_summary, read_log

CONFIG = {"a": 1, "fit": {"lr": 0.1, "seed": 0}, "resume": False}


def test_a_directory_belongs_to_one_run(tmp_path):
    out = open_run(tmp_path / "a" / "b", "train", CONFIG)
    before = (out / "run.json").read_text()
    with pytest.raises(QvgptError, match=r"holds another run already; .* --resume true"):
        open_run(out, "train", CONFIG)
    assert open_run(out, "train", {**CONFIG, "resume": True}, resume=True) == out
    changed = {**CONFIG, "fit": {"lr": 0.2, "seed": 0}}
    with pytest.raises(QvgptError, match=r"other settings \(fit.lr 0.1 → 0.2\)"):
        open_run(out, "train", changed, resume=True)
    with pytest.raises(QvgptError, match=r"\(command 'train' → 'collect'\)"):
        open_run(out, "collect", CONFIG, resume=True)
    assert (out / "run.json").read_text() == before
    with pytest.raises(QvgptError, match=r"choose another output$"):
        open_run(out, "export", {})


def test_what_holds_no_run_is_refused_and_left_alone(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(QvgptError, match="is not empty and holds no run"):
        open_run(tmp_path, "train", CONFIG)
    with pytest.raises(QvgptError, match="a directory was expected"):
        open_run(tmp_path / "file", "train", CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(QvgptError, match="broken JSON"):
        open_run(tmp_path, "train", CONFIG, resume=True)


def test_a_resumed_log_forgets_the_steps_taken_again(tmp_path):
    console = Console(quiet=True)
    with RunProgress(4, 0, tmp_path, console=console) as progress:
        for step in (1, 2, 3):
            progress.step(step, {"total": 1.0}, 5.0)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "to')
    with RunProgress(4, 2, tmp_path, console=console) as progress:
        progress.step(3, {"total": 2.0}, 5.0)
    log = read_log(tmp_path / "log.jsonl")
    assert [(e["step"], e["total"]) for e in log] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_the_first_ctrl_c_waits_and_the_second_does_not():
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: Interruption().__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before


def test_summary_lines():
    assert flatten({"a": {"b": 1, "c": {}}}) == {"a.b": 1, "a.c": {}}
    summary = {
        "x": {"y": 0.123456},
        "none": None,
        "l": [1, 2],
        "rows": [{"n": "[/I] base", "m": 1}],
    }
    shown = Console(width=60, force_terminal=False)
    with shown.capture() as captured:
        print_summary(json.loads(json.dumps(summary)), shown)
    text = captured.get()
    assert "x.y   0.1235" in text
    assert "[/I] base" in text  # texts of users, not marks for the console
    assert "none" not in text
