"""π₀·exp(β·A) whatever says A: every source, cached and batched, against one computed naively."""

import itertools

import pytest
import torch
from tiny_hf import TOKENIZER, make_hf

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.beam import BeamSearch
from qvgpt.decode.engine import Engine, Request, generate, row_seed, write
from qvgpt.decode.guide import Guide
from qvgpt.decode.policy import Guidance
from qvgpt.decode.reading import Reading, States
from qvgpt.decode.score import score
from qvgpt.decode.sources import (
    Contrast,
    HeadValues,
    PrefixValues,
    TokenScorer,
    WeightedSum,
    own_values,
)
from qvgpt.errors import QvgptError
from qvgpt.models.causal_lm import CausalLM
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Trajectory

PROMPTS = [[1], [1, 9, 2], [1, 30, 8, 8, 8, 17, 21, 25, 2], [1, 2], [1, 7, 7, 2], [1, 12, 13, 2]]
SIZE = TOKENIZER.vocab_size
FUDGE = HeadsConfig("categorical", rank=2, bins=2)
SOFT = HeadsConfig("categorical", rank=2, bins=5, low=-1.0, high=1.0)


def small(seed, heads=None, trunk=None, reward_scale=1.0):
    """A model smaller than the one it guides, far from its start."""
    torch.manual_seed(seed)
    model = ValueModel(trunk or GPT(SIZE, 8, 2, 1, seq_len=40), heads, TOKENIZER).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.4 * torch.randn_like(p))
    if model.heads is not None:
        model.heads.reward_scale = reward_scale
    return model


def last(trunk, text):
    """The hidden state after a text, without any cache."""
    return trunk.hidden(torch.tensor([text]))[:, -1]


def log_pi(model, text):
    return (last(model.trunk, text) @ model.trunk.output_weight.T).log_softmax(-1)[0]


def each_after(model, text, read):
    longer = torch.tensor([[*text, a] for a in range(SIZE)])
    return read(model.trunk.hidden(longer)[:, -1])


def by_hand(texts, tokens):
    """A function that a user might write: even tokens are good, more so in longer texts."""
    length = torch.tensor([len(t) for t in texts])[:, None]
    return (tokens % 2 == 0) * length / 10.0


def make(name, model):
    """A source, and what it says of all tokens after a text, naively."""
    if name == "own heads":
        return None, lambda text: model.heads.target_q[0](last(model.trunk, text))[0]
    if name == "other heads":
        other = small(1, HeadsConfig("mlp", num_q=1), reward_scale=0.5)
        q = other.heads.target_q[0]
        return HeadValues(other), lambda text: q(last(other.trunk, text))[0] / 0.5
    if name == "contrast":
        plus, minus = small(2), small(3)
        return Contrast(plus, minus), lambda text: log_pi(plus, text) - log_pi(minus, text)
    if name == "prefix":
        other = small(4, HeadsConfig(), reward_scale=2.0)
        return PrefixValues(other), lambda text: each_after(other, text, other.heads.v) / 2
    if name == "own prefix":
        return PrefixValues(model), lambda text: each_after(model, text, model.heads.v)
    if name == "fudge":
        other = small(5, FUDGE)
        v = other.heads.v
        naive = lambda text: each_after(other, text, lambda h: v.logits(h).softmax(-1)[:, 1]).log()  # noqa: E731
        return PrefixValues(other, log=True), naive
    if name == "soft":
        other = small(6, SOFT)
        v, returns = other.heads.v, torch.linspace(-1, 1, 5)

        def read(hidden):
            return (v.logits(hidden).softmax(-1) @ (1.3 * returns).exp()).log() / 1.3

        return PrefixValues(other), lambda text: each_after(other, text, read)
    if name == "function":
        everything = torch.arange(SIZE)[None]
        return TokenScorer(by_hand), lambda text: by_hand([text], everything)[0]
    parts = [make(part, model) for part in ("other heads", "contrast", "prefix", "function")]
    weights = (0.5, -1.0, 2.0, 1.0)
    terms = tuple((w, source) for w, (source, _) in zip(weights, parts, strict=True))
    return WeightedSum(terms), lambda text: sum(
        w * f(text) for w, (_, f) in zip(weights, parts, strict=True)
    )


SOURCES = ["own heads", "other heads", "contrast", "prefix", "own prefix", "fudge", "soft",
           "function", "sum"]  # fmt: skip
EVERY = pytest.mark.parametrize("name", SOURCES)


def guidance_of(name, **options):
    return Guidance(beta=1.3, functional="soft" if name == "soft" else "mean", **options)


@pytest.fixture(scope="module")
def guided(make_model):
    """The larger model, with values of its own: our GPT, or a Hugging Face trunk."""
    heads = HeadsConfig(num_q=1)
    return {
        "gpt": make_model(num_q=1),
        "llama": small(7, heads, CausalLM(make_hf("llama"))),
    }


@pytest.fixture
def seen(monkeypatch):
    """Every distribution that an engine samples from."""
    found = []

    next_token = Guide.next_token

    def spy(*arguments):
        found.append(next_token(*arguments))
        return found[-1]

    monkeypatch.setattr(Guide, "next_token", spy)
    return found


@torch.no_grad()
@EVERY
@pytest.mark.parametrize("trunk", ["gpt", "llama"])
@pytest.mark.parametrize("options", [{}, {"top_k": 6, "temperature": 0.7}], ids=["all", "top-6"])
def test_every_source_gives_the_naive_distribution(guided, seen, name, trunk, options):
    """Prompts of all lengths; requests join and leave in the middle."""
    model, guidance = guided[trunk], guidance_of(name, **options)
    source, naive = make(name, model)
    engine = Engine(model, max_batch=3, values=source)
    engine.end_ids = frozenset()
    texts, waiting, checked = {}, list(enumerate(PROMPTS)), 0
    while engine.busy or waiting:
        if waiting:
            i, prompt = waiting.pop(0)
            request_id = engine.submit(Request(prompt, 3 + 2 * (i % 2), guidance, seed=i))
            texts[request_id] = list(prompt)
        for event, logprob, tokens in _rows(engine.step(), seen):
            text = texts[event.request_id]
            expected = log_pi(model, text)
            if "top_k" in options:
                expected[expected.argsort(descending=True)[6:]] = -torch.inf
            expected = ((expected + 1.3 * naive(text)) / guidance.temperature).softmax(-1)
            found = torch.zeros(SIZE).scatter(0, tokens, logprob.exp())
            atol = 2e-6 if trunk == "gpt" else 1e-5  # its hidden states are larger
            torch.testing.assert_close(found, expected, atol=atol, rtol=0)
            text.append(event.token)
            checked += 1
    assert checked == sum(3 + 2 * (i % 2) for i in range(len(PROMPTS)))


def _rows(events, seen):
    picked = seen.pop()
    assert not seen
    assert len(events) == len(picked.tokens)
    return zip(events, picked.logprob, picked.tokens, strict=True)


@EVERY
@pytest.mark.parametrize("trunk", ["gpt", "llama"])
def test_a_seeded_text_is_the_same_alone_and_in_any_batch(guided, name, trunk):
    model, guidance = guided[trunk], guidance_of(name, top_k=5)
    source, _ = make(name, model)
    how = {"max_tokens": 12, "seed": 5, "values": source}
    together = generate(model, PROMPTS, guidance, **how)
    assert together == generate(model, PROMPTS, guidance, **how, max_batch=2)
    for i, prompt in enumerate(PROMPTS):
        request = Request(prompt, 12, guidance, row_seed(5, i))
        assert write(model, [request], values=source)[0].tokens == together[i].tokens
    assert together != generate(model, PROMPTS, Guidance(top_k=5), **how)


@torch.no_grad()
@pytest.mark.parametrize("trunk", ["gpt", "llama"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_a_forked_cache_is_what_is_read_anew_and_stays_as_it_is(guided, trunk, left):
    """Prompts padded on either side; some rows of a reading; more candidates than a fork holds."""
    trunk = guided[trunk].trunk
    reading = Reading.new([trunk], len(PROMPTS), 20)
    longest = max(map(len, PROMPTS))
    tokens, mask = torch.zeros(2, len(PROMPTS), longest, dtype=torch.long)
    for i, prompt in enumerate(PROMPTS):
        place = slice(longest - len(prompt), longest) if left else slice(0, len(prompt))
        tokens[i, place], mask[i, place] = torch.tensor(prompt), 1
    reading._feed(tokens, mask.bool(), sum(map(len, PROMPTS)))
    states = reading.read(torch.full((len(PROMPTS),), 11))
    for rows in ([4, 0, 2], None):
        some = states if rows is None else states.take(rows)
        chosen = PROMPTS if rows is None else [PROMPTS[i] for i in rows]
        candidates = torch.randint(0, SIZE, (len(chosen), 300))
        found = some.after(trunk, candidates)
        for text, row, after in zip(chosen, candidates, found, strict=True):
            for k in (0, 1, 299):
                exact = last(trunk, [*text, 11, int(row[k])])[0]
                torch.testing.assert_close(after[k], exact, atol=1e-5, rtol=1e-5)
    assert reading.counts == [sum(map(len, PROMPTS)) + len(PROMPTS) + 900 + 1800]
    then = reading.read(torch.full((len(PROMPTS),), 12)).of(trunk)
    for text, after in zip(PROMPTS, then, strict=True):
        exact = last(trunk, [*text, 11, 12])[0]
        torch.testing.assert_close(after, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trunk", ["gpt", "llama"])
def test_identities_of_contrast(guided, trunk):
    model, plus = guided[trunk], small(2)
    how = {"max_tokens": 12, "seed": 3}
    itself = generate(model, PROMPTS, Guidance(beta=3.0), values=Contrast(plus, plus), **how)
    assert itself == generate(model, PROMPTS, **how)
    # π₀·π₊/π₀ = π₊
    steered = generate(model, PROMPTS, Guidance(beta=1.0), values=Contrast(plus, model), **how)
    assert steered == generate(plus, PROMPTS, **how)
    assert steered != itself


@pytest.mark.parametrize("name", ["own heads", "other heads", "contrast", "prefix", "function"])
def test_a_sum_of_one_is_that_one(make_model, name):
    model = make_model(num_q=1)
    source, _ = make(name, model)
    source = source or HeadValues(model)
    others = (Contrast(small(8), small(9)), HeadValues(small(1, HeadsConfig())))
    terms = ((1.0, source), *((0.0, other) for other in others))
    guidance = guidance_of(name, top_k=6)
    request = [Request(p, 8, guidance, seed=i) for i, p in enumerate(PROMPTS)]
    alone, summed = (
        write(model, request, report=True, values=s) for s in (source, WeightedSum(terms))
    )
    for a, b in zip(alone, summed, strict=True):
        assert a.tokens == b.tokens
        for x, y in zip(a.reports, b.reports, strict=True):
            assert x.logprob == pytest.approx(y.logprob, abs=1e-5)
            assert x.q == pytest.approx(y.q, abs=1e-5)
            assert (x.v is None) == (y.v is None)


def test_values_of_an_enumerated_game_give_its_soft_optimum():
    """π(text) = π₀(text)·exp(R(text)/η) / Z where values are η·log E exp(R/η) of what follows."""
    torch.manual_seed(0)
    model = ValueModel(GPT(5, 8, 2, 1, seq_len=8)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn_like(p))
    reward = dict(
        zip(itertools.product(range(5), repeat=3), torch.randn(125).tolist(), strict=True)
    )
    eta, prompt = 0.4, [1]

    @torch.no_grad()
    def value(text):
        """η·log E_π₀ exp(R/η) of what is written (the prompt is one token)."""
        if len(text) == 4:
            return torch.tensor(reward[tuple(text[1:])])
        each = torch.stack([value([*text, a]) for a in range(5)])
        return eta * (log_pi(model, text) + each / eta).logsumexp(-1)

    def scores(texts, tokens):
        return torch.stack([
            torch.stack([value([*text, int(a)]) for a in row])
            for text, row in zip(texts, tokens, strict=True)
        ])  # fmt: skip

    z = float(value(prompt)) / eta
    requests = [Request(prompt, 3, Guidance(beta=1 / eta), seed=i) for i in range(40)]
    for text in write(model, requests, report=True, values=TokenScorer(scores)):
        base = sum(r.base_logprob for r in text.reports)
        exact = base + reward[tuple(text.tokens)] / eta - z
        assert sum(r.logprob for r in text.reports) == pytest.approx(exact, abs=1e-5)


@torch.no_grad()
@EVERY
def test_reports_say_what_the_source_says(guided, name):
    model = guided["gpt"]
    source, naive = make(name, model)
    guidance = guidance_of(name, top_k=8)
    (written,) = write(model, [Request([1, 9, 2], 5, guidance)], report=True, values=source)
    text = [1, 9, 2]
    for token, report in zip(written.tokens, written.reports, strict=True):
        if name != "soft":  # reports tell the mean
            assert report.q == pytest.approx(float(naive(text)[token]), abs=1e-5)
        if name in ("function", "sum"):
            assert report.v is None
            assert report.advantage is None
        elif name == "contrast":
            assert report.v == 0
        else:
            assert report.v is not None
        text.append(token)
    if name == "fudge":  # of a prefix scorer, q is v one token later
        reports = written.reports
        assert [r.v for r in reports[1:]] == pytest.approx([r.q for r in reports[:-1]], abs=1e-5)


@pytest.mark.parametrize("name", ["other heads", "contrast", "prefix", "function"])
def test_beams_are_guided_by_any_source(guided, name):
    model = guided["gpt"]
    source, naive = make(name, model)
    guidance = guidance_of(name, top_k=7)
    greedy = Guidance(**{**vars(guidance), "temperature": 0.0})
    one = BeamSearch(beams=1, max_tokens=8)(model, PROMPTS, guidance, source)
    written = generate(model, PROMPTS, greedy, max_tokens=8, values=source)
    assert [best.tokens for best in one.best] == [text.tokens for text in written]
    search = BeamSearch(beams=4, max_tokens=6)
    together = search(model, PROMPTS, guidance, source)
    for prompt, texts in zip(PROMPTS, together.texts, strict=True):
        (alone,) = search(model, [prompt], guidance, source).texts
        assert [t.tokens for t in alone] == [t.tokens for t in texts]
    with torch.no_grad():  # its log π is the naive one
        best, text, total = together.best[2], list(PROMPTS[2]), 0.0
        for token in best.tokens:
            base = log_pi(model, text)
            base[base.argsort(descending=True)[7:]] = -torch.inf
            total += float((base + 1.3 * naive(text)).log_softmax(-1)[token])
            text.append(token)
    assert best.logprob == pytest.approx(total, abs=1e-4)


def test_what_each_source_costs_in_tokens_read(guided):
    """Per token written: one of each trunk, and one for each candidate of a prefix scorer."""
    model, n, k, prompt = guided["gpt"], 10, 6, [1, 9, 2]
    expected = {
        "own heads": [n + 2],
        "other heads": [n + 2, n + 2],
        "contrast": [n + 2, n + 2, n + 2],
        "prefix": [n + 2, n + 2 + k * n],
        "own prefix": [n + 2 + k * n],
        "function": [n + 2],
    }
    for name, counts in expected.items():
        engine = Engine(model, values=make(name, model)[0])
        engine.end_ids = frozenset()
        engine.submit(Request(prompt, n, guidance_of(name, top_k=k)))
        while engine.busy:
            engine.step()
        assert engine.counts == counts, name


def test_heads_that_know_v_alone_are_read_after_each_candidate(guided):
    """In the form of the objective that taught them; Q that knows nothing guides nowhere."""
    told = {"FUDGE": {"weight": 1.0}}
    model = small(5, FUDGE)
    with torch.no_grad():
        for head in (*model.heads.q, *model.heads.target_q):
            head.weight.zero_()
    assert isinstance(own_values(small(5, FUDGE)), HeadValues)
    assert isinstance(own_values(model), HeadValues)
    with pytest.raises(QvgptError, match="know V and no Q"):
        generate(model, PROMPTS, Guidance(beta=2.0), max_tokens=8)
    model.info.objectives = [{"LM": {}}, told]
    assert own_values(model) == PrefixValues(model, log=True)
    own = generate(model, PROMPTS, Guidance(beta=9.0), max_tokens=8)
    assert own == generate(
        model, PROMPTS, Guidance(beta=9.0), max_tokens=8, values=PrefixValues(model, log=True)
    )
    assert own != generate(model, PROMPTS, max_tokens=8)
    model.info.objectives = [{"ControlledDecoding": {}}]
    assert own_values(model) == PrefixValues(model, log=False)
    assert own_values(small(2)) is None
    assert isinstance(own_values(ValueModel(GPT(SIZE, 8, 2, 1), HeadsConfig())), HeadValues)


def test_what_does_not_go_together_is_refused(guided, make_model):
    model, request = guided["gpt"], Request([1, 9], 5, Guidance(beta=1.0))
    foreign = ValueModel(
        GPT(SIZE, 8, 2, 1),
        HeadsConfig(),
        Tokenizer.train(["ABCDEFGHIJKLMNOPQRSTUVWXYZ :?"], "char"),
    )
    for source in (HeadValues(foreign), Contrast(small(2), foreign),
                   WeightedSum(((1.0, PrefixValues(foreign)),))):  # fmt: skip
        with pytest.raises(QvgptError, match="another tokenizer"):
            Engine(model, values=source)
    for make_source in (HeadValues, PrefixValues):
        with pytest.raises(QvgptError, match="no values to guide with"):
            make_source(small(2))
    with pytest.raises(QvgptError, match="2 bins"):
        PrefixValues(small(6, SOFT), log=True)
    with pytest.raises(QvgptError, match="needs sources, and weights"):
        WeightedSum(())
    engine = Engine(model, values=PrefixValues(small(4, HeadsConfig())))
    with pytest.raises(QvgptError, match="fit the context of 40 of the model of the values"):
        engine.submit(Request([1] * 20, 21, Guidance(beta=1.0)))
    few = TokenScorer(by_hand, most_candidates=5)
    with pytest.raises(QvgptError, match=r"there are 35: say top_k, at most 5"):
        Engine(model, values=few).submit(request)
    cut_later = Request([1], 5, Guidance(beta=1.0, top_k=4, candidates="guided"))
    with pytest.raises(QvgptError, match="there are 35"):
        Engine(model, values=few).submit(cut_later)
    Engine(model, values=few).submit(Request([1], 5, Guidance(beta=1.0, top_k=5)))
    Engine(model, values=few).submit(Request([1], 5))
    for function, message in (
        (lambda texts, tokens: torch.zeros(1), "shape"),
        (lambda texts, tokens: tokens / 0, "NaN or infinity"),
    ):
        with pytest.raises(QvgptError, match=message):
            generate(model, [[1]], Guidance(beta=1.0), max_tokens=3, values=TokenScorer(function))
    soft, means = Guidance(beta=1.0, functional="soft"), PrefixValues(small(4, HeadsConfig()))
    with pytest.raises(QvgptError, match="reads a distribution"):
        generate(model, [[1]], soft, max_tokens=3, values=means)


@pytest.mark.parametrize("name", ["fudge", "contrast", "function"])
def test_functionals_are_refused_where_nothing_reads_them(guided, name):
    model, guidance = guided["gpt"], Guidance(beta=1.0, functional="cvar", top_k=5)
    source, reader = make(name, model)[0], make("soft", model)[0]
    for values in (source, WeightedSum(((2.0, source),))):
        with pytest.raises(QvgptError, match="functional 'cvar' reads a distribution of returns"):
            Engine(model, values=values).submit(Request([1], 5, guidance))
    both = WeightedSum(((1.0, source), (1.0, reader)))
    Engine(model, values=both).submit(Request([1], 5, guidance))


@pytest.mark.parametrize("summed", [False, True])
def test_a_function_of_the_whole_vocabulary_gives_a_value_for_each_text_and_token(guided, summed):
    model = ValueModel(guided["gpt"].trunk, None, guided["gpt"].tokenizer)
    wide = small(7, None, GPT(SIZE + 5, 16, 2, 1, seq_len=48))

    def write(of, shape):
        source = TokenScorer(lambda texts, tokens: torch.ones(shape), None)
        if summed:
            source = WeightedSum(((1.0, source), (1.0, make("contrast", of)[0])))
        return generate(of, PROMPTS[:3], Guidance(beta=1.0), max_tokens=1, values=source)

    for shape in ((3, 10), (1, SIZE), (3, 100), (SIZE,), (3, SIZE, 1)):
        with pytest.raises(QvgptError, match="values of "):
            write(model, shape)
    write(model, (3, SIZE))
    for size in (SIZE, SIZE + 5):  # with what pads the vocabulary, or without
        write(wide, (3, size))


@pytest.mark.parametrize("alternatives", [None, 3])
def test_heads_that_know_v_alone_report_no_q(alternatives):
    model = small(5, FUDGE)
    with torch.no_grad():
        for head in (*model.heads.q, *model.heads.target_q):
            head.weight.zero_()
    [text] = write(model, [Request([1, 9], 5, alternatives=alternatives)], report=True)
    tokens = [1, 9, *text.tokens]
    read = Trajectory(tokens, [i > 1 for i in range(len(tokens))], [0.0] * len(tokens), False)
    [found] = score(model, [read], alternatives=alternatives)
    for report in (*text.reports, *found.reports):
        assert report.v is not None
        assert (report.q, report.advantage) == (None, None)
        assert all(other.q is None for other in report.alternatives)
        assert len(report.alternatives) == (alternatives or 0)
    assert found.advantage is None


@torch.no_grad()
def test_vocabularies_padded_to_other_sizes(guided):
    """Of one tokenizer all the same: what pads them is never a candidate."""
    plus, minus = small(2), small(3, None, GPT(SIZE + 9, 8, 2, 1, seq_len=40))
    wide = small(7, None, GPT(SIZE + 5, 16, 2, 1, seq_len=48))
    for model in (guided["gpt"], wide):
        for options in ({}, {"top_k": SIZE + 3}):
            source = WeightedSum(
                ((1.0, Contrast(plus, minus)), (1.0, PrefixValues(small(4, FUDGE))))
            )
            request = [Request([1, 9, 2], 6, Guidance(beta=1.0, **options))]
            (text,) = write(model, request, report=True, values=source)
            assert max(text.tokens) < SIZE
            assert all(r.logprob <= 0 for r in text.reports)
            states = Reading.of([plus.trunk], [[1, 9]], 4).read(torch.tensor([2]))
            assert isinstance(states, States)
            known = (last(minus.trunk, [1, 9, 2]) @ minus.trunk.output_weight[:SIZE].T)[0]
            expected = log_pi(plus, [1, 9, 2]) - known.log_softmax(-1)
            hidden = (last(plus.trunk, [1, 9, 2]), last(minus.trunk, [1, 9, 2]))
            both = Reading.new([plus.trunk, minus.trunk], 1, 4)
            found = Contrast(plus, minus)(States(both, hidden), None, Guidance())
            torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)
