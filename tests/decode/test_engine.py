"""A text must not depend on who shares its batch, and what is reported must be true."""

import inspect
from dataclasses import replace

import pytest
import torch

from qvgpt.decode.engine import Door, Engine, Request, generate, row_seed, write
from qvgpt.decode.guide import Guide
from qvgpt.decode.policy import Guidance, next_token
from qvgpt.decode.reading import Reading
from qvgpt.decode.sources import TokenScorer
from qvgpt.errors import QvgptError
from qvgpt.models.value_model import ValueModel

PROMPTS = [[1], [1, 9, 2], [1, 30, 8, 8, 8, 17, 21, 25, 2], [1, 2], [1, 7, 7, 2], [1, 12, 13, 2]]
GUIDANCES = {
    "folded": Guidance(beta=1.0),
    "gathered": Guidance(beta=1.0, top_k=8, temperature=0.8),
    "greedy": Guidance(beta=1.0, temperature=0.0),
    "plain": Guidance(),
}


def drain(engine, finished=None):
    tokens, ends = {}, {}
    while engine.busy:
        for event in engine.step():
            tokens.setdefault(event.request_id, []).append(event.token)
            if event.finished:
                ends[event.request_id] = event.finished
    return tokens, ends


def alone(model, request):
    engine = Engine(model)
    engine.submit(request)
    (tokens,) = drain(engine)[0].values()
    return tokens


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
@pytest.mark.parametrize("max_batch", [64, 2])
def test_p20_a_batch_writes_what_each_writes_alone(model, guidance, max_batch):
    together = generate(model, PROMPTS, guidance, max_tokens=20, seed=5, max_batch=max_batch)
    for i, (prompt, text) in enumerate(zip(PROMPTS, together, strict=True)):
        assert text.tokens == alone(model, Request(prompt, 20, guidance, row_seed(5, i)))


@torch.no_grad()
def test_distributions_in_a_batch_are_those_of_the_whole_text(model, monkeypatch):
    seen, distribution = [], Guide.next_token

    def spy(*arguments):
        picked = distribution(*arguments)
        seen.append(picked.logprob)
        return picked

    monkeypatch.setattr(Guide, "next_token", spy)
    guidance = Guidance(beta=1.0)
    engine = Engine(model)
    texts = {engine.submit(Request(p, 9, guidance, i)): list(p) for i, p in enumerate(PROMPTS)}
    while engine.busy:
        rows = [row.request_id for row in engine._slots if row] or list(texts)
        events = engine.step()
        assert [e.request_id for e in events] == rows
        for event, found in zip(events, seen.pop(), strict=True):
            text = texts[event.request_id]
            hidden = model.trunk.hidden(torch.tensor([text]))[:, -1]
            exact = next_token(model, hidden, guidance).logprob[0]
            torch.testing.assert_close(found, exact, atol=1e-5, rtol=0)
            text.append(event.token)


def test_the_same_seed_gives_the_same_text(model):
    once = generate(model, PROMPTS, max_tokens=20, seed=1)
    assert once == generate(model, PROMPTS, max_tokens=20, seed=1)
    assert once != generate(model, PROMPTS, max_tokens=20, seed=100)


def test_other_seeds_share_no_random_numbers(model):
    """Were row i seeded with seed + i, seed 1 would write seed 0's texts again, one row up."""
    one, two = (generate(model, [[1]] * 30, max_tokens=20, seed=seed) for seed in (0, 1))
    assert not [i for i in range(29) if one[i + 1] == two[i] and len(two[i].tokens) > 3]
    assert generate(model, [[1]], max_tokens=20, seed=-1) != two[:1]  # to Python they are one seed


def test_samples_of_one_prompt_share_its_reading(model):
    engine = Engine(model)
    requests = [Request(PROMPTS[2], 1, seed=i) for i in range(5)]
    for request in requests:
        engine.submit(request)
    tokens, _ = drain(engine)
    assert list(tokens.values()) == [alone(model, r) for r in requests]
    assert len({t[0] for t in tokens.values()}) > 1
    assert engine.forward_tokens == len(PROMPTS[2]) - 1 + 5


@pytest.mark.parametrize("max_batch", [64, 3])
def test_requests_join_midway(model, max_batch):
    engine = Engine(model, max_batch)
    requests = [Request(p, 12 + 3 * i, GUIDANCES["folded"], seed=i) for i, p in enumerate(PROMPTS)]
    ids = {}
    tokens = {}
    for i, request in enumerate(requests):  # each needs a longer cache than those before
        ids[engine.submit(request)] = i
        for _ in range(2):
            for event in engine.step():
                tokens.setdefault(event.request_id, []).append(event.token)
    for request_id, rest in drain(engine)[0].items():
        tokens.setdefault(request_id, []).extend(rest)
    assert {ids[k]: v for k, v in tokens.items()} == {
        i: alone(model, request) for i, request in enumerate(requests)
    }


def test_who_joins_is_served_at_once(model):
    engine = Engine(model)
    engine.end_ids = frozenset()
    first = engine.submit(Request([1, 9], 10))
    engine.step()
    second = engine.submit(Request([1, 8, 2], 40))
    assert [event.request_id for event in engine.step()] == [first, second]


def test_who_waits_begins_with_others_but_not_late():
    door = Door(64)
    assert door.open(at_work=0, waiting=200) == 64
    assert door.open(at_work=64, waiting=136) == 0
    assert door.open(at_work=62, waiting=136) == 0, "two of four slots"
    assert door.open(at_work=60, waiting=136) == 4
    assert [door.open(at_work=63, waiting=9) for _ in range(6)] == [0, 0, 0, 0, 1, 0]
    assert door.open(at_work=30, waiting=2) == 2, "all that wait have a slot"
    assert Door(8).open(at_work=7, waiting=9) == 1, "small batches keep nobody"


def test_a_full_batch_reads_prompts_together(model, monkeypatch):
    reads, of = [], Reading.of

    def spy(trunks, prompts, *rest):
        reads.append(len(prompts))
        return of(trunks, prompts, *rest)

    monkeypatch.setattr(Reading, "of", spy)
    engine = Engine(model, max_batch=32)
    engine.end_ids = frozenset()
    for i in range(40):  # from the second step on, one text ends at each
        engine.submit(Request([1, 2 + i % 30, 3 + i // 30, 2], 2 + i, seed=i))
    drain(engine)
    assert reads == [32, 2, 2, 2, 2]


def test_guidances_mix_in_a_batch(model):
    requests = [
        Request(p, 10, g, seed=3) for p, g in zip(PROMPTS, GUIDANCES.values(), strict=False)
    ]
    engine = Engine(model)
    ids = [engine.submit(request) for request in requests]
    tokens, _ = drain(engine)
    assert [tokens[i] for i in ids] == [alone(model, request) for request in requests]


def test_slots_are_used_again(model):
    engine = Engine(model, max_batch=2)
    requests = [Request(p, 3 + 5 * (i % 2), seed=i) for i, p in enumerate(PROMPTS)]
    ids = [engine.submit(request) for request in requests]
    widths, tokens = [], {}
    while engine.busy:
        events = engine.step()
        widths.append(len(events))
        for event in events:
            tokens.setdefault(event.request_id, []).append(event.token)
    assert max(widths) == 2
    assert [tokens[i] for i in ids] == [alone(model, request) for request in requests]


def test_cancelled_requests_are_forgotten(model):
    engine = Engine(model, max_batch=2)
    engine.end_ids = frozenset()
    ids = [engine.submit(Request(p, 6, seed=i)) for i, p in enumerate(PROMPTS[:4])]
    engine.step()
    engine.cancel(ids[0])  # at work
    engine.cancel(ids[2])  # waiting
    engine.cancel(999)
    tokens, _ = drain(engine)
    assert {k: len(v) for k, v in tokens.items()} == {ids[1]: 5, ids[3]: 6}
    engine.cancel(engine.submit(Request([1], 5)))
    assert not engine.busy
    assert engine.step() == []


def test_an_end_token_ends_a_text(model):
    engine = Engine(model)
    for i in range(60):
        engine.submit(Request([1], 30, seed=i))
    tokens, ends = drain(engine)
    assert {"end", "length"} == set(ends.values())
    for i, text in tokens.items():
        assert (text[-1] in engine.end_ids) == (ends[i] == "end")
        assert not engine.end_ids & set(text[:-1])
        assert (len(text) == 30) or ends[i] == "end"
    for completion in generate(model, [[1]] * 60, max_tokens=30):
        assert completion.terminated == (completion.tokens[-1] in engine.end_ids)


def test_stop_strings_end_a_text(model):
    engine = Engine(model)
    engine.end_ids = frozenset()
    for i in range(10):
        engine.submit(Request([1], 40, seed=i, stop=("a", "b")))
    tokens, ends = drain(engine)
    assert "stop" in ends.values()
    for i, text in tokens.items():
        written = model.tokenizer.decode(text)
        assert any(s in written for s in "ab") == (ends[i] == "stop")
        assert not any(s in model.tokenizer.decode(text[:-1]) for s in "ab")


def test_a_stop_string_is_in_the_tokens_and_not_in_the_text(model):
    stop = ("a", "bc", "b")
    requests = [Request([1], 40, seed=i, stop=stop) for i in range(12)]
    texts = write(model, requests)
    completions = generate(model, [[1]] * 12, max_tokens=40, stop=stop)
    stopped = 0
    for text, completion in zip(texts, completions, strict=True):
        assert (completion.tokens, completion.terminated) == (text.tokens, text.terminated)
        whole = model.tokenizer.decode_completion(text.tokens)
        ended = any(s in whole for s in stop)
        stopped += ended
        assert not any(s in text.text for s in stop)
        assert whole[:-1] == text.text if ended else whole == text.text
        assert text.terminated or (len(text.tokens) == 40 and not ended)
    assert stopped


def test_stop_strings_that_mean_nothing_are_refused(model):
    without = ValueModel(model.trunk, None)
    for to, stop, message in (
        (model, "abc", "a list of strings was expected, not 'abc'"),
        (model, ["a", ""], "an empty string would end every text"),
        (without, ["a"], "no tokenizer to find strings with"),
    ):
        with pytest.raises(QvgptError, match=f"stop: .*{message}"):
            Engine(to).submit(Request([1], 5, stop=stop))
    Engine(without).submit(Request([1], 5))


def test_after_a_step_that_failed_an_engine_goes_no_further(model):
    """The cache has read tokens that nobody was told of."""
    calls = []

    def function(texts, tokens):
        calls.append(texts)
        return torch.zeros(tokens.shape) if len(calls) < 3 else 1 / 0

    engine = Engine(model, values=TokenScorer(function))
    engine.end_ids = frozenset()
    engine.submit(Request([1], 9, Guidance(beta=1.0, top_k=5)))
    engine.step()
    engine.step()
    with pytest.raises(ZeroDivisionError):
        engine.step()
    with pytest.raises(QvgptError, match="begin the texts anew in another engine"):
        engine.step()


def test_an_engine_without_room_is_refused(model):
    with pytest.raises(QvgptError, match="max_batch must be at least 1"):
        Engine(model, max_batch=0)


def test_what_cannot_be_served_is_refused(model, plain):
    with pytest.raises(QvgptError, match=r"tokens that are not of the model's \d+: \[1, 9999\]"):
        write(model, [Request([1, 9999], 2)])
    with pytest.raises(QvgptError, match="40 tokens and max_tokens 9 do not fit the context of 48"):
        Engine(model).submit(Request([1] * 40, 9))
    with pytest.raises(QvgptError, match="empty prompt"):
        Engine(model).submit(Request([], 9))
    with pytest.raises(QvgptError, match="no value heads"):
        Engine(plain).submit(Request([1], 9, Guidance(beta=1.0)))
    with pytest.raises(QvgptError, match="max_tokens must be at least 1, not 0"):
        Engine(model).submit(Request([1], 0))
    untyped = inspect.unwrap(Guide.refuse)
    for prompt in (torch.tensor([1, 2]), torch.tensor([1, 2]).numpy(), "ab", 7):
        with pytest.raises(QvgptError, match="a prompt is a list of token ids, not "):
            untyped(Guide.of(model), prompt, 5, Guidance())
    (whole,) = generate(model, [[1] * 40], max_tokens=8)  # fits to the last token
    assert 1 <= len(whole.tokens) <= 8


@torch.no_grad()
@pytest.mark.parametrize("twins", ["mean", "min"])
def test_reports_are_true(make_model, twins):
    model = make_model("mlp")
    guidance = Guidance(beta=1.5, temperature=0.7, top_p=0.9, twins=twins)
    prompt = [1, 9, 2]
    (written,) = write(model, [Request(prompt, 8, guidance)], report=True)
    text = prompt + written.tokens
    states = model.trunk.hidden(torch.tensor([text]))[0]
    for i, (token, report) in enumerate(zip(written.tokens, written.reports, strict=True)):
        h = states[len(prompt) - 1 + i]
        base = (model.trunk.output_weight @ h).log_softmax(-1)
        both = torch.stack([head(h[None])[0] for head in model.heads.target_q])
        q = both.mean(0) if twins == "mean" else both.amin(0)
        order = base.argsort(descending=True)
        count = int((base[order].exp().cumsum(0) < 0.9).sum()) + 1
        kept = order[:count]
        logprob = ((base[kept] + 1.5 * q[kept]) / 0.7).log_softmax(0)
        place = kept.tolist().index(token)
        expected = {
            "base_logprob": base[token],
            "logprob": logprob[place],
            "kl": (logprob.exp() * (logprob - base[kept])).sum(),
            "q": q[token],
            "v": model.heads.v(h),
            "advantage": q[token] - model.heads.v(h),
        }
        for name, value in expected.items():
            assert getattr(report, name) == pytest.approx(value.item(), abs=1e-5), name


def test_reports_without_heads_know_no_values(plain):
    reports = write(plain, [Request([1], 3)], report=True)[0].reports
    assert all(r.q is None and r.v is None and r.advantage is None for r in reports)
    assert all(r.kl == 0 and r.base_logprob == r.logprob for r in reports)


@pytest.mark.parametrize("cut", [{}, {"top_k": 9, "top_p": 0.9, "candidates": "guided"}])
def test_a_report_changes_no_text(model, cut):
    guidance = replace(GUIDANCES["folded"], **cut)
    requests = [Request(p, 15, guidance, seed=i) for i, p in enumerate(PROMPTS)]
    silent, reported = write(model, requests), write(model, requests, report=True)
    assert [t.tokens for t in silent] == [t.tokens for t in reported]
    assert not any(t.reports for t in silent)


def test_what_is_written_is_told_step_by_step(model):
    told = []
    requests = [Request(p, 5, seed=i) for i, p in enumerate(PROMPTS)]
    texts = write(model, requests, report=True, keep_reports=[2], on_step=told.append)
    events = [event for step in told for event in step]
    assert len(events) == sum(len(t.tokens) for t in texts)
    assert sum(e.finished is not None for e in events) == len(PROMPTS)
    assert [len(t.reports) for t in texts] == [0, 0, len(texts[2].tokens), 0, 0, 0]
    assert texts[2].kl == sum(r.kl for r in texts[2].reports)
    assert texts[2].text == model.tokenizer.decode_completion(texts[2].tokens)
