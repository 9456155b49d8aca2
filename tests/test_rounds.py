"""Rounds: what one round has never seen the next one finds; and they survive being stopped."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from word_reward import WORD

from qvgpt import collect as collecting
from qvgpt import rounds as of_rounds
from qvgpt.collect import collect
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.envs.rewards import get_reward
from qvgpt.errors import QvgptError
from qvgpt.fit_options import FitOptions
from qvgpt.loop import Training
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.reward_model.scratch import Size, new_model, new_tokenizer
from qvgpt.rounds import RoundsConfig, rounds
from qvgpt.run import alone_in

QUIET = Console(quiet=True)
FILES = ("samples/data.jsonl", "model/model.safetensors", "model/value_heads.safetensors")
COLLECT, TRAIN = of_rounds.COLLECT, of_rounds.TRAIN


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def task(tmp_path) -> RoundsConfig:
    """A model that knows nothing, and a word of six letters: one of 531,441 texts has all of it."""
    tokenizer = Tokenizer.train(["abcd"], "char")
    torch.manual_seed(0)
    gpt = GPT(tokenizer.vocab_size, embed_dim=64, num_heads=2, num_layers=1, seq_len=16)
    ValueModel(gpt, None, tokenizer).save(tmp_path / "base")
    rows = [{"prompt": prompt} for prompt in "abcd"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RoundsConfig(
        model=str(tmp_path / "base"),
        data=str(tmp_path / "prompts.jsonl"),
        reward="word_reward:begun",
        output=str(tmp_path / "out"),
        beta=40.0,
        eval_samples=20,
        collect=replace(COLLECT, samples=60, max_tokens=len(WORD)),
        train=replace(
            TRAIN,
            objectives=["MonteCarlo"],
            heads=HeadsConfig("mlp", num_q=1),
            freeze_trunk=True,
            fit=FitOptions(epochs=1000.0, max_steps=200, batch_size=48, lr=1e-2),
        ),
    )


@pytest.fixture
def quick(task) -> RoundsConfig:
    """The same, learning next to nothing."""
    fit = replace(task.train.fit, max_steps=4, batch_size=8, save_every=1)
    return replace(
        task,
        eval_samples=1,
        collect=replace(task.collect, samples=3, max_batch=1),  # two prompts a chunk
        train=replace(task.train, fit=fit),
    )


def rewards(config, number):
    """All rewards of the texts that a round has collected."""
    lines = Path(config.output, f"round-{number}/samples/data.jsonl").read_text().splitlines()
    return [reward for line in lines for reward in json.loads(line)["rewards"]]


def test_a_second_round_finds_what_the_first_had_never_seen(task):
    summary = rounds(task, QUIET)
    first, second = summary["rounds"]
    assert max(rewards(task, 1)) < max(rewards(task, 2))
    assert first["collected"] < 0.1 < second["collected"]
    assert first["base"] == second["base"] < 0.1
    assert 0.2 < first["guided"] < second["guided"] - 0.1
    assert second["delta"] == pytest.approx(second["guided"] - second["base"])
    assert (first["texts"], second["texts"]) == (240, 480)
    assert json.loads(Path(task.output, "summary.json").read_text()) == summary
    base, last = (ValueModel.from_pretrained(p) for p in (task.model, summary["model"]))
    for name, tensor in base.trunk.state_dict().items():  # frozen: it is the base still
        assert torch.equal(tensor, last.trunk.state_dict()[name])


def kill(monkeypatch, config, place, name, calls):
    """Let the rounds die at the given call of a function."""
    real, left = getattr(place, name), calls

    def dies(*args, **more):
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        return real(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, dies)
        with pytest.raises(Killed):
            rounds(config, QUIET)


def test_rounds_that_were_stopped_end_as_if_they_had_not_been(quick, monkeypatch):
    straight = rounds(replace(quick, output=quick.output + "-straight"), QUIET)
    kill(monkeypatch, quick, collecting, "write_best", 2)
    again = replace(quick, resume=True)
    with pytest.raises(QvgptError, match="holds another run already"):
        rounds(quick, QUIET)
    for place, name, calls in (
        (Training, "learn", 3),
        (of_rounds, "evaluate", 1),
        (collecting, "write_best", 2),  # of the second round
        (Training, "learn", 4),
        (of_rounds, "evaluate", 1),
    ):
        kill(monkeypatch, again, place, name, calls)
    calls = []
    for name in ("collect", "train"):  # all is there but the last evaluation
        monkeypatch.setattr(of_rounds, name, lambda *_, name=name: calls.append(name))
    summary = rounds(again, QUIET)
    assert calls == []
    assert len(summary["rounds"]) == 2
    for number in (1, 2):
        for name in (
            "samples/data.jsonl",
            "model/model.safetensors",
            "model/value_heads.safetensors",
        ):
            there = f"round-{number}/{name}"
            whole = Path(quick.output + "-straight", there).read_bytes()
            assert Path(quick.output, there).read_bytes() == whole
    for row, other in zip(summary["rounds"], straight["rounds"], strict=True):
        assert {k: v for k, v in row.items() if k != "model"} == {
            k: v for k, v in other.items() if k != "model"
        }


def test_a_finished_run_takes_more_rounds_and_no_other_settings(quick, monkeypatch):
    rounds(replace(quick, rounds=1), QUIET)
    first = Path(quick.output, "round-1/model/model.safetensors").stat().st_mtime_ns
    summary = rounds(replace(quick, rounds=2, resume=True), QUIET)
    assert [row["round"] for row in summary["rounds"]] == [1, 2]
    assert Path(quick.output, "round-1/model/model.safetensors").stat().st_mtime_ns == first
    with pytest.raises(QvgptError, match=r"other settings \(beta 40.0 → 5.0\)"):
        rounds(replace(quick, beta=5.0, resume=True), QUIET)
    with alone_in(Path(quick.output)), pytest.raises(QvgptError, match="another process"):
        rounds(replace(quick, resume=True), QUIET)
    with pytest.raises(QvgptError, match="has finished more than 1: give at least as many"):
        rounds(replace(quick, rounds=1, resume=True), QUIET)
    assert json.loads(Path(quick.output, "summary.json").read_text()) == summary


def test_rounds_of_earlier_versions_go_on(quick, judges):
    """What followed from the data later stood there as a number, and nobody named a judge."""
    first, second, _ = judges
    left_open = replace(quick.train, fit=replace(quick.train.fit, lr=None))
    config = replace(quick, reward=first, judge=second, rounds=1, train=left_open)
    usual = replace(left_open, fit=replace(left_open.fit, lr=1e-3))
    rounds(replace(config, train=usual), QUIET)
    place = Path(quick.output)
    for record in (place / "run.json", place / "round-1/evaluation/run.json"):
        found = json.loads(record.read_text())
        if found["command"] == "rounds":
            del found["config"]["judge"]
            found["config"]["train"]["gpt"] |= {
                "embed_dim": 256, "num_heads": 4, "num_layers": 4, "seq_len": 256,
            }  # fmt: skip
            found["config"]["train"]["tokenizer"]["vocab_size"] = 8000
        else:
            del found["config"]["card"]
        record.write_text(json.dumps(found))
    (place / "round-1/evaluation/summary.json").unlink()
    card = (place / "round-1/model/README.md").read_bytes()
    with pytest.raises(QvgptError, match=r"other settings \(beta 40.0 → 5.0, judge"):
        rounds(replace(config, beta=5.0, resume=True), QUIET)
    said = Console(file=io.StringIO(), width=500)
    summary = rounds(replace(config, rounds=2, resume=True), said)
    assert f"goes on with other settings: judge None → '{second}'" in said.file.getvalue()
    assert [row["judge"] for row in summary["rounds"]] == [second, second]
    assert (place / "round-1/model/README.md").read_bytes() == card  # as it was begun
    fit = json.loads((place / "round-2/model/run.json").read_text())["config"]["fit"]
    assert fit["lr"] == 1e-3
    third = replace(config, rounds=2, judge="length", resume=True)
    with pytest.raises(QvgptError, match=r"other settings \(judge"):
        rounds(third, QUIET)


def test_until_the_first_training_begins_its_options_may_change(quick):
    train = replace(quick.train, centred=True, max_length=3)
    short = replace(quick, rounds=1, judge="length", train=train)
    with pytest.raises(QvgptError, match="raise max_length"):  # known when texts are there
        rounds(short, QUIET)
    collected = Path(quick.output, "round-1/samples/data.jsonl")
    written = collected.stat().st_mtime_ns
    longer = replace(short, train=replace(short.train, max_length=None), resume=True)
    record = Path(quick.output, "run.json").read_bytes()
    with alone_in(Path(quick.output)), pytest.raises(QvgptError, match="another process"):
        rounds(longer, QUIET)
    assert Path(quick.output, "run.json").read_bytes() == record
    with pytest.raises(QvgptError, match=r"beta 40\.0 → 5\.0, train\.max_length 3 → None"):
        rounds(replace(longer, beta=5.0), QUIET)
    said = Console(file=io.StringIO())
    model = rounds(longer, said)["model"]
    assert "goes on with other settings: train.max_length 3 → None\n" in said.file.getvalue()
    assert collected.stat().st_mtime_ns == written
    with pytest.raises(QvgptError, match=r"other settings \(train.max_length None → 3\)"):
        rounds(replace(short, resume=True), QUIET)
    on = replace(quick, model=model, train=replace(quick.train, heads=None), output=model + "-on")
    with pytest.raises(QvgptError, match="learned with true: say the same"):
        rounds(on, QUIET)
    assert not Path(on.output).exists()


def test_logs_of_which_no_text_fits_are_left_to_the_training(quick, tmp_path):
    (tmp_path / "logs.jsonl").write_text(json.dumps({"text": "abcd" * 9, "reward": 1}) + "\n")
    train = replace(quick.train, on_too_long="drop")
    found = rounds(
        replace(quick, rounds=1, logs=[str(tmp_path / "logs.jsonl")], train=train), QUIET
    )
    assert Path(found["model"]).exists()


def test_what_was_collected_is_collected_from_and_gone_on_with(quick):
    data = Path(quick.data).with_name("again.jsonl")
    settings = {"model": quick.model, "reward": "length", "resume": True}
    first = replace(quick.collect, data=quick.data, output=f"{quick.output}-1", **settings)
    collect(first)
    lines = Path(first.output, "data.jsonl").read_text().splitlines()
    data.write_text("".join(json.dumps({**json.loads(x), "bytes": 1}) + "\n" for x in lines))
    second = replace(first, data=str(data), output=f"{quick.output}-2", samples=2)
    collect(second)
    whole = Path(second.output, "data.jsonl").read_bytes()
    assert {json.loads(line)["bytes"] for line in whole.splitlines()} == {1}
    collect(second)
    assert Path(second.output, "data.jsonl").read_bytes() == whole


def test_a_training_starts_from_the_base_or_from_the_last_round(quick):
    found = {}
    logs = quick.data.replace("prompts", "logs")
    Path(logs).write_text('{"prompt": "a", "completion": "bd", "reward": 0.5}\n')
    for start in ("base", "last"):
        config = replace(quick, start=start, logs=[logs], output=quick.output + start)
        assert rounds(config, QUIET)["rounds"][1]["texts"] == 25
        of = json.loads(Path(config.output, "round-2/model/run.json").read_text())["config"]
        found[start] = of["model"]
        assert of["data"][0] == logs
        assert len(of["data"]) == 3
    assert found == {"base": quick.model, "last": f"{quick.output}last/round-1/model"}
    seeds = [json.loads(Path(config.output, f"round-{n}/samples/run.json").read_text())["config"]
             for n in (1, 2)]  # fmt: skip
    assert [s["seed"] for s in seeds] == [1, 2]
    assert [s["beta"] for s in seeds] == [0.0, 40.0]


def test_values_of_whole_turns_choose_what_is_collected(quick):
    turns = [{"ILQL": {"level": "turn", "cql_weight": 0.0}}]
    config = replace(
        quick,
        beta=0.0,
        collect=replace(quick.collect, best_of=4),
        train=replace(quick.train, objectives=turns),
    )
    summary = rounds(config, QUIET)
    said = json.loads(Path(config.output, "round-2/evaluation/summary.json").read_text())
    assert [row["best_of"] for row in said["rows"]] == [1, 4]
    assert said["values"] is None
    assert summary["rounds"][1]["kl_per_sequence"] == pytest.approx(math.log(4) - 3 / 4)
    assert ValueModel.from_pretrained(summary["model"]).info.level == "turn"


@pytest.fixture
def judges(tmp_path):
    """Two classifiers, and the first one's SHA-256."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        tokenizer = new_tokenizer(["abcd"], "bert", 30)
        labels = {"num_labels": 2, "id2label": {0: "no", 1: "yes"}}
        size = Size(width=32, layers=1, vocab_size=30)
        place = tmp_path / f"judge-{seed}"
        new_model("bert", size, tokenizer, 64, labels).save_pretrained(place)
        tokenizer.save_pretrained(place)
        made.append(f"classifier:{place}#yes")
    [sha256] = get_reward(made[0]).models
    return *made, sha256


def test_who_trains_does_not_judge(quick, judges, tmp_path):
    first, second, sha256 = judges
    logs = tmp_path / "logs.jsonl"
    row = {"prompt": "a", "completion": "bd", "reward": 0.5, "judged_by": [sha256]}
    logs.write_text(json.dumps(row) + "\n")
    for change in (
        {"reward": first},
        {"reward": f"0.5*length:3 + 0.5*{first}"},
        {"reward": second, "judge": f"1*{first} + 1*{second}"},
        {"reward": "length", "judge": first, "logs": [str(logs)]},
    ):
        with pytest.raises(QvgptError, match=r"judge: .* Name another one"):
            rounds(replace(quick, **change), QUIET)
        assert not Path(quick.output).exists()
    config = replace(quick, reward=first, judge=second, rounds=1)
    summary = rounds(config, QUIET)
    found = json.loads(Path(config.output, "round-1/evaluation/summary.json").read_text())
    assert (summary["reward"], summary["judge"], found["metric"]) == (first, second, second)
    assert found["judges_trained_on"] == []
    card = Path(summary["model"], "README.md").read_text()
    assert f"which are no judges of it: `{sha256}`" in card
    row = found["rows"][1]
    assert f"| {row['method']} | {row['mean']:.4g} [" in card
    assert "classifier:judge-1#yes" in card
    # what compares needs something to compare with, whoever trains
    with pytest.raises(QvgptError, match="to compare with"):
        rounds(replace(config, judge="bleu", output=quick.output + "-2"), QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "must be at least 1"),
        ({"beta": 0.0}, "nothing guides"),
        ({"beta": math.inf}, "beta must be finite"),
        ({"collect": {"seed": -1}}, "seed must be at least 0"),
        ({"collect": {"best_of": 2}}, "give one of them"),
        ({"beta": 0.0, "collect": {"best_of": 2, "temperatures": [0.0]}}, "writes one text"),
        ({"collect": {"base_url": "http://x/v1"}}, "collect.base_url: a server's model"),
        ({"collect": {"model": "there"}}, "collect.model: is for the rounds to say"),
        ({"train": {"output": "there"}}, "train.output: is for the rounds to say"),
        ({"train": {"objectives": ["LM"]}}, "teach no Q"),
        ({"train": {"objectives": ["ILQ"]}}, "did you mean 'ILQL'"),
        ({"train": {"objectives": [{"ILQL": {"level": "turn", "cql_weight": 0.0}}]}},
         "guide no token"),
        ({"reward": "bleu"}, "to compare with"),
        ({"reward": "zebra"}, "no reward 'zebra'"),
        ({"model": "nowhere"}, "no such directory"),
        ({"train": {"fit": FitOptions(keep_best="total")}}, "keep_best: needs evaluation data"),
        ({"train": {"fit": FitOptions(slow_trunk=True)}}, "slow_trunk: a frozen trunk does not"),
        ({"train": {"fit": FitOptions(gradient_checkpointing=True)}}, "keeps no activations"),
        ({"train": {"eval_data": ["nowhere.jsonl"]}}, "no such file"),
        ({"train": {"max_length": 500}}, "not between 2 and the context of 16"),
        ({"train": {"dtype": "bfloat16", "freeze_trunk": False}}, "too few digits"),
        ({"train": {"reward_scale": -1.0}}, "reward_scale: must be above 0"),
        ({"train": {"heads": HeadsConfig("categorical", 99)}}, "needs a rank below"),
        ({"train": {"objectives": ["ReturnDistribution"]}}, "need heads of kind categorical"),
        ({"logs": ["nowhere.jsonl"]}, "no such file"),
        ({"eval_data": "nowhere.jsonl"}, "no such file"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_anything_is_written(quick, change, message):
    for section in ("collect", "train"):
        if section in change:
            change = {**change, section: replace(getattr(quick, section), **change[section])}
    with pytest.raises(QvgptError, match=message):
        rounds(replace(quick, **change), QUIET)
    assert not Path(quick.output).exists()
