"""What a server may promise on top of the engine, for our GPT and a Hugging Face trunk alike."""

import pytest
import torch
from test_sources import small
from tiny_hf import make_hf

from qvgpt.decode.engine import Engine, Request, row_seed, write
from qvgpt.decode.guide import Guide
from qvgpt.decode.policy import Guidance
from qvgpt.errors import QvgptError
from qvgpt.models.causal_lm import CausalLM
from qvgpt.models.heads_config import HeadsConfig

PROMPTS = [[1, *[5 + (7 * i + k) % 28 for k in range(i % 5)], 2] for i in range(16)]
GUIDANCES = [
    Guidance(),
    Guidance(beta=1.3),
    Guidance(beta=1.3, top_k=6, temperature=0.7),
    Guidance(kl_budget=0.3, top_k=8),
    Guidance(beta=0.5, temperature=0.0),
    Guidance(beta=2.0, top_p=0.8, candidates="guided"),
    Guidance(beta=0.1, beta_end=2.0, beta_tokens=5, min_p=0.05),
    Guidance(top_k=3),
]
REQUESTS = [
    Request(prompt, 4 + (5 * i) % 13, GUIDANCES[i % len(GUIDANCES)], row_seed(3, i))
    for i, prompt in enumerate(PROMPTS[:10])
]


@pytest.fixture(scope="module")
def models(make_model):
    return {
        "gpt": make_model(num_q=1),
        "llama": small(7, HeadsConfig(num_q=1), CausalLM(make_hf("llama"))),
    }


@pytest.fixture(params=["gpt", "llama"])
def model(models, request):
    return models[request.param]


@pytest.fixture(scope="module")
def alone(models):
    """What each request is answered when it has the engine for itself."""
    return {
        name: [write(model, [request])[0].tokens for request in REQUESTS]
        for name, model in models.items()
    }


def take(engine, texts):
    """One step; what it wrote is added to the texts."""
    events = engine.step()
    for event in events:
        texts.setdefault(event.request_id, []).append(event.token)
    return events


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_who_joins_and_who_leaves_changes_nobodys_text(models, alone, name):
    """One comes a step, guidances differ, and every second guest is cancelled."""
    engine, texts, cancelled = Engine(models[name], max_batch=4), {}, {}
    ids = {}
    for i, request in enumerate(REQUESTS):
        ids[engine.submit(request)] = i
        guest = engine.submit(Request([1, 9 + i], 20, GUIDANCES[i % 8], seed=i))
        take(engine, texts)
        if i % 2:
            engine.cancel(guest)
        cancelled[guest] = bool(i % 2)
    while engine.busy:
        take(engine, texts)
    assert [texts[k] for k in ids] == alone[name]
    assert len({tuple(text) for text in alone[name]}) > 7
    for guest, gone in cancelled.items():
        assert len(texts.get(guest, [])) <= (16 if gone else 20)


def test_each_guidance_in_one_batch_is_its_own(model):
    """Of one prompt and one seed, so that only guidance differs."""
    requests = [Request([1, 9, 2], 8, guidance, seed=5) for guidance in GUIDANCES]
    together = write(model, requests, report=True)
    for request, text in zip(requests, together, strict=True):
        (own,) = write(model, [request], report=True)
        assert own.tokens == text.tokens
        for ours, theirs in zip(own.reports, text.reports, strict=True):
            for key, value in vars(theirs).items():
                rough = 1e-3 if key == "beta" else 1e-5  # it is solved for, and Q may hardly vary
                same = value if value is None else pytest.approx(value, abs=1e-5, rel=rough)
                assert getattr(ours, key) == same, key
    assert len({tuple(text.tokens) for text in together}) > 5


def cut(logprob, guidance):
    """−inf outside top_k, top_p and min_p, one token at a time."""
    order, kept, mass = logprob.argsort(descending=True).tolist(), [], 0.0
    for rank, token in enumerate(order):
        p = float(logprob[token].exp())
        if rank >= (guidance.top_k or len(order)) or mass >= (guidance.top_p or 2.0):
            break
        if p >= (guidance.min_p or 0.0) * float(logprob[order[0]].exp()):
            kept.append(token)
        mass += p
    return torch.full_like(logprob, -torch.inf).index_put(
        (torch.tensor(kept),), logprob[torch.tensor(kept)]
    )


@torch.no_grad()
def test_reports_are_those_of_a_full_forward_over_the_finished_text(model):
    """Base and guided log-probabilities, the latter by hand at every step."""
    head = model.heads.target_q[0]
    for request, text in zip(REQUESTS, write(model, REQUESTS, report=True), strict=True):
        guidance, first = request.guidance, len(request.tokens) - 1
        hidden = model.trunk.hidden(torch.tensor([[*request.tokens, *text.tokens]]))[0]
        for k, (token, report) in enumerate(zip(text.tokens, text.reports, strict=True)):
            state = hidden[first + k]
            base = (model.trunk.output_weight @ state).log_softmax(-1)
            assert report.base_logprob == pytest.approx(float(base[token]), abs=1e-4)
            beta = guidance.beta_at(k) if report.beta is None else report.beta
            inside = cut(base, guidance) if guidance.candidates == "base" else base
            logits = inside + beta * head(state[None])[0]
            if guidance.candidates == "guided":
                logits = cut(logits.log_softmax(-1), guidance)
            if guidance.temperature == 0:
                assert token == int(logits.argmax())
                assert report.logprob == 0
                continue
            expected = (logits / guidance.temperature).log_softmax(-1)[token]
            assert report.logprob == pytest.approx(float(expected), abs=1e-4)


def test_a_cancelled_request_frees_its_slot_at_once(model):
    engine, texts = Engine(model, max_batch=2), {}
    engine.end_ids = frozenset()
    stays, goes, waits = (engine.submit(Request([1, 9, 4 + k], 9, seed=k)) for k in range(3))
    assert {e.request_id for e in take(engine, texts)} == {stays, goes}
    engine.cancel(goes)
    assert {e.request_id for e in take(engine, texts)} == {stays, waits}
    while engine.busy:
        take(engine, texts)
    assert len(texts[goes]) == 1
    for k, request_id in ((0, stays), (2, waits)):
        other = Engine(model)
        other.end_ids = frozenset()
        other.submit(Request([1, 9, 4 + k], 9, seed=k))
        own = {}
        while other.busy:
            take(other, own)
        assert [texts[request_id]] == list(own.values())


def test_stop_strings_span_tokens(model):
    """A stop string of several tokens ends the text with its last one, and is not in it."""
    free = [Request([1, 9, 2], 30, seed=k) for k in range(8)]
    plain = write(model, free)
    seen = 0
    for request, text in zip(free, plain, strict=True):
        whole = model.tokenizer.decode(text.tokens)
        if len(whole) < 8:
            continue
        stop = whole[4:7]  # three tokens, each a character
        at = whole.find(stop)
        (stopped,) = write(model, [Request(request.tokens, 30, seed=request.seed, stop=(stop,))])
        assert stopped.text == whole[:at]
        assert stopped.terminated
        assert stopped.tokens == text.tokens[: len(stopped.tokens)]
        assert model.tokenizer.decode(stopped.tokens) == whole[: at + 3]
        assert model.tokenizer.decode(stopped.tokens[:-1]) != whole[: at + 3]
        seen += 1
    assert seen >= 3


def test_a_request_refused_at_submit_harms_nobody(models, alone):
    bad = [
        Request([], 5),
        Request([1] * 40, 40),
        Request([1], 0),
        Request([1], 999, Guidance(beta=1.0)),
    ]
    for name, model in models.items():
        engine, texts, ids = Engine(model, max_batch=4), {}, []
        for i, request in enumerate(REQUESTS):
            with pytest.raises(QvgptError):
                engine.submit(bad[i % len(bad)])
            ids.append(engine.submit(request))
            take(engine, texts)
        while engine.busy:
            take(engine, texts)
        assert [texts[k] for k in ids] == alone[name]
        with pytest.raises(QvgptError):
            engine.submit(bad[0])
        assert not engine.busy
        assert engine.step() == []


BF16 = {"gpt": 0.05, "llama": 0.2}
"""No log π of a likely token differs by more, alone and in a batch of 16, in bfloat16. Measured on
a CPU: 0 (261 steps), and 0.11 at most of 236 steps, 92 % of which do not differ; these weights are
far from their start, so that logits are large."""


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_in_bfloat16_a_batch_changes_no_distribution_by_much(name, monkeypatch):
    """Compared as long as both have written the same: then a text may go another way."""
    trunk = CausalLM(make_hf("llama")) if name == "llama" else None
    model = small(7, HeadsConfig(num_q=1), trunk)
    model.trunk.to(torch.bfloat16)
    seen = []

    distribution = Guide.next_token

    def spy(*arguments):
        seen.append(distribution(*arguments))
        return seen[-1]

    monkeypatch.setattr(Guide, "next_token", spy)
    requests = [Request(p, 20, Guidance(beta=1.3), seed=i) for i, p in enumerate(PROMPTS)]

    def steps(requests):
        """(token, log π over the vocabulary) of each step of each request."""
        engine, found = Engine(model), {}
        for request in requests:
            found[engine.submit(request)] = []
        while engine.busy:
            for row, event in enumerate(engine.step()):
                found[event.request_id].append((event.token, seen[-1].logprob[row]))
        return list(found.values())

    worst, compared = 0.0, 0
    for request, together in zip(requests, steps(requests), strict=True):
        (own,) = steps([request])
        for (token, ours), (other, theirs) in zip(own, together, strict=False):
            top = theirs.topk(8).indices
            worst = max(worst, float((ours[top] - theirs[top]).abs().max()))
            compared += 1
            if token != other:
                break
    assert compared > 100
    assert worst < BF16[name], worst
