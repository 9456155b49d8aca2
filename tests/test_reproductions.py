"""Every reproduction has a quick form, so that the scripts behind the tables cannot rot."""

import json
import math
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.policy import Guidance
from qvgpt.envs.games import score
from qvgpt.errors import QvgptError
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Trajectory, collate

GAMES = {
    "random_walk", "star_graph", "star_graph_2_5", "star_graph_5_5", "maze_full", "maze_partial",
    "wordle",
}  # fmt: skip
TEXTS = {
    "metric", "base", "guided", "delta", "delta_ci95", "relative_decode_time", "seeds", "rows",
}  # fmt: skip
REPRODUCTIONS = Path(__file__).parent.parent / "reproductions"


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("random_walk", {"optimality_mean", "optimality_min", "seeds", "seconds_per_seed"}),
        ("games", GAMES),
        ("search", {"base", "best of 8", "guided, β = 64", "contrast, α = 1"}),
        ("sentiment", TEXTS | {"against_best_of_n", "negative"}),
        ("export", {"rows"}),
        ("dialogue", {"base", "guided", "why_not_guided", "seeds", "fqe", "rows"}),
        *((row, TEXTS) for row in ("translation", "qa", "summarization")),
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


@pytest.fixture
def games(monkeypatch):
    """The names of the script of the games."""
    script = REPRODUCTIONS / "games" / "run.py"
    monkeypatch.syspath_prepend(str(script.parent))
    names = runpy.run_path(str(script), run_name="games_run")
    return runpy.run_path(str(script.with_name("training.py"))) | names


def test_games_are_trained_once_and_only_under_one_setting(games, tmp_path):
    setting = games["quick_settings"]()["random_walk"]
    setting = replace(setting, evaluations=5, fit=replace(setting.fit, max_steps=2))
    kept = tmp_path / "cells.jsonl"
    found = games["cell"]("random_walk", setting, "ILQL", 1, tmp_path, kept)
    assert json.loads(kept.read_text()) == found
    assert found["score"] == score(found["mean"], found["data_mean"], 1.0)
    kept.write_text(json.dumps({**found, "mean": 7.0}))
    assert games["cell"]("random_walk", setting, "ILQL", 1, tmp_path, kept)["mean"] == 7.0
    other = replace(setting, embed_dim=64)
    with pytest.raises(QvgptError, match="another setting"):
        games["cell"]("random_walk", other, "ILQL", 1, tmp_path, kept)
    digests = {
        games["digest"](games["described"](setting, f"MonteCarlo{form}"))
        for form in ("", "_linear", "_rank4", "_mlp", "_cloned_trunk")
    }
    assert len(digests) == 5


def test_p29_figures_of_the_games_by_hand(games):
    cells = [{"mean": m, "score": m, "invalid_rate": 0.0, "seconds": 1.0} for m in (0.0, 1.0)]
    found = games["summary"](cells)
    half = 12.706 * 0.5  # t of one degree of freedom, times the standard error
    assert found["ci95"] == pytest.approx([0.5 - half, 0.5 + half])
    assert games["interval"]([1.0]) is None
    new = {"walks": {"data_mean": 0.0, "optimum": 1.0, "methods": {"BC": found}}}
    old = {"walks": {"data_mean": 0.1, "methods": {"BC": 1, "ILQL": found}}, "maze": new["walks"]}
    both = games["merged"](old, new)
    assert both == {"walks": {**new["walks"], "methods": {"BC": found, "ILQL": found}}, **both}
    assert "| | ILQL | 0.500 | 0.500 | -5.853 … 6.853 | 2 |" in games["as_markdown"](both)
    rows = [{"prompt": "", "completion": "", "reward": float(i)} for i in range(10)]
    setting = games["quick_settings"]()["maze_full"]
    assert games["objectives_of"](setting, "filtered_BC", rows) == [{"LM": {"min_return": 0.8}}]
    assert [*games["objectives_of"](setting, "ILQL", rows)[0]] == ["ILQL"]  # on a frozen trunk
    assert [*games["objectives_of"](setting, "ILQL_joint", rows)[0]] == ["LM"]
    assert games["objectives_of"](setting, "ILQL_joint", rows)[1]["ILQL"]["expectile"] == 0.9


@torch.no_grad()
def test_a_frozen_trunk_looks_up_what_it_would_compute(games):
    setting = games["quick_settings"]()["maze_full"]
    tokenizer, texts = games["encoded"](setting, 0)
    trunk = games["new_trunk"](games["drawn"](setting.task, 0, setting.episodes), setting, 0)
    batch = collate(texts[:9], tokenizer.template.pad, packed=True)
    computed = trunk.hidden(batch.tokens, positions=batch.positions)
    games["freeze"](trunk, games["states"](trunk, texts))
    found = trunk.hidden(batch.tokens, positions=batch.positions)
    real = batch.attention_mask
    assert not torch.equal(real, torch.ones_like(real))
    torch.testing.assert_close(found[real], computed[real], atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in trunk.parameters())


def test_each_fold_is_answered_by_a_model_that_did_not_learn_it(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(REPRODUCTIONS))
    from texts.steps import Files, Models, Recipe, read, write

    rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(24)]
    files = Files(*(write(tmp_path / f"{n}.jsonl", rows) for n in ("a", "b", "c", "d")))
    recipe = Recipe.read(REPRODUCTIONS / "translation" / "en_zh.yaml", quick=True)
    models = Models(tmp_path / "work", files, replace(recipe, folds=2), 0)
    samples = models.samples()
    asked = [{r["prompt"] for r in read(models.work / f"fold-{i}/prompts.jsonl")} for i in (0, 1)]
    learnt = [{r["prompt"] for r in read(models.work / f"fold-{i}/train.jsonl")} for i in (0, 1)]
    assert learnt == asked[::-1]
    assert min(map(len, asked)) > 0
    assert asked[0] | asked[1] == {row["prompt"] for row in rows}
    written = {row["prompt"] for row in read(samples)}
    assert written & asked[0]
    assert written & asked[1]
    more = replace(recipe, folds=2, collect={**recipe.collect, "samples": 3})
    with pytest.raises(QvgptError, match="other settings"):
        replace(models, recipe=more).samples()
    ours, theirs = (ValueModel.from_pretrained(models.work / n) for n in ("base", "fold-0/base"))
    assert ours.tokenizer.sha256 == theirs.tokenizer.sha256


def test_an_end_bias_makes_texts_shorter_or_longer(monkeypatch):
    monkeypatch.syspath_prepend(str(REPRODUCTIONS))
    from texts import decoding

    torch.manual_seed(0)
    tokenizer = Tokenizer.train("abcdef", "char")
    model = ValueModel(
        GPT(tokenizer.vocab_size, embed_dim=16, num_heads=2, num_layers=1, seq_len=64),
        HeadsConfig("linear"),
        tokenizer,
    )
    values = decoding.end_bias(model)
    longest, plain, shortest = (
        decoding.write(model, ["ab"] * 60, Guidance(beta=nats), max_tokens=12, values=values)[1]
        for nats in (-30.0, 0.0, 30.0)
    )
    assert longest["written_tokens"] == 60 * 12
    assert shortest["written_tokens"] == 60  # the end
    assert 60 < plain["written_tokens"] < 60 * 12


def test_a_dialogue_that_is_reported_is_not_learned_from(monkeypatch, tmp_path):
    script = REPRODUCTIONS / "summarization" / "run.py"
    monkeypatch.syspath_prepend(str(REPRODUCTIONS))
    summaries = runpy.run_path(str(script), run_name="summaries")
    said = [f"Ann: {i} apples?" for i in range(40)]
    same = [text.replace("?", " ? \n") for text in said]
    for name, texts in (("train", [*said, *same, "Bob: Hello ."]), ("dev", ["bob: hello"])):
        rows = [{"prompt": text, "completion": "Fruit."} for text in texts]
        (tmp_path / f"dialogsum.{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = summaries["prepare"](tmp_path, tmp_path / "data")
    learnt, held = (
        [summaries["dialogue"](row) for row in summaries["read"](path)]
        for path in (files.train, files.validation)
    )
    assert len(learnt) + len(held) == 80
    assert len(held) > 0
    assert not set(learnt) & set(held)
    files.train.write_text(files.test.read_text())
    with pytest.raises(QvgptError, match="give another --work"):
        summaries["prepare"](tmp_path, tmp_path / "data")


@pytest.fixture
def sentiment(monkeypatch):
    """The names of the script of sentiment."""
    script = REPRODUCTIONS / "sentiment" / "run.py"
    monkeypatch.syspath_prepend(str(script.parent))
    return {
        **runpy.run_path(str(script), run_name="sentiment_run"),
        **{
            name: runpy.run_path(str(script.with_name(f"{name}.py")))
            for name in ("sst2", "judging", "methods")
        },
    }


def test_ways_to_please_a_judge(sentiment, tmp_path, monkeypatch, capsys):
    """The search reads what the sentiment script left; values that know nothing change nothing."""
    made, setting = sentiment["methods"], sentiment["methods"]["QUICK"]
    toy = sentiment["sst2"]["toy"](tmp_path / "toy")
    files = sentiment["sst2"]["prepare"](toy, tmp_path / "data", test=3)
    made["judge_model"](tmp_path / "judge", files, "B", setting, 0, judge=True)
    base = made["language_model"](tmp_path / "seed-0/base", files, "A", setting, 0)
    for label in ("positive", "negative"):
        shutil.copytree(base, tmp_path / f"seed-0/expert-{label}")
    plain = ValueModel.from_pretrained(base)
    valued = ValueModel(plain.trunk, HeadsConfig("linear"), plain.tokenizer)
    valued.save(tmp_path / "seed-0/positive/MonteCarlo")
    script = str(REPRODUCTIONS / "search/run.py")
    monkeypatch.setattr(sys, "argv", [script, "sentiment", "--work", str(tmp_path), "--quick"])
    runpy.run_path(script, run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    of_base = {key: found["base"][key] for key in ("reward", "kl")}
    for same in ("guided, β = 24", "contrast, α = 2"):  # experts, too, are copies of the base
        assert {key: found[same][key] for key in of_base} == pytest.approx(of_base, rel=1e-4)
    assert {"best of 8", "block search (block 2)", "tree search"} <= found.keys()


def test_halves_share_no_sentence(sentiment, tmp_path):
    """Phrases go where the longest text goes that contains them."""
    sst2 = sentiment["sst2"]
    owners = sst2["containing"](["a b c d", "b c", "c d e", "c", "ab"])
    assert owners == {
        "a b c d": "a b c d",
        "b c": "a b c d",
        "c d e": "c d e",
        "c": "a b c d",
        "ab": "ab",
    }
    sides = [sst2["side_of"](f"sentence {i}") for i in range(2000)]
    assert 0.03 < sides.count("validation") / 2000 < 0.09
    assert abs(sides.count("A") - sides.count("B")) < 200
    files = sst2["prepare"](sst2["toy"](tmp_path / "toy"), tmp_path / "files", test=3)
    held = [{row["text"] for row in sst2["read"](files.labelled(side))} for side in sst2["SIDES"]]
    assert not held[0] & held[1]
    assert sum(map(len, held)) == len(sst2["read"](tmp_path / "toy" / "sst2.train.jsonl"))
    kinds = [row["kind"] for row in sst2["read"](files.prompts("test"))]
    assert kinds == ["sst"] * 3 + ["neutral"] * 3
    learnt, chosen, reported = (
        {row["prompt"] for row in sst2["read"](path)}
        for path in (files.texts("A"), files.prompts("validation"), files.prompts("test"))
    )
    assert not learnt & (chosen | reported)
    assert not chosen & reported
    files.prompts("test").write_text(files.prompts("train").read_text())
    with pytest.raises(QvgptError, match="prompts of test are learned from there"):
        sst2["prepare"](tmp_path / "toy", tmp_path / "files", test=3)
    assert sst2["_as_sst"]('We aren\'t "out".').split() == [
        "we",
        "are",
        "n't",
        '"',
        "out",
        '"',
        ".",
    ]


def test_strengths_are_chosen_and_matched(sentiment):
    figures = sentiment["judging"]["Figures"]

    def one(strength, reward, kl, perplexity, pairs=0.9):
        return figures(
            "m", strength, [0.5], [0.5], [reward], kl, perplexity, [0.0, pairs, 0.0], 9.0, 1.0, 1.0
        )

    base = one(0.0, 0.5, 0.0, 100.0)
    found = {
        "a": [one(1.0, 0.6, 1.0, 110.0), one(4.0, 0.9, 4.0, 126.0)],
        "b": [one(2.0, 0.7, 2.0, 90.0), one(8.0, 0.8, 8.0, 90.0, pairs=0.8)],
    }
    assert sentiment["_chosen"](found, base, "positive") == ("b", 2.0)
    assert sentiment["_chosen"](found, base, "negative") == ("a", 1.0)
    at = sentiment["_strength_at"]
    assert at(found["a"], 2.0) == pytest.approx(2.0)  # half of the way in logs
    assert at(found["a"], 100.0) == 4.0


def test_best_of_n_takes_the_highest_reward(sentiment):
    written = sentiment["judging"]["Written"](
        "base", 0.0, [["a", "b", "c", "d"]], [[False] * 4], np.array([[0.1, 0.9, 0.2, 0.3]]),
        np.array([[0.4, 0.3, 0.1, 0.8]]), 1.0, 5.0, 1.5, 2.0,
    )  # fmt: skip
    best = written.best_of(2, "positive")
    assert best.texts == [["a", "d"]]
    assert best.judge.tolist() == [[0.1, 0.3]]
    assert (best.read_per_token, best.seconds_per_token) == (3.0, 4.0)
    assert best.kl == pytest.approx(1.0 + math.log(2) - 0.5)
    assert written.best_of(4, "negative").texts == [["c"]]
    distinct = sentiment["judging"]["distinct"]
    assert distinct([["a b a b"], ["a b"]], 2) == pytest.approx(2 / 4)


def test_perplexity_of_a_word_longer_than_the_context_is_that_of_its_beginning(sentiment):
    perplexity = sentiment["judging"]["perplexity"]
    tokenizer = Tokenizer.train("abc", "char")
    reader = ValueModel(GPT(tokenizer.vocab_size, 16, 2, 1, seq_len=9), tokenizer=tokenizer)
    whole = perplexity(reader, [{"prompt": "a"}], [["abcabc"]], [[True]])  # 8 → 6 letters of 6
    assert perplexity(reader, [{"prompt": "a"}], [["abcabcab"]], [[False]]) == whole


@pytest.fixture
def qa(monkeypatch):
    """The names of the script of question answering."""
    script = REPRODUCTIONS / "qa" / "run.py"
    monkeypatch.syspath_prepend(str(script.parent))
    return runpy.run_path(str(script), run_name="qa_run")


def test_stories_are_in_one_split_and_their_answers_follow(qa, tmp_path):
    """Answers by a second reader, who goes through the facts from the first to the last."""
    files = qa["generated"]("three", learnt=100, asked=100, judged=20)(tmp_path, tmp_path / "data")
    parts = [
        qa["read"](getattr(files, name)) for name in ("train", "prompts", "validation", "test")
    ]
    assert [len(rows) for rows in parts] == [100, 100, 10, 20]
    facts = [qa["facts"](row) for rows in parts for row in rows]
    assert len(set(facts)) == len(facts)
    for row in parts[0]:
        *told, question = row["prompt"].split("\n")
        thing = question.split()[3]
        place, holder, been = {}, None, []
        for words in (fact.rstrip(".").split() for fact in told):
            if words[1] == "went":
                place[words[0]] = words[-1]
            elif thing in words:
                holder = {"took": words[0], "gave": words[-1], "left": None}[words[1]]
            if holder and been[-1:] != [place[holder]]:
                been.append(place[holder])
        assert row["completion"] == f"with {holder} in the {been[-1]}, before in the {been[-2]}"


def test_questions_about_one_babi_story_stay_together(qa, tmp_path):
    lines = [[f"Mary went to place {i} {j}." for j in range(3)] for i in range(50)]
    rows = [
        {"prompt": "\n".join([*story[: n + 1], "Where is Mary?"]), "completion": "x"}
        for story in lines
        for n in range(3)
    ]
    qa["write"](tmp_path / "babi_qa1.train.jsonl", rows)
    files = qa["babi"](tmp_path, tmp_path / "data")
    names = ("train", "prompts", "validation", "test")
    parts = [qa["read"](getattr(files, name)) for name in names]
    assert sum(map(len, parts)) == 150
    stories = [{row["prompt"].split("\n")[0] for row in part} for part in parts]
    assert sum(map(len, stories)) == 50


def test_figures_of_a_text_task_are_paired_and_of_all_seeds(qa):
    names = sys.modules["texts.program"]
    rows = [{"prompt": str(i), "completion": "yes"} for i in range(4)]

    def system(*texts):
        return {"texts": list(texts), "forward_tokens": 8, "seconds": 1.0, "kl": 0.5}

    cells = [
        {
            "chosen": {"values": "v", "beta": 1.0, "greedy": []},
            "time": {"median": 1.05, "per_token_written": 1.1, "per_text": 1.2},
            "made_in": made_in,
            "systems": {
                "base": system("yes", "no", "no", last),
                "guided": system(*["yes"] * 4),
                "base, beam 5": system("no", "no", "yes", "yes"),
                "guided, beam 5": system("yes", "no", "yes", "yes"),
            },
        }
        for last, made_in in (("no", 10.0), ("yes", 20.0))
    ]
    found = names.summary(cells, rows, names.Judge(("exact_match", "token_f1")))
    assert (found["base"], found["guided"], found["delta"]) == (37.5, 100.0, 62.5)
    assert found["seeds"] == 2
    assert found["seconds_per_seed"] == 15
    assert found["relative_time"] == {"per_token_written": pytest.approx(1.1), "per_text": 1.2}
    low, high = found["delta_ci95"]
    assert 0 <= low < 62.5 < high <= 100
    assert found["guided_against"]["base, beam 5"]["delta"] == 25
    table = sys.modules["texts.reporting"].table
    assert "Target" in table({"toy": found})
    assert "met" in table({"toy": found})
    assert "missed" in table({"toy": {**found, "relative_decode_time": 1.2}})


def test_dialogue_figures_by_hand(monkeypatch):
    """What is foretold at the beginnings of turns, against what came."""
    script = REPRODUCTIONS / "dialogue" / "turns.py"
    judging = runpy.run_path(str(script))
    acts = [False, True, True, False, True, False]
    texts = [
        Trajectory([0, 1, 2, 3, 4, 5], acts, [0.0, 0.0, -1.0, 0.0, last, 0.0], terminated=True)
        for last in (0.0, -1.0)
    ]
    turns = judging["Turns"].of(texts)
    assert turns.game.tolist() == [0, 0, 1, 1]
    assert turns.turn.tolist() == [0, 1, 0, 1]
    assert turns.to_come.tolist() == [-1, 0, -2, -1]
    many = judging["Turns"](*np.tile([turns.game, turns.turn, turns.to_come], 5))
    mean = np.where(many.turn == 0, -1.5, -0.5)
    known = judging["figures"](mean, many, mean)
    assert (known["skill"], known["within"], known["slope"]) == (0, 0, pytest.approx(1))
    assert known["ece"] == pytest.approx(0)
    right = judging["figures"](2 * many.to_come - 1, many, mean)
    assert (right["within"], right["spearman"], right["slope"]) == pytest.approx((1, 1, 0.5))
    assert right["intercept"] == pytest.approx(0.5)
    assert right["rmse"] ** 2 == pytest.approx((4 + 1 + 9 + 4) / 4)  # 2·c − 1 − c = c − 1
    assert right["skill"] == pytest.approx(1 - 4.5 / 0.25)
    low, high = judging["clustered"](lambda at: {"x": many.to_come[at].mean()}, many.game, 200)["x"]
    assert (low, high) == (-1.5, -0.5)  # two clusters: one of them twice, or both
    rivals = judging["Rivals"].of(texts, texts).foretell(texts)
    assert rivals["mean of the turn"].tolist() == [-1.5, -0.5, -1.5, -0.5]
