import json
import signal
import threading
from dataclasses import asdict, dataclass, field, replace

import pytest
from rich.console import Console

from qvgpt.cli import _sigterm_as_exception
from qvgpt.errors import QvgptError, Terminated
from qvgpt.run import (
    Interruption,
    RunProgress,
    alone_in,
    flatten,
    open_run,
    print_summary,
    read_log,
    write_json,
)

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
    with pytest.raises(QvgptError, match="command"):
        open_run(out, "collect", CONFIG, resume=True, accept_changes=True)
    open_run(out, "train", changed, resume=True, accept_changes=True)
    assert json.loads((out / "run.json").read_text())["config"] == changed


@dataclass
class Fit:
    lr: float = 0.1
    new: int = 3


@dataclass
class Config:
    data: str
    fit: Fit
    heads: Fit | None = None
    fresh: list[str] = field(default_factory=list)
    resume: bool = False


def test_a_setting_that_was_not_there_yet_was_at_its_default(tmp_path):
    config = Config("x", Fit())
    assert open_run(tmp_path, "train", config) == tmp_path
    path = tmp_path / "run.json"
    found = json.loads(path.read_text())
    assert found["config"] == asdict(config)
    del found["config"]["fit"]["new"], found["config"]["fresh"]
    path.write_text(json.dumps(found))
    open_run(tmp_path, "train", config, resume=True)
    for change, message in (
        ({"fit": Fit(new=4)}, "fit.new 3 → 4"),
        ({"fresh": ["y"]}, r"fresh \[\] → \['y'\]"),
        ({"heads": Fit()}, "heads.lr None → 0.1"),  # that part was not wanted, and is now
    ):
        with pytest.raises(QvgptError, match=message):
            open_run(tmp_path, "train", replace(config, **change), resume=True)


def test_what_a_kill_left_before_the_first_step_is_no_run_of_others(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.json.staged").write_text("{")
    assert open_run(tmp_path, "train", CONFIG) == tmp_path


def test_files_are_utf8_whatever_the_locale_is(tmp_path, monkeypatch):
    monkeypatch.setattr("io.text_encoding", lambda encoding, *_: encoding or "latin-1")
    config = {"data": "数据.jsonl", "resume": True}
    for _ in range(2):
        open_run(tmp_path, "train", config, resume=True)
    write_json(tmp_path / "summary.json", config)
    assert json.loads((tmp_path / "summary.json").read_bytes()) == config


def test_one_process_a_directory(tmp_path):
    with alone_in(tmp_path):
        with pytest.raises(QvgptError, match=r"another process is at work there \(pid \d+ on"):
            alone_in(tmp_path).__enter__()
        assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]
    with alone_in(tmp_path):
        pass


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


@pytest.fixture
def heard():
    """Ctrl-C reaches Python also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("heard")
def test_the_first_signal_waits_and_the_second_does_not(first, second):
    kinds = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    with _sigterm_as_exception(), Interruption() as interruption:
        signal.raise_signal(first)
        assert interruption.asked is kinds[first]
        with pytest.raises(kinds[second]):
            signal.raise_signal(second)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
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
        "o": [{"LM": {"on": "all", "top_share": None}}, {"ILQL": {"tau": 0.9}}],
    }
    shown = Console(width=60, force_terminal=False)
    with shown.capture() as captured:
        print_summary(json.loads(json.dumps(summary)), shown)
    text = captured.get()
    assert "x.y     0.1235" in text
    assert "[/I] base" in text  # texts of users, not marks for the console
    assert "none" not in text
    assert "o.LM    on all\n" in text
    assert "o.ILQL  tau 0.9\n" in text
