"""Every objective, with a free table for values, learns what dynamic programming says it should."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from mdp import (
    CUT,
    SIDES,
    Game,
    Histories,
    Table,
    best,
    conservative,
    expectile,
    learn,
    mean,
    same_policy,
    same_q,
    same_v,
    soft,
    weighted_returns,
)

from qvgpt.categorical import Support, read_distribution
from qvgpt.objectives import (
    AWAC,
    AWR,
    FQE,
    FUDGE,
    ILQL,
    LM,
    QSFT,
    SARSA,
    Candidates,
    ControlledDecoding,
    DoubleQ,
    MonteCarlo,
    PathConsistency,
    ReturnDistribution,
    parse_objectives,
)
from qvgpt.trajectory import collate

FIXED, RANDOM = Game.draw(3), Game.draw(3, horizon=3, stochastic=True)
# a reward of 0 or 1 at the end and nothing before it
WON, LUCKY = Game.draw(3, sparse=True), Game.draw(7, 3, stochastic=True, sparse=True)
BERNOULLI = Support(0.0, 1.0, 2)
GAMES = pytest.mark.parametrize("game", [FIXED, RANDOM], ids=["fixed", "random"])
OTHER = Game.draw(11, 3, stochastic=True)
MORE_GAMES = pytest.mark.parametrize(
    "game", [FIXED, RANDOM, OTHER], ids=["fixed", "random", "other"]
)


@MORE_GAMES
def test_the_oracle_agrees_with_its_own_texts(game):
    q, v = game.solve(mean)
    found = weighted_returns(game)
    assert sorted(found) == game.pairs
    assert found == pytest.approx({pair: q[pair] for pair in game.pairs})
    for node, action in game.pairs:
        for expected, known in ((q[node, action], (node, action)), (v[node], (node,))):
            returns = game.returns(*known)
            assert sum(returns.values()) == pytest.approx(1)
            assert sum(x * p for x, p in returns.items()) == pytest.approx(expected, abs=1e-6)


def test_the_texts_are_of_every_kind():
    batch = RANDOM.batch()
    texts = RANDOM.texts()
    assert len({t.tokens[-1] for t in texts if not t.terminated}) > 3
    assert not batch.mask[torch.arange(len(texts)), -1].all()
    for game in (FIXED, RANDOM):
        assert any(t.terminated and sum(t.is_action) <= 2 for t in game.texts())
    masked = [t for t, m in zip(texts, batch.mask.sum(1), strict=True) if m < sum(t.is_action)]
    assert masked
    assert all(t.tokens[-1] == 2 and not t.terminated for t in masked)


@GAMES
@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("gamma", "per_turn"), [(0.8, False), (0.5, True)])
def test_monte_carlo_evaluates_the_data_policy(game, lambda_, gamma, per_turn):
    model = learn(MonteCarlo(gamma, lambda_, per_turn), Table(game), game.batch())
    q, v = game.solve(mean, gamma, per_turn)
    same_q(model, q, game)
    same_v(model, v, game)


@MORE_GAMES
@pytest.mark.parametrize("tau", [0.5, 0.7, 0.95])
def test_ilql_learns_the_expectile_of_its_data(game, tau):
    objective = ILQL(gamma=0.9, expectile=tau, cql_weight=0.0)
    model = learn(objective, Table(game), game.batch())
    q, v = game.solve(expectile(tau), 0.9)
    same_q(model, q, game)
    same_v(model, v, game)
    if tau == 0.5:
        same_q(model, game.solve(mean, 0.9)[0], game)


@GAMES
@pytest.mark.parametrize("tau", [0.5, 0.9])
def test_ilql_that_bootstraps_at_turns_follows_the_data_within_them(game, tau):
    """And v stands for what a cut turn would have gone on with."""
    objective = ILQL(gamma=0.9, expectile=tau, cql_weight=0.0, bootstrap="turn")
    model = learn(objective, Table(game), game.batch())
    q, v = game.solve(expectile(tau), 0.9, within=mean, cut=True)
    same_q(model, q, game)
    same_v(model, v, game)
    elsewhere = game.solve(expectile(tau), 0.9)[0]
    assert (max(abs(q[x] - elsewhere[x]) for x in game.pairs) > 0.05) == (tau != 0.5)


@GAMES
@pytest.mark.parametrize(("tau", "cut"), [(0.5, False), (0.9, True)])
def test_ilql_of_whole_turns_learns_the_expectile_over_turns(game, tau, cut):
    objective = ILQL(gamma=0.8, expectile=tau, cql_weight=0.0, level="turn")
    model = learn(objective, Histories(game), game.batch(cut), steps=800)
    q, v = game.solve_turns(expectile(tau), 0.8, cut)
    checked = set()
    for t in game.texts(cut=False):
        begins, said = 1, ()
        for i, token in enumerate(t.tokens):
            if not t.is_action[i]:
                begins = i + 1
                continue
            said = t.tokens[begins : i + 1]
            if i + 1 < len(t.tokens) and t.is_action[i + 1]:
                continue
            node = game.walk(t.tokens[:begins])
            checked.add((node, tuple(said)))
            wanted = torch.tensor(q[node, tuple(said)]).expand(2)
            found = model.q.detach()[:, model.where(tuple(t.tokens[:i])), token]
            torch.testing.assert_close(found, wanted, atol=1e-2, rtol=0)
            state = model.v.detach()[model.where(tuple(t.tokens[:begins]))]
            assert state.item() == pytest.approx(v[node], abs=1e-2)
    assert max(len(said) for _, said in checked) > 1
    assert len({node for node, _ in checked}) > 2
    if tau == 0.5:  # a mean of means: what the data policy earns, counted by the token
        assert v[0] == pytest.approx(game.solve(mean, 0.8, per_turn=True)[1][0])


@GAMES
def test_ilql_nears_the_optimum_as_its_expectile_nears_one(game):
    objective = ILQL(gamma=0.9, expectile=0.9995, cql_weight=0.0)
    model = learn(objective, Table(game), game.batch(), steps=1500)
    q, v = game.solve(best, 0.9)
    same_q(model, q, game)
    same_v(model, v, game)
    # and each step there is one up
    at = [game.solve(expectile(tau), 0.9)[1][0] for tau in (0.5, 0.7, 0.9, 0.99)]
    assert at == sorted(at)
    assert at[-1] <= v[0]


@GAMES
@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0])
def test_sarsa_evaluates_the_data_policy(game, lambda_):
    model = learn(SARSA(0.5, lambda_, per_turn_discount=True), Table(game), game.batch())
    q, v = game.solve(mean, 0.5, per_turn=True)
    same_q(model, q, game)
    same_v(model, v, game)


@MORE_GAMES
def test_double_q_finds_the_optimum(game):
    model = learn(DoubleQ(gamma=0.9, cql_weight=0.0), Table(game), game.batch())
    q, v = game.solve(best, 0.9)
    same_q(model, q, game)
    same_v(model, v, game)


@GAMES
@pytest.mark.parametrize(
    ("objective", "backup"),
    [(ILQL(0.9, 0.8), expectile(0.8)), (ILQL(0.9, 0.8, 0.4), expectile(0.8)), (DoubleQ(0.9), best)],
    ids=["ilql", "ilql_held_more", "double_q"],
)
def test_the_conservative_term_pulls_values_as_far_as_it_weighs(game, objective, backup):
    model = learn(objective, Table(game), game.batch())
    q, v = game.solve(backup, 0.9, held=conservative(objective.cql_weight))
    same_q(model, q, game, atol=2e-3)
    same_v(model, v, game, atol=2e-3)
    free, _ = game.solve(backup, 0.9)
    assert max(abs(q[x] - free[x]) for x in game.pairs) > objective.cql_weight / 4


@GAMES
def test_double_q_seeks_the_best_of_what_the_base_policy_might_say(game):
    shares = (0.5, 0.3, 0.2)
    base = {(s, a): shares[(s + a) % 3] for s, a in game.policy}
    said = replace(game, policy=base)
    free, _ = game.solve(best, 0.9)
    for candidates in (Candidates(top_k=2), Candidates(min_p=0.5), Candidates(min_p=1.0)):
        least = 0.5 if candidates.min_p == 1.0 else 0.3

        def restricted(q, p, least=least):
            return max(x for x, share in zip(q, p, strict=True) if share >= least)

        objective = DoubleQ(0.9, 0.0, top_k=candidates.top_k, min_p=candidates.min_p)
        assert objective.candidates == candidates
        model = Table(game)
        model.ref = Table(said).ref
        model.candidates = objective.candidates
        learn(objective, model, game.batch())
        q, v = said.solve(restricted, 0.9)
        same_q(model, q, game)
        same_v(model, v, game)
        assert max(abs(q[pair] - free[pair]) for pair in game.pairs) > 0.1


@GAMES
def test_fqe_evaluates_another_policy_than_that_of_the_data(game):
    other = replace(game, policy={(s, a): (a == 3) * 0.7 + (a == 4) * 0.3 for s, a in game.policy})
    model = Table(game)
    for (node, action), share in other.policy.items():
        model.judged[node, action] = share
    learn(FQE(gamma=0.9), model, game.batch())
    q, v = other.solve(mean, 0.9)
    same_q(model, q, game)
    same_v(model, v, game)
    model.judged = model.ref.exp() * (model.ref < 0)  # the data policy itself
    q, v = game.solve(mean, 0.9)
    learn(FQE(gamma=0.9), model, game.batch())
    same_q(model, q, game)


@MORE_GAMES
def test_a_language_model_clones_the_data(game):
    same_policy(learn(LM(), Table(game), game.batch()), lambda *_: 1.0, game)


@MORE_GAMES
@pytest.mark.parametrize(("share", "by_return"), [(0.4, False), (0.7, True)])
def test_filtered_cloning_clones_the_texts_that_are_kept(game, share, by_return):
    texts = sorted(game.texts(), key=lambda t: -t.total_reward)
    least = texts[round(share * len(texts)) - 1].total_reward
    kept = collate([t for t in texts if t.total_reward >= least - 1e-6], end_ids=[2])
    pairs = torch.stack([Table(game).at(kept)[:, :-1], kept.action], dim=-1)[kept.mask]
    times = Counter(map(tuple, pairs.tolist()))
    lm = LM(min_return=least) if by_return else LM(top_share=share)
    model = learn(parse_objectives([lm]).fitted_to(texts), Table(game), game.batch())
    same_policy(model, lambda *pair: times[pair] / game.policy[pair], game)


@GAMES
def test_awac_weighs_the_data_by_its_advantage(game):
    q, v = game.solve(mean)
    for t, most in ((0.7, 1e6), (0.3, 2.0)):
        both = parse_objectives([MonteCarlo(), AWAC(t, most)])
        model = learn(both, Table(game), game.batch())
        weight = {(s, a): min(math.exp((q[s, a] - v[s]) / t), most) for s, a in game.pairs}
        same_policy(model, lambda *pair, weight=weight: weight[pair], game)


@MORE_GAMES
def test_awr_weighs_the_data_by_what_was_observed(game):
    """E exp((G − V)/T) of the returns, chance included: more than exp((Q − V)/T)."""
    model = learn(parse_objectives([MonteCarlo(), AWR(0.7, 1e6)]), Table(game), game.batch())
    _, v = game.solve(mean)
    where_cut = {node: v[node] for node in v if node // SIDES == CUT}

    def weight(s, a):
        whole, cut = game.returns(s, a), game.returns(s, a, where_cut)
        if s // SIDES < CUT:  # one text of three; V stands for what it would have earned
            whole = {g: (2 * whole[g] + cut[g]) / 3 for g in whole | cut}
        return sum(p * math.exp((g - v[s]) / 0.7) for g, p in whole.items())

    same_policy(model, weight, game)


def test_soft_values_lie_between_the_mean_and_the_best():
    q = [1.0, 0.0, 0.5]
    p = [0.25, 0.5, 0.25]
    assert soft(1e3)(q, p) == pytest.approx(mean(q, p), abs=1e-3)
    assert soft(1e-3)(q, p) == pytest.approx(best(q, p), abs=1e-2)


@GAMES
@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0])
def test_path_consistency_finds_the_soft_optimum(game, lambda_):
    """Whoever wrote the data, and with replies drawn by chance as well."""
    objective = PathConsistency(eta=0.5, gamma=0.9, lambda_=lambda_)
    model = learn(objective, Table(game), game.batch(), steps=1200)
    q, v = game.solve(soft(0.5), 0.9)
    same_v(model, v, game)
    same_policy(model, lambda s, a: math.exp(q[s, a] / 0.5), game)


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0])
def test_least_squares_of_whole_paths_find_it_too(lambda_):
    objective = PathConsistency(eta=0.5, gamma=0.9, lambda_=lambda_, whole_path=True)
    model = learn(objective, Table(FIXED), FIXED.batch(), steps=1200)
    q, v = FIXED.solve(soft(0.5), 0.9)
    same_v(model, v, FIXED)
    same_policy(model, lambda s, a: math.exp(q[s, a] / 0.5), FIXED)


def test_least_squares_of_whole_paths_do_not_find_it_through_chance():
    objective = PathConsistency(eta=0.5, gamma=0.9, whole_path=True)
    model = learn(objective, Table(RANDOM), RANDOM.batch(), steps=1200)
    _, v = RANDOM.solve(soft(0.5), 0.9)
    with pytest.raises(AssertionError):
        same_v(model, v, RANDOM)


@pytest.mark.parametrize("game", [WON, LUCKY], ids=["fixed", "random"])
def test_q_sft_finds_the_optimum_in_the_ratio_of_two_policies(game):
    model = learn(QSFT(gamma=0.9), Table(game, dummy=[0]), game.batch(), steps=1200)
    q, _ = game.solve(best, 0.9)
    ratio = (model.log_pi() - model.ref).exp().detach()
    same_q(model, q, game, q=[ratio])


def read(model, **functional):
    """What is read of the learned distributions of (s, a), and of s."""
    centres = model.support.centres(model.v)
    tables = model.returns.detach(), model.v_returns.detach()
    return [read_distribution(table, centres, **functional) for table in tables]


def true(game, functional):
    """The same of the true ones."""
    nodes = {node for node, _ in game.pairs}
    return (
        {pair: functional(game.returns(*pair)) for pair in game.pairs},
        {node: functional(game.returns(node)) for node in nodes},
    )


@GAMES
@pytest.mark.parametrize("support", [Support(-6.0, 6.0, 33), Support(-6.0, 6.0, 33, sigma=0.75)])
def test_the_mean_of_a_learned_distribution_is_what_regression_learns(game, support):
    model = learn(ReturnDistribution(gamma=0.9), Table(game, 1, support), game.batch_with_noise())
    expected_q, expected_v = game.solve(mean, 0.9)
    q, v = read(model)
    same_q(model, expected_q, game, q=q)
    same_v(model, expected_v, game, v=v)


@pytest.mark.parametrize("game", [WON, LUCKY], ids=["fixed", "random"])
def test_functionals_are_those_of_the_true_returns(game):
    model = learn(ReturnDistribution(), Table(game, 1, BERNOULLI), game.batch_with_noise())

    def tilted(returns):
        return 0.3 * math.log(sum(p * math.exp(g / 0.3) for g, p in returns.items()))

    def worst(returns):  # of 0/1 returns: what of the worst 60 % is not 0
        return max(0.0, returns[1.0] - 0.4) / 0.6

    for functional, of in (
        ({"functional": "soft", "eta": 0.3}, tilted),
        ({"functional": "cvar", "alpha": 0.6}, worst),
    ):
        (q, v), (expected_q, expected_v) = read(model, **functional), true(game, of)
        same_q(model, expected_q, game, q=q)
        same_v(model, expected_v, game, v=v)


def test_q_sharp_is_the_soft_optimum_on_four_conditions():
    """Replies are fixed, γ = 1, β = 1/η and π₀ wrote the data: else it errs, and this way."""
    support = Support(0.0, 1.0, 9)  # has the returns that γ = ½ makes of 1

    def soft_q(game, gamma=1.0):
        table = Table(game, 1, support)
        model = learn(ReturnDistribution(gamma), table, game.batch_with_noise())
        return read(model, functional="soft", eta=0.3)[0][0]

    fixed, lucky, discounted = soft_q(WON), soft_q(LUCKY), soft_q(WON, 0.5)
    other = replace(WON, policy={(s, a): (a == 3) * 0.7 + (a == 4) * 0.3 for s, a in WON.policy})
    for q, base, gamma, eta, too_low, too_high in (
        (fixed, WON, 1.0, 0.3, False, False),
        (lucky, LUCKY, 1.0, 0.3, False, True),
        (discounted, WON, 0.5, 0.3, True, False),
        (fixed, WON, 1.0, 0.6, False, True),
        (fixed, WON, 1.0, 0.15, True, False),
        (fixed, other, 1.0, 0.3, True, True),
    ):
        expected, _ = base.solve(soft(eta), gamma)
        excess = torch.tensor([q[pair] - expected[pair] for pair in base.pairs])
        assert -excess.min() > 0.05 if too_low else -excess.min() < 1e-2
        assert excess.max() > 0.05 if too_high else excess.max() < 1e-2


@pytest.mark.parametrize("game", [WON, LUCKY], ids=["fixed", "random"])
def test_prefix_scorers_know_how_likely_a_text_ends_well(game):
    _, expected = game.solve(mean)
    model = learn(FUDGE(), Table(game, 1, BERNOULLI), game.batch_with_noise())
    same_v(model, expected, game, v=model.v_returns.detach().softmax(-1)[:, 1])
    log_odds = model.v_returns.detach().diff(dim=-1)[:, 0]
    same_v(model, expected, game, v=log_odds.sigmoid())
    for lambda_ in (0.0, 1.0):
        same_v(learn(ControlledDecoding(lambda_), Table(game), game.batch()), expected, game)
