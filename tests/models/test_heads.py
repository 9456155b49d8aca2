"""Q heads: centred, a no-op at the start, the same numbers by every way of asking."""

import copy

import pytest
import torch

from qvgpt.errors import QvgptError
from qvgpt.models import vocab
from qvgpt.models.gpt import GPT
from qvgpt.models.heads import StateHead, ValueHeads
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel

KINDS = ["linear", "low_rank", "bilinear", "mlp"]
EMBED, VOCAB = 8, 11


def make(kind, noise=0.5, **options):
    torch.manual_seed(0)
    options = {"low": 0.0, "high": 1.0} | options
    heads = ValueHeads(EMBED, VOCAB, HeadsConfig(kind, rank=3, **options))
    if kind == "bilinear":
        heads.tell_tokens_by(torch.randn(VOCAB, EMBED))
    with torch.no_grad():
        for p in heads.parameters():
            p.add_(noise * torch.randn_like(p))
    return heads


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_asking_agrees(kind):
    head, h = make(kind).q[0], torch.randn(5, EMBED)
    q = head(h)
    token, some = torch.randint(0, VOCAB, (5,)), torch.randint(0, VOCAB, (5, 4))
    exact = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(head.of(h, token), q.gather(1, token[:, None])[:, 0], **exact)
    torch.testing.assert_close(head.of_many(h, some), q.gather(1, some), **exact)
    taken, total = head.of_and_logsumexp(h, token)
    torch.testing.assert_close(taken, head.of(h, token), **exact)
    torch.testing.assert_close(total, q.logsumexp(-1), **exact)


@torch.no_grad()
def test_a_distribution_is_the_same_by_every_way_of_asking(monkeypatch):
    head, h = make("categorical", bins=4, low=-1.0, high=2.0).q[0], torch.randn(5, EMBED)
    everything = torch.arange(VOCAB).expand(5, VOCAB)
    logits = head.logits(h, everything)
    # by hand: b(s, z) + (wₐ − w̄)·f(s, z)
    f = (h @ head.project.weight.T).view(5, 4, 3)
    by_hand = torch.einsum("rbf,vf->rvb", f, head.weight - head.weight.mean(0))
    by_hand = by_hand + head.baseline.layers(h)[:, None]
    exact = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(logits, by_hand, **exact)
    mean = logits.softmax(-1) @ torch.tensor([-1.0, 0.0, 1.0, 2.0])
    token, some = torch.randint(0, VOCAB, (5,)), torch.randint(0, VOCAB, (5, 4))
    for chunk in (2**26, 80, 1):
        monkeypatch.setattr(vocab, "CHUNK_ELEMENTS", chunk)
        torch.testing.assert_close(head(h), mean, **exact)
        soft = 0.5 * (logits.log_softmax(-1) + torch.arange(-1.0, 3.0) / 0.5).logsumexp(-1)
        torch.testing.assert_close(head(h, functional="soft", eta=0.5), soft, **exact)
    torch.testing.assert_close(head.of(h, token), mean.gather(1, token[:, None])[:, 0], **exact)
    torch.testing.assert_close(head.of_many(h, some), mean.gather(1, some), **exact)


def test_a_distribution_begins_as_no_guidance_and_learns():
    heads = make("categorical", noise=0.0, bins=5)
    assert heads.are_fresh
    heads.start_at(0.7)
    assert heads.are_fresh
    h = torch.randn(5, EMBED)
    torch.testing.assert_close(heads.q[0](h), torch.full((5, VOCAB), 0.5))
    heads.q[0].logits(h, torch.zeros(5, 1, dtype=torch.long))[..., 0].sum().backward()
    assert heads.q[0].weight.grad.abs().sum() > 0
    with pytest.raises(QvgptError, match="does not fold"):
        heads.folded()
    with pytest.raises(
        QvgptError, match=r"below the model's 8 dimensions, not 8: .* 1,056 numbers"
    ):
        ValueHeads(EMBED, VOCAB, HeadsConfig("categorical", 8, bins=12, low=0.0, high=1.0))
    with pytest.raises(QvgptError, match="low must be below high"):
        HeadsConfig("categorical", low=1.0, high=0.5)


def test_the_support_comes_from_the_returns_unless_it_is_given():
    returns = [0.0, 2.0, -2.0]
    found = HeadsConfig("categorical").fitted_to(returns)
    assert (found.low, found.high) == pytest.approx((-2.2, 2.2))
    alike = HeadsConfig("categorical").fitted_to([3.0, 3.0])
    assert (alike.low, alike.high) == (2.5, 3.5)
    for config in (
        HeadsConfig("categorical", low=0.0, high=1.0),
        HeadsConfig("categorical", bins=2),
        HeadsConfig("mlp"),
    ):
        assert config.fitted_to(returns) == config
    two = HeadsConfig("categorical", bins=2).support
    assert (two.low, two.high) == (0.0, 1.0)
    with pytest.raises(QvgptError, match="which returns are there"):
        ValueHeads(EMBED, VOCAB, HeadsConfig("categorical", rank=3))
    with pytest.raises(QvgptError, match="give low and high, or neither"):
        HeadsConfig("categorical", low=1.0)


def test_the_mean_kept_for_decoding_follows_every_change():
    heads, h = make("linear").eval(), torch.randn(5, EMBED)
    head, slow = heads.q[0], heads.target_q[0]
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.1, fused=True)

    def learn():
        head(h)[:, 0].square().sum().backward()
        optimizer.step()

    changes = {
        "optimizer": learn,
        "slow copy": lambda: heads.update_targets(0.5),
        "loading": lambda: heads.load_state_dict(make("linear", noise=1.0).state_dict()),
        "device": lambda: heads.to(torch.float64),
    }
    for name, change in changes.items():
        before = slow.mean_weight()
        assert slow.mean_weight() is before
        change()
        assert torch.equal(head.mean_weight(), head.weight.mean(0)), name
        assert torch.equal(slow.mean_weight(), slow.weight.mean(0)), name
    heads.train()
    assert slow.mean_weight() is not slow.mean_weight()  # sharded, it changes unseen
    assert head.mean_weight().requires_grad
    assert not slow.mean_weight().requires_grad


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_over_tokens_is_the_baseline(kind):
    head, h = make(kind).q[0], torch.randn(5, EMBED)
    torch.testing.assert_close(head(h).mean(-1), head.baseline(h), atol=1e-5, rtol=0)


def learned_advantages(kind, constant):
    """Token 0 pays 1 more than token 1; the others are never seen."""
    heads = make(kind, noise=0.0, num_q=1)
    heads.start_at(0.5 + constant)
    h, token = torch.ones(2, EMBED), torch.tensor([0, 1])
    reward = torch.tensor([1.0, 0.0]) + constant
    head = heads.q[0]
    optimizer = torch.optim.SGD(head.parameters(), lr=0.02)
    for _ in range(2000 if kind == "bilinear" else 300):  # its rows are short
        optimizer.zero_grad()
        (head.of(h, token) - reward).square().sum().backward()
        optimizer.step()
    q = head(h).detach()
    torch.testing.assert_close(q[0, :2], reward, atol=0.02, rtol=0)
    return (q - q.mean(-1, keepdim=True))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_in_all_rewards_leaves_guidance_alone(kind):
    """The trap is Q = 0 for the unseen where all that is seen is below 0."""
    plain, low = learned_advantages(kind, 0.0), learned_advantages(kind, -5.0)
    torch.testing.assert_close(plain, low, atol=1e-3, rtol=0)
    if kind != "bilinear":  # the unseen are what they are like
        assert (low[2:] < low[0]).all()
        assert (low[2:] > low[1]).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_start_at_is_the_value_of_every_token(kind):
    heads, h = make(kind, noise=0.0), torch.randn(5, EMBED)
    heads.start_at(-3.0)
    for head in [*heads.q, *heads.target_q]:
        assert head(h).eq(-3.0).all()
    assert heads.v(h).eq(-3.0).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_p28_a_fresh_head_guides_nowhere(kind):
    heads, h = make(kind, noise=0.0), torch.randn(5, EMBED)
    for head in [*heads.q, *heads.target_q]:
        assert head(h).abs().max() == 0
    assert heads.v(h).abs().max() == 0
    if kind != "mlp":
        assert heads.folded().abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_head_learns(kind):
    head = make(kind, noise=0.0).q[0]
    h, token = torch.randn(5, EMBED), torch.randint(0, VOCAB, (5,))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (head.of(h, token) - 1).square().sum().backward()
        optimizer.step()
    learns = {name: p for name, p in head.named_parameters() if p.requires_grad}
    assert not [name for name, p in learns.items() if not p.grad.abs().sum() > 0]


@torch.no_grad()
def test_bilinear_heads_tell_tokens_apart_as_the_lm_head_does():
    trunk = GPT(VOCAB, EMBED, 2, 1, seq_len=8)
    heads = ValueModel(trunk, HeadsConfig("bilinear", num_q=2)).heads
    rows = trunk.output_weight - trunk.output_weight.mean(0)
    for head in [*heads.q, *heads.target_q]:
        scale = head.weight[0, 0] / rows[0, 0]
        torch.testing.assert_close(head.weight, rows * scale)
        torch.testing.assert_close(head.weight.square().sum(-1).mean(), torch.tensor(1 / EMBED))
        assert not head.weight.requires_grad
    head, h = heads.q[0], torch.randn(3, EMBED)
    head.project.weight.normal_()
    head.weight[4] = head.weight[7]  # tokens alike are worth the same, seen or not
    assert torch.equal(head(h)[:, 4], head(h)[:, 7])
    by_hand = torch.einsum("ae,ef,rf->ra", head.weight, head.project.weight, h)
    by_hand = by_hand - by_hand.mean(-1, keepdim=True)
    torch.testing.assert_close(head(h), by_hand + head.baseline(h)[:, None], atol=1e-5, rtol=0)


@torch.no_grad()
def test_bilinear_heads_share_their_rows_in_memory_and_on_disk():
    def make():
        return ValueModel(GPT(VOCAB, EMBED, 2, 1, seq_len=8), HeadsConfig("bilinear")).heads

    def all_of(heads):
        return [*heads.q, *heads.target_q]

    heads = make()
    for each in (heads, copy.deepcopy(heads)):
        assert len({head.weight.data_ptr() for head in all_of(each)}) == 1
        assert [p.shape for p in each.parameters()].count((VOCAB, EMBED)) == 1
    rows = heads.q[0].weight.clone()
    heads.q[1].project.weight.normal_()
    heads.update_targets(0.5)
    saved = heads.state_dict()
    others = ["q.1.weight", "target_q.0.weight", "target_q.1.weight"]
    assert "q.0.weight" in saved
    assert not set(others) & set(saved)
    # files from before have them for every head
    for state in (saved, saved | dict.fromkeys(others, rows)):
        again = make()
        again.load_state_dict(state)
        for head, known in zip(all_of(again), all_of(heads), strict=True):
            assert torch.equal(head.weight, rows)
            assert torch.equal(head.project.weight, known.project.weight)
        assert again.q[0].weight is again.target_q[1].weight
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict({k: v for k, v in saved.items() if k != "q.0.weight"})


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "low_rank", "bilinear"])
def test_folded_is_the_mean_of_the_slow_heads_up_to_a_constant(kind):
    heads, h = make(kind, num_q=3), torch.randn(5, EMBED)
    difference = h @ heads.folded().T - torch.stack([q(h) for q in heads.target_q]).mean(0)
    assert (difference.amax(-1) - difference.amin(-1)).max() < 1e-5


def test_mlp_does_not_fold():
    with pytest.raises(QvgptError, match="not linear in the hidden state"):
        make("mlp").folded()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
def test_targets_move_by_tau(kind, tau):
    heads = make(kind)
    before = [p.clone() for p in heads.target_q.parameters()]
    fast = [p.clone() for p in heads.q.parameters()]
    heads.update_targets(tau)
    for slow, old, new in zip(heads.target_q.parameters(), before, fast, strict=True):
        torch.testing.assert_close(slow, old + tau * (new - old))
        shared = any(slow is p for p in heads.q.parameters())  # bilinear heads' rows
        assert torch.equal(slow, old) == (tau == 0 or shared)
    for now, then in zip(heads.q.parameters(), fast, strict=True):
        assert torch.equal(now, then)


def test_targets_start_as_copies_without_gradient():
    heads = make("mlp", noise=0.0)
    for slow, fast in zip(heads.target_q.parameters(), heads.q.parameters(), strict=True):
        assert torch.equal(slow, fast)
        assert slow is not fast
        assert not slow.requires_grad
        assert fast.requires_grad


def test_twins_differ_from_the_start_where_they_can():
    heads = make("mlp", noise=0.0)
    assert not torch.equal(heads.q[0].project.weight, heads.q[1].project.weight)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_state_heads_take_any_shape(kind):
    assert StateHead(EMBED, kind)(torch.zeros(2, 3, EMBED)).shape == (2, 3)


def test_unknown_heads_are_refused():
    with pytest.raises(QvgptError, match="at least 1"):
        HeadsConfig(num_q=0)


def test_the_kind_follows_the_vocabulary_where_none_is_given():
    """A model keeps the kind that it was made with, and one that is given stays."""
    for size, kind in ((999, "linear"), (1000, "bilinear")):
        torch.manual_seed(0)
        model = ValueModel(GPT(size, EMBED, 2, 1, seq_len=4), HeadsConfig(num_q=1))
        assert model.heads.config == HeadsConfig(kind, num_q=1)
        assert model.heads.q[0].last.shape[0] == (size if kind == "linear" else EMBED)
    rows = model.trunk.output_weight.detach()
    centred = rows - rows.mean(0)
    found = model.heads.q[0].weight / model.heads.q[0].weight[0, 0]
    torch.testing.assert_close(found, centred / centred[0, 0], atol=1e-4, rtol=1e-4)
    assert HeadsConfig("mlp").for_vocabulary(50_000) == HeadsConfig("mlp")
