"""What the methods ask of a training beyond their loss: thresholds, references, scales, heads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
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
from qvgpt.decode.policy import next_token
from qvgpt.decode.sources import Contrast, PrefixValues, own_values
from qvgpt.export import export_hf
from qvgpt.fqe import evaluate_offline
from qvgpt.objectives import METHODS
from qvgpt.trainer import train
from qvgpt.trajectory import Trajectory


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
    categorical = HeadsConfig("categorical", rank=4)
    with pytest.raises(QvgptError, match=r"read q_logsumexp, .* linear, low_rank or mlp"):
        run(model(heads=categorical), ["ILQL"])
    run(model(heads=categorical), [{"ILQL": {"cql_weight": 0.0}}])
