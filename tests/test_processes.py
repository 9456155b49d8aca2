"""Two processes are one: what they learn, what they save, and what becomes of one alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import two_processes
from safetensors.torch import load_file

from qvgpt.models.value_model import ValueModel

pytestmark = pytest.mark.xdist_group("processes")  # one worker makes `folders` for all
HELPER = two_processes.__file__
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
OF_ONE_BATCH = {
    "value.overestimation",
    "value.overestimation_any",
    "value.overestimation_return",
    "value.advantage_to_logits",
}
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What one process, and two, have left."""
    found = {}
    for count, launcher in ((1, [sys.executable]), (2, TORCHRUN)):
        found[count] = tmp_path_factory.mktemp(f"processes_{count}")
        command = [*launcher, HELPER, str(found[count])]
        done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=110)
        assert done.returncode == 0, done.stderr
        assert '"done"' in done.stdout
    return found


@pytest.mark.parametrize("way", ["plain", "fsdp2"])
@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        ("float64", 1e-12),
        ("packed", 1e-12),
        ("shared", 1e-12),
        ("fp32", 1e-6),
        ("reference", 1e-12),
        ("bilinear", 1e-12),
        ("categorical", 1e-12),
        ("lora", 1e-3),
        ("lora-reference", 1e-3),
    ],
)
def test_p19_losses_gradients_and_weights_are_those_of_one_process(folders, way, case, tolerance):
    one = load_file(folders[1] / f"plain-{case}.safetensors")
    two = load_file(folders[2] / f"{way}-{case}.safetensors")
    assert one.keys() == two.keys()
    kinds = {name.split(".")[0] for name in one}
    assert kinds == {"weight", "gradient", "loss", "value"}
    for name, value in one.items():
        is_short = case in ("fp32", "lora", "lora-reference")
        if is_short and name.startswith(("weight", "value")):
            continue  # Adam makes a step of the sign of a gradient that is 0 but for rounding
        if name in OF_ONE_BATCH:
            continue  # each process asks a batch of its own
        torch.testing.assert_close(two[name], value, atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("way", ["plain", "fsdp2"])
def test_a_run_stopped_in_one_process_goes_on_in_any_number(folders, way):
    """Saved sharded, read whole; the signal reached one process, and all stopped at its step."""
    tokens = torch.arange(1, 13)[None]
    logits = [
        ValueModel.from_pretrained(folder / name).eval().trunk(tokens)
        for folder, name in ((folders[1], "plain"), (folders[2], way))
    ]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)
    assert not (folders[2] / way / "checkpoints").exists()
    assert (folders[2] / way / "value_heads.safetensors").exists()


def test_where_one_is_killed_the_other_ends_and_says_so(tmp_path):
    command = [*TORCHRUN, HELPER, str(tmp_path), "endless"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENV)
    try:
        log = tmp_path / "endless/log.jsonl"
        deadline = time.monotonic() + 60
        while not (log.exists() and log.stat().st_size > 1000):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        started = time.monotonic()
        os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - started < 60
        assert process.returncode != 0
        assert "has lost another one" in said or "SIGTERM" in said
        survivor = Path(f"/proc/{(tmp_path / 'pid0').read_text()}")
        assert not survivor.exists()
    finally:
        process.kill()
