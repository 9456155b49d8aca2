"""What else might have been written: of tokens the engine writes, and of given texts."""

from dataclasses import replace

import pytest
import torch

from qvgpt.decode.engine import Engine, Request, write
from qvgpt.decode.guide import Guide
from qvgpt.decode.policy import Guidance
from qvgpt.decode.score import score
from qvgpt.decode.sources import PrefixValues
from qvgpt.errors import QvgptError
from qvgpt.trajectory import Trajectory

PROMPT = [1, 9, 12, 2]
GUIDANCES = {
    "full": Guidance(beta=2.0),
    "top_k": Guidance(beta=2.0, top_k=6, temperature=0.7),
    "plain": Guidance(),
    "top_p": Guidance(beta=1.0, top_p=0.05),  # leaves one or two
}


@torch.no_grad()
def by_hand(model, text, guidance):
    """(log π, log π₀, Q) of every token after a text, without engine or guide."""
    hidden = model.trunk.hidden(torch.tensor([text]))[:, -1]
    logits = hidden @ model.trunk.output_weight.T
    logits[:, model.tokenizer.vocab_size :] = -torch.inf
    base = logits.log_softmax(-1)[0]
    q = torch.stack([head(hidden) for head in model.heads.target_q]).mean(0)[0]
    q = q / model.heads.reward_scale
    kept = base.clone()
    if guidance.top_k:
        kept[kept < kept.topk(guidance.top_k).values[-1]] = -torch.inf
    if guidance.top_p:
        order = kept.argsort(descending=True)
        p = kept.exp()[order]
        kept[order[(p.cumsum(0) - p) >= guidance.top_p]] = -torch.inf
    pi = ((kept + guidance.beta * q) / (guidance.temperature or 1.0)).log_softmax(-1)
    return pi, base, q


def check(model, text, guidance, report, count):
    pi, base, q = by_hand(model, text, guidance)
    best = [i for i in pi.argsort(descending=True).tolist()[:count] if pi[i] > -torch.inf]
    assert [a.token for a in report.alternatives] == best
    for a in report.alternatives:
        assert a.logprob == pytest.approx(pi[a.token].item(), abs=1e-4)
        assert a.base_logprob == pytest.approx(base[a.token].item(), abs=1e-4)
        assert a.q == pytest.approx(q[a.token].item(), abs=1e-4)


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
def test_of_tokens_written(model, guidance):
    [text] = write(model, [Request(PROMPT, 6, guidance, 3, alternatives=4)])
    [plain] = write(model, [Request(PROMPT, 6, guidance, 3)])
    assert text.tokens == plain.tokens  # asking changes nothing
    for i, report in enumerate(text.reports):
        check(model, [*PROMPT, *text.tokens[:i]], guidance, report, 4)


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
def test_of_given_texts(model, guidance):
    tokens = [7, 20, 3]
    text = Trajectory([*PROMPT, *tokens], [False] * 4 + [True] * 3, [0.0] * 7, True)
    [found] = score(model, [text], guidance, alternatives=5)
    [plain] = score(model, [text], guidance)
    for i, report in enumerate(found.reports):
        check(model, [*PROMPT, *tokens[:i]], guidance, report, 5)
        assert replace(report, alternatives=()) == plain.reports[i]


def test_greedy_texts_are_reported_on_at_temperature_1(model):
    greedy = Guidance(beta=2.0, temperature=0.0)
    [text] = write(model, [Request(PROMPT, 6, greedy, alternatives=2)])
    [plain] = write(model, [Request(PROMPT, 6, greedy)], report=True)
    assert text.tokens == plain.tokens
    assert {r.logprob for r in plain.reports} == {0.0}
    for i, (token, report) in enumerate(zip(text.tokens, text.reports, strict=True)):
        pi, base, _ = by_hand(model, [*PROMPT, *text.tokens[:i]], Guidance(beta=2.0))
        assert report.alternatives[0].token == token
        assert report.logprob == pytest.approx(pi[token].item(), abs=1e-4)
        assert report.kl == pytest.approx(float((pi.exp() * (pi - base)).sum()), abs=1e-4)
    whole = [*PROMPT, *text.tokens]
    given = Trajectory(whole, [False] * 4 + [True] * (len(whole) - 4), [0.0] * len(whole), False)
    [found] = score(model, [given], greedy, alternatives=2)
    assert [r.logprob for r in found.reports] == pytest.approx(
        [r.logprob for r in text.reports], abs=1e-4
    )


def test_requests_with_and_without_share_a_batch(model):
    engine = Engine(model)
    guidance = Guidance(beta=1.0)
    kinds = [None, 0, 3, None, 1]
    ids = [engine.submit(Request(PROMPT, 5, guidance, 4, alternatives=k)) for k in kinds]
    found = {i: [] for i in ids}
    while engine.busy:
        for event in engine.step():
            found[event.request_id].append(event)
    assert len({tuple(e.token for e in events) for events in found.values()}) == 1
    for i, k in zip(ids, kinds, strict=True):
        for event in found[i]:
            assert (event.report is None) == (k is None)
            assert event.report is None or len(event.report.alternatives) == k


def test_values_read_after_each_candidate(model):
    """V of the text with the alternative appended, also of given texts, and without guiding."""
    values = PrefixValues(model)
    text = Trajectory([*PROMPT, 7, 20], [False] * 4 + [True] * 2, [0.0] * 6, False)
    for guidance in (Guidance(), Guidance(beta=1.0, top_k=5)):
        [found] = score(model, [text], guidance, values=values, alternatives=3)
        for i, report in enumerate(found.reports):
            before = text.tokens[: 4 + i]
            for a in report.alternatives:
                with torch.no_grad():
                    hidden = model.trunk.hidden(torch.tensor([[*before, a.token]]))[:, -1]
                    v = model.heads.state_value(hidden.float()).item()
                assert a.q == pytest.approx(v, abs=1e-4)


def test_models_without_values_have_alternatives_too(plain):
    [text] = write(plain, [Request(PROMPT, 3, alternatives=2)])
    assert all(a.q is None for r in text.reports for a in r.alternatives)
    assert all(len(r.alternatives) == 2 for r in text.reports)


def test_only_what_may_is_folded(model):
    guide = replace(Guide.of(model), foldable=frozenset({1.0}))
    texts = {}
    for foldable in (guide, Guide.of(model)):
        engine = Engine(model)
        engine.guide = foldable
        ids = [engine.submit(Request(PROMPT, 8, Guidance(beta=b), 1)) for b in (1.0, 2.0)]
        found = {i: [] for i in ids}
        while engine.busy:
            for event in engine.step():
                found[event.request_id].append(event.token)
        texts[foldable.foldable] = [found[i] for i in ids]
    assert list(guide._folded[1]) == [1.0]
    assert len({str(t) for t in texts.values()}) == 1


@pytest.mark.parametrize("functional", ["soft", "cvar"])
def test_functionals_that_heads_do_not_know_are_refused_at_once(model, functional):
    guidance = Guidance(beta=1.0, functional=functional)
    with pytest.raises(QvgptError, match="distribution of returns"):
        Engine(model).submit(Request(PROMPT, 3, guidance))
