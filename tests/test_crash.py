"""Real processes that are killed, stopped, doubled and starved of disk."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import crash_runs
import pytest

from qvgpt.checkpoint import fault
from qvgpt.cli import main
from qvgpt.run import RunProgress

HELPER = Path(crash_runs.__file__)
LONG = 10**6  # steps: such a run never ends by itself


def write_yaml(folder, steps):
    config = crash_runs.config(folder, folder / "run", steps)
    (folder / "train.yaml").write_text(json.dumps(asdict(config)))
    return config


def steps_logged(log):
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)["step"] for line in lines]


def test_fifty_kills_change_not_a_bit(tmp_path):
    done = subprocess.run(
        [sys.executable, HELPER, "kill", tmp_path], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == 50
    assert found["alike"] >= 1
    assert found["places"]["in a save"] >= 3
    assert found["places"]["in or before a step"] >= 3


@pytest.fixture
def endless(tmp_path):
    """A run in a process of its own, with a few steps behind it."""
    write_yaml(tmp_path, LONG)
    words = ["train", "--config", str(tmp_path / "train.yaml")]
    code = "import sys; from qvgpt.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while len(steps_logged(tmp_path / "run/log.jsonl")) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process
    process.kill()
    process.communicate()


def test_sigterm_saves_and_a_second_process_is_refused(endless, tmp_path, capsys):
    words = ["train", "--config", str(tmp_path / "train.yaml")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"run: another process is at work there (pid {endless.pid} on " in said
    assert said.count("\n") == 1
    assert endless.poll() is None

    asked = time.monotonic()
    endless.send_signal(signal.SIGTERM)
    _, said = endless.communicate(timeout=30)
    assert time.monotonic() - asked < 5
    assert endless.returncode == 143
    newest = max((tmp_path / "run/checkpoints").glob("step-*"))
    step = int(newest.name.removeprefix("step-"))
    place = newest.parent
    assert said.endswith(f"qvgpt: interrupted; step {step} is in {place}: go on with --resume\n")
    assert max(steps_logged(tmp_path / "run/log.jsonl")) == step

    more = [f"--fit.max_steps={step + 2}", "--accept_changes"]
    assert main([*words, *more]) == 0
    said = capsys.readouterr().err
    assert f"goes on with other settings: fit.max_steps {LONG} → {step + 2}" in said
    assert json.loads((tmp_path / "run/run.json").read_text())["config"]["fit"]["max_steps"] < LONG
    logged = [e for e in steps_logged(tmp_path / "run/log.jsonl") if e > step]
    assert set(logged) == {step + 1, step + 2}


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def kill(self, at, *args):
        step(self, at, *args)
        if at == 3:
            raise Killed

    config = write_yaml(tmp_path, 6)
    step = RunProgress.step
    with monkeypatch.context() as patch:
        patch.setattr(RunProgress, "step", kill)
        with pytest.raises(Killed):
            crash_runs.train(config)
    newest = tmp_path / "run/checkpoints/step-00000002"
    sizes = {file.name: file.stat().st_size for file in newest.iterdir()}
    assert sizes["model.safetensors"] < sizes["optimizer.safetensors"]
    limits = [100, *(sizes[name] - 1 for name in ("model.safetensors", "optimizer.safetensors"))]
    done = subprocess.run(
        [sys.executable, HELPER, "full", tmp_path, *map(str, limits)],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = ["run/log.jsonl", "run/best/step-00000003", "run/checkpoints/step-00000003"]
    for (code, said), name in zip(json.loads(done.stdout), names, strict=True):
        assert code == 2, said
        line = said.splitlines()[-1]  # before it stands the evaluation
        assert line.startswith(f"qvgpt: error: {tmp_path / name}: cannot be written (")
        assert "File too large" in line
        assert "go on with --resume" in line
        assert "Traceback" not in said
    places = sorted(newest.parent.iterdir())
    assert [path.name for path in places] == ["step-00000001", "step-00000002"]
    assert [fault(path) for path in places] == [None, None]
    crash_runs.train(config)
    straight = replace(config, output=str(tmp_path / "straight"))
    crash_runs.train(straight)
    for name in crash_runs.FILES:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
