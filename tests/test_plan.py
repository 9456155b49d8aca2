import io
import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from qvgpt import GPT, HeadsConfig, QvgptError, Tokenizer, Trajectory, ValueModel
from qvgpt import plan as planning
from qvgpt.fit_options import FitOptions
from qvgpt.loop import Training
from qvgpt.memory import available_memory, held_memory
from qvgpt.objectives import parse_objectives
from qvgpt.plan import MIB, plan

TOKENIZER = Tokenizer.train(["abc"], "char")
BOTH = parse_objectives(["LM", {"ILQL": {"gamma": 1.0}}])
OPTIONS = FitOptions(batch_size=4, epochs=3.0)
CPU = torch.device("cpu")
RUN = """
import sys
from pathlib import Path
from qvgpt.cli import main
code = main()
[line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
print("peak", int(line.split()[1]) / 1024)
sys.exit(code)
"""


def texts(count=30):
    rng = random.Random(0)
    lengths = [rng.randint(3, 32) for _ in range(count)]
    return [
        Trajectory([1] * n, [False] + [True] * (n - 1), [0.0] * (n - 1) + [0.5], True)
        for n in lengths
    ]


def model():
    torch.manual_seed(0)
    return ValueModel(GPT(TOKENIZER.vocab_size, 16, 2, 1, 32), HeadsConfig(), TOKENIZER)


def planned(options=OPTIONS, objectives=BOTH, **more):
    said = io.StringIO()
    found = plan(model(), texts(), objectives, options, console=Console(file=said), **more)
    return found, said.getvalue()


def peak_of(*words):
    done = subprocess.run(
        [sys.executable, "-c", RUN, "train", *words], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    figures = dict(line.split()[:2] for line in done.stdout.splitlines() if len(line.split()) == 2)
    return float(figures["peak"]), figures


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_predicted_peak_is_that_of_the_training(tmp_path):
    rng = random.Random(0)
    rows = [
        {"prompt": "say", "completion": "ab" * rng.randint(3, 20), "reward": rng.random()}
        for _ in range(24)
    ]
    path, out = tmp_path / "data.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        f"--data {path} --eval_data {path} --output {out} --tokenizer.kind char --gpt.embed_dim 512"
        " --gpt.num_layers 5 --objectives LM ILQL --fit.batch_size 8 --fit.max_steps 3"
        " --fit.keep_best total --fit.save_every 3 --fit.eval_every 3 --gpt.seq_len 64"
    ).split()
    _, said = peak_of(*words, "--dry-run")
    assert not out.exists()
    actual, _ = peak_of(*words)
    predicted, program = (float(said[x]) for x in ("predicted_peak_mib", "memory_mib.program"))
    assert actual - program > 300  # tensors matter here
    assert predicted == pytest.approx(actual, rel=0.25)
    assert predicted - program == pytest.approx(actual - program, rel=0.25)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"micro_batch_size": 2},
        {"packed": True},
        {"share_prompts": True},
        {"max_steps": 2},
        {"epochs": 0.4},
    ],
)
def test_the_heaviest_batch_of_all_steps_is_found(change):
    training = Training(model(), texts(), BOTH, replace(OPTIONS, **change))
    step = planning._heaviest_step(training)
    found = training.my_batches(training.data, step.indices, training.options.micro_batch_size)
    sizes = []
    for micro_batches in training.optimizer_steps():
        sizes.append([b.tokens.numel() for b in micro_batches])
        training.state.step += 1
    assert len(sizes) == training.total_steps
    if not training.options.packed:  # how texts fall into rows is only estimated
        assert max(b.tokens.numel() for b in found) == max(map(max, sizes))
        assert step.padded_mean == pytest.approx(sum(map(sum, sizes)) / len(sizes))
    assert step.padded_mean == pytest.approx(sum(map(sum, sizes)) / len(sizes), rel=0.2)


def test_of_very_many_texts_the_longest_are_tried(monkeypatch):
    monkeypatch.setattr(planning, "_TEXTS_SEARCHED", 1)
    training = Training(model(), texts(), BOTH, OPTIONS)
    lengths = sorted(training.rows.lengths[i] for i in planning._heaviest_step(training).indices)
    assert lengths == sorted(training.rows.lengths)[-4:]


def test_what_is_certain_is_counted():
    found, said = planned(eval_data=texts(5))
    m = model()
    trained = [p for p in m.parameters() if p.requires_grad]
    weights = sum(p.nbytes for p in m.parameters())
    assert found["memory_mib"]["weights"] == pytest.approx(weights / MIB, abs=0.06)
    assert found["memory_mib"]["gradients"] * MIB <= sum(p.nbytes for p in trained) + 0.06 * MIB
    assert found["parameters"]["trunk"]["trainable"] == sum(p.numel() for p in m.trunk.parameters())
    slow = found["parameters"]["slow_targets"]
    assert (slow["trainable"], slow["frozen"]) == (0, found["parameters"]["q"]["trainable"])
    assert found["steps"] == 24
    assert found["fits"]
    assert found["measured"]
    assert found["advice"] == []
    assert found["predicted_hours"] > 24 * found["seconds_per_step"] / 3600 > 0
    assert said.startswith("fits: ")


@pytest.mark.parametrize("room", [0.5, 0.99])
def test_what_does_not_fit_comes_with_advice(monkeypatch, room):
    now = held_memory(CPU)
    monkeypatch.setattr(planning, "available_memory", lambda _: int(now * room))
    monkeypatch.setattr(planning, "_try", lambda *_: pytest.fail("it is tried nevertheless"))
    found, said = planned()
    assert not found["fits"]
    assert not found["measured"]
    assert found["predicted_hours"] is None
    assert said.startswith("does not fit: ")


def test_a_device_that_runs_out_of_memory_is_no_traceback(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(planning, "_try", full)
        found, _ = planned()
        assert not found["fits"]
    monkeypatch.setattr(planning, "_try_one_text", full)
    with pytest.raises(QvgptError, match=r"not even one text fits into the .* MiB of cpu"):
        planned()


def test_advice_is_sorted_by_what_it_saves():
    training = Training(model(), texts(), BOTH, OPTIONS)
    heaviest = training.my_batches(training.data, range(4), None)[0]
    static = {"weights": 100 * MIB, "gradients": 100 * MIB, "optimizer": 200 * MIB}
    advice = planning._advice(training, heaviest, static, 1000 * MIB, 500 * MIB)
    saved = [a["saves_mib"] for a in advice]
    assert saved == sorted(saved, reverse=True)
    changes = {a["change"]: a["saves_mib"] for a in advice}
    assert changes["fit.micro_batch_size: 1"] == 750
    assert changes["fit.gradient_checkpointing: true"] == 600
    assert "freeze_trunk: true" in changes
    frozen = replace(OPTIONS, bf16=True, batch_size=1)
    training = Training(model(), texts(), parse_objectives(["LM"]), frozen)
    heaviest = training.my_batches(training.data, [0], None)[0]
    advice = planning._advice(training, heaviest, static, 1000 * MIB, 500 * MIB)
    assert [a["change"].split(":")[0] for a in advice] == [
        "fit.gradient_checkpointing",
        "max_length",
    ]


def test_available_memory_is_no_more_than_a_limit(monkeypatch):
    assert 2**20 < available_memory(CPU) < 2**60
    monkeypatch.setattr("qvgpt.memory._cgroup_limit", lambda: 12345)
    assert available_memory(CPU) == 12345


def test_a_dry_run_refuses_what_training_would():
    bad = [Trajectory([1, 2], [False, True], [0.0, float("nan")], True)]
    with pytest.raises(QvgptError, match="became NaN"):
        plan(model(), bad, BOTH, OPTIONS, console=Console(quiet=True))


def test_a_slow_trunk_is_counted_and_named_as_what_to_leave_off():
    options = replace(OPTIONS, slow_trunk=True)
    training = Training(model(), texts(), BOTH, options)
    trunk = sum(p.nbytes for p in training.bare.trunk.parameters())
    static = planning._static(training)
    assert static["slow_trunk"] == trunk
    batch = training.collate(texts()[:4])
    advice = planning._advice(training, batch, {**static, "slow_trunk": 9 * MIB}, 0, 1)
    assert "fit.slow_trunk: false" in [a["change"] for a in advice]
    assert "slow_trunk" in planned(options)[0]["memory_mib"]
    assert "slow_trunk" not in planned()[0]["memory_mib"]
