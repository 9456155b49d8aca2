"""Block, tree and beam search by values: against exact optima, their limits, and each other."""

import math
from collections import Counter
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from exact import LENGTH, PROMPTS, SIZE, Exact, Game, make_model
from mdp import ACTIONS
from mdp import Game as TokenGame
from mdp import mean as data_policy
from test_sources import TOKENIZER, make, small
from tiny_hf import make_hf

from qvgpt.decode import tree as tree_module
from qvgpt.decode.beam import BeamSearch
from qvgpt.decode.blocks import BlockSearch
from qvgpt.decode.engine import Request, generate, row_seed, write
from qvgpt.decode.guide import Guide
from qvgpt.decode.policy import Guidance, guided_logits
from qvgpt.decode.rerank import candidate_seed, choice_kl, last_q, write_best
from qvgpt.decode.score import score
from qvgpt.decode.search import Judge
from qvgpt.decode.searches import parse_search, search_name, write_searched
from qvgpt.decode.sources import Contrast, HeadValues, PrefixValues, WeightedSum
from qvgpt.decode.tree import TreeSearch
from qvgpt.errors import QvgptError
from qvgpt.models.causal_lm import CausalLM
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Trajectory

MODEL = make_model()
EVEN = Guidance(temperature=1e3)  # all tokens alike: so many samples cover all blocks
SOME = [[1], [1, 9, 2], [1, 30, 8, 8, 8, 17, 21, 25, 2], [1, 12, 13, 2]]
COVER = {1: 60, 2: 700, 3: 6000}
"""Samples that hold all blocks of so many tokens."""
SEARCHES = {
    "block": BlockSearch(2, 3, 2, max_tokens=6),
    "rejection": BlockSearch(1, 8, 2, keep=0.5, max_tokens=6),
    "beam": BeamSearch(3, value_weight=2.0, max_tokens=6),
    "tree": TreeSearch(6, 5, max_tokens=6),
}
EACH = pytest.mark.parametrize("name", SEARCHES)
VALUES = ["own heads", "other heads", "contrast", "prefix", "function", "sum"]
BOTH = [*(("gpt", values) for values in VALUES), ("llama", "own heads"), ("llama", "prefix")]


@pytest.fixture(scope="module")
def models(make_model):
    llama = CausalLM(make_hf("llama"))
    return {"gpt": make_model(num_q=1), "llama": small(7, HeadsConfig(num_q=1), llama)}


def returns(game, found):
    """What the texts found earn."""
    both = zip(PROMPTS, found.best, strict=True)
    return [game.returns(tuple(p), tuple(h.tokens)) for p, h in both]


# ── the optimum, and one step towards it ─────────────────────────────────────────────────────


@pytest.mark.parametrize("block", [1, 2])
def test_blocks_ranked_by_the_optimal_v_find_the_optimum(block):
    game = Game(MODEL)
    search = BlockSearch(1, COVER[block], block, max_tokens=LENGTH, max_batch=3000)
    found = search(MODEL, PROMPTS, EVEN, Exact(game, "best"))
    best = [game.best(tuple(p)) for p in PROMPTS]
    assert returns(game, found) == pytest.approx(best)
    assert [h.score for h in found.best] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("block", [1, 2])
def test_blocks_ranked_by_the_policys_v_are_one_step_of_improvement(block, per_token):
    """With K → ∞ exactly the best block by V^π, each time: better than π, no better than V*."""
    game = Game(MODEL, per_token)
    search = BlockSearch(
        1, COVER[block], block, per_token=per_token, max_tokens=LENGTH, max_batch=3000
    )
    found = search(MODEL, PROMPTS, EVEN, Exact(game, "model"))
    short = 0
    for prompt, text, earned in zip(PROMPTS, found.best, returns(game, found), strict=True):
        assert tuple(text.tokens) == best_blocks(game, tuple(prompt), block)
        assert game.v(tuple(prompt), (), "model") < earned <= game.best(tuple(prompt)) + 1e-9
        short += earned < game.best(tuple(prompt)) - 1e-6
    if block == 1:
        assert short  # one step only: somewhere it falls short of the optimum


def best_blocks(game, prompt, block):
    """Go on by the block after which return so far and V^π are most, by trying all of them."""
    text = ()
    while not game.is_over(text):
        following = [text]
        for _ in range(block):
            following = [
                then
                for t in following
                for then in ([t] if game.is_over(t) else [(*t, a) for a in range(SIZE)])
            ]
        text = max(following, key=lambda t: game.returns(prompt, t) + game.v(prompt, t, "model"))
    return text


@pytest.mark.parametrize("who", ["best", "model", "blind"])
@pytest.mark.parametrize(
    ("per_token", "gamma"), [(False, 1.0), (True, 1.0), (False, 0.6), (True, 0.6)]
)
def test_trees_find_the_optimum_whatever_the_values(who, per_token, gamma):
    """By exact V* at once; by V of the policy, and by values that know nothing but how texts end,
    in the end: the optimum of what its candidates allow."""
    model = make_model(gamma)
    game = Game(model, per_token, gamma)
    source, top_k = Exact(game, who), SIZE if who == "best" else 4
    how = {"simulations": 12, "c_puct": 0.01} if who == "best" else {"simulations": 800}
    search = TreeSearch(**how, top_k=top_k, per_token=per_token, max_tokens=LENGTH, max_batch=9999)
    found = search(model, PROMPTS, values=source)
    best = [best_among(game, tuple(p), top_k) for p in PROMPTS]
    assert returns(game, found) == pytest.approx(best)
    assert max(Counter(source.seen).values()) == 1  # no text is read twice
    assert found.forward_tokens == sum(len(p) - 1 for p in PROMPTS) + len(source.seen)


@torch.no_grad()
@pytest.mark.parametrize("per_token", [False, True])
def test_what_a_first_visit_finds_is_q(per_token):
    """γ·V of the new node, and what its token earned: Q(s, a), where values are exact."""
    model = make_model(gamma=0.6)
    game = Game(model, per_token, gamma=0.6)
    judge = Judge.of(Guide.of(model, Exact(game, "model")), Guidance(), per_token)
    how = TreeSearch(SIZE, SIZE, c_puct=1e9, max_tokens=LENGTH)
    forest, checked = tree_module._Forest(how, judge, PROMPTS, Guidance()), 0
    while any(map(forest._wants, forest.trees)):
        forest._simulate(forest.trees)
    for prompt, tree in zip(map(tuple, PROMPTS), forest.trees, strict=True):
        root = tree.root
        for token, visits, total in zip(root.tokens, root.visits, root.total, strict=True):
            if visits == 1:
                assert total == pytest.approx(game.q(prompt, (), token, "model"), abs=1e-5)
                checked += 1
    assert checked > SIZE


def best_among(game, prompt, top_k):
    """The greatest return of texts whose every token is one of the likeliest there."""

    def is_allowed(text):
        for i, t in enumerate(text):
            each = game.policy(prompt, text[:i])
            if sorted(each, reverse=True).index(each[t]) >= top_k:
                return False
        return True

    return max(game.returns(prompt, text) for text in game.texts() if is_allowed(text))


@pytest.mark.parametrize("per_token", [False, True])
def test_beams_that_heed_optimal_values_find_the_optimum(per_token):
    game = Game(MODEL, per_token)
    search = BeamSearch(1, value_weight=1e5, per_token=per_token, max_tokens=LENGTH)
    found = search(MODEL, PROMPTS, values=Exact(game, "best"))
    best = [game.best(tuple(p)) for p in PROMPTS]
    assert returns(game, found) == pytest.approx(best)
    alone = BeamSearch(1, max_tokens=LENGTH)(MODEL, PROMPTS)
    assert returns(game, alone) != pytest.approx(best)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_enough_beams_find_the_best_score_of_all_texts(weight, per_token):
    """score = Σ log π / length^p + w · (Q of the last token, or Σ advantages)."""
    game, penalty = Game(MODEL, per_token), 1.3
    search = BeamSearch(SIZE**2, penalty, LENGTH, 400, value_weight=weight, per_token=per_token)
    found = search(MODEL, PROMPTS, values=Exact(game, "model"))
    for prompt, texts in zip(map(tuple, PROMPTS), found.texts, strict=True):

        def of(text, prompt=prompt):
            log_pi = sum(math.log(game.policy(prompt, text[:i])[t]) for i, t in enumerate(text))
            worth = game.returns(prompt, text)
            if per_token:
                worth -= game.v(prompt, (), "model")
            return log_pi / len(text) ** penalty + weight * worth

        best = max(game.texts(), key=of)
        assert tuple(texts[0].tokens) == best
        for text in texts:
            assert text.score == pytest.approx(of(tuple(text.tokens)), abs=1e-4)


# ── best of N ────────────────────────────────────────────────────────────────────────────────


def best_of_n(probability, value, n):
    """The exact distribution of the best of n: P(y) = P(value ≤ y)^n − P(value < y)^n."""
    found, below = {}, 0.0
    for text in sorted(probability, key=value):
        found[text] = (below + probability[text]) ** n - below**n
        below += probability[text]
    return found


def kl_of(p, q):
    return sum(p[x] * math.log(p[x] / q[x]) for x in p if p[x] > 0)


def test_the_best_of_n_stays_within_its_bound_and_earns_what_enumeration_says():
    """KL ≤ log N − (N − 1)/N (Beirami et al.), by the exact distribution over all texts."""
    game, prompt = Game(MODEL), tuple(PROMPTS[1])

    def share(text):
        return math.prod(game.policy(prompt, text[:i])[t] for i, t in enumerate(text))

    base = {text: share(text) for text in game.texts()}
    assert sum(base.values()) == pytest.approx(1)

    def value(text):
        return game.returns(prompt, text)

    for n in (1, 2, 4, 8, 64):
        chosen = best_of_n(base, value, n)
        assert sum(chosen.values()) == pytest.approx(1)
        assert kl_of(chosen, base) <= choice_kl(n) + 1e-12
        assert kl_of(chosen, base) >= 0.9 * choice_kl(n) or n > 8  # and not by far
    # samples of it
    requests = [Request(prompt, LENGTH, seed=row_seed(1, i)) for i in range(800)]
    texts = write_best(MODEL, requests, 4, values=Exact(game, "model"), max_batch=2000)
    earned = [value(tuple(text.tokens)) for text in texts]
    chosen = best_of_n(base, value, 4)
    expected = sum(p * value(text) for text, p in chosen.items())
    error = (sum(p * (value(t) - expected) ** 2 for t, p in chosen.items()) / 800) ** 0.5
    assert abs(fmean(earned) - expected) < 4 * error
    assert abs(fmean(earned) - game.v(prompt, (), "model")) > 12 * error


def test_the_choice_after_each_block_adds_no_more_kl_than_is_said():
    """The exact distribution of CD-blockwise, M = 1 and 2: the chain rule over its blocks."""
    game, prompt = Game(MODEL), tuple(PROMPTS[2])
    for block, samples in ((1, 4), (2, 4), (2, 2)):
        how = BlockSearch(1, samples, block, max_tokens=LENGTH)

        def kl_from(text, block=block, samples=samples):
            if game.is_over(text):
                return 0.0
            base = {text: 1.0}
            for _ in range(block):
                following = {}
                for t, p in base.items():
                    each = game.policy(prompt, t) if not game.is_over(t) else None
                    for a in range(SIZE) if each else [None]:
                        then = t if a is None else (*t, a)
                        following[then] = p if a is None else p * each[a]
                base = following

            def value(t):
                return game.returns(prompt, t) + game.v(prompt, t, "model")

            chosen = best_of_n(base, value, samples)
            return kl_of(chosen, base) + sum(p * kl_from(t) for t, p in chosen.items())

        assert 0.3 < kl_from(()) <= how.choice_kl(LENGTH)
        assert how.choice_kl(LENGTH) == pytest.approx(
            math.ceil(LENGTH / block) * choice_kl(samples)
        )
    assert BlockSearch(2, 4, 3).choice_kl(7) == pytest.approx(math.log(8) + 2 * math.log(4))
    assert BlockSearch(1, 8, 2, keep=0.5).choice_kl(7) == pytest.approx(math.log(8))
    assert BlockSearch(1, 8, 2, keep=1.0).choice_kl(7) == pytest.approx(choice_kl(8))


@torch.no_grad()
@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize("folded", [True, False])
def test_values_that_guide_and_choose_stay_within_the_bound(beta, folded):
    """Both prefer the same tokens: KL(π ‖ π₀) and the choice's alone would be too little."""
    size, n, samples = 64, 600, 2
    model = ValueModel(GPT(size, 16, 2, 1, seq_len=4, tied=False), HeadsConfig("linear", num_q=1))
    hidden = model.eval().trunk.hidden(torch.tensor([[1]]))[0, 0]
    q = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(size) + 0.5) / size)
    model.trunk.output_weight.zero_()  # π₀ is uniform
    for head in (model.heads.q[0], model.heads.target_q[0]):
        head.weight.copy_(torch.outer(q, hidden) / hidden.square().sum())
    base = dict.fromkeys(range(size), 1 / size)
    pi = dict(enumerate((beta * q).double().softmax(-1).tolist()))
    exact = kl_of(best_of_n(pi, lambda a: q[a].item(), samples), base)
    guidance = Guidance(beta=beta, top_k=None if folded else size)
    requests = [Request([1], 1, guidance, seed) for seed in range(n)]
    how = BlockSearch(1, samples, 1, max_tokens=1, max_batch=2 * n)
    searched = fmean(t.kl for t in write_searched(how, model, requests, report=True))
    best = fmean(t.kl for t in write_best(model, requests, samples)) + choice_kl(samples)
    for found in (searched, best):
        assert exact - 0.1 < found < exact + 0.2
    assert exact > (1.2 if beta else 0) * (kl_of(pi, base) + choice_kl(samples))


def test_the_guided_policy_of_a_table_is_the_formula_in_float64():
    """π₀·exp(β·A)/Z with A of an enumerated game, to rounding."""
    game = TokenGame.draw(3)
    q, v = game.solve(data_policy)
    nodes = range(game.nodes)
    base = torch.tensor([[game.policy[n, a] for a in ACTIONS] for n in nodes], dtype=torch.float64)
    known = torch.tensor([[q[n, a] for a in ACTIONS] for n in nodes], dtype=torch.float64)
    for beta in (-3.0, 0.0, 1.0, 20.0):
        found = guided_logits(base.log(), known, Guidance(beta=beta)).softmax(-1)
        for n in nodes:
            weight = [game.policy[n, a] * math.exp(beta * (q[n, a] - v[n])) for a in ACTIONS]
            exact = [w / sum(weight) for w in weight]
            assert found[n].tolist() == pytest.approx(exact, abs=1e-12)


# ── limits: what searches are where nothing is left to choose ────────────────────────────────


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(beta=1.0, top_k=9, temperature=0.7)])
@pytest.mark.parametrize("trunk", ["gpt", "llama"])
@pytest.mark.parametrize(
    "how", [{"samples": 5, "block": 99}, {"samples": 5, "keep": 1.0, "block": 3}]
)
def test_one_long_block_or_keeping_all_is_best_of_n(models, trunk, guidance, how):
    model = models[trunk]
    seeds = [row_seed(4, i) for i in range(len(SOME))]
    requests = [Request(p, 12, guidance, seed) for p, seed in zip(SOME, seeds, strict=True)]
    written = write_best(model, requests, 5, report=True)
    found = BlockSearch(max_tokens=12, **how)(model, SOME, guidance, seeds=seeds)
    assert [h.tokens for h in found.best] == [text.tokens for text in written]
    assert [h.score for h in found.best] == pytest.approx([last_q(t) for t in written], abs=1e-4)
    assert [h.terminated for h in found.best] == [text.terminated for text in written]
    for h, text in zip(found.best, written, strict=True):
        assert h.logprob == pytest.approx(sum(r.logprob for r in text.reports), abs=1e-4)
        assert h.choice_kl == choice_kl(5)
        base = sum(r.base_logprob for r in text.reports)
        assert text.kl == pytest.approx(h.logprob - base, abs=1e-4)
    # what it read: prompts once, and all tokens but each text's last
    every = [replace(r, seed=candidate_seed(r.seed, k)) for r in requests for k in range(5)]
    tokens = sum(len(text.tokens) - 1 for text in write(model, every, report=True))
    assert found.forward_tokens == sum(map(len, SOME)) + tokens


@pytest.mark.parametrize("values", VALUES)
def test_one_sample_is_plain_sampling(models, values):
    model, guidance = models["gpt"], Guidance(top_k=9, temperature=0.8)
    source, _ = make(values, model)
    written = generate(model, SOME, guidance, max_tokens=12, seed=0)
    if values != "sum":
        found = BlockSearch(1, 1, 3, max_tokens=12)(model, SOME, guidance, source)
        assert [h.tokens for h in found.best] == [c.tokens for c in written]
        return
    with pytest.raises(QvgptError, match="that know no V of a state"):
        BlockSearch(1, 1, 3, max_tokens=12)(model, SOME, guidance, source)


def test_rejection_keeps_texts_of_best_of_n_and_reads_less(models):
    model = models["gpt"]
    whole = BlockSearch(1, 16, 2, keep=1.0, max_tokens=12)
    half = replace(whole, keep=0.5)
    all_kept, found = (search(model, SOME, Guidance()) for search in (whole, half))
    requests = [Request(p, 12, seed=row_seed(0, i)) for i, p in enumerate(SOME)]
    for i, h in enumerate(found.best):
        each = [candidate_seed(requests[i].seed, k) for k in range(16)]
        texts = write(model, [replace(requests[i], seed=s) for s in each])
        assert h.tokens in [text.tokens for text in texts]
        assert h.score <= all_kept.best[i].score + 1e-5
    assert found.forward_tokens < 0.5 * all_kept.forward_tokens
    assert [half.kept_of(n) for n in (16, 8, 5, 3, 2, 1)] == [8, 4, 3, 2, 1, 1]
    assert replace(half, width=3).kept_of(4) == 3


def test_rejection_by_exact_values_loses_nothing():
    """V* of a deterministic game says early which text will be best: all the rest may go."""
    game = Game(MODEL)
    best = BlockSearch(1, 400, 1, keep=1.0, max_tokens=LENGTH, max_batch=3000)
    source = Exact(game, "best")
    kept = best(MODEL, PROMPTS, EVEN, source)
    early = replace(best, keep=0.3)(MODEL, PROMPTS, EVEN, source)
    assert early.forward_tokens < 0.75 * kept.forward_tokens
    assert fmean(returns(game, early)) > fmean(returns(game, kept)) - 0.05


@pytest.mark.parametrize("trunk", ["gpt", "llama"])
def test_one_simulation_is_greedy_by_q_or_by_the_policy(models, trunk):
    model = models[trunk]
    written = generate(model, SOME, Guidance(temperature=0.0), max_tokens=9)
    by_policy = TreeSearch(1, 6, 1e9, max_tokens=9)(model, SOME)
    assert [h.tokens for h in by_policy.best] == [c.tokens for c in written]
    read = sum(map(len, SOME)) + sum(len(c.tokens) - 1 for c in written)
    assert by_policy.forward_tokens == read  # no token is read twice
    greedy_in_q = Guidance(beta=1e5, top_k=6, temperature=0.0)
    by_q = TreeSearch(1, 6, 0.0, max_tokens=9)(model, SOME)
    written = generate(model, SOME, greedy_in_q, max_tokens=9)
    assert [h.tokens for h in by_q.best] == [c.tokens for c in written]


# ── whatever the values, in a batch, and against a fresh reading ─────────────────────────────


@EACH
@pytest.mark.parametrize(("trunk", "values"), BOTH)
def test_a_batch_finds_what_each_prompt_alone_finds(models, name, values, trunk):
    model, guidance = models[trunk], Guidance(beta=0.5, top_k=5)
    search, (source, _) = SEARCHES[name], make(values, model)
    seeds = [row_seed(2, i) for i in range(len(SOME))]
    if values == "sum":  # its contrast makes it a sum over tokens, and its function knows no V
        with pytest.raises(QvgptError, match="that know no V of a state"):
            search(model, SOME, guidance, source)
        return
    together = search(model, SOME, guidance, source, seeds)
    again = replace(search, max_batch=25)(model, SOME, guidance, source, seeds)
    alone = [search(model, [p], guidance, source, [s]) for p, s in zip(SOME, seeds, strict=True)]
    for i, texts in enumerate(together.texts):
        tokens = [h.tokens for h in texts]
        assert tokens == [h.tokens for h in again.texts[i]]
        assert tokens == [h.tokens for h in alone[i].texts[0]]
        scores = [h.score for h in alone[i].texts[0]]
        assert [h.score for h in texts] == pytest.approx(scores, abs=1e-4)
    read = sum(found.forward_tokens for found in alone)
    assert together.forward_tokens == again.forward_tokens == read


@EACH
@pytest.mark.parametrize(("trunk", "values"), [b for b in BOTH if b[1] != "sum"])
def test_what_was_read_on_forks_is_what_is_read_anew(models, name, values, trunk):
    """Each text's figures are those of a reading of the whole text without any cache."""
    model = models[trunk]
    guidance = Guidance(top_k=5)
    source, naive = make(values, model)
    for prompt, texts in zip(
        SOME, SEARCHES[name](model, SOME, guidance, source).texts, strict=True
    ):
        for h in texts:
            with torch.no_grad():
                q = [float(naive([*prompt, *h.tokens[:i]])[t]) for i, t in enumerate(h.tokens)]
            worth = sum(q) if values == "contrast" else q[-1]
            text = Trajectory(
                [*prompt, *h.tokens],
                [False] * len(prompt) + [True] * len(h.tokens),
                [0.0] * (len(prompt) + len(h.tokens)),
                h.terminated,
            )
            [read] = score(model, [text], guidance)
            assert h.logprob == pytest.approx(read.logprob, abs=1e-4)
            if name == "beam":
                worth = h.logprob / len(h.tokens) + 2.0 * worth
            assert h.score == pytest.approx(worth, abs=1e-4)
            assert h.terminated == (h.tokens[-1] in TOKENIZER.template.end_ids)


@pytest.mark.parametrize("values", ["own heads", "contrast", "prefix"])
def test_what_each_search_reads(models, values):
    """Per token of the result; prompts and what other trunks read of the same aside."""
    model, n = models["gpt"], 8
    source, _ = make(values, model)
    model_ends = model.tokenizer.template.end_ids
    guidance = Guidance(top_k=6)
    trunks = len({id(m.trunk) for m in source.models} | {id(model.trunk)}) if source else 1
    for name, search in {
        "block": BlockSearch(1, 4, 2, max_tokens=n),
        "beam": BeamSearch(4, max_tokens=n),
        "tree": TreeSearch(10, 6, max_tokens=n),
    }.items():
        found = search(model, SOME[1:2], guidance, source)
        tokens = len(found.best[0].tokens)
        assert found.best[0].tokens[-1] in model_ends or tokens == n
        most = {"block": 4, "beam": 4, "tree": 10}[name] * n
        # a fork for each text that ends: the value of an end token is read after it
        forks = most if values == "prefix" else 0
        assert found.forward_tokens <= trunks * (most + len(SOME[1])) + forks
    one = TreeSearch(10, 1, max_tokens=n)(model, SOME[1:2], guidance, source)
    tokens = len(one.best[0].tokens)
    extra = 1 if values == "prefix" else 0
    assert one.forward_tokens == trunks * (len(SOME[1]) + tokens - 1) + extra


# ── contrasts, and best of N by other values ─────────────────────────────────────────────────


def test_a_contrast_ranks_by_its_sum():
    plus, minus = make_model(), make_model()
    with torch.no_grad():
        for p in minus.parameters():
            p.add_(0.1 * torch.ones_like(p).cumsum(-1).cos())
    two, source = (Game(plus), Game(minus)), Contrast(plus, minus)

    def worth(prompt, text):
        up, down = (
            sum(math.log(g.policy(prompt, text[:i])[t]) for i, t in enumerate(text)) for g in two
        )
        return up - down

    found = TreeSearch(1000, SIZE, 0.4, max_tokens=LENGTH, max_batch=10**5)(
        plus, PROMPTS, values=source
    )
    for prompt, h in zip(map(tuple, PROMPTS), found.best, strict=True):
        best = max(worth(prompt, text) for text in two[0].texts())
        assert worth(prompt, tuple(h.tokens)) == pytest.approx(best, abs=1e-4)
        assert h.score == pytest.approx(best, abs=1e-4)
    requests = [Request(p, LENGTH, seed=i) for i, p in enumerate(PROMPTS)]
    for request, text in zip(requests, write_best(plus, requests, 9, values=source), strict=True):
        each = write(plus, [replace(request, seed=candidate_seed(request.seed, k))
                            for k in range(9)])  # fmt: skip
        sums = [worth(tuple(request.tokens), tuple(t.tokens)) for t in each]
        assert text.tokens == each[sums.index(max(sums))].tokens


@pytest.mark.parametrize("values", ["other heads", "prefix", "function"])
def test_the_best_of_n_may_be_chosen_by_any_values(models, values):
    model = models["gpt"]
    source, naive = make(values, model)
    requests = [Request(p, 8, seed=i) for i, p in enumerate(SOME)]
    changed = 0
    for request, kept in zip(requests, write_best(model, requests, 6, values=source), strict=True):
        each = write(model, [replace(request, seed=candidate_seed(request.seed, k))
                             for k in range(6)])  # fmt: skip
        with torch.no_grad():
            q = [float(naive([*request.tokens, *t.tokens[:-1]])[t.tokens[-1]]) for t in each]
        assert q[[t.tokens for t in each].index(kept.tokens)] == pytest.approx(max(q), abs=1e-5)
        changed += kept.tokens != each[0].tokens
    assert changed


# ── as options, and what is refused ──────────────────────────────────────────────────────────


@torch.no_grad()
def test_searches_are_written_as_the_engine_writes(models):
    model, spent = models["gpt"], []
    seeds = [row_seed(0, i) for i in range(len(SOME))]
    requests = [Request(p, 6, seed=s) for p, s in zip(SOME, seeds, strict=True)]
    events, tokens = [], 0
    for name, search in SEARCHES.items():
        found = search(model, SOME, seeds=seeds)
        texts = write_searched(
            search, model, requests, report=True, keep_reports=[1], spent=spent,
            on_step=events.extend,
        )  # fmt: skip
        assert spent.pop() == found.forward_tokens
        assert [t.tokens for t in texts] == [h.tokens for h in found.best]
        tokens += sum(len(t.tokens) for t in texts)
        assert [bool(t.reports) for t in texts] == [False, True, False, False]
        for text, h in zip(texts, found.best, strict=True):
            assert text.text == model.tokenizer.decode_completion(h.tokens)
            if name in ("beam", "tree"):
                assert h.choice_kl is None
                exact = 0.0
                for i, t in enumerate(h.tokens):
                    prompt = SOME[found.best.index(h)]
                    hidden = model.trunk.hidden(torch.tensor([[*prompt, *h.tokens[:i]]]))[0, -1]
                    exact -= float((model.trunk.output_weight @ hidden).log_softmax(-1)[t])
                assert text.kl == pytest.approx(exact, abs=1e-3)
            else:
                assert text.kl == pytest.approx(search.choice_kl(len(h.tokens)), abs=1e-4)
    assert len(events) == tokens
    assert sum(e.finished is not None for e in events) == len(SEARCHES) * len(SOME)
    assert write_searched(SEARCHES["tree"], model, []) == []


@EACH
@pytest.mark.parametrize("values", ["own heads", "contrast"])
def test_what_a_search_wrote_is_reported_as_guided(models, name, values):
    """By the values that guided, at the temperature that the search has."""
    model, guidance = models["gpt"], Guidance(beta=2.0, temperature=0.7)
    source, search = make(values, model)[0], SEARCHES[name]
    requests = [Request(p, 6, guidance, seed=i) for i, p in enumerate(SOME)]
    texts = write_searched(search, model, requests, report=True, values=source)
    found = search(model, SOME, guidance, source, range(len(SOME))).best
    for text, h in zip(texts, found, strict=True):
        assert text.tokens == h.tokens
        assert sum(r.logprob for r in text.reports) == pytest.approx(h.logprob, abs=1e-3)
        assert abs(sum(r.base_logprob for r in text.reports) - h.logprob) > 0.1
        assert all((r.v == 0) == (values == "contrast") for r in text.reports)


def test_searches_have_names():
    assert parse_search("tree", 9, 33) == TreeSearch(max_tokens=9, max_batch=33)
    said = {"block": {"keep": 1, "samples": 4, "per_token": True}}
    found = parse_search(said, 9, 33)
    assert found == BlockSearch(1, 4, keep=1.0, per_token=True, max_tokens=9, max_batch=33)
    assert search_name(found) == "block search (samples 4, keep 1.0, per_token True)"
    assert parse_search({"beam": None}, 9, 33) == BeamSearch(max_tokens=9, max_batch=33)
    assert search_name(BeamSearch()) == "beam search"
    for wrong, message in (
        ("blok", r"unknown search 'blok' \(did you mean 'block'\?\)"),
        ({"tree": {"simulation": 3}}, r"tree has no option 'simulation' \(did you mean 'simul"),
        ({"tree": {"max_tokens": 3}}, "is an option of the command"),
        ({"tree": {"simulations": 3.5}}, "simulations is a int, not 3.5"),
        ({"tree": {"simulations": True}}, "simulations is a int, not True"),
        ({"block": {"keep": "half"}}, "keep is a float"),
        ({"block": 3}, "options were expected"),
        ({"block": {}, "tree": {}}, "one of block, beam, tree"),
        ({"block": {"keep": 1.5}}, r"keep must lie in \(0, 1\]"),
        ({"block": {"width": 0}}, "width must be at least 1"),
        ({"tree": {"top_k": 0}}, "top_k must be at least 1"),
        ({"tree": {"c_puct": -1.0}}, "c_puct must be at least 0"),
        ({"tree": {"c_puct": math.nan}}, "c_puct must be at least 0"),
        ({"tree": {"c_puct": math.inf}}, "c_puct must be at least 0"),
        ({"beam": {"value_weight": math.nan}}, "value_weight must be finite"),
        ({"beam": {"length_penalty": math.nan}}, "length_penalty must be finite"),
        ({"beam": {"length_penalty": -math.inf}}, "length_penalty must be finite"),
    ):
        with pytest.raises(QvgptError, match=message):
            parse_search(wrong, 9, 33)


@EACH
def test_what_cannot_be_searched_is_refused(plain, make_model, name):
    search, model = SEARCHES[name], make_model(num_q=1)
    with pytest.raises(QvgptError, match="no value heads to rank texts by"):
        search(plain, SOME)
    with pytest.raises(QvgptError, match="do not fit the context"):
        replace(search, max_tokens=47)(model, SOME)
    with pytest.raises(QvgptError, match="an empty prompt"):
        search(model, [[]])
    with pytest.raises(QvgptError, match="stop strings"):
        write_searched(search, model, [Request([1], 5, stop=["x"])])
    model.info.level = "turn"
    with pytest.raises(QvgptError, match="they rank whole texts, by best_of"):
        search(model, SOME)
    model.info.level = "token"
    with torch.no_grad():
        for head in (*model.heads.q, *model.heads.target_q):
            for p in head.parameters():
                p.zero_()
    with pytest.raises(QvgptError, match="know V and no Q"):
        search(model, SOME)
    if name == "tree":
        other = small(1, HeadsConfig())
        other.info.gamma = 0.5
        two = WeightedSum(((1.0, HeadValues(other)), (1.0, PrefixValues(small(2, HeadsConfig())))))
        with pytest.raises(QvgptError, match="several discounts"):
            search(model, SOME, values=two)
