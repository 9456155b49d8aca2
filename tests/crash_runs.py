"""Runs that are killed on the way: a process of its own for test_crash.py, which forks per attempt.

`python crash_runs.py kill FOLDER` and `full FOLDER LIMIT…` print what they found as JSON.
"""

import collections
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

import torch
from rich.console import Console

from qvgpt import RandomWalks
from qvgpt.cli import main
from qvgpt.data.sizes import GPTShape, TokenizerConfig
from qvgpt.fit_options import FitOptions
from qvgpt.train_config import TrainConfig
from qvgpt.trainer import train

KILLS = 50
FILES = ("model.safetensors", "value_heads.safetensors", "README.md")


def config(folder, output, steps=6):
    data = folder / "walks.jsonl"
    if not data.exists():
        rows = RandomWalks.draw(0).logged_walks(24, 0)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig(
        data=[str(data)],
        eval_data=[str(data)],
        output=str(output),
        gpt=GPTShape(embed_dim=16, num_heads=2, num_layers=1, seq_len=24, dropout=0.2),
        tokenizer=TokenizerConfig(kind="char"),
        objectives=["LM", {"ILQL": {"gamma": 1.0}}],
        fit=FitOptions(
            max_steps=steps, epochs=1e6, batch_size=4, save_every=1, eval_every=3,
            keep_best="total",
        ),
        resume=True,
    )  # fmt: skip


def fork_run(settings):
    """A training in a child of its own; its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        train(settings, Console(quiet=True))
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def staged(output):
    """What is being saved, or was when a run was killed."""
    return {(path, path.stat().st_mtime_ns) for path in output.glob("*/.staged-step-*")}


def place(output, staged_before):
    """Where in a run a kill struck, as far as its directory tells."""
    if not (output / "run.json").exists():
        return "before run.json"
    if (output / "summary.json").exists():
        return "after summary.json"
    if staged(output) - staged_before:
        return "in a save"
    return "at the end" if (output / FILES[0]).exists() else "in or before a step"


def kill(folder):
    """Kill runs at random moments until there were 50 kills; every finished one must be alike."""
    os.fsync = lambda _: None  # a kill loses no cached page, so that syncing shows nothing here
    train(config(folder, folder / "first"), Console(quiet=True))  # all is imported once, then
    start = time.perf_counter()
    assert os.waitpid(fork_run(config(folder, folder / "straight")), 0)[1] == 0
    duration = time.perf_counter() - start
    expected = [(folder / "straight" / name).read_bytes() for name in FILES]
    output, rng = folder / "killed", random.Random(0)
    places, kills, alike = collections.Counter(), 0, 0
    while kills < KILLS or output.exists():
        before = staged(output)
        pid = fork_run(config(folder, output))
        if kills < KILLS:
            time.sleep(rng.uniform(0, duration))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            kills += 1
            places[place(output, before)] += 1
            continue
        assert status == 0, "a run that was killed does not go on"
        assert [(output / name).read_bytes() for name in FILES] == expected
        assert not (output / "checkpoints").exists()
        alike += 1
        shutil.rmtree(output)
    print(json.dumps({"kills": kills, "alike": alike, "places": places, "duration": duration}))


def full(folder, *limits):
    """Go on with a run where no file may grow beyond a limit, in bytes, as if the disk were full.

    For each limit the exit code and what the command line says.
    """
    words = ["train", "--config", str(folder / "train.yaml")]
    found = []
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
        with redirect_stderr(io.StringIO()) as said:
            code = main(words)
        found.append((code, said.getvalue()))
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    {"kill": kill, "full": full}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
