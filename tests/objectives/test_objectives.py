"""Worked numbers; and on problems small enough to solve by hand, training must reach the answer."""

import math

import pytest
import torch

from qvgpt.categorical import Support
from qvgpt.errors import QvgptError
from qvgpt.objectives import (
    AWAC,
    AWR,
    FQE,
    FUDGE,
    ILQL,
    LM,
    METHODS,
    QSFT,
    SARSA,
    Candidates,
    ControlledDecoding,
    DoubleQ,
    MonteCarlo,
    Objectives,
    PathConsistency,
    ReturnDistribution,
    Values,
    parse_objectives,
)
from qvgpt.objectives.base import discount
from qvgpt.trajectory import Trajectory, collate

# one decision, two actions: token 1 pays 1, token 2 pays 0
BANDIT = collate([Trajectory([0, a], [False, True], [0.0, float(a == 1)], True) for a in (1, 2)])
# two decisions of one turn, and one more row with a single decision
TWO_ROWS = collate(
    [
        Trajectory([0, 1, 2], [False, True, True], [0.0, 0.5, 1.0], True),
        Trajectory([0, 3], [False, True], [0.0, 2.0], False),
    ]
)
VALUES = Values(
    q=torch.tensor([[[1.0, 2.0], [3.0, 9.0]], [[0.0, 1.0], [1.0, 9.0]]]),
    target_q=torch.tensor([[[1.0, 2.0], [2.0, 9.0]], [[2.0, 0.0], [3.0, 9.0]]]),
    v=torch.tensor([[1.0, 4.0, 7.0], [1.5, 4.0, 9.0]]),
    q_logsumexp=torch.tensor([[[2.0, 2.0], [4.0, 9.0]], [[1.0, 3.0], [1.0, 9.0]]]),
    q_max=torch.tensor([[2.0, 3.0, 9.0], [2.5, 5.0, 9.0]]),
    target_q_at_argmax=torch.tensor(
        [[[2.0, 2.0, 9.0], [3.0, 5.0, 9.0]], [[1.0, 3.0, 9.0], [4.0, 4.0, 9.0]]]
    ),
    logprob=torch.tensor([[-1.0, -2.0], [-3.0, -9.0]]),
    token_logprob=torch.tensor([[-1.0, -2.0], [-3.0, -9.0]]),
)


def test_v_needs_one_state_more_than_steps():
    v = torch.zeros(2, 3)
    Values(v=v)
    Values(v=v, logprob=torch.zeros(2, 2))
    for name, shape in {"logprob": (2, 3), "q": (1, 2, 3), "target_q": (1, 2, 1)}.items():
        with pytest.raises(ValueError, match="v needs one state more than steps"):
            Values(v=v, **{name: torch.zeros(shape)})


def parts(loss):
    return {name: value.item() for name, value in loss.parts.items()}


def test_ilql_by_hand():
    # targets: .5 + .9·4 = 4.1;  1 + 0;  2 + .9·4 = 5.6
    q = (3.1**2 + 1**2 + 2.6**2) + (4.1**2 + 0 + 4.6**2)  # the twins are summed
    # u = min Q̄ − v: 0, −4, .5
    v = 0.2 * 16 + 0.8 * 0.25
    cql = (1 + 0 + 1) + (1 + 2 + 0)
    loss = ILQL(gamma=0.9, expectile=0.8, cql_weight=0.1)(VALUES, TWO_ROWS)
    assert parts(loss) == pytest.approx({"q": q / 3, "v": v / 3, "cql": cql / 3})
    assert loss.total.item() == pytest.approx((q + v + 0.1 * cql) / 3)


def test_ilql_of_whole_turns_by_hand():
    """Two turns of two tokens; one token and then an observation; a turn that was cut."""
    batch = collate(
        [
            Trajectory([0, 1, 2, 7, 1, 3], [False, True, True, False, True, True],
                       [0.0, 1.0, 0.25, 0.5, 2.0, 4.0], True),
            Trajectory([0, 2, 7], [False, True, False], [0.0, 3.0, 0.0], False),
            Trajectory([0, 1, 1], [False, True, True], [0.0, 9.0, 9.0], False),
        ],
        end_ids=[2],
    )  # fmt: skip
    first, reward = batch.turns()
    assert first[0].tolist() == [0, 0, 2, 2]
    assert reward[0].tolist() == [1.75, 1.75, 6.0, 6.0]  # the observation's goes to the first turn
    assert batch.ends_whole_turn.int().tolist() == [[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    q = torch.arange(12.0).view(1, 3, 4)
    v = torch.tensor([[1.0, 9.0, 2.0, 9.0, 9.0], [3.0, 4.0, 9.0, 9.0, 9.0], [9.0] * 5])
    values = Values(q=q, target_q=q, v=v)
    ilql = ILQL(gamma=0.5, expectile=0.75, cql_weight=0.0, level="turn")
    assert ilql.per_turn_discount
    # targets: 1.75 + ½·2 = 2.75;  6;  3 + ½·4 = 5;  Q there: 1, 3, 4;  v: 1, 2, 3
    loss = ilql(values, batch)
    expected = {"q": (1.75**2 + 3**2 + 1) / 3, "v": 0.75 * (0 + 1 + 1) / 3}
    assert parts(loss) == pytest.approx(expected)
    assert ilql.counted(batch).sum() == 3
    one = ILQL(gamma=0.5, expectile=0.75, cql_weight=0.0)
    assert parts(one(values, batch)) != pytest.approx(expected)
    assert one.counted(batch).sum() == batch.mask.sum() == 7


def test_candidates_are_those_of_guidance():
    logits = torch.tensor([[0.0, -1.0, -2.0, -3.0], [5.0, 5.0, 5.0, 1.0]]).log_softmax(-1)
    for candidates, expected in (
        (Candidates(), [[1, 1, 1, 1]] * 2),
        (Candidates(top_k=2), [[1, 1, 0, 0], [1, 1, 1, 0]]),
        (Candidates(top_k=9, min_p=0.13), [[1, 1, 1, 0], [1, 1, 1, 0]]),
        (Candidates(top_k=2, min_p=0.9), [[1, 0, 0, 0], [1, 1, 1, 0]]),
    ):
        assert candidates.among(logits).int().tolist() == expected
    assert Candidates(min_p=0.0).are_all


def test_monte_carlo_by_hand():
    # returns: .5 + .9·1 = 1.4;  1;  2 + .9·4 = 5.6 (cut short: bootstraps)
    q = (0.4**2 + 1 + 2.6**2) + (1.4**2 + 0 + 4.6**2)
    v = 0.4**2 + 3**2 + 4.1**2
    loss = MonteCarlo(gamma=0.9)(VALUES, TWO_ROWS)
    assert parts(loss) == pytest.approx({"q": q / 3, "v": v / 3})
    assert loss.total.item() == pytest.approx((q + v) / 3)


def test_monte_carlo_with_lambda_zero_has_the_td_target_of_ilql():
    td = MonteCarlo(gamma=0.9, lambda_=0.0)(VALUES, TWO_ROWS)
    assert parts(td)["q"] == pytest.approx(parts(ILQL(gamma=0.9)(VALUES, TWO_ROWS))["q"])


def test_sarsa_by_hand():
    # slow Q, the mean of the heads: 1.5, 1; 2.5. Targets: .5 + .9·1 = 1.4;  1;  2 + .9·4 = 5.6
    q = (0.4**2 + 1 + 2.6**2) + (1.4**2 + 0 + 4.6**2)
    v = 0.5**2 + 3**2 + 1
    loss = SARSA(gamma=0.9, lambda_=0.0)(VALUES, TWO_ROWS)
    assert parts(loss) == pytest.approx({"q": q / 3, "v": v / 3})
    assert loss.total.item() == pytest.approx((q + v) / 3)


def test_sarsa_with_lambda_one_has_the_targets_of_monte_carlo():
    sarsa = SARSA(gamma=0.9, lambda_=1.0)(VALUES, TWO_ROWS)
    assert parts(sarsa)["q"] == parts(MonteCarlo(gamma=0.9)(VALUES, TWO_ROWS))["q"]


def test_fqe_by_hand():
    # Σ π Q̄: targets .5 + .9·{2; 1} per head = 2.3; 1.4;  1; 1;  2 + .9·{1; 3} = 2.9; 4.7
    expected = torch.tensor(
        [[[5.0, 2.0, 9.0], [1.0, 1.0, 9.0]], [[3.0, 1.0, 9.0], [2.0, 3.0, 9.0]]]
    )
    values = Values(q=VALUES.q, v=VALUES.v, expected_q=expected)
    q = (1.3**2 + 1 + 0.1**2) + (1.4**2 + 0 + 3.7**2)
    v = (1 - 4) ** 2 + (4 - 1.5) ** 2 + 0
    loss = FQE(gamma=0.9)(values, TWO_ROWS)
    assert parts(loss) == pytest.approx({"q": q / 3, "v": v / 3})


def test_double_q_by_hand():
    # min Q̄ at the best token: 1, 2; 3, 4. Targets: .5 + .9·2 = 2.3;  1;  2 + .9·4 = 5.6
    q = (1.3**2 + 1 + 2.6**2) + (2.3**2 + 0 + 4.6**2)
    v = 0 + 2**2 + 1.5**2
    gap = (2 - 0.5) + (3 - 1.5) + (2.5 - 2)
    cql = (1 + 0 + 1) + (1 + 2 + 0)
    loss = DoubleQ(gamma=0.9, cql_weight=0.1)(VALUES, TWO_ROWS)
    expected = {"q": q / 3, "v": v / 3, "gap": gap / 3, "cql": cql / 3}
    assert parts(loss) == pytest.approx(expected)
    assert loss.total.item() == pytest.approx((q + v + 0.1 * cql) / 3)
    free = DoubleQ(gamma=0.9, cql_weight=0.0)
    assert free.needs == {"q", "v", "q_max", "target_q_at_argmax"}
    assert free(VALUES, TWO_ROWS).total.item() == pytest.approx((q + v) / 3)


def test_path_consistency_by_hand():
    values = Values(
        logprob=torch.tensor([[-1.0, -2.0], [-3.0, -9.0]]),
        ref_logprob=torch.tensor([[-2.0, -1.0], [-1.0, -9.0]]),
        v=VALUES.v,
    )
    # η·log-ratios ½, −½; −1. One step: .5 − ½ + .9·4 = 3.6;  1 + ½;  2 + 1 + .9·4 = 6.6
    one = (3.6 - 1) ** 2 + (1.5 - 4) ** 2 + (6.6 - 1.5) ** 2
    loss = PathConsistency(eta=0.5, gamma=0.9, lambda_=0.0)(values, TWO_ROWS)
    assert parts(loss) == pytest.approx({"v": one / 3, "pi": one / 3})
    # the whole path: .5 − ½ + .9·1.5 = 1.35
    path = (1.35 - 1) ** 2 + (1.5 - 4) ** 2 + (6.6 - 1.5) ** 2
    loss = PathConsistency(eta=0.5, gamma=0.9)(values, TWO_ROWS)
    assert parts(loss) == pytest.approx({"v": path / 3, "pi": path / 3})
    loss = PathConsistency(eta=0.5, gamma=0.9, whole_path=True)(values, TWO_ROWS)
    assert parts(loss) == pytest.approx({"path": path / 3})


def test_q_sft_by_hand():
    values = Values(
        logprob=torch.tensor([[-1.0, -2.0], [-3.0, -9.0]]),
        dummy_logprob=torch.tensor([[-4.0, -4.0], [-5.0, -9.0]]),
        max_ratio=torch.tensor([[9.0, 0.5, 9.0], [9.0, 0.75, 9.0]], requires_grad=True),
    )
    batch = collate(
        [
            Trajectory([0, 1, 2], [False, True, True], [0.0, 0.25, 0.5], True),
            Trajectory([0, 3], [False, True], [0.0, 1.0], False),
        ]
    )
    # weights: .25 + .5·.5; .5 at the end; 1 + .5·.75, which is 1
    expected = (0.5 * 1 + 0.5 * 4) + (0.5 * 2 + 0.5 * 4) + 3
    loss = QSFT(gamma=0.5)(values, batch)
    assert parts(loss) == pytest.approx({"nll": expected / 3, "weight": 2 / 3})
    assert loss.total.item() == pytest.approx(expected / 3)
    assert not loss.total.requires_grad


def test_the_current_token_alone_learns_from_a_path():
    logprob = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]], requires_grad=True)
    v = VALUES.v.clone().requires_grad_()
    values = Values(logprob=logprob, ref_logprob=torch.zeros(2, 2), v=v)
    PathConsistency(eta=0.5)(values, TWO_ROWS).total.backward()
    # G = .5 + .5 + 1 + 1 = 3, then 2: residuals V − G of −2, 2, times η; mean of the squares
    assert logprob.grad[0].tolist() == pytest.approx([2 * 0.5 * -2 / 3, 2 * 0.5 * 2 / 3])
    assert v.grad[0].tolist() == pytest.approx([2 * -2 / 3, 2 * 2 / 3, 0.0])
    assert logprob.grad[1, 1] == 0
    assert v.grad[1, 1] == 0  # what a cut text bootstraps from


def test_all_of_a_path_learns_by_least_squares():
    logprob = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]], requires_grad=True)
    v = VALUES.v.clone().requires_grad_()
    values = Values(logprob=logprob, ref_logprob=torch.zeros(2, 2), v=v)
    PathConsistency(eta=0.5, whole_path=True)(values, TWO_ROWS).total.backward()
    # residuals as above; the second token is in both
    assert logprob.grad[0].tolist() == pytest.approx([2 * 0.5 * -2 / 3, 2 * 0.5 * (-2 + 2) / 3])
    assert v.grad[0].tolist() == pytest.approx([2 * -2 / 3, 2 * 2 / 3, 0.0])
    assert v.grad[1, 1] == -v.grad[1, 0] != 0  # what a cut text bootstraps from learns as well


# two bins, 0 and 1; the first text ends with 1 after 0, the second is cut
SHORT = collate(
    [
        Trajectory([0, 1, 2], [False, True, True], [0.0, 0.0, 1.0], True),
        Trajectory([0, 3], [False, True], [0.0, 1.0], False),
    ]
)
ODDS = torch.tensor([[[0.0, 0.0], [0.0, math.log(3)], [0.0, math.log(7)]]]).expand(2, 3, 2)
NLL = [math.log(2), math.log(4 / 3), math.log(8 / 7)]


def test_return_distribution_by_hand():
    values = Values(
        return_logits=ODDS[None, :, 1:].expand(2, 2, 2, 2),
        v_return_logits=ODDS,
        support=Support(0.0, 1.0, 2),
    )
    objective = ReturnDistribution()
    loss = objective(values, SHORT)
    assert objective.counted(SHORT).tolist() == [[True, True], [False, False]]
    expected = {"q": 2 * (NLL[1] + NLL[2]) / 2, "v": (NLL[0] + NLL[1]) / 2}
    assert parts(loss) == pytest.approx(expected)
    # γ = ½: a quarter of the way from one bin to the other, at the first decision
    half = ReturnDistribution(gamma=0.5)(values, SHORT)
    mixed = -0.5 * math.log(0.5) - 0.5 * math.log(0.5)
    assert parts(half)["v"] == pytest.approx((mixed + NLL[1]) / 2)


def test_fudge_by_hand():
    values = Values(v_return_logits=ODDS, support=Support(0.0, 1.0, 2))
    loss = FUDGE()(values, SHORT)
    assert parts(loss) == pytest.approx({"v": (NLL[0] + NLL[1]) / 2, "end": NLL[2] / 2})
    wide = Values(v_return_logits=torch.zeros(2, 3, 5), support=Support(0.0, 1.0, 5))
    with pytest.raises(QvgptError, match="FUDGE needs categorical heads of 2 bins"):
        FUDGE()(wide, SHORT)


def test_controlled_decoding_by_hand():
    v = torch.tensor([[0.5, 0.25, 0.75], [0.5, 0.25, 0.0]])
    end = (0.75 - 1) ** 2
    # the observed reward: 1, 1; the cut text: 1 + .25
    loss = ControlledDecoding()(Values(v=v), SHORT)
    seen = 0.5**2 + 0.75**2 + 0.75**2
    assert parts(loss) == pytest.approx({"v": seen / 3, "end": end / 3})
    # Bellman: .25, 1; 1.25
    loss = ControlledDecoding(lambda_=0.0)(Values(v=v), SHORT)
    bellman = 0.25**2 + 0.75**2 + 0.75**2
    assert parts(loss) == pytest.approx({"v": bellman / 3, "end": end / 3})


def test_awac_by_hand():
    # A = min Q̄ − v: 0, −4, .5
    weights = torch.tensor([0.0, -2.0, 0.25]).exp()
    expected = (weights * torch.tensor([1.0, 2.0, 3.0])).sum().item() / 3
    loss = AWAC(temperature=2.0)(VALUES, TWO_ROWS)
    assert loss.total.item() == pytest.approx(expected)
    plain = AWAC(temperature=1e9)(VALUES, TWO_ROWS)
    assert plain.total.item() == pytest.approx(LM()(VALUES, TWO_ROWS).total.item())


def test_awr_weighs_by_the_observed_return():
    values = Values(
        logprob=torch.tensor([[-1.0, -2.0]]), v=torch.tensor([[0.5, 1.0, 7.0]], requires_grad=True)
    )
    batch = collate([Trajectory([0, 5, 6], [False, True, True], [0.0, 0.0, 2.0], True)])
    # G − v: 2 − .5 and 2 − 1
    expected = (math.exp(1.5) * 1 + math.exp(1.0) * 2) / 2
    assert AWR()(values, batch).total.item() == pytest.approx(expected)
    assert AWR(max_weight=1.0)(values, batch).total.item() == pytest.approx(1.5)
    # λ = 0: 0 + v(1) − v(0) = .5, then 2 − 1
    expected = (math.exp(0.5) * 1 + math.exp(1.0) * 2) / 2
    assert AWR(lambda_=0.0)(values, batch).total.item() == pytest.approx(expected)
    assert not AWR()(values, batch).total.requires_grad  # V learns nothing from it


def test_lm_on_completions_or_on_all():
    batch = collate([Trajectory([0, 5, 6, 7], [False, False, True, True], [0.0] * 4, True)])
    completions = Values(logprob=torch.tensor([[-1.0, -3.0]]))
    everything = Values(token_logprob=torch.tensor([[-5.0, -1.0, -3.0]]))
    assert LM().needs == {"logprob"}
    assert LM(on="all").needs == {"token_logprob"}
    assert LM()(completions, batch).total == 2.0
    assert LM(on="all")(everything, batch).total == 3.0


def test_filtered_lm_learns_the_good_texts_only():
    good = Trajectory([0, 5, 6], [False, True, True], [0.0, 0.4, 0.3], True)
    bad = Trajectory([0, 5], [False, True], [0.0, 0.6], True)
    batch = collate([good, bad])
    values = Values(logprob=torch.tensor([[-1.0, -3.0], [-100.0, 0.0]]))
    everything = Values(token_logprob=torch.tensor([[-1.0, -4.0], [-100.0, 0.0]]))
    assert LM(min_return=0.7)(values, batch).total == 2.0
    assert LM(on="all", min_return=0.7)(everything, batch).total == 2.5
    assert LM(min_return=0.9)(values, batch).total == 0.0
    assert LM(min_return=0.6)(values, batch).total == pytest.approx(104 / 3)


def test_the_top_share_is_that_of_the_whole_data():
    returns = [3.0, 1.0, 2.0, 0.0, 2.0]
    assert LM(top_share=0.2).fitted_to(returns) == LM(min_return=3.0)
    assert LM(top_share=0.4).fitted_to(returns) == LM(min_return=2.0)  # its equal comes along
    assert LM(top_share=0.01).fitted_to(returns) == LM(min_return=3.0)
    assert LM(top_share=1.0, on="all").fitted_to(returns) == LM(min_return=0.0, on="all")
    assert LM(min_return=0.5).fitted_to(returns) == LM(min_return=0.5)
    with pytest.raises(QvgptError, match="top_share is of the whole data"):
        LM(top_share=0.5)(VALUES, TWO_ROWS)
    data = [Trajectory([0, 1], [False, True], [0.0, r], True) for r in returns]
    both = parse_objectives([{"LM": {"top_share": 0.4}}, "MonteCarlo"])
    assert both.fitted_to(data) == parse_objectives([LM(min_return=2.0), "MonteCarlo"])
    assert both.parts == ["total", "LM/nll", "MonteCarlo/q", "MonteCarlo/v"]


def learn(objective, batch, states, steps=500):
    """Tabular Q[state, token] and V[state]; `states` [batch, steps+1] says where one is."""
    q = torch.zeros(int(states.max()) + 1, 4, requires_grad=True)
    v = torch.zeros(len(q), requires_grad=True)
    optimizer = torch.optim.Adam([q, v], lr=0.05)
    for _ in range(steps):
        taken = q[states[:, :-1], batch.action][None]
        total = q.logsumexp(-1)[states[:, :-1]][None]
        values = Values(q=taken, target_q=taken.detach(), v=v[states], q_logsumexp=total)
        optimizer.zero_grad()
        objective(values, batch).total.backward()
        optimizer.step()
    return q.detach(), v.detach()


def test_ilql_seeks_the_better_action():
    objective = ILQL(gamma=1.0, expectile=0.9, cql_weight=0.0)
    q, v = learn(objective, BANDIT, torch.tensor([[0, 1], [0, 1]]))
    torch.testing.assert_close(q[0, 1:3], torch.tensor([1.0, 0.0]), atol=0.02, rtol=0)
    assert abs(v[0] - 0.9) < 0.02  # the 0.9-expectile of {1, 0}


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0])
def test_monte_carlo_evaluates_the_data(lambda_):
    q, v = learn(MonteCarlo(lambda_=lambda_), BANDIT, torch.tensor([[0, 1], [0, 1]]))
    torch.testing.assert_close(q[0, 1:3], torch.tensor([1.0, 0.0]), atol=0.02, rtol=0)
    assert abs(v[0] - 0.5) < 0.02  # the mean of {1, 0}


def test_the_conservative_term_lowers_what_was_not_taken():
    states = torch.tensor([[0, 1], [0, 1]])
    free, _ = learn(ILQL(gamma=1.0, cql_weight=0.0), BANDIT, states)
    held, _ = learn(ILQL(gamma=1.0, cql_weight=0.1), BANDIT, states)
    assert free[0, 3] == 0
    assert held[0, 3] < -0.5
    assert held[0, 1] > held[0, 2] > held[0, 3]


def two_turns(first, second, reward):
    """State 0 —first→ (observation 7) → state 1 —second→ end, paid at the end."""
    tokens, is_action = [0, first, 7, second], [False, True, False, True]
    return Trajectory(tokens, is_action, [0.0, 0.0, 0.0, reward], True)


def test_p05_ilql_stitches_across_an_observation():
    """No text took 1 and then 3, yet 3 is best after 1: value flows back over the reply."""
    texts = [two_turns(1, 2, 0.0), two_turns(1, 3, 1.0), two_turns(2, 2, 0.3)]
    batch = collate(texts)
    states = torch.tensor([[0, 1, 3], [0, 1, 3], [0, 2, 3]])
    objective = ILQL(gamma=0.9, expectile=0.95, cql_weight=0.0)
    q, v = learn(objective, batch, states, steps=800)
    assert abs(v[1] - 0.95) < 0.02
    torch.testing.assert_close(q[0, 1:3], 0.9 * torch.tensor([0.95, 0.3]), atol=0.02, rtol=0)
    q, _ = learn(MonteCarlo(gamma=0.9), batch, states, steps=800)
    torch.testing.assert_close(q[0, 1:3], 0.9 * torch.tensor([0.5, 0.3]), atol=0.02, rtol=0)


def test_per_turn_discount_applies_at_the_ends_of_turns():
    batch = collate(
        [Trajectory([0, 1, 2, 7, 1, 2], [False, True, True, False, True, True], [0.0] * 6, True)]
    )
    assert discount(batch, 0.5, per_turn=False).tolist() == [[0.5, 0.5, 0.5, 0.0]]
    assert discount(batch, 0.5, per_turn=True).tolist() == [[1.0, 0.5, 1.0, 0.0]]
    values = Values(q=torch.zeros(1, 1, 4), v=torch.zeros(1, 5))
    paid = collate(
        [Trajectory([0, 1, 2, 7, 1, 2], [False, True, True, False, True, True],
                    [0.0] * 5 + [1.0], True)]
    )  # fmt: skip
    loss = MonteCarlo(gamma=0.5, per_turn_discount=True)(values, paid)
    assert parts(loss)["v"] == pytest.approx((0.25 + 0.25 + 1 + 1) / 4)


def test_no_conservative_term_no_sum_over_the_vocabulary():
    assert "q_logsumexp" in ILQL().needs
    assert ILQL(cql_weight=0.0).needs == {"q", "target_q", "v"}
    values = Values(q=VALUES.q, target_q=VALUES.target_q, v=VALUES.v)
    assert set(ILQL(cql_weight=0.0)(values, TWO_ROWS).parts) == {"q", "v"}


def test_targets_carry_no_gradient():
    v = VALUES.v.clone().requires_grad_()
    q = VALUES.q.clone().requires_grad_()
    target_q = VALUES.target_q.clone().requires_grad_()
    logprob = VALUES.logprob.clone().requires_grad_()
    values = Values(q=q, target_q=target_q, v=v, q_logsumexp=VALUES.q_logsumexp, logprob=logprob)
    ILQL()(values, TWO_ROWS).total.backward()
    assert target_q.grad is None
    assert v.grad[1].tolist()[1:] == [0.0, 0.0]  # the bootstrap of a cut text, and padding
    v.grad = q.grad = None
    AWAC()(values, TWO_ROWS).total.backward()
    assert v.grad is None
    assert q.grad is None
    assert logprob.grad[1, 1] == 0.0


def test_objectives_add_up_with_their_weights():
    both = parse_objectives(["LM", {"MonteCarlo": {"gamma": 0.9, "weight": 0.25}}])
    assert both.needs == {"logprob", "q", "v"}
    assert both.learns_values
    assert not parse_objectives("LM").learns_values
    loss = both(VALUES, TWO_ROWS)
    lm, mc = LM()(VALUES, TWO_ROWS), MonteCarlo(gamma=0.9)(VALUES, TWO_ROWS)
    assert loss.total.item() == pytest.approx((lm.total + 0.25 * mc.total).item())
    assert set(loss.parts) == {"LM/nll", "MonteCarlo/q", "MonteCarlo/v"}


def test_objectives_are_read_as_written():
    ilql = {"ILQL": {"expectile": 0.8, "weight": 2}}
    spec = [{"LM": {"on": "all"}}, ilql, AWAC(), "MonteCarlo"]
    parsed = parse_objectives(spec)
    assert parsed.terms == (
        (1.0, LM(on="all")), (2.0, ILQL(expectile=0.8)), (1.0, AWAC()), (1.0, MonteCarlo()),
    )  # fmt: skip
    assert parse_objectives(parsed.as_list()) == parsed
    assert parse_objectives(parsed) is parsed
    assert parse_objectives([{"ILQL": None}]) == Objectives(((1.0, ILQL()),))
    assert parse_objectives([{"LM": {"min_return": 1}}]).terms == ((1.0, LM(min_return=1.0)),)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["ILQ"], "unknown method 'ILQ' .did you mean 'ILQL'"),
        (["MonteCarol"], "did you mean 'MonteCarlo'"),
        (["zebra"], "unknown method 'zebra'$"),
        ([{"LM": {"weight": -1.0}}], "LM: weight must be finite, 0 or more, not -1"),
        ([{"ILQL": {"expectil": 0.8}}], "ILQL has no option 'expectil' .did you mean 'expectile'"),
        ([{"ILQL": {}, "LM": {}}], "one method per entry"),
        ([], "at least one of"),
        ([{"ILQL": 0.8}], "ILQL: options were expected"),
        ([{"ILQL": {"weight": "much"}}], "ILQL: weight"),
        ([{"ILQL": {"expectile": "high"}}], "ILQL: expectile is a float, not 'high'"),
        ([{"ILQL": {"expectile": 1}}], r"ILQL: expectile must lie in \(0, 1\)"),
        ([{"ILQL": {"per_turn_discount": "no"}}], "per_turn_discount is a bool"),
        ([{"ILQL": {"gamma": -1}}], r"gamma must lie in \[0, 1\]"),
        ([{"ILQL": {"cql_weight": -1}}], "cql_weight must be 0 or more"),
        ([{"MonteCarlo": {"lambda_": 2.0}}], "lambda_ must lie"),
        ([{"PathConsistency": {"eta": 0.0}}], "eta must be above 0"),
        ([{"ReturnDistribution": {"gamma": 2.0}}], "gamma must lie"),
        ([{"ControlledDecoding": {"lambda_": 2.0}}], "lambda_ must lie"),
        ([{"SARSA": {"lambda_": 2.0}}], "lambda_ must lie"),
        ([{"DoubleQ": {"cql_weight": -1.0}}], "cql_weight must be 0 or more"),
        ([{"DoubleQ": {"top_k": 2.5}}], "top_k is a int, not 2.5"),
        ([{"DoubleQ": {"top_k": 0}}], "top_k must be at least 1"),
        ([{"DoubleQ": {"min_p": 2}}], r"min_p must lie in \[0, 1\]"),
        ([{"ILQL": {"level": "word"}}], "level is 'token' or 'turn'"),
        ([{"ILQL": {"level": "turn"}}], "cql_weight must be 0 at level 'turn'"),
        ([{"LM": {"top_share": 10}}], r"top_share must lie in \(0, 1\]"),
        ([{"LM": {"top_share": 0.1, "min_return": 1}}], "min_return or top_share, not both"),
        ([{"AWAC": {"temperature": 0.0}}], "temperature must be above 0"),
        ([{"AWAC": {"max_weight": 0.0}}], "max_weight must be above 0"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(QvgptError, match=message):
        parse_objectives(spec)


def test_objectives_agree_on_what_a_decision_is_and_where_the_best_is_sought():
    turn = {"ILQL": {"level": "turn", "cql_weight": 0.0}}
    assert parse_objectives(["LM", turn]).level == "turn"
    assert parse_objectives(["LM", turn]).discount == (0.99, True)
    assert parse_objectives(parse_objectives([turn]).as_list()) == parse_objectives([turn])
    assert parse_objectives(["LM", "ILQL", "AWAC"]).level == "token"
    for other in ("MonteCarlo", "AWAC", "AWR"):
        with pytest.raises(QvgptError, match=r"of whole turns .* and of tokens do not mix"):
            _ = parse_objectives([turn, other]).level
    restricted = {"DoubleQ": {"top_k": 20}}
    assert parse_objectives(["LM", restricted]).candidates == Candidates(top_k=20)
    assert parse_objectives(["LM", "DoubleQ"]).candidates.are_all
    with pytest.raises(QvgptError, match="several DoubleQ with different top_k"):
        _ = parse_objectives([restricted, "DoubleQ"]).candidates


def test_the_names_of_loss_parts_are_known_before_any_data():
    found = parse_objectives(["LM", {"ILQL": {"cql_weight": 0.0}}, "AWR", "AWAC"])
    assert found.parts == ["total", "LM/nll", "ILQL/q", "ILQL/v", "AWR/nll", "AWAC/nll"]
    assert parse_objectives([{"LM": {True: "all"}}]) == parse_objectives([{"LM": {"on": "all"}}])
    twice = parse_objectives(["LM", {"LM": {"on": "all"}}])
    assert twice.parts == ["total", "LM/nll", "LM 2/nll"]


def test_the_discount_is_that_of_the_values_that_are_taught():
    assert parse_objectives(["LM", "ILQL", {"AWR": {"gamma": 0.1}}]).discount == (0.99, False)
    turns = [{"MonteCarlo": {"gamma": 0.5, "per_turn_discount": True}}, "ILQL"]
    with pytest.raises(QvgptError, match=r"one discount, not gamma 0.5, per_turn_.* and gamma 0.9"):
        _ = parse_objectives(turns).discount
    assert parse_objectives([turns[0], "LM"]).discount == (0.5, True)
    assert not parse_objectives(["LM", "AWAC", "AWR"]).teaches_values
    for name in METHODS.keys() - {"LM", "AWAC", "AWR", "QSFT"}:
        assert parse_objectives(name).teaches_values
        assert parse_objectives(name).learns_values
        assert len(parse_objectives(name).parts) >= 2
