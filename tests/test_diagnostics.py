"""Figures of values by hand, on exact values of solved games, and while training."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from mdp import Game, Table, mean
from rich.console import Console
from test_trainer import (
    FIT,
    TOKENIZER,
    Killed,
    _no_sync,  # noqa: F401
    model,
    run,
    stopped_at,
    texts,
)

from qvgpt import HeadsConfig, Trajectory
from qvgpt.bootstrap import calibration
from qvgpt.diagnostics import (
    Foretold,
    figures,
    foretold,
    out_of_reach,
    value_diagnostics,
)
from qvgpt.loop import fit
from qvgpt.objectives import METHODS, Values, parse_objectives
from qvgpt.run import read_log
from qvgpt.trajectory import centred, collate
from qvgpt.value_report import learning_section, value_charts, watched_section

# two prompts of two texts each; the last one was cut short
TEXTS = [
    Trajectory([1, 6, 7], [False, True, True], [0.0, 0.0, 1.0], True),
    Trajectory([1, 6, 8], [False, True, True], [0.0, 0.0, 0.0], True),
    Trajectory([2, 6, 7], [False, True, True], [0.0, 1.0, 2.0], True),
    Trajectory([2, 6, 8], [False, True, True], [0.0, 0.0, 2.0], False),
]
PROMPTS = [t.prompt for t in TEXTS]
BATCH = collate(TEXTS)
V = torch.tensor([[0.5, 1.0, 9.0], [0.5, 0.25, 9.0], [2.0, 2.0, 9.0], [2.0, 1.0, 1.0]])
Q = torch.tensor([[1.0, 1.0], [0.0, 0.25], [2.5, 2.0], [2.0, 1.0]])
APART = torch.zeros(4, 2)
APART[0, 0] = 0.5
VALUES = Values(
    v=V,
    target_q=torch.stack([Q + APART, Q - APART]),
    candidate_q_max=Q + 0.5,
    any_q_max=Q + 0.75,
    q_spread=torch.full((4, 2), 0.2),
    logit_spread=torch.full((4, 2), 0.4),
)


def look(values=VALUES, batch=BATCH, gamma=1.0, **more):
    return Foretold.of(foretold(values, batch, range(len(batch.row)), gamma, False, **more))


def test_figures_by_hand():
    found = figures(look(), PROMPTS)
    # of the texts that ended: V .5 1 .5 .25 2 2, returns to come 1 1 0 0 3 2
    slope = (11.5 - 6.25 * 7 / 6) / (9.5625 - 6.25**2 / 6)
    expected = {
        "slope": slope,
        "intercept": 7 / 6 - slope * 6.25 / 6,
        "ece": (1 * 0.25 + 2 * 0 + 1 * 0 + 2 * 0.5) / 6,  # V = .25, .5, 1, 2
        "rank_across": 1.0,
        "rank_within": 1.0,  # foretold half-way: 1 and .25, where 1 and 0 came
        "advantage_rank": math.sqrt(15 / 17),
        "advantage_within": 1.0,
        # r + V′ − Q: 0 0; .25 −.25; .5 0; −1 2
        "td_error": 1.5 / 8,
        "td_error_abs": 4 / 8,
        "td/2/mean": -0.25 / 4,
        "td/2/abs": 1.75 / 4,
        "td/7/mean": 1.75 / 4,
        "td/7/abs": 2.25 / 4,
        "overestimation": 0.5,
        "overestimation_return": (6.75 + 6 * 0.5 - 7) / 6,
        "overestimation_any": 0.75,
        "v_abs": 9.25 / 8,
        "q_abs": 9.75 / 8,
        "advantage_abs": 1.5 / 8,
        "advantage_to_logits": 0.5,
        "expectile_gap": -0.5 / 8,
        "twin_gap": 1 / 8,
        "reliability/0/v": 0.25,
        "reliability/0/return": 0.0,
        "reliability/3/v": 2.0,
        "reliability/3/return": 2.5,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["v_spread"] == pytest.approx(V[:, :2].std(correction=0).item())
    assert found["advantage_spread"] == pytest.approx((Q - V[:, :2]).std(correction=0).item())
    assert all(math.isfinite(x) for x in found.values())


def test_ranks_across_and_within_prompts_are_two_things():
    """V that knows which prompt is easy, and has the texts of each the wrong way round."""
    four = [replace(t, terminated=True) for t in TEXTS]
    v = torch.tensor([[0.5, 0.0, 0.0], [0.5, 1.0, 0.0], [2.0, 0.0, 0.0], [2.0, 3.0, 0.0]])
    found = figures(look(Values(v=v), collate(four)), PROMPTS)
    assert [found["rank_across"], found["rank_within"]] == pytest.approx([1.0, -1.0])
    turned = torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.5, 2.0, 0.0], [0.5, 0.0, 0.0]])
    found = figures(look(Values(v=turned), collate(four)), PROMPTS)
    assert [found["rank_across"], found["rank_within"]] == pytest.approx([-1.0, 1.0])


def many(rewards, prompts=40, samples=4):
    """Texts of prompts 0, 1 …, whose rewards are what `rewards(generator)` draws."""
    generator = np.random.default_rng(0)
    found = []
    for prompt in range(prompts):
        for _ in range(samples):
            paid = [float(r) for r in rewards(generator)]
            acts = [False] + [True] * len(paid)
            found.append(Trajectory([prompt, *range(len(paid))], acts, [0.0, *paid], True))
    return found


def of_many(texts, v, gamma=1.0):
    """`figures` where V is `v` of batch and states."""
    batch = collate(texts)
    f = look(Values(v=v(len(texts), batch.reward.size(1) + 1)), batch, gamma)
    return f, figures(f, [t.prompt for t in texts])


@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.9])
def test_a_v_that_tells_no_texts_apart_has_no_rank_within(gamma):
    """Nor where equal values are computed in batches, and rounded otherwise."""
    texts = many(lambda generator: [0.0] * 5 + [generator.random()])
    _, found = of_many(texts, lambda *shape: torch.full(shape, 0.12), gamma)
    assert found["rank_within"] == 0
    rounded = torch.tensor([0.12, 0.12 + 2e-8])
    _, found = of_many(texts, lambda n, m: rounded[torch.arange(n) % 2, None].expand(n, m), gamma)
    assert found["rank_within"] == 0


def test_what_was_earned_before_is_known():
    texts = many(lambda generator: generator.integers(5, size=6) / 4, prompts=8)
    f, found = of_many(texts, torch.zeros, gamma=0.5)
    for text, t in zip(f.texts(), texts, strict=True):
        paid = 0.5 ** np.arange(6) * t.reward[1:]
        np.testing.assert_allclose(text["earned"], np.cumsum(paid) - paid)
    assert found["rank_within"] > 0.9  # of six rewards three are known, the greater ones


def test_equal_returns_are_equal_however_they_were_paid():
    def paid(generator):
        return np.diff(np.append(np.sort(generator.random(7)) * 0.37, 0.37), prepend=0.0)

    _, found = of_many(many(paid), lambda *shape: torch.rand(shape))
    assert found["rank"] != 0
    assert not {"rank_within", "rank_across"} & found.keys()


def test_where_returns_are_centred_nothing_is_said_of_prompts():
    texts = centred(many(lambda generator: generator.random(3)))
    _, found = of_many(texts, lambda *shape: torch.rand(shape))
    assert "rank_within" in found
    assert "rank_across" not in found


def test_where_v_alone_is_learned_nothing_is_said_of_q():
    found = figures(look(Values(v=V)), PROMPTS)
    of_q = {"q_rank", "q_abs", "q_spread", "advantage_rank", "overestimation", "twin_gap",
            "overestimation_any", "expectile_gap", "advantage_to_logits",
            "advantage_within"}  # fmt: skip
    assert not of_q & found.keys()
    # r + V′ − V: .5 0; −.25 −.25; 1 0; −1 2
    assert found["td_error"] == pytest.approx(2 / 8)
    m = model()
    torch.nn.init.ones_(m.heads.v.layers[-1].weight)  # and Q, which begins at 0, is 0 still
    summary = value_diagnostics(m, texts(8))
    assert (summary["q"]["mse"], summary["q"]["calibration"]) == (None, [])
    assert summary["v"]["mse"] > 0
    json.dumps(summary, allow_nan=False)
    assert "Q of tokens" not in value_charts(summary)


def test_what_was_cut_short_has_no_return():
    cut = [replace(t, terminated=False) for t in TEXTS]
    found = figures(look(batch=collate(cut)), PROMPTS)
    assert not [name for name in found if name.startswith(("slope", "ece", "rank", "reliability"))]
    assert found["td_error_abs"] > 0
    assert math.isnan(out_of_reach(look(batch=collate(cut)), 0.0, 1.0))


def test_units_are_those_of_the_rewards():
    found = figures(look(reward_scale=0.5), PROMPTS)
    plain = figures(look(), PROMPTS)
    for name in ("slope", "rank", "rank_within"):
        assert found[name] == pytest.approx(plain[name])
    of_q = ("overestimation", "overestimation_any", "twin_gap")
    for name in ("intercept", "ece", "td_error", "v_spread", *of_q):
        assert found[name] == pytest.approx(2 * plain[name])
    assert found["advantage_to_logits"] == pytest.approx(1.0)


def test_out_of_reach_by_hand():
    # returns 0 to 3, reach 3; V and Q from 0 to 2.5
    assert out_of_reach(look(), 0.0, 1.0) == 0
    high = look(replace(VALUES, v=V + 7.0))  # up to 9: 6 above
    assert out_of_reach(high, 0.0, 1.0) == pytest.approx(6 / 3, rel=0.01)
    assert out_of_reach(high, -3.0, 1.0) == pytest.approx(6 / 6, rel=0.01)  # elsewhere −3 came
    low = look(replace(VALUES, target_q=VALUES.target_q - 4.0))  # down to −4
    assert out_of_reach(low, 0.0, 1.0) == pytest.approx(4 / 3, rel=0.05)
    nothing = collate([replace(t, reward=[0.0] * 3) for t in TEXTS])
    assert out_of_reach(look(batch=nothing), 0.0, 0.0) == pytest.approx(2.5, rel=0.05)


def test_equal_predictions_share_a_bin():
    v = np.array([0.5] * 8 + [2.0] * 5)
    came = np.array([0.0, 1.0] * 4 + [1.0, 2.0, 2.0, 2.0, 3.0])
    found = calibration(v, came)
    assert [(t["predicted"], t["actual"], t["n"]) for t in found] == [(0.5, 0.5, 8), (2.0, 2.0, 5)]


GAME = Game.draw(3, horizon=3, stochastic=True)


def exact(gamma=1.0, noise=0.0):
    """A table that holds the data policy's values, or those moved by noise."""
    q, v = GAME.solve(mean, gamma)
    table = Table(GAME)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        table.v.zero_()
        for node, value in v.items():
            table.v[node] = value + noise * torch.randn((), generator=generator)
        for pair, value in q.items():
            table.q[:, *pair] = value
    return table


def of_the_game(table, gamma=1.0, cut=False):
    batch = GAME.batch(cut)
    with torch.no_grad():
        f = look(table(batch, {"v", "target_q"}), batch, gamma)
    return f, figures(f, [t.prompt for t in GAME.texts(cut)])


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_exact_values_of_a_game_have_no_error(gamma):
    """Every text is there as often as it is likely, so that figures are expectations."""
    f, found = of_the_game(exact(gamma), gamma)
    tiny = {"abs": 1e-5}
    assert found["slope"] == pytest.approx(1.0, **tiny)
    assert found["intercept"] == pytest.approx(0.0, **tiny)
    assert found["ece"] == pytest.approx(0.0, **tiny)
    assert found["rank_across"] == pytest.approx(1.0)
    assert found["twin_gap"] == 0
    assert found["expectile_gap"] == pytest.approx(0.0, **tiny)  # V is the mean of Q
    # ranks counted another way: each value compared with each
    ranked = [((x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) - 1) / 2)
              for x in (f.v, f.to_come)]  # fmt: skip
    assert found["rank"] == pytest.approx(np.corrcoef(*ranked)[0, 1])
    assert 0.2 < found["rank"] < 1
    assert found["rank_within"] > 0.2
    assert found["td_error_abs"] > 0.02  # the luck of the replies
    for cut in (False, True):  # where a text was cut, V of what follows stands for it
        f, _ = of_the_game(exact(gamma), gamma, cut)
        assert f.td_error.mean() == pytest.approx(0.0, **tiny)
        assert (f.ended == 0).any() == cut


def test_wrong_values_of_a_game_have_an_error():
    right = of_the_game(exact())[1]
    noisy = of_the_game(exact(noise=1.0))[1]
    assert noisy["ece"] > 0.2
    assert noisy["rank"] < right["rank"]
    table = exact()
    with torch.no_grad():
        table.v.mul_(2).add_(1)
    twice = of_the_game(table)[1]
    assert twice["slope"] == pytest.approx(0.5, abs=1e-5)
    assert twice["intercept"] == pytest.approx(-0.5, abs=1e-5)
    assert twice["rank"] == pytest.approx(right["rank"])


def test_the_order_in_which_batches_are_seen_changes_nothing():
    rows = foretold(VALUES, BATCH, range(4), 1.0, False)
    expected, found = Foretold.of(rows), Foretold.of(torch.cat([rows[4:], rows[:4]]))
    assert figures(found, PROMPTS) == figures(expected, PROMPTS)


WATCHED = replace(FIT, max_steps=4, eval_every=2)
ONE_IN_EIGHT = {"overestimation", "overestimation_return", "overestimation_any",
                "advantage_to_logits"}  # fmt: skip
OF_Q = {"values/q_rank", "values/overestimation", "values/overestimation_any", "values/twin_gap",
        "values/td_error_abs"}  # fmt: skip


def watched(objectives, tmp_path, heads=HeadsConfig(), options=WATCHED, **more):  # noqa: B008
    m = model(heads=heads)
    summary = run(m, objectives, options, eval_data=texts(20), output=tmp_path, **more)
    log = read_log(tmp_path / "log.jsonl")
    return m, summary, [line for line in log if any(k.startswith("values/") for k in line)]


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"FQE"}))
def test_every_method_is_watched_as_far_as_it_has_values(method, tmp_path):
    heads = HeadsConfig()
    if method in ("ReturnDistribution", "FUDGE"):
        heads = HeadsConfig("categorical", rank=4, bins=2)
    objectives = ["LM", method] if method not in ("AWAC", "AWR") else [method, "MonteCarlo"]
    _, summary, lines = watched(objectives, tmp_path, heads)
    if method in ("LM", "QSFT"):
        assert lines == []
        assert summary["values"] == {}
        return
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[-1]["values/td_error_abs"] == summary["values"]["td_error_abs"]
    of_v_alone = method in ("FUDGE", "ControlledDecoding", "PathConsistency")
    assert OF_Q & lines[-1].keys() == ({"values/td_error_abs"} if of_v_alone else OF_Q)
    assert lines[-1]["values/diverging"] == 0
    assert all(math.isfinite(x) for x in lines[-1].values())
    assert json.loads(json.dumps(summary)) == summary


def test_the_log_says_what_the_model_that_is_left_does(tmp_path):
    """Evaluated after the last step, batch by batch, packed or not: the same figures."""
    m, summary, _ = watched(["LM", "MonteCarlo"], tmp_path / "a")
    found = value_diagnostics(m, texts(20))["figures"]
    ours = {k: x for k, x in summary["values"].items() if k in found.keys() - ONE_IN_EIGHT}
    assert ours == pytest.approx({k: found[k] for k in ours}, abs=1e-4)
    assert summary["values"].keys() - found.keys() == {"out_of_reach", "diverging"}
    packed = replace(WATCHED, packed=True, micro_batch_size=4)
    _, other, _ = watched(["LM", "MonteCarlo"], tmp_path / "b", options=packed)
    assert other["values"].keys() == summary["values"].keys()


@torch.no_grad()
def test_a_huge_q_of_an_unlikely_token_is_seen():
    """One that was never taken and is not among the likeliest: the figures of those miss it."""
    m, size = model(heads=HeadsConfig("linear")), TOKENIZER.vocab_size
    m.trunk.norm.bias.fill_(1.0)  # the sum of every state is now its width, 16
    assert size > 20  # so that not all tokens are among the likeliest
    unlikely = TOKENIZER.template.pad
    m.trunk.output_weight[unlikely] = -1.0
    for head in [*m.heads.q, *m.heads.target_q]:
        head.weight[unlikely] = 10.0
    found = value_diagnostics(m, texts(8))["figures"]
    assert found["overestimation"] == pytest.approx(0.0, abs=1e-3)
    assert found["overestimation_any"] == pytest.approx(160.0, rel=1e-4)


@pytest.mark.parametrize("packed", [True, False])
def test_batches_change_no_figure(tmp_path, packed):
    still = replace(WATCHED, lr=0.0, packed=packed)
    found = []
    for size in (3, 8, 40):
        m = model()
        with torch.no_grad():
            for p in m.heads.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        options = replace(still, micro_batch_size=size)
        summary = run(m, ["LM", "ILQL"], options, eval_data=texts(20))
        found.append(summary["values"])
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name in other.keys() - ONE_IN_EIGHT:
            assert other[name] == pytest.approx(found[0][name], abs=1e-4), name


def said(objectives, options):
    console = Console(file=io.StringIO(), width=1000)
    summary = fit(model(), texts(), parse_objectives(objectives), options, eval_data=texts(20),
                  console=console)  # fmt: skip
    return summary, console.file.getvalue()


def test_values_that_diverge_are_warned_of_once():
    healthy = replace(FIT, max_steps=6, eval_every=1)
    summary, text = said(["MonteCarlo"], healthy)
    assert "warning" not in text
    assert summary["values"]["diverging"] == 0
    assert text.count("values: slope") + text.count("values: ece") >= 1
    # at each step the heads are thrown far beyond returns of 0 to 1
    summary, text = said(["MonteCarlo"], replace(healthy, value_lr=30.0))
    assert text.count("warning: values diverge") == 1
    [line] = [line for line in text.splitlines() if "warning" in line]
    assert line.startswith("step 3/6")
    assert summary["values"]["diverging"] == 6
    assert summary["values"]["out_of_reach"] > 1


def test_the_count_of_bad_evaluations_outlives_a_stop(tmp_path):
    """A resumed run warns at the same evaluation as one that was never stopped."""
    wild = replace(FIT, max_steps=6, eval_every=1, value_lr=30.0, save_every=2)
    with stopped_at(3), pytest.raises(Killed):
        run(model(), ["MonteCarlo"], wild, eval_data=texts(20), output=tmp_path)
    summary = run(model(), ["MonteCarlo"], wild, eval_data=texts(20), output=tmp_path, resume=True)
    assert summary["values"]["diverging"] == 6


def test_a_report_draws_what_was_logged(tmp_path):
    _, _, lines = watched(["LM", "ILQL"], tmp_path)
    log = read_log(tmp_path / "log.jsonl")
    [curves], [values] = learning_section(log), watched_section(log)
    assert "values/" not in curves.body_html
    for part in ("V at step 2", "V at step 4", "TD error by position", "Rank correlations",
                 "best Q among likely tokens", "y = x"):  # fmt: skip
        assert part in values.body_html
    assert "diverged" not in values.paragraph
    bad = [{**line, "values/diverging": 3.0} for line in lines]
    assert "diverged" in watched_section(bad)[0].paragraph
    assert watched_section([{"step": 1, "total": 1.0}]) == learning_section([]) == []
