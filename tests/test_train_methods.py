"""What the methods ask of a training beyond their loss: thresholds, references, scales, heads."""

import copy
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from test_trainer import (  # noqa: F401  fixtures among them
    FIT,
    QUIET,
    ROWS,
    TOKENIZER,
    Killed,
    _no_sync,
    config,
    model,
    run,
    same,
    stopped_at,
    texts,
)

from qvgpt import Guidance, HeadsConfig, QvgptError, ValueModel, generate
from qvgpt.bootstrap import spearman
from qvgpt.data.sizes import TokenizerConfig
from qvgpt.decode.policy import next_token
from qvgpt.decode.score import score
from qvgpt.decode.sources import (
    Contrast,
    HeadValues,
    PrefixValues,
    TokenScorer,
    WeightedSum,
    own_values,
)
from qvgpt.export import export_hf
from qvgpt.fit_options import learning_rate_factor, parameter_groups
from qvgpt.fqe import evaluate_offline
from qvgpt.models.gpt import GPT
from qvgpt.models.lora import LoraConfig
from qvgpt.objectives import ILQL, METHODS, Candidates
from qvgpt.trainer import train
from qvgpt.trajectory import Trajectory, collate, mean_return


@pytest.fixture
def base(config, tmp_path):  # noqa: F811
    """A directory with a plain language model."""
    train(replace(config, objectives=["LM"], output=str(tmp_path / "lm")), QUIET)
    return str(tmp_path / "lm")


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"LM", "AWAC", "AWR", "FQE", "QSFT"}))
def test_every_method_trains_and_what_it_learned_guides(config, base, method):  # noqa: F811
    heads = HeadsConfig()
    if method in ("ReturnDistribution", "FUDGE"):
        heads = HeadsConfig("categorical", rank=4, bins=2)
    config = replace(config, model=base, objectives=["LM", method], heads=heads)
    train(config, QUIET)
    learnt = ValueModel.from_pretrained(config.output)
    assert learnt.info.objectives[1].keys() == {method}
    assert not learnt.heads.are_fresh
    prompt = TOKENIZER.encode_prompt("c")
    values = None
    if method == "PathConsistency":  # its policy is what it learned: log π/π₀ guides others
        with pytest.raises(QvgptError, match="as contrast with its base"):
            generate(learnt, [prompt], Guidance(2.0), max_tokens=5)
        values = Contrast(learnt, ValueModel.from_pretrained(base))
    elif method in ("FUDGE", "ControlledDecoding"):
        assert own_values(learnt) == PrefixValues(learnt, log=method == "FUDGE")
        with pytest.raises(QvgptError, match="know V and no Q"):
            export_hf(config.output, Path(config.output) / "exported", beta=2.0)
    for guidance in (Guidance(2.0), Guidance(2.0, top_k=4)):
        assert generate(learnt, [prompt], guidance, max_tokens=5, values=values)[0].tokens
    if method == "ReturnDistribution":
        soft = Guidance(2.0, functional="soft", top_k=4)
        assert generate(learnt, [prompt], soft, max_tokens=5)[0].tokens


def test_the_top_share_is_a_return_of_the_data_and_the_summary_says_which(config):  # noqa: F811
    summary = train(replace(config, objectives=[{"LM": {"top_share": 0.25}}]), QUIET)
    returns = sorted((t.total_reward for t in texts()), reverse=True)
    [said] = summary["objectives"]
    assert said["LM"]["top_share"] is None
    assert said["LM"]["min_return"] == pytest.approx(returns[14])


def test_rewards_are_scaled_where_said_and_guidance_never_knows(config, base, tmp_path):  # noqa: F811
    small = replace(
        config, model=base, objectives=["MonteCarlo"], freeze_trunk=True, reward_scale=0.125
    )
    train(small, QUIET)
    learnt = ValueModel.from_pretrained(small.output)
    assert learnt.heads.reward_scale == 0.125
    said = json.loads((Path(small.output) / "value_config.json").read_text())
    assert said["reward_scale"] == 0.125
    rows = [row | {"reward": 0.125 * row["reward"]} for row in ROWS]
    (tmp_path / "eighths.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    eighths = [str(tmp_path / "eighths.jsonl")]
    by_hand = replace(small, data=eighths, reward_scale=None, output=str(tmp_path / "by_hand"))
    train(by_hand, QUIET)
    by_hand = ValueModel.from_pretrained(by_hand.output)
    assert by_hand.heads.reward_scale == 1.0
    assert same(learnt.state_dict(), by_hand.state_dict())
    h = torch.randn(5, 16)
    torch.testing.assert_close(learnt.heads.state_value(h), 8 * by_hand.heads.state_value(h))
    found, expected = (
        next_token(m.eval(), h, Guidance(beta)).logprob
        for m, beta in ((learnt, 1.0), (by_hand, 8.0))
    )
    torch.testing.assert_close(found, expected)
    more = replace(small, model=small.output, reward_scale=None, output=str(tmp_path / "more"))
    train(more, QUIET)
    assert ValueModel.from_pretrained(more.output).heads.reward_scale == 0.125
    other = replace(more, reward_scale=1.0, output=str(tmp_path / "other"))
    with pytest.raises(QvgptError, match=r"reward_scale: .* learned with 0.125; leave it out"):
        train(other, QUIET)
    with pytest.raises(QvgptError, match="reward_scale: must be above 0"):
        train(replace(small, reward_scale=0.0, output=str(tmp_path / "x")), QUIET)
    with pytest.raises(QvgptError, match="reward_scale: is kept with values"):
        train(replace(small, objectives=["LM"], output=str(tmp_path / "x")), QUIET)


@pytest.mark.parametrize("method", ["PathConsistency", "QSFT"])
def test_the_reference_is_the_model_that_the_run_began_with(config, base, tmp_path, method):  # noqa: F811
    config = replace(config, model=base, objectives=[method])
    train(config, QUIET)
    other = replace(config, output=str(tmp_path / "other"))
    with stopped_at(3), pytest.raises(Killed):
        train(other, QUIET)
    train(replace(other, resume=True), QUIET)
    whole, resumed = (ValueModel.from_pretrained(c.output) for c in (config, other))
    assert same(whole.state_dict(), resumed.state_dict())
    begun = ValueModel.from_pretrained(base)
    assert not same(begun.trunk.state_dict(), whole.trunk.state_dict())
    with pytest.raises(QvgptError, match="learn away from a reference: say which --model"):
        train(replace(config, model=None, output=str(tmp_path / "x")), QUIET)
    with pytest.raises(QvgptError, match="freeze_trunk: the objectives learn in the trunk's own"):
        train(replace(config, freeze_trunk=True, output=str(tmp_path / "x")), QUIET)


def test_offline_evaluation_knows_what_guidance_would_earn():
    """Four answers, one of them paid: a quarter by chance, nearly all under guidance."""
    answers = [
        Trajectory([1, 9, 2, a], [False] * 3 + [True], [0.0] * 3 + [float(a == 10)], True)
        for a in (9, 10, 11, 12)
    ]
    options = replace(FIT, max_steps=150, batch_size=4)
    learnt = model()
    run(learnt, ["LM", "MonteCarlo"], options, answers)
    before = {k: v.clone() for k, v in learnt.state_dict().items()}
    chance, guided, greedy = (
        evaluate_offline(learnt, answers, guidance, options).value
        for guidance in (Guidance(), Guidance(beta=10.0), Guidance(beta=10.0, temperature=0.0))
    )
    assert chance == pytest.approx(0.25, abs=0.05)
    assert guided == pytest.approx(1.0, abs=0.05)
    assert greedy == pytest.approx(1.0, abs=0.05)
    assert same(before, learnt.state_dict())
    assert all(p.requires_grad for p in learnt.trunk.parameters())
    with pytest.raises(QvgptError, match="FQE judges a policy"):
        run(learnt, ["FQE"])


@pytest.mark.parametrize("kind", ["other heads", "sum under a budget"])
def test_offline_evaluation_judges_what_other_values_guide(kind):
    """Four answers: what guidance earns is Σ π(a)·r(a), known exactly."""
    rewards = {9: 0.0, 10: 1.0, 11: 2.0, 12: -1.0}
    answers = [
        Trajectory([1, 9, 2, a], [False] * 3 + [True], [0.0] * 3 + [r], True)
        for a, r in rewards.items()
    ]
    options = replace(FIT, max_steps=120, batch_size=4, lr=3e-2)
    base = model()
    run(base, ["LM"], replace(options, max_steps=40), answers)
    others = [_far(seed, heads) for seed, heads in ((1, HeadsConfig()), (2, None))]
    source, guidance = HeadValues(others[0]), Guidance(beta=1.5)
    if kind == "sum under a budget":
        source = WeightedSum(((1.0, source), (0.5, Contrast(others[1], others[0]))))
        guidance = Guidance(kl_budget=0.4, top_k=8)

    def earned(guidance):
        scores = score(base, answers, guidance, values=source)
        chances = [math.exp(found.logprob) for found in scores]
        assert sum(chances) > 0.97  # of what the logs know
        return sum(p * r for p, r in zip(chances, rewards.values(), strict=True))

    assert abs(earned(guidance) - earned(Guidance())) > 0.15
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (base, *others)]
    learns = [p.requires_grad for m in (base, *others) for p in m.parameters()]
    found = evaluate_offline(base, answers, guidance, options, values=source).value
    assert found == pytest.approx(earned(guidance), abs=0.06)
    assert learns == [p.requires_grad for m in (base, *others) for p in m.parameters()]
    assert all(same(m.state_dict(), b) for m, b in zip((base, *others), before, strict=True))


def _far(seed, heads):
    """A model of other size, whose weights are far from their start."""
    torch.manual_seed(seed)
    other = ValueModel(GPT(TOKENIZER.vocab_size, 24, 2, 1, seq_len=24), heads, TOKENIZER)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return other


def test_offline_evaluation_refuses_values_that_are_read_after_candidates():
    answers = [Trajectory([1, 9, 2, 10], [False] * 3 + [True], [0.0] * 4, True)]
    for source, said in (
        (PrefixValues(_far(1, HeadsConfig())), "V after each candidate"),
        (TokenScorer(lambda texts, tokens: tokens), "a function"),
    ):
        with pytest.raises(QvgptError, match=f"{said} would be read anew at every logged state"):
            evaluate_offline(model(), answers, Guidance(beta=1.0, top_k=3), values=source)
    with pytest.raises(QvgptError, match="no value heads"):
        evaluate_offline(_far(1, None), answers, Guidance(beta=1.0))


def test_a_known_q_is_not_left_behind_by_its_trunk():
    m = model()
    run(m, ["LM", "MonteCarlo"])
    with pytest.raises(QvgptError, match="the Q it knows would no longer fit"):
        run(m, ["LM", "ControlledDecoding"])
    run(m, ["ControlledDecoding", "MonteCarlo"])
    fresh = model()
    for _ in range(2):  # the second time with a V that is known
        run(fresh, ["LM", "ControlledDecoding"])


def test_heads_of_another_kind_are_refused_before_training():
    with pytest.raises(QvgptError, match=r"read return_logits, v_return_logits, .* categorical"):
        run(model(), ["ReturnDistribution"])
    categorical = HeadsConfig("categorical", rank=4, low=0.0, high=1.0)
    with pytest.raises(QvgptError, match=r"read q_logsumexp, .* linear, low_rank, bilinear or mlp"):
        run(model(heads=categorical), ["ILQL"])
    run(model(heads=categorical), [{"ILQL": {"cql_weight": 0.0}}])


def test_a_slow_trunk_is_a_hand_made_step_and_survives_being_stopped(config, tmp_path):  # noqa: F811
    """ILQL's target network: Q̄ of a slow copy of all, which follows by tau after each step."""
    options = replace(FIT, max_steps=3, batch_size=4, slow_trunk=True, dropout=0.0, tau=0.3)
    data = texts()[:4]  # the same batch at every step
    ours, by_hand = model(), model()
    run(ours, [{"ILQL": {"gamma": 1.0}}], options, data)
    assert ours.slow is None

    objective = ILQL(gamma=1.0)
    by_hand.heads.start_at(mean_return(data))
    slow = copy.deepcopy(by_hand)
    optimizer = torch.optim.AdamW(parameter_groups(by_hand, options), betas=(0.9, 0.95))
    batch = collate(data, TOKENIZER.template.pad, TOKENIZER.template.end_ids)
    for step in range(3):
        with torch.no_grad():
            target_q = slow(batch, {"target_q"}).target_q
        read = by_hand(batch, objective.needs - {"target_q"})
        optimizer.zero_grad()
        objective(replace(read, target_q=target_q), batch).total.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), options.clip)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(step, 3, options)
        optimizer.step()
        by_hand.heads.update_targets(0.3)
        with torch.no_grad():
            slow.heads.target_q.load_state_dict(by_hand.heads.target_q.state_dict())
            for p, q in zip(slow.trunk.parameters(), by_hand.trunk.parameters(), strict=True):
                p.lerp_(q, 0.3)
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-5, rtol=1e-4)
    heads_alone = model()
    run(heads_alone, [{"ILQL": {"gamma": 1.0}}], replace(options, slow_trunk=False), data)
    assert not same(ours.state_dict(), heads_alone.state_dict())

    slow = replace(config, fit=replace(config.fit, slow_trunk=True, save_every=1))
    train(slow, QUIET)
    other = replace(slow, output=str(tmp_path / "other"))
    with stopped_at(3), pytest.raises(Killed):
        train(other, QUIET)
    train(replace(other, resume=True), QUIET)
    whole, resumed = (ValueModel.from_pretrained(c.output) for c in (slow, other))
    assert same(whole.state_dict(), resumed.state_dict())


def test_a_slow_trunk_that_would_do_nothing_is_refused():
    for m, objectives, message in (
        (model(freeze=True), ["ILQL"], "a frozen trunk does not move"),
        (model(), ["LM", "MonteCarlo"], "read no slow Q"),
    ):
        with pytest.raises(QvgptError, match=f"fit.slow_trunk: .*{message}"):
            run(m, objectives, replace(FIT, slow_trunk=True))


def test_beside_adapters_a_slow_trunk_is_a_second_adapter(tmp_path):
    pytest.importorskip("peft")
    plain = model(heads=None)
    plain.save(tmp_path / "base")
    m = ValueModel.from_pretrained(tmp_path / "base", as_causal_lm=True)
    m.trunk.add_lora(LoraConfig(rank=2))
    m.keep_slow_trunk()
    copied = m.slow.state_dict()
    assert copied
    assert all("lora_" in name for name in copied)
    base = {p.data_ptr() for n, p in m.trunk.named_parameters() if "lora_" not in n}
    shared = {p.data_ptr() for n, p in m.slow.trunk.named_parameters() if "lora_" not in n}
    assert base == shared
    assert not base & {tensor.data_ptr() for tensor in copied.values()}


def test_a_distribution_takes_its_support_from_the_data(config, base, tmp_path):  # noqa: F811
    rows = [row | {"reward": 10 * row["reward"] - 4} for row in ROWS]
    (tmp_path / "tens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = io.StringIO()
    config = replace(
        config, model=base, data=[str(tmp_path / "tens.jsonl")], eval_data=[],
        objectives=["ReturnDistribution"], heads=HeadsConfig("categorical", rank=4, bins=11),
    )  # fmt: skip
    train(config, Console(file=said, width=1000))
    returns = [row["reward"] for row in rows]
    margin = 0.05 * (max(returns) - min(returns))
    learnt = ValueModel.from_pretrained(config.output).heads.config
    assert learnt.low == pytest.approx(min(returns) - margin)
    assert learnt.high == pytest.approx(max(returns) + margin)
    assert f"the returns of the data lie between {min(returns):g} and" in said.getvalue()
    # a run that was stopped finds the same, and takes the numbers it has
    other = replace(config, output=str(tmp_path / "other"))
    with stopped_at(3), pytest.raises(Killed):
        train(other, QUIET)
    train(replace(other, resume=True), QUIET)
    names = ("value_heads.safetensors", "value_config.json")
    for name in names:
        whole, resumed = (Path(c.output, name).read_bytes() for c in (config, other))
        assert whole == resumed
    given = replace(config.heads, low=0.0, high=1.0)
    with pytest.raises(QvgptError, match=r"its return -?\d.* is none that the value heads know, 0"):
        train(replace(config, heads=given, output=str(tmp_path / "x")), QUIET)
    two = HeadsConfig("categorical", rank=4, bins=2)
    with pytest.raises(QvgptError, match=r"text \d+ of 60: its return .* 0 to 1: give fitting"):
        train(replace(config, heads=two, output=str(tmp_path / "x")), QUIET)
    assert not (tmp_path / "x").exists()


def test_double_q_is_told_among_what_to_seek_the_best():
    found = []
    for options in ({}, {"top_k": 2}):
        m = model()
        run(m, ["LM", {"DoubleQ": options}])
        found.append(m)
    assert found[1].candidates == Candidates(top_k=2)
    assert not same(found[0].state_dict(), found[1].state_dict())


def test_values_learn_on_a_small_trunk_of_their_own(config, base, tmp_path):  # noqa: F811
    """No LM loss: a second model, with the tokens of the one it is to judge."""
    own = replace(
        config, gpt=replace(config.gpt, embed_dim=8), objectives=["MonteCarlo"],
        tokenizer=TokenizerConfig(path=base), fit=replace(config.fit, max_steps=60),
    )  # fmt: skip
    train(own, QUIET)
    learnt, judged = ValueModel.from_pretrained(own.output), ValueModel.from_pretrained(base)
    assert learnt.tokenizer.sha256 == judged.tokenizer.sha256
    assert learnt.trunk.embed_dim < judged.trunk.embed_dim
    data = texts()
    foretold = [found.reports[-1].q for found in score(learnt, data)]
    assert spearman(np.array(foretold), np.array([t.total_reward for t in data])) > 0.5
