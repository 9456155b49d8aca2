"""π(a|s) ∝ π₀(a|s)·exp(β·A(s,a)): exactly, in the stated order, by every path of computation."""

import pytest
import torch

from qvgpt.decode.next_token import NextToken
from qvgpt.decode.policy import (
    Guidance,
    fold,
    folds,
    functional_options,
    guided_logits,
    joined_q,
    next_token,
)
from qvgpt.errors import QvgptError

BASE = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
Q = torch.tensor([[0.0, 1.0, -1.0, 3.0]])


def guided(q=Q, **options):
    return guided_logits(BASE, q, Guidance(**options)).softmax(-1)[0].tolist()


def normalised(*weights):
    weights = [float(w) for w in weights]
    return pytest.approx([w / sum(weights) for w in weights], abs=1e-6)


def states(model, rows=7):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, model.trunk.embed_dim, generator=generator)


def dense(policy, size):
    return torch.zeros(len(policy.tokens), size).scatter(1, policy.tokens, policy.logprob.exp())


def test_the_formula_by_hand():
    base = torch.randn(3, 5).log_softmax(-1)
    q, v = torch.randn(3, 5), torch.randn(3, 1)
    found = guided_logits(base, q, Guidance(beta=1.7)).softmax(-1).double()
    weight = base.double().exp() * (1.7 * (q - v).double()).exp()
    torch.testing.assert_close(found, weight / weight.sum(-1, keepdim=True), atol=1e-6, rtol=0)


def test_a_constant_on_all_values_changes_nothing():
    base, q = torch.randn(3, 5).log_softmax(-1), torch.randn(3, 5)
    for options in ({}, {"top_k": 3}, {"top_p": 0.8, "temperature": 0.5}):
        guidance = Guidance(beta=2.0, **options)
        a, b = (guided_logits(base, x, guidance).log_softmax(-1) for x in (q, q + 7.0))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_beta_zero_is_the_base():
    assert guided(beta=0.0) == normalised(0.4, 0.3, 0.2, 0.1)
    assert guided(q=None, beta=0.0) == normalised(0.4, 0.3, 0.2, 0.1)


def test_truncation_by_hand():
    assert guided(q=None, top_k=2) == normalised(0.4, 0.3, 0, 0)
    assert guided(q=None, top_k=9) == normalised(0.4, 0.3, 0.2, 0.1)
    assert guided(q=None, top_p=0.6) == normalised(0.4, 0.3, 0, 0)
    assert guided(q=None, top_p=0.75) == normalised(0.4, 0.3, 0.2, 0)
    assert guided(q=None, top_p=0.01) == normalised(0.4, 0, 0, 0)
    assert guided(q=None, top_p=1.0) == normalised(0.4, 0.3, 0.2, 0.1)
    assert guided(q=None, min_p=0.45) == normalised(0.4, 0.3, 0.2, 0)
    assert guided(q=None, min_p=0.0) == normalised(0.4, 0.3, 0.2, 0.1)
    assert guided(q=None, min_p=1.0) == normalised(0.4, 0, 0, 0)
    # one after the other: of the three kept by top_k (4/9, 3/9, 2/9), top_p needs two
    assert guided(q=None, top_k=3, top_p=0.75) == normalised(0.4, 0.3, 0, 0)


def test_equal_tokens_do_not_slip_in_past_top_k():
    flat = torch.zeros(2, 6).log_softmax(-1)
    assert (guided_logits(flat, None, Guidance(top_k=2)) > float("-inf")).sum(-1).tolist() == [
        2,
        2,
    ]


def test_p18_candidates_come_from_the_base_or_from_the_guided():
    e = torch.tensor([0.0, 1.0, -1.0, 3.0]).exp()  # β = 1
    w = [0.4 * e[0], 0.3 * e[1], 0.2 * e[2], 0.1 * e[3]]
    assert guided(beta=1.0, top_k=2) == normalised(w[0], w[1], 0, 0)
    assert guided(beta=1.0, top_k=2, candidates="guided") == normalised(0, w[1], 0, w[3])
    assert guided(beta=1.0, top_p=0.69) == normalised(w[0], w[1], 0, 0)
    # guided: 0.12, 0.25, 0.02, 0.61 of the whole
    assert guided(beta=1.0, top_p=0.5, candidates="guided") == normalised(0, 0, 0, w[3])
    assert guided(beta=1.0, top_p=0.7, candidates="guided") == normalised(0, w[1], 0, w[3])


def test_temperature_comes_last():
    e = (2 * Q[0]).exp()
    w = [0.16 * e[0], 0.09 * e[1], 0.04 * e[2], 0.01 * e[3]]  # (π₀ exp(Q))²
    assert guided(beta=1.0, temperature=0.5) == normalised(*w)
    # after a temperature of 4 (0.29, 0.27, 0.24, 0.20) top_p 0.6 would keep three
    assert guided(q=None, top_p=0.6, temperature=4.0) == normalised(0.4**0.25, 0.3**0.25, 0, 0)
    kept = guided(beta=1.0, top_p=0.5, candidates="guided", temperature=8.0)
    assert kept == normalised(0, 0, 0, 1)


def test_senseless_guidance_is_refused():
    for options in (
        {"temperature": -1.0}, {"temperature": float("inf")}, {"temperature": float("nan")},
        {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 2.0},
        {"beta": float("inf")}, {"beta": float("nan")}, {"temperature": 1e-38}, {"beta": -1e38},
        {"beta_end": 1e38, "beta_tokens": 2}, {"kl_budget": 0.1, "top_k": 5, "beta_max": 1e38},
    ):  # fmt: skip
        with pytest.raises(QvgptError, match="guidance: "):
            Guidance(**options)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "low_rank", "bilinear"])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 5, "candidates": "guided"},
     {"top_k": 9, "top_p": 0.7, "min_p": 0.05, "candidates": "guided"},
     {"top_p": 0.8, "candidates": "guided", "temperature": 1.3}],
)  # fmt: skip
def test_folded_path_is_the_full_path(make_model, kind, options):
    model = make_model(kind)
    guidance = Guidance(beta=1.3, **options)
    assert folds(model.heads, guidance)
    folded = fold(model.trunk.output_weight, model.heads, 1.3)
    short = next_token(model, states(model), guidance, folded)
    full = next_token(model, states(model), guidance)
    ours, theirs = (
        torch.zeros(len(x.tokens), model.trunk.vocab_size).scatter(1, x.tokens, x.logprob.exp())
        for x in (short, full)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_what_folds(make_model, plain):
    model = make_model()
    assert folds(model.heads, Guidance(beta=1.0))
    assert folds(make_model(num_q=1).heads, Guidance(beta=1.0, twins="min"))
    assert not folds(model.heads, Guidance(beta=1.0, twins="min"))
    assert not folds(model.heads, Guidance(beta=1.0, top_k=3))
    assert not folds(model.heads, Guidance(beta=0.0))
    assert not folds(make_model("mlp").heads, Guidance(beta=1.0))
    assert not folds(plain.heads, Guidance(beta=1.0))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "low_rank", "bilinear", "mlp", "categorical"])
@pytest.mark.parametrize("twins", ["mean", "min"])
@pytest.mark.parametrize("top_k", [1, 6, 34, 35, 500])
def test_gathered_path_is_the_full_path(make_model, kind, twins, top_k):
    model, size = make_model(kind), 35
    assert model.trunk.vocab_size == size
    h = states(model)
    guidance = Guidance(beta=1.3, top_k=top_k, top_p=0.9, temperature=0.8, twins=twins)
    gathered = next_token(model, h, guidance)
    assert gathered.tokens.size(1) == min(top_k, size)
    base = (h @ model.trunk.output_weight.T).log_softmax(-1)
    full = guided_logits(base, joined_q(model, h, None, twins), guidance).softmax(-1)
    torch.testing.assert_close(dense(gathered, size), full, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        gathered.base_logprob, base.gather(1, gathered.tokens), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_twins_are_joined_as_said(make_model):
    model = make_model("linear", num_q=3)
    h = states(model)
    each = torch.stack([head(h) for head in model.heads.target_q])
    torch.testing.assert_close(joined_q(model, h, None, "mean"), each.mean(0))
    torch.testing.assert_close(joined_q(model, h, None, "min"), each.min(0).values)
    some = torch.randint(0, 35, (7, 4))
    picked = joined_q(model, h, some, "min")
    torch.testing.assert_close(picked, each.min(0).values.gather(1, some), atol=1e-5, rtol=0)


def test_guidance_reads_the_slow_heads(make_model):
    model = make_model()
    guidance = Guidance(beta=1.0)
    before = next_token(model, states(model), guidance).logprob
    with torch.no_grad():
        for p in model.heads.q.parameters():
            p.add_(torch.randn_like(p))  # not alike for all tokens: that is no advantage
    torch.testing.assert_close(next_token(model, states(model), guidance).logprob, before)
    with torch.no_grad():
        for p in model.heads.target_q.parameters():
            p.add_(torch.randn_like(p))
    after = next_token(model, states(model), guidance).logprob
    assert not torch.allclose(after, before, atol=1e-2)


FUNCTIONALS = pytest.mark.parametrize(
    "functional", [{}, {"functional": "soft"}, {"functional": "cvar", "alpha": 0.3}]
)


@torch.no_grad()
@FUNCTIONALS
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_guidance_by_a_functional_of_the_returns(make_model, functional, scale):
    """Q♯ among them: π₀·E exp(β·return), by hand; rewards were learned `scale` times their size."""
    model = make_model("categorical", num_q=1, bins=5, low=-1.0, high=1.0, noise=0.6)
    model.heads.reward_scale = scale
    h, beta = states(model), 1.3
    returns = torch.linspace(-1, 1, 5) / scale
    everything = torch.arange(35).expand(len(h), 35)
    p = model.heads.target_q[0].logits(h, everything).softmax(-1)
    if not functional:
        q = p @ returns
    elif functional["functional"] == "soft":
        q = (p @ (beta * returns).exp()).log() / beta
    else:
        worst = p.cumsum(-1).clamp(max=0.3)
        q = torch.cat([worst[..., :1], worst.diff(dim=-1)], -1) @ returns / 0.3
    base = (h @ model.trunk.output_weight.T).log_softmax(-1)
    expected = (base + beta * q).log_softmax(-1)
    whole = next_token(model, h, Guidance(beta, **functional))
    torch.testing.assert_close(whole.logprob, expected, atol=1e-4, rtol=0)
    some = next_token(model, h, Guidance(beta, top_k=6, **functional))
    cut = expected.gather(1, some.tokens).log_softmax(-1)
    torch.testing.assert_close(some.logprob, cut, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "low_rank", "bilinear"])
def test_reward_scale_is_undone_by_every_path(make_model, kind):
    model, h = make_model(kind), states(make_model(kind))
    expected = next_token(model, h, Guidance(beta=1.0)).logprob
    model.heads.reward_scale = 4.0
    guidance = Guidance(beta=4.0)
    torch.testing.assert_close(next_token(model, h, guidance).logprob, expected)
    folded = fold(model.trunk.output_weight, model.heads, 4.0)
    found = next_token(model, h, guidance, folded).logprob
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_knows_only_means_has_no_other_functional(make_model):
    soft = Guidance(beta=1.0, functional="soft")
    for model in (make_model(), make_model("categorical", bins=9, sigma=0.75)):
        with pytest.raises(QvgptError, match="'soft' reads a distribution of returns"):
            next_token(model, states(model), soft)
        assert not folds(model.heads, soft)
        next_token(model, states(model), Guidance(beta=0.0, functional="soft"))
    knows = make_model("categorical").heads
    assert not folds(knows, Guidance(beta=1.0))
    assert functional_options(knows, soft)["eta"] == 1.0
    assert functional_options(knows, Guidance(functional="soft")) == {}  # η would have no end


def test_no_heads_no_guidance(plain):
    with pytest.raises(QvgptError, match="no value heads"):
        next_token(plain, states(plain), Guidance(beta=1.0))
    next_token(plain, states(plain), Guidance())


@torch.no_grad()
def test_kl_by_hand(model):
    h = states(model)
    for guidance in (Guidance(beta=1.3), Guidance(beta=1.3, top_k=4), Guidance(top_p=0.5)):
        policy = next_token(model, h, guidance)
        p = dense(policy, 35).double()
        base = (h @ model.trunk.output_weight.T).double().log_softmax(-1)
        expected = torch.where(p > 0, p * (p.log() - base), 0.0).sum(-1)
        torch.testing.assert_close(policy.kl().double(), expected, atol=1e-5, rtol=0)
        assert (policy.kl() >= 0).all()


def test_sampling_frequencies_and_greedy():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.2, 0.3, 0.0]])
    n = 20000
    tokens = torch.tensor([[15, 14, 13, 12, 11, 10]])
    policy = NextToken(tokens.expand(n, -1), p.log().expand(n, -1), p.log().expand(n, -1))
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0))
    token, place = policy.sample(uniform)
    frequency = torch.bincount(place, minlength=6) / n
    torch.testing.assert_close(frequency, p[0], atol=0.012, rtol=0)
    assert torch.equal(token, tokens[0][place])
    assert (policy.greedy().sample(uniform)[0] == 14).all()


@pytest.mark.parametrize("n", [30, 1024, 1025, 5000])
def test_sampling_inverts_the_distribution_function(n):
    """Also where sums of blocks stand between, and where blocks have no probability at all."""
    generator = torch.Generator().manual_seed(n)
    logprob = (3 * torch.randn(200, n, generator=generator)).log_softmax(-1)
    logprob[:, n // 3 : n // 3 + 300 * (n > 1024)] = float("-inf")
    policy = NextToken(torch.arange(n).expand(200, -1), logprob, logprob)
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    uniform[0], uniform[1] = 0.0, 1.0 - 1e-16
    cumulative = logprob.exp().double().cumsum(-1)
    exact = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1).clamp(max=n - 1)
    token, place = policy.sample(uniform)
    assert torch.equal(token, exact)
    assert torch.equal(place, exact)


@torch.no_grad()
@pytest.mark.parametrize(
    "guidance",
    [Guidance(), Guidance(beta=1.3), Guidance(beta=1.3, top_k=4), Guidance(beta=1.3, top_p=0.5)],
)
def test_greedy_is_all_probability_on_the_best(model, guidance):
    h = states(model)
    policy = next_token(model, h, Guidance(**{**vars(guidance), "temperature": 0.0}))
    best = dense(next_token(model, h, guidance), 35).argmax(-1)
    base = (h @ model.trunk.output_weight.T).log_softmax(-1)
    assert torch.equal(policy.tokens[:, 0], best)
    assert policy.logprob.eq(0).all()
    expected = -base.gather(1, best[:, None])[:, 0]
    torch.testing.assert_close(policy.kl(), expected, atol=1e-5, rtol=0)
    assert torch.equal(policy.sample(torch.rand(len(h)))[0], best)


@pytest.mark.parametrize("p", [[0.0, 0.5, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
def test_the_edges_pick_no_impossible_token(p):
    logprob = torch.tensor([p]).log()
    policy = NextToken(torch.arange(4)[None], logprob, logprob)
    possible = [i for i, x in enumerate(p) if x]
    for dtype in (torch.float32, torch.float64):
        low = policy.sample(torch.zeros(1, dtype=dtype))[0].item()
        assert low == possible[0]
        for u in (1.0, 1 - 2**-53, 1 - 2**-24):
            high = policy.sample(torch.tensor([u], dtype=dtype))[0].item()
            assert high == possible[-1]
