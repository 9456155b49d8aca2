"""Evaluation: bootstrap against known truths, paired comparison, diagnostics, and the command."""

import copy
import hashlib
import json
import math
import os
import random
import re
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch

import qvgpt.compare
from qvgpt.bootstrap import (
    Estimate,
    calibration,
    corpus_bleu_ci,
    corpus_chrf_ci,
    mean_ci,
    ranks,
    spearman,
)
from qvgpt.compare import CompareOptions, Method, compare
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.blocks import BlockSearch
from qvgpt.decode.policy import Guidance
from qvgpt.decode.tree import TreeSearch
from qvgpt.diagnostics import value_diagnostics
from qvgpt.errors import QvgptError
from qvgpt.evaluate import CORPUS_METRICS, EvaluateConfig, _recommend, evaluate, methods_of
from qvgpt.evaluate_report import _texts
from qvgpt.model_card import write_card
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Trajectory
from qvgpt.written import WrittenTexts

WORDS = ["a", "man", "stands", "on", "the", "street", "and", "one", "woman", "laughs", ".", "dog"]


@pytest.fixture(scope="module")
def model() -> ValueModel:
    tokenizer = Tokenizer.train(["abcdefgh "], "char")
    torch.manual_seed(0)
    gpt = GPT(tokenizer.vocab_size, embed_dim=16, num_heads=2, num_layers=1, seq_len=32)
    model = ValueModel(gpt, HeadsConfig(num_q=2, v="linear"), tokenizer)
    assert model.heads is not None
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.fixture
def prompts(model):
    return [model.tokenizer.encode_prompt(p) for p in ("ab", "c", "d e", "fgh", "a")]


def share_of_a(texts: list[str], index: list[int]) -> list[float]:
    return [
        text.count("a") / max(len(text), 1) + 0.1 * i for text, i in zip(texts, index, strict=True)
    ]


def corpus(n: int) -> tuple[list[str], list[list[str]]]:
    """Hypotheses and one or two references each, an empty text among them."""
    rng = random.Random(n)
    wanted = [
        [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(rng.choice([1, 1, 2]))]
        for _ in range(n)
    ]
    texts = [
        " ".join(w if rng.random() < 0.7 else rng.choice(WORDS) for w in refs[0].split())
        for refs in wanted
    ]
    return [*texts[:-1], ""], wanted


@pytest.mark.parametrize("n", [2, 5, 60])
def test_corpus_metrics_are_sacrebleus(n):
    texts, wanted = corpus(n)
    columns = [[refs[i] if i < len(refs) else None for refs in wanted] for i in range(2)]
    bleu, chrf = corpus_bleu_ci(texts, wanted, resamples=50), corpus_chrf_ci(texts, wanted)
    assert bleu.value == pytest.approx(
        sacrebleu.corpus_bleu(texts, columns, force=True).score, abs=1e-9
    )
    assert chrf.value == pytest.approx(sacrebleu.corpus_chrf(texts, columns).score, abs=1e-9)


def test_corpus_bleu_counts_chinese_characters_where_asked():
    texts, wanted = ["我在这里吃饭。", "猫很大"], [["我在这里吃饭。"], ["那只猫很大"]]
    expected = sacrebleu.corpus_bleu(texts, [[r[0] for r in wanted]], tokenize="zh", force=True)
    found = CORPUS_METRICS["corpus_bleu:zh"](texts, wanted, resamples=2).value
    assert found == pytest.approx(expected.score, abs=1e-9)
    assert corpus_bleu_ci(texts, wanted, resamples=2).value != pytest.approx(found)


def test_resampled_bleu_is_bleu_of_the_resample():
    texts, wanted = corpus(40)
    drawn = np.random.default_rng(3).integers(40, size=(1, 40))[0]
    columns = [[wanted[i][k] if k < len(wanted[i]) else None for i in drawn] for k in range(2)]
    found = corpus_bleu_ci(texts, wanted, resamples=1, seed=3).ci95[0]
    expected = sacrebleu.corpus_bleu([texts[i] for i in drawn], columns, force=True).score
    assert found == pytest.approx(expected, abs=1e-9)


def test_corpus_bleu_of_groups_counts_all_their_texts():
    texts, wanted = corpus(12)
    groups = [texts[i : i + 2] for i in range(0, 12, 2)]
    same = [wanted[i] for i in range(0, 12, 2)]
    flat = [refs for refs in same for _ in range(2)]
    assert corpus_bleu_ci(groups, same).value == pytest.approx(corpus_bleu_ci(texts, flat).value)


def test_a_method_against_itself_differs_by_exactly_nothing():
    texts, wanted = corpus(30)
    values = np.random.default_rng(0).normal(size=30).tolist()
    for found in (mean_ci(values, values), corpus_bleu_ci(texts, wanted, texts),
                  corpus_chrf_ci(texts, wanted, texts)):  # fmt: skip
        assert found.delta == 0
        assert found.delta_ci95 == (0, 0)
        assert found.ci95[0] < found.value < found.ci95[1]


def test_intervals_cover_a_known_mean_and_a_known_difference():
    rng = np.random.default_rng(1)
    hits = paired = 0
    for trial in range(200):
        base = rng.normal(5, 3, size=60)
        better = base + rng.normal(0.3, 0.5, size=60)
        found = mean_ci(better.tolist(), base.tolist(), resamples=400, seed=trial)
        hits += found.ci95[0] <= 5.3 <= found.ci95[1]
        assert found.delta_ci95 is not None
        paired += found.delta_ci95[0] <= 0.3 <= found.delta_ci95[1]
        assert np.ptp(found.delta_ci95) < 0.5 * np.ptp(found.ci95)  # pairing takes out the noise
    assert 180 <= hits <= 198
    assert 180 <= paired <= 198


def test_figures_without_prompts_or_with_unequal_ones_are_refused():
    with pytest.raises(QvgptError, match="prompt"):
        mean_ci([])
    with pytest.raises(QvgptError, match="baseline"):
        mean_ci([1.0, 2.0], [1.0])
    with pytest.raises(QvgptError, match="references of 1"):
        corpus_bleu_ci(["a", "b"], [["a"]])


def test_ranks_share_ties_and_correlations_know_their_limits():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]
    x = np.arange(10.0)
    assert spearman(x, x**3) == pytest.approx(1)
    assert spearman(x, -np.exp(x)) == pytest.approx(-1)
    assert np.isnan(spearman(x, np.ones(10)))
    tenths = calibration(x, 2 * x, bins=5)
    assert [t["predicted"] for t in tenths] == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert [t["actual"] for t in tenths] == [1, 5, 9, 13, 17]


def test_equal_methods_compare_equal(model, prompts):
    same = {"base": Guidance(), "again": Guidance()}
    options = CompareOptions(samples=3, max_tokens=8, timing=4, keep_reports=2)
    metrics = {"length": lambda texts, index: [float(len(text)) for text in texts]}
    base, again = compare(model, prompts, share_of_a, same, options, metrics=metrics)
    assert [s.written for s in base.samples] == [s.written for s in again.samples]
    assert (again.baseline, again.score.delta, again.score.delta_ci95) == ("base", 0, (0, 0))
    assert again.metrics["length"].delta_ci95 == (0, 0)
    assert base.score.value == pytest.approx(np.mean([s.score for s in base.samples]))
    assert (base.n, len(base.samples)) == (5, 15)
    assert base.s_per_token is not None
    assert base.s_per_token > 0
    kept = [[len(s.written.reports) > 0 for s in group] for group in base.by_prompt()]
    assert kept == [[True, False, False]] * 2 + [[False] * 3] * 3
    json.dumps(base.as_dict(), allow_nan=False)


def test_kl_is_nothing_for_the_base_and_grows_with_beta(model, prompts):
    guidances = {f"{b}": Guidance(beta=b) for b in (0.0, 0.5, 2.0)}
    guidances |= {"truncated": Guidance(top_k=3), "greedy": Guidance(temperature=0.0)}
    options = CompareOptions(samples=4, max_tokens=8, timing=0)
    rows = {r.method: r for r in compare(model, prompts, share_of_a, guidances, options)}
    assert all(s.written.kl >= 0 for r in rows.values() for s in r.samples)
    kl = {name: row.kl_per_sequence for name, row in rows.items()}
    assert kl["0.0"] == pytest.approx(0, abs=1e-4)
    assert 1e-3 < kl["0.5"] < kl["2.0"]
    assert kl["truncated"] > 0.1
    assert kl["greedy"] > kl["truncated"]
    assert len(rows["greedy"].samples) == 5  # more would be the same
    assert rows["greedy"].baseline == "greedy"
    assert rows["2.0"].baseline == "0.0"
    assert rows["0.0"].s_per_token is None


def logged(model, seed=0, prompts=6, samples=5):
    """Random texts whose return is their share of the token 'a', given at the end."""
    rng, a = random.Random(seed), model.tokenizer.encode("a")[0]
    found = []
    for p in range(prompts):
        prompt = model.tokenizer.encode_prompt("abcdefgh"[p])
        for _ in range(samples):
            written = [rng.choice(model.tokenizer.encode("abcd")) for _ in range(8)]
            found.append(
                Trajectory(
                    [*prompt, *written],
                    [False] * len(prompt) + [True] * 8,
                    [0.0] * (len(prompt) + 7) + [written.count(a) / 8],
                    terminated=True,
                )
            )
    return found


class Oracle(ValueModel):
    """Values that know the returns, as far as `noise` lets them."""

    noise = 0.0

    def forward(self, batch, needs=frozenset()):
        values = super().forward(batch, needs)
        total = batch.reward.sum(1, keepdim=True)
        v = (total + self.noise * torch.randn(values.v.shape)).expand_as(values.v)
        return replace(values, v=v, target_q=(v[:, :-1] + 0.5 * (total - v[:, :-1]))[None])


def test_diagnostics_of_values_that_know_and_of_values_that_do_not(model):
    trajectories = logged(model)
    oracle = Oracle(model.trunk, HeadsConfig(), model.tokenizer)
    found = value_diagnostics(oracle, trajectories, batch_size=7)
    assert found["texts"] == 30
    assert found["decisions"] == 240
    assert found["v"]["spearman"] == pytest.approx(1)
    assert found["q"]["pearson"] == pytest.approx(1)
    assert found["v"]["mse"] == pytest.approx(0, abs=1e-12)
    assert found["v"]["mse_of_mean"] > 0.005
    assert found["advantage"] == {"pearson": None, "spearman": None}  # nothing is left to foretell
    within = found["within_prompt"]
    assert within["v_middle"]["mean"] == pytest.approx(1)
    assert within["total_last"]["mean"] == pytest.approx(1)
    assert within["v_middle"]["groups"] == 6
    oracle.noise = 1.0
    noisy = value_diagnostics(oracle, trajectories)
    assert noisy["advantage"]["spearman"] > 0.99
    assert noisy["v"]["mse"] > noisy["v"]["mse_of_mean"]
    assert abs(noisy["within_prompt"]["v_middle"]["mean"]) < 0.6
    json.dumps(noisy, allow_nan=False)


def test_diagnostics_credit_what_was_earned_before(model):
    """With the reward at the start, V rightly foretells nothing more: the total is known."""
    early = [replace(t, reward=[0.0] * 3 + [t.total_reward] + [0.0] * 7) for t in logged(model)]

    class Zero(Oracle):
        def forward(self, batch, needs=frozenset()):
            values = super().forward(batch, needs)
            return replace(values, v=torch.zeros_like(values.v))

    found = value_diagnostics(Zero(model.trunk, HeadsConfig(), model.tokenizer), early)
    assert found["within_prompt"]["v_middle"] == {"mean": None, "ci95": None, "groups": 0}
    assert found["within_prompt"]["total_middle"]["mean"] == pytest.approx(1)


def test_diagnostics_discount_as_the_values_do(model):
    """γ at the end of the first turn only: exact values are found to be exact."""
    is_action = [False, True, True, False, True, True]
    texts = [Trajectory([1, 6, 4, 7, 6, 3], is_action, [0.0] * 5 + [r], True) for r in (1.0, 3.0)]

    class Exact(ValueModel):
        def forward(self, batch, needs=frozenset()):
            v = batch.reward.sum(1, keepdim=True) * torch.tensor([0.5, 0.5, 1.0, 1.0, 0.0])
            return replace(super().forward(batch, needs), v=v, target_q=v[None, :, :-1])

    exact = Exact(model.trunk, HeadsConfig(), model.tokenizer)
    exact.info.gamma, exact.info.per_turn_discount = 0.5, True
    found = value_diagnostics(exact, texts)
    assert (found["v"]["mse"], found["q"]["mse"], found["per_turn_discount"]) == (0, 0, True)
    exact.info.per_turn_discount = False
    assert value_diagnostics(exact, texts)["v"]["mse"] > 0.1


def test_diagnostics_refuse_a_model_without_values(model):
    with pytest.raises(QvgptError, match="no value heads"):
        value_diagnostics(ValueModel(model.trunk, None, model.tokenizer), logged(model))


@pytest.fixture
def task(tmp_path, model):
    model.save(tmp_path / "model")
    steps = [{"step": i, "total": 1 / i, "eval/total": 2 / i} for i in range(1, 9)]
    lines = "".join(json.dumps(step) + "\n" for step in steps)
    (tmp_path / "model" / "log.jsonl").write_text(lines)
    rows = [{"prompt": p, "completion": c} for p, c in (("ab", "a a"), ("c", "c b"), ("d", "h"))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvaluateConfig(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "data.jsonl"),
        reward="chrf",
        output=str(tmp_path / "out"),
        metrics=["token_f1", "corpus_bleu:zh", "corpus_chrf"],
        betas=[2.0],
        temperatures=[1.0, 0.0],
        samples=3,
        max_tokens=8,
        texts=2,
    )


def test_command_writes_summary_and_report(task, tmp_path, capsys):
    summary = evaluate(task)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    names = [(r["method"], r["beta"], r["temperature"]) for r in summary["rows"]]
    assert names == [
        ("base, T = 1", 0, 1),
        ("guided, β = 2, T = 1", 2, 1),
        ("base, greedy", 0, 0),
        ("guided, β = 2, greedy", 2, 0),
    ]
    base, guided = summary["rows"][:2]
    assert summary["metric"] == "chrf"
    assert (base["n"], base["delta"], base["delta_ci95"]) == (3, 0, [0, 0])
    assert guided["delta"] == pytest.approx(guided["mean"] - base["mean"])
    assert guided["kl_per_sequence"] > base["kl_per_sequence"]
    assert set(guided["metrics"]) == {"token_f1", "corpus_bleu:zh", "corpus_chrf"}
    assert guided["metrics"]["corpus_chrf"]["delta"] is not None
    assert summary["values"]["texts"] == 9
    page = (tmp_path / "out" / "report.html").read_text()
    for part in ("What guidance brings", "Calibration", "Learning curves", "β = 2", "A = "):
        assert part in page
    assert "guided" in capsys.readouterr().out


def test_searches_are_rows_beside_the_base(task, tmp_path):
    """What each reads for a token, what it differs from, and how far it is from the base."""
    said = [
        {"tree": {"simulations": 4}},
        {"block": {"samples": 4, "block": 2}},
        {"beam": {"value_weight": 1.0}},
    ]
    config = replace(task, searches=said, search_betas=[0.0, 3.0], best_of=4, recommend=True)
    config = replace(config, betas=[], temperatures=[1.0], samples=2)
    summary = evaluate(config)
    rows = {row["method"]: row for row in summary["rows"]}
    block, tree = "block search (samples 4, block 2)", "tree search (simulations 4)"
    searched = [
        tree, f"{tree}, β = 3", f"{block}, T = 1", f"{block}, β = 3, T = 1",
        "beam search (value_weight 1.0)", "beam search (value_weight 1.0), β = 3",
    ]  # fmt: skip
    assert [n for n, row in rows.items() if row["search"]] == searched
    read = {name: row["forward_tokens_per_token"] for name, row in rows.items()}
    prompt = 1 + max(map(len, ("ab", "c", "d"))) + 2  # an upper bound
    assert 1 <= read["base, T = 1"] <= prompt
    assert read["base, T = 1"] < read[f"{block}, T = 1"] < read["best of 4 by Q, T = 1"] * 2
    assert read[tree] > 2
    bound = 4 * (math.log(4) - 0.75)
    assert 0 < rows[f"{block}, T = 1"]["kl_per_sequence"] <= bound
    assert rows[tree]["kl_per_sequence"] > 0
    assert summary["recommended"] not in searched
    page = (tmp_path / "out" / "report.html").read_text()
    assert block in page
    with pytest.raises(QvgptError, match="unknown search 'tre'"):
        evaluate(replace(config, searches=["tre"], output=str(tmp_path / "other")))
    with pytest.raises(QvgptError, match="search_betas must not be empty"):
        evaluate(replace(config, search_betas=[], output=str(tmp_path / "other")))


@torch.no_grad()
def test_kl_of_searches_is_to_the_base_that_is_named(model, prompts):
    """−log of its probability where nothing is left to chance; else log π beside it."""
    other = ValueModel(copy.deepcopy(model.trunk), None, model.tokenizer).eval()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    blocks = BlockSearch(1, 3, 2, max_tokens=6)
    methods = {
        "base": Guidance(),
        "tree": Method(Guidance(temperature=0.0), search=TreeSearch(4, max_tokens=6)),
        "block": Method(Guidance(), search=blocks),
    }
    options = CompareOptions(samples=2, max_tokens=6, timing=3)
    _, tree, block = compare(model, prompts, share_of_a, methods, options, base=other)
    assert (len(tree.samples), len(block.samples)) == (5, 10)
    for sample in (*tree.samples, *block.samples):
        prompt, text = prompts[sample.prompt], sample.written.tokens
        logprob = [
            m.trunk(torch.tensor([[*prompt, *text]]))[0, len(prompt) - 1 : -1].log_softmax(-1)
            for m in (model, other)
        ]
        if sample in tree.samples:
            exact = -float(logprob[1][range(len(text)), text].sum())
        else:
            exact = float((logprob[0] - logprob[1])[range(len(text)), text].sum())
            exact += blocks.choice_kl(len(text))
        assert sample.written.kl == pytest.approx(exact, abs=1e-4)
    assert tree.forward_tokens_per_token is not None
    assert tree.as_dict()["search"] == "tree search (simulations 4)"


def test_the_best_guidance_is_recommended_to_the_model(task, tmp_path, model, capsys):
    assert evaluate(task)["recommended"] is None
    kept = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    capsys.readouterr()
    summary = evaluate(replace(task, recommend=True, output=str(tmp_path / "again")))
    said = capsys.readouterr().err
    best = max(summary["rows"], key=lambda row: row["mean"])
    assert summary["recommended"] == best["method"]
    found = ValueModel.from_pretrained(tmp_path / "model").info.recommended_guidance
    assert (found or {"beta": 0})["beta"] == best["beta"]
    assert best["beta"] == 0 or found["temperature"] == best["temperature"]
    name, guided = best["method"], f"recommended from now on by {task.model}: {best['method']}"
    assert (guided if best["beta"] else f"nothing earned more than {name}") in said
    changed = {p.name for p in (tmp_path / "model").iterdir() if kept[p.name] != p.read_bytes()}
    assert changed <= {"value_config.json"}
    ValueModel(model.trunk, None, model.tokenizer).save(tmp_path / "plain")
    plain = replace(task, model=str(tmp_path / "plain"), betas=[], recommend=True)
    with pytest.raises(QvgptError, match="recommend: there are no value heads"):
        evaluate(replace(plain, output=str(tmp_path / "third")))


@pytest.mark.parametrize(
    ("best", "kept"),
    [
        ("base, T = 1", None),
        ("base, greedy", {"beta": 0, "temperature": 0}),
        ("guided, β = -2, T = 1", {"beta": -2, "temperature": 1}),
        ("guided, β = 2, greedy", {"beta": 2, "temperature": 0}),
    ],
)
def test_what_is_recommended_is_how_the_best_was_written(task, model, prompts, best, kept):
    config, options = replace(task, betas=[2.0, -2.0]), CompareOptions(max_tokens=2, timing=0)
    rows = compare(model, prompts[:1], share_of_a, methods_of(config), options)
    scored = [replace(r, score=Estimate(float(r.method == best), (0.0, 1.0))) for r in rows]
    assert _recommend(ValueModel.from_pretrained(task.model), scored, config) == best
    found = ValueModel.from_pretrained(task.model).info.recommended_guidance
    assert (found and {name: found[name] for name in kept}) == kept


def test_figures_go_into_the_card_where_it_is_ours(task, tmp_path):
    model, card = Path(task.model), Path(task.model, "README.md")
    with pytest.raises(QvgptError, match="holds no model card that qvgpt wrote"):
        evaluate(replace(task, card=True))
    card.write_text("# Mine\n")
    with pytest.raises(QvgptError, match=r"no other README.md is touched"):
        evaluate(replace(task, card=True))
    assert not Path(task.output).exists()
    write_card(model, "---\na: 1\n---\n# A model\n\n## Limits\n- Some.\n", print)
    aside = model / "README.qvgpt.md"
    with pytest.raises(QvgptError, match="card: what guides here"):
        evaluate(replace(task, card=True, value_models=[task.model]))
    evaluate(task)
    assert "Evaluation" not in aside.read_text()  # nobody asked
    sections = []
    for number in (1, 2):
        out = str(tmp_path / f"with-card-{number}")
        summary = evaluate(replace(task, card=True, seed=number, output=out))
        text = aside.read_text()
        assert text.count("## Evaluation") == 1
        head, _, limits = text.partition("## Limits\n")
        assert limits == "- Some.\n"
        sections.append(head.partition("## Evaluation\n")[2])
    assert sections[0] != sections[1]
    base, guided = summary["rows"][:2]
    for row in (base, guided):
        shown = [(row["mean"], row["ci95"]), (row["delta"], row["delta_ci95"])]
        shown += [(m["value"], m["ci95"]) for m in row["metrics"].values()]
        cells = [f"{x:.4g} [{low:.4g}, {high:.4g}]" for x, (low, high) in shown]
        assert f"| {' | '.join([row['method'], *cells])} |" in sections[1]
    digest = hashlib.sha256(Path(task.data).read_bytes()).hexdigest()
    assert summary["data_sha256"] == digest
    assert f"3 prompts of data.jsonl (SHA-256 `{digest}`)" in sections[1]
    assert "chosen by these figures" not in sections[1]
    assert str(tmp_path) not in text
    assert card.read_text() == "# Mine\n"
    evaluate(replace(task, card=True, recommend=True, output=str(tmp_path / "chosen")))
    assert "chosen by these figures" in aside.read_text()


def test_prompts_have_no_part_in_the_scale_of_colours(model):
    prompt = model.tokenizer.encode_prompt("abcd" * 6)
    options = CompareOptions(max_tokens=3, timing=0, keep_reports=1)
    rows = compare(model, [prompt], share_of_a, {"guided": Guidance(beta=1.0)}, options)
    greatest = max(abs(r.advantage) for r in rows[0].samples[0].written.reports)
    [shown] = re.findall(r"A ≥ \+([\d.]+)", _texts(model, [prompt], rows, 1))
    assert float(shown) == pytest.approx(greatest, rel=1e-3)


def test_command_is_repeatable_and_refuses_what_it_cannot_do(task, tmp_path):
    first = evaluate(task)
    before = (tmp_path / "out" / "summary.json").read_text()
    with pytest.raises(QvgptError, match=r"another run already; .*made anew\) with --resume true"):
        evaluate(task)
    with pytest.raises(QvgptError, match="3 of 3 prompts"):
        evaluate(replace(task, output=str(tmp_path / "long"), max_tokens=30))
    with pytest.raises(QvgptError, match="did you mean 'chrf'"):
        evaluate(replace(task, output=str(tmp_path / "typo"), reward="chrff"))
    plain = ValueModel.from_pretrained(task.model)
    plain.heads = None
    plain.save(tmp_path / "plain")
    without = replace(task, model=str(tmp_path / "plain"), output=str(tmp_path / "new"))
    with pytest.raises(QvgptError, match="no value heads"):
        evaluate(without)
    assert not [p for p in ("long", "typo", "new") if (tmp_path / p).exists()]
    assert (tmp_path / "out" / "summary.json").read_text() == before
    assert evaluate(replace(without, betas=[]))["values"] is None
    again = evaluate(replace(task, resume=True))
    for one, two in zip(first["rows"], again["rows"], strict=True):
        assert {**one, "s_per_token": 0} == {**two, "s_per_token": 0}


class Stopped(Exception):
    pass


def test_an_evaluation_that_was_stopped_goes_on_with_what_was_written(
    task, tmp_path, monkeypatch, capsys
):
    whole = evaluate(replace(task, output=str(tmp_path / "whole")))
    written, write = list[str](), qvgpt.compare._write

    def write_until(last, writer, *rest):
        if len(written) == last:
            raise Stopped
        written.append(repr(writer.how))
        return write(writer, *rest)

    monkeypatch.setattr(qvgpt.compare, "_write", partial(write_until, 2))
    with pytest.raises(Stopped):
        evaluate(task)
    output = tmp_path / "out"
    [broken, _] = sorted((output / "texts").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    shutil.copytree(output, tmp_path / "torn")
    (tmp_path / "torn" / "texts" / broken.name).write_text(broken.read_text()[:-9])
    (tmp_path / "torn" / "run.json").write_text(
        (output / "run.json").read_text().replace(task.output, str(tmp_path / "torn"))
    )
    capsys.readouterr()
    for where, again in ((output, 2), (tmp_path / "torn", 3)):
        written.clear()
        monkeypatch.setattr(qvgpt.compare, "_write", partial(write_until, None))
        found = evaluate(replace(task, resume=True, output=str(where)))
        assert len(written) == again
        assert f"{4 - again} of 4 methods have written" in capsys.readouterr().err
        for one, two in zip(whole["rows"], found["rows"], strict=True):
            assert {**one, "s_per_token": 0} == {**two, "s_per_token": 0}
        assert shown_texts(where) == shown_texts(tmp_path / "whole")
        assert not (where / "texts").exists()
    # another model of the same name
    written.clear()
    monkeypatch.setattr(qvgpt.compare, "_write", partial(write_until, 1))
    task = replace(task, output=str(tmp_path / "other"))
    with pytest.raises(Stopped):
        evaluate(task)
    os.utime(Path(task.model) / "model.safetensors", ns=(1, 1))
    monkeypatch.setattr(qvgpt.compare, "_write", partial(write_until, None))
    written.clear()
    evaluate(replace(task, resume=True))
    assert len(written) == 4


def test_kept_texts_are_judged_anew_and_those_of_others_are_not_read(
    task, tmp_path, model, prompts
):
    writes = Path(task.model)
    kept = WrittenTexts(writes / "evaluation" / "texts", [writes, Path(task.data)])
    (writes / "evaluation").mkdir()
    options = CompareOptions(samples=2, max_tokens=4, timing=0, keep_reports=1)
    methods = {"guided": Guidance(beta=1.0)}
    [first] = compare(model, prompts, share_of_a, methods, options, kept=kept)
    (writes / "README.md").write_text("a card, meanwhile")
    again = WrittenTexts(kept.folder, [writes, Path(task.data)])
    assert again.find("guided") == [sample.written for sample in first.samples]
    assert again.find("other") is None
    [other] = compare(model, prompts, lambda texts, _: [7.0] * len(texts), methods, options,
                      kept=again)  # fmt: skip
    assert other.score.value == 7
    assert [s.written for s in other.samples] == [s.written for s in first.samples]
    [file] = kept.folder.iterdir()
    for change in ({"texts": [{"tokens": [1]}]}, {"written_by": ["0.0.1"]}, {"texts": None}):
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | change))
        assert again.find("guided") is None
        file.write_text(json.dumps(content))
    assert again.find("guided")
    Path(task.data).write_text("{}\n")
    assert WrittenTexts(kept.folder, [writes, Path(task.data)]).find("guided") is None


def shown_texts(output: Path) -> list[str]:
    """Tokens of the report, with what is shown of each."""
    found = re.findall(r"<span [^>]*title=.*?</span>", (output / "report.html").read_text())
    assert found
    return found


def test_another_base_writes_the_unguided_texts_and_kl_is_to_it(task, tmp_path, model):
    torch.manual_seed(5)
    gpt = GPT(model.tokenizer.vocab_size, embed_dim=8, num_heads=2, num_layers=1, seq_len=32)
    ValueModel(gpt, None, model.tokenizer).save(tmp_path / "base")
    own = evaluate(task)
    alone = replace(task, model=str(tmp_path / "base"), betas=[], output=str(tmp_path / "alone"))
    plain = evaluate(alone)["rows"]
    other = replace(task, base=str(tmp_path / "base"), output=str(tmp_path / "other"))
    found = evaluate(other)["rows"]
    for ours, theirs in ((found[0], plain[0]), (found[2], plain[1])):
        assert {**ours, "s_per_token": 0} == {**theirs, "s_per_token": 0}
    for i in (1, 3):
        assert found[i]["mean"] == own["rows"][i]["mean"]
        assert found[i]["kl_per_sequence"] != own["rows"][i]["kl_per_sequence"]
        assert found[i]["delta"] == pytest.approx(found[i]["mean"] - found[i - 1]["mean"])
    ValueModel(GPT(30, 8, 2, 1, 32), None, Tokenizer.train(["xyz"], "char")).save(tmp_path / "xyz")
    wrong = replace(other, base=str(tmp_path / "xyz"), output=str(tmp_path / "wrong"))
    with pytest.raises(QvgptError, match="another tokenizer"):
        evaluate(wrong)
    assert not (tmp_path / "wrong").exists()


def test_centred_values_are_judged_on_centred_returns(task, tmp_path, capsys):
    model = ValueModel.from_pretrained(task.model)
    model.info.centred = True
    model.save(tmp_path / "centred")
    centred = replace(task, model=str(tmp_path / "centred"), samples=3)
    for samples, temperature in ((3, 1.0), (1, 1.0), (3, 0.0)):
        out = str(tmp_path / f"{samples} at {temperature}")
        change = {"samples": samples, "temperatures": [temperature], "output": out}
        found = evaluate(replace(centred, **change))["values"]
        said = "centred values are judged by several samples" in capsys.readouterr().err
        assert (found is None) == said == (samples == 1 or temperature == 0)
        if found:  # what came at the prompt is 0 in the mean of each
            actual = [tenth["actual"] for tenth in found["v_at_prompt"]["calibration"]]
            assert sum(actual) / len(actual) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"texts": -1}, "texts must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"temperatures": []}, "temperatures must not be empty"),
        ({"temperatures": [-1.0]}, "temperature must be finite"),
        ({"temperatures": [0.0], "best_of": 4}, "choose among sampled texts"),
        ({"temperatures": [0.0], "searches": ["block"]}, "choose among sampled texts"),
        ({"recommend": True, "base": "other"}, "leave base out to choose"),
        ({"limit": 0}, "limit"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_senseless_options_are_refused_before_anything_is_written(task, change, message):
    with pytest.raises(QvgptError, match=message):
        evaluate(replace(task, **change))
    assert not Path(task.output).exists()


def test_references_are_looked_for_before_anything_is_written(task):
    with Path(task.data).open("a") as lines:
        lines.write('{"prompt": "a"}\n')
    for change in ({}, {"reward": "length"}, {"reward": "length", "metrics": ["corpus_bleu"]}):
        with pytest.raises(QvgptError, match=r"data.jsonl:4: .*to compare with"):
            evaluate(replace(task, **change))
    assert not Path(task.output).exists()


def test_shaped_rewards_leave_the_return_as_it_is(task, tmp_path):
    plain = evaluate(task)
    shaped = evaluate(replace(task, output=str(tmp_path / "shaped"), shaped=True))
    at_prompt = [s["values"]["v_at_prompt"]["calibration"] for s in (plain, shaped)]
    for one, two in zip(*at_prompt, strict=True):
        assert one["actual"] == pytest.approx(two["actual"], abs=1e-6)
    assert plain["values"]["q"]["mse_of_mean"] != shaped["values"]["q"]["mse_of_mean"]


def test_config_is_json_ready(task):
    json.dumps(asdict(task))
