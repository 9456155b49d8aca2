"""Reward models: they learn, go on where they stopped, and judge as `transformers` would."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qvgpt.bootstrap import mean_ci
from qvgpt.collect import CollectConfig, collect
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.sources import Contrast
from qvgpt.envs.rewards import get_reward
from qvgpt.envs.rewards.classifier import encode
from qvgpt.errors import QvgptError
from qvgpt.evaluate import EvaluateConfig, evaluate, judges_trained_on
from qvgpt.fit_options import FitOptions
from qvgpt.models.gpt import GPT
from qvgpt.models.value_model import ValueModel
from qvgpt.reward_model import RewardModelConfig, train_reward_model
from qvgpt.reward_model import training as training_module
from qvgpt.reward_model.examples import load_examples, split
from qvgpt.reward_model.judged import judged, loss
from qvgpt.reward_model.scratch import Size, new_tokenizer
from qvgpt.reward_model.training import Rates
from qvgpt.train_config import TrainConfig
from qvgpt.trainer import train

judges = import_module("qvgpt.envs.rewards.classifier")
SMALL = Size(width=32, layers=1, vocab_size=400, dropout=0.0)
WORDS = ["tea", "rain", "stone", "road", "blue", "seven", "cup", "wall"]


def rows_with(good: str, bad: str) -> list[dict]:
    """Sentences in which one word decides."""
    found = []
    for i in range(160):
        around = [WORDS[(i * 3 + k) % 8] for k in range(1 + i % 5)]
        label = i % 2
        around.insert(i % (len(around) + 1), good if label else bad)
        found.append({"text": " ".join(around), "label": label})
    return found


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def config(tmp_path: Path, rows: list[dict], **options) -> RewardModelConfig:
    return RewardModelConfig(
        data=[write(tmp_path / "data.jsonl", rows)],
        output=str(tmp_path / "judge"),
        size=SMALL,
        rates=Rates(epochs=12.0, batch_size=16, lr=4e-3),
        **options,
    )


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A judge of good and bad, its directory and its summary."""
    folder = tmp_path_factory.mktemp("judge")
    said = config(folder, rows_with("good", "bad"), labels=["minus", "plus"])
    return said.output, train_reward_model(said)


def test_it_learns_which_word_decides(judge):
    folder, summary = judge
    with pytest.raises(
        QvgptError, match=r"is a classifier \(Bert.*; as a reward it is classifier:"
    ):
        ValueModel.from_pretrained(folder)
    held = summary["held_out"]
    assert held["accuracy"] == 1.0
    assert held["accuracy_of_the_commonest"] < 0.8
    assert held["loss"] < 0.1
    assert summary == json.loads((Path(folder) / "summary.json").read_text())
    assert not (Path(folder) / "checkpoint").exists()
    assert summary["rewards"] == [f"classifier:{folder}#minus", f"classifier:{folder}#plus"]


def test_its_card_says_what_it_learned_and_how_it_is_read(judge):
    folder, summary = judge
    card = (Path(folder) / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["pipeline_tag"] == "text-classification"
    [data] = summary["data"]["files"]
    assert (
        data["sha256"]
        == hashlib.sha256((Path(folder).parent / data["name"]).read_bytes()).hexdigest()
    )
    assert f"| {data['name']} | {data['bytes']:,} | `{data['sha256']}` |" in card
    for counts in (summary["data"], summary["eval_data"]):
        assert f"{counts['examples']:,} " in card
        assert f"minus {counts['of_label']['minus']}, plus {counts['of_label']['plus']}" in card
    assert "| accuracy | 1 [1, 1] |" in card
    assert f"| loss | {summary['held_out']['loss']:.4g} |" in card
    assert "| texts a step, learning rate, seed | 16, 0.004, 0 |" in card
    assert f"`{summary['sha256']}`" in card
    assert "`classifier:DIR#minus`, `classifier:DIR#plus`" in card
    assert "not to be judged by it" in card
    assert str(Path(folder).parent) not in card
    [python] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found: dict[str, Any] = {"path": folder}
    exec(python, found)
    with torch.no_grad():
        logits = found["model"].eval()(**found["tokenizer"]("good tea", return_tensors="pt")).logits
    (plus,) = get_reward(f"classifier:{folder}#plus")(["good tea"], [{}])
    assert float(logits.softmax(-1)[0, 1]) == pytest.approx(plus, abs=1e-5)


def test_the_reward_is_what_transformers_says(judge):
    folder, _ = judge
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["good tea", "a bad road of stone and rain", "", "Good", "tea " * 400]
    with torch.no_grad():
        one_by_one = torch.cat([
            model(**tokenizer(t, return_tensors="pt", truncation=True)).logits for t in texts
        ])  # fmt: skip
    rows = [{}] * len(texts)
    plus = get_reward(f"classifier:{folder}#plus")
    assert plus(texts, rows) == pytest.approx(one_by_one.softmax(-1)[:, 1].tolist(), abs=1e-5)
    logit = get_reward(f"classifier:{folder}#minus:logit")
    assert logit(texts, rows) == pytest.approx(one_by_one[:, 0].tolist(), abs=1e-4)
    assert plus(texts, rows)[0] > 0.9 > 0.1 > plus(texts, rows)[1]
    assert plus([], []) == []
    both = get_reward(f"2*classifier:{folder}#plus - 0.5*length")
    assert both(texts[:1], rows[:1]) == pytest.approx([2 * plus(texts[:1], rows[:1])[0] - 1])
    assert both.models == plus.models == {judge[1]["sha256"]}


def test_equal_texts_are_read_once(judge):
    reward, read = get_reward(f"classifier:{judge[0]}#plus"), []
    model = judges._loaded(str(Path(judge[0]).resolve()), judges._changed(judge[0])).model
    hook = model.register_forward_hook(lambda module, args, out: read.append(len(out.logits)))
    scores = reward(["good", "bad tea", "good"], [{"prompt": "x"}, {}, {"prompt": "x"}])
    hook.remove()
    assert read == [2]
    assert scores[0] == scores[2] != scores[1]


def test_what_is_read_of_prompt_and_completion(judge, tmp_path):
    reward = get_reward(f"classifier:{judge[0]}#plus")
    (alone,) = reward(["good tea"], [{}])
    assert reward(["tea"], [{"prompt": "good"}]) == [alone]
    assert reward([" tea"], [{"prompt": "good"}]) == pytest.approx([alone])
    completion = tmp_path / "of-completions"
    completion.mkdir()
    for file in Path(judge[0]).iterdir():
        (completion / file.name).write_bytes(file.read_bytes())
    said = json.loads((completion / "config.json").read_text())
    (completion / "config.json").write_text(json.dumps(said | {"qvgpt": {"reads": "completion"}}))
    assert get_reward(f"classifier:{completion}#plus")(["good tea"], [{"prompt": "bad"}]) == [alone]


def test_a_stopped_training_ends_as_if_it_was_not(tmp_path, monkeypatch):
    """Ctrl-C after a step in the middle of an epoch."""
    said = config(tmp_path, rows_with("good", "bad"))
    said = replace(said, size=replace(SMALL, dropout=0.2), rates=replace(said.rates, epochs=3.0))
    whole = train_reward_model(replace(said, output=str(tmp_path / "whole")))
    learn, steps = training_module.Training._learn, []

    def stopped(self):
        steps.append(self.state.step)
        if len(steps) == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return learn(self)

    monkeypatch.setattr(training_module.Training, "_learn", stopped)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        train_reward_model(said)
    with pytest.raises(QvgptError, match="--resume"):
        train_reward_model(said)
    found = train_reward_model(replace(said, resume=True))
    assert steps[12:15] == [12, 13, 14]
    assert found["sha256"] == whole["sha256"]
    assert found["held_out"] == whole["held_out"]
    assert train_reward_model(replace(said, resume=True)) == found  # finished: not done again


def test_other_data_than_a_run_began_with_are_refused(tmp_path, monkeypatch):
    said = config(tmp_path, rows_with("good", "bad"))
    learn, steps = training_module.Training._learn, []

    def stopped(self):
        steps.append(0)
        if len(steps) == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return learn(self)

    monkeypatch.setattr(training_module.Training, "_learn", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(said)
    Path(said.data[0]).write_text(Path(said.data[0]).read_text().replace("tea", "cup"))
    with pytest.raises(QvgptError, match="texts to learn from are no longer those"):
        train_reward_model(replace(said, resume=True))


def test_what_a_column_holds_does_not_hang_on_its_being_named(tmp_path):
    def kind(rows, target, name="rows.jsonl"):
        if name.endswith("csv"):
            (tmp_path / name).write_text("text,mark\n" + "".join(f"{t},{m}\n" for t, m in rows))
            return load_examples([str(tmp_path / name)], "text", target).kind
        rows = [{"text": t, target or "score": m} for t, m in rows]
        return load_examples([write(tmp_path / name, rows)], "text", target).kind

    texts, whole = "abcd", [0, 1, 2, 1]
    for column in ("score", "reward"):
        assert kind(zip(texts, whole, strict=True), column) == "scores"
    assert kind(zip(texts, whole, strict=True), None) == "scores"
    assert kind(zip(texts, whole, strict=True), "mark") == "classes"
    assert kind(zip(texts, [4, 4.5, 3, 2], strict=True), "mark") == "scores"
    assert kind(zip(texts, [4.0, 5.0, 3.0, 2.0], strict=True), "mark") == "scores"
    assert kind(zip(texts, ["0.25", "0.5", "1", "0"], strict=True), "mark", "m.csv") == "scores"
    assert kind(zip(texts, whole, strict=True), "mark", "m.csv") == "classes"
    assert kind(zip(texts, ["x", "y", "1", "0.5"], strict=True), "mark") == "classes"


def test_prompts_of_preferences_are_on_one_side(tmp_path):
    rows = [
        {"prompt": f"p{p}", "chosen": f"{p} {a}", "rejected": f"{p} {b}"}
        for p in range(20) for a in range(4) for b in range(a)
    ]  # fmt: skip
    learned, held = split(load_examples([write(tmp_path / "p.jsonl", rows)], "completion"), 0.3)
    texts = [{text for e in side.items for text, _ in e.texts} for side in (learned, held)]
    assert len(held.items) % 6 == 0
    assert held.items
    assert not texts[0] & texts[1]


def test_scores_are_in_their_own_units(tmp_path):
    rows = [
        {"prompt": "p", "completion": r["text"], "score": 1000.0 + 50 * r["label"]}
        for r in rows_with("good", "bad")
    ]
    said = config(tmp_path, rows, reads="pair", family="roberta")
    summary = train_reward_model(said)
    assert summary["kind"] == "scores"
    assert summary["held_out"]["rmse"] < 5 < 20 < summary["held_out"]["rmse_of_the_mean"]
    assert summary["held_out"]["spearman"] > 0.8
    low, high = summary["held_out"]["rmse_ci95"]
    assert low <= summary["held_out"]["rmse"] <= high
    card = (tmp_path / "judge" / "README.md").read_text()
    assert f"| rmse | {summary['held_out']['rmse']:.4g} [{low:.4g}, {high:.4g}] |" in card
    (spec,) = summary["rewards"]
    high, low = get_reward(spec)(["good cup", "bad cup"], [{"prompt": "p"}] * 2)
    assert high == pytest.approx(1050, abs=8)
    assert low == pytest.approx(1000, abs=8)
    with pytest.raises(QvgptError, match="regressor"):
        get_reward(spec + "#plus")


def test_preferences_and_chinese(tmp_path):
    rows = [
        {"prompt": "茶？", "chosen": f"很好{WORDS[i % 8]}", "rejected": f"不好{WORDS[i % 7]}"}
        for i in range(80)
    ]
    summary = train_reward_model(config(tmp_path, rows))
    assert summary["kind"] == "preferences"
    assert summary["held_out"]["accuracy"] == 1.0
    (spec,) = summary["rewards"]
    good, bad = get_reward(spec)(["很好", "不好"], [{"prompt": "茶？"}] * 2)
    assert good > bad + 1


def test_going_on_from_a_given_model(judge, tmp_path):
    """Three classes in the place of two: the head is new, the rest is kept."""
    rows = [r | {"label": ["a", "b", "c"][i % 3]} for i, r in enumerate(rows_with("x", "y"))]
    said = RewardModelConfig(
        data=[write(tmp_path / "d.jsonl", rows)],
        output=str(tmp_path / "out"),
        model=judge[0],
        rates=Rates(epochs=0.2, lr=1e-9),
    )
    summary = train_reward_model(said)
    assert summary["data"]["of_label"].keys() == {"a", "b", "c"}
    old, new = (
        AutoModelForSequenceClassification.from_pretrained(p) for p in (judge[0], tmp_path / "out")
    )
    torch.testing.assert_close(new.bert.state_dict(), old.bert.state_dict(), atol=1e-6, rtol=0)
    assert new.classifier.out_features == 3


def test_losses_and_figures_by_hand():
    logits, targets = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]]), torch.tensor([1.0, 0.0])
    assert loss("classes", logits, targets).tolist() == pytest.approx(
        [-math.log(0.75), math.log(2)]
    )
    found = judged("classes", logits, targets, ["a", "b"])
    assert (found["accuracy"], found["accuracy_of_the_commonest"]) == (1.0, 0.5)
    assert found["brier"] == pytest.approx((2 * 0.25**2 + 2 * 0.5**2) / 2)
    # of 0.75 and of 0.5 all were right: (0.25 + 0.5) / 2
    assert found["calibration_error"] == pytest.approx(0.375)
    values = torch.tensor([[2.0], [0.0], [1.0], [3.0]])  # chosen 2 and 0, rejected 1 and 3
    expected = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))]
    assert loss("preferences", values, torch.ones(2)).tolist() == pytest.approx(expected)
    assert judged("preferences", values, torch.ones(2), [])["accuracy"] == 0.5
    scores = judged("scores", values, torch.tensor([2.0, 0.0, 1.0, 1.0]), [])
    assert scores["rmse"] == pytest.approx(1.0)
    squares = mean_ci([0.0, 0.0, 0.0, 4.0]).ci95
    assert scores["rmse_ci95"] == pytest.approx([math.sqrt(x) for x in squares])
    assert squares[1] > 1


def test_faults_are_named(judge, tmp_path):
    def load(rows, **options):
        return load_examples([write(tmp_path / "x.jsonl", rows)], "text", **options)

    for rows, match in [
        ([{"text": "a"}], "x.jsonl:1: nothing to learn"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 0}], "every label is '0'"),
        ([{"text": "a", "label": 0}, {"text": "b", "score": 1}], "x.jsonl:2: column 'label'"),
        ([{"text": "a", "label": 0.5}], "column 'label': a class was expected"),
        ([{"text": "a", "score": "x"}], "column 'score': a number was expected"),
        ([{"label": 1}], "column 'completion': a text was expected"),
        ([{"prompt": "a", "completions": ["b"], "rewards": [1, 2]}], "one for each"),
    ]:
        with pytest.raises(QvgptError, match=match):
            load(rows)
    for name, value in (("width", 0), ("layers", 0), ("layers", -1), ("vocab_size", 2)):
        with pytest.raises(QvgptError, match=f"size.{name}: .* not {value}"):
            Size(**{name: value})
    with pytest.raises(QvgptError, match="below 1, not 3"):
        Size(dropout=3.0)
    rows = [{"prompt": "p", "completions": ["a", "b"], "rewards": [0.0, 1.0]}]
    assert [e.target for e in load(rows).items] == [0.0, 1.0]
    assert load([{"text": "a", "label": True}, {"text": "b", "label": False}]).labels == ["0", "1"]
    assert load([{"text": "a", "label": 10}, {"text": "b", "label": 9}]).labels == ["9", "10"]
    with pytest.raises(QvgptError, match="label '7' is not among"):
        load([{"text": "a", "label": 7}], known=["0", "1"])
    for spec, match in [
        (f"classifier:{judge[0]}", "say #LABEL, one of: minus plus"),
        (f"classifier:{judge[0]}#plux", "did you mean 'plus'"),
        (f"classifier:{judge[0]}#plus:odds", "`:logit` may stand"),
        (f"classifier:{tmp_path}/none#plus", "no such directory"),
        (f"classifier:{tmp_path}#plus", "config.json: no such file"),
        ("classifier:", "say classifier:DIR"),
    ]:
        with pytest.raises(QvgptError, match=match):
            get_reward(spec)


def test_code_and_untrained_heads_are_refused(judge, tmp_path):
    said = json.loads((Path(judge[0]) / "config.json").read_text())
    for file in Path(judge[0]).glob("*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(said | {"auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(QvgptError, match="auto_map"):
        get_reward(f"classifier:{tmp_path}#plus")
    (tmp_path / "config.json").write_text(json.dumps(said | {"model_type": "roberta"}))
    with pytest.raises(QvgptError, match="is no trained classifier"):
        get_reward(f"classifier:{tmp_path}#plus")


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_new_tokenizer_is_the_same_each_time(family):
    texts = ["很好吃 the Tea", "tea and tears, unread [SEP]", "味道不好"] * 5
    one, two = (new_tokenizer(texts, family, 300) for _ in range(2))
    assert one.get_vocab() == two.get_vocab()
    ids = encode(one, [("tea", None), ("the tea", "味道")], 50)[0]["input_ids"]
    assert one.decode(ids, skip_special_tokens=True).strip() == "tea"
    pair = encode(one, [("the tea", "味道")], 50)[0]["input_ids"]
    ends = one.convert_tokens_to_ids("[SEP]" if family == "bert" else "</s>")
    assert pair.count(ends) == (2 if family == "bert" else 3)
    said = encode(one, [("tea [SEP] </s>", None)], 50)[0]["input_ids"]
    assert said.count(ends) == 1
    if family == "bert":
        assert one.tokenize("味道好") == ["味", "道", "好"]
        assert one.unk_token_id not in encode(one, [("unread tears", None)], 50)[0]["input_ids"]


def test_who_trained_does_not_judge(judge, tmp_path, capsys):
    """The judge's weights are told from rows to model to evaluation, wherever they lie."""
    tokenizer = Tokenizer.train(WORDS, "char", 40)
    gpt = GPT(tokenizer.vocab_size, embed_dim=16, num_heads=2, num_layers=1, seq_len=16)
    ValueModel(gpt, None, tokenizer).save(tmp_path / "lm")
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "tea"}, {"prompt": "cup", "judged_by": "x"}])
    spec = f"classifier:{judge[0]}#plus"
    collected = CollectConfig(
        str(tmp_path / "lm"), prompts, spec, str(tmp_path / "c"), samples=2, max_tokens=4
    )
    collect(collected)
    data = tmp_path / "c" / "data.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert [row["judged_by"] for row in rows] == [[judge[1]["sha256"]]] * 2
    texts = [text for row in rows for text in row["completions"]]
    both = get_reward(spec)(texts, [row for row in rows for _ in range(2)])
    assert [x for row in rows for x in row["rewards"]] == pytest.approx(both, abs=1e-6)
    for name, objectives in {"values": ["MonteCarlo"], "plain": ["LM"]}.items():
        train(
            TrainConfig(
                [str(data)], str(tmp_path / name), model=str(tmp_path / "lm"),
                objectives=objectives, fit=FitOptions(max_steps=1),
            )
        )  # fmt: skip
        model = ValueModel.from_pretrained(tmp_path / name)
        assert model.info.judged_by == [judge[1]["sha256"]]
    copy = tmp_path / "copy"
    shutil.copytree(judge[0], copy)
    capsys.readouterr()
    how = EvaluateConfig(
        str(tmp_path / "values"), prompts, f"classifier:{copy}#minus", str(tmp_path / "e"),
        metrics=["length"], betas=[1.0], max_tokens=4,
    )  # fmt: skip
    other = f"classifier:{copy}#minus"
    for change in (
        {},
        {"reward": f"1*length - 0.5*{other}"},
        {"reward": "length", "metrics": [other]},
        {"metrics": [other], "recommend": True},  # no metric chooses
        {"model": str(tmp_path / "lm"), "base": str(tmp_path / "plain"), "betas": []},
    ):
        if change.get("recommend"):
            change["reward"] = "length"
        with pytest.raises(QvgptError, match=r"no evidence.* --accept_training_judge true"):
            evaluate(replace(how, **change))
    assert not Path(how.output).exists()
    assert capsys.readouterr().err == ""
    for name in ("accept_training_judge", "recommend"):
        said = replace(how, output=str(tmp_path / name), **{name: True}, card=True)
        assert evaluate(said)["judges_trained_on"] == [other]
        assert "is no evidence; judge by another one" in capsys.readouterr().err
        assert "its figures are no evidence" in (tmp_path / name / "report.html").read_text()
        card = (tmp_path / "values" / "README.md").read_text()
        assert "classifier:copy#minus gave the rewards that the model learned from" in card
        assert f"SHA-256 `{judge[1]['sha256']}`" in card
        assert str(tmp_path) not in card
    honest = evaluate(replace(how, reward="length", metrics=[], output=str(tmp_path / "honest")))
    assert honest["judges_trained_on"] == honest["judged_by"] == []
    rewards = {"a": get_reward(spec), "b": get_reward("length")}
    lm, plain = (ValueModel.from_pretrained(tmp_path / name) for name in ("lm", "plain"))
    assert judges_trained_on(rewards, lm, None) == []
    assert judges_trained_on(rewards, lm, Contrast(plain, lm)) == ["a"]
