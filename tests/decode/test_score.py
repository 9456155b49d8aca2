"""Teacher-forced scores must be what the engine reported when it wrote the text."""

import pytest
import torch
from test_sources import SOURCES, guidance_of, log_pi, make, small
from tiny_hf import make_hf

from qvgpt.decode.engine import Request, write
from qvgpt.decode.policy import Guidance, next_token
from qvgpt.decode.score import score, sequence_kl
from qvgpt.decode.sources import Contrast, HeadValues
from qvgpt.errors import QvgptError
from qvgpt.models import vocab
from qvgpt.models.causal_lm import CausalLM
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.trajectory import Trajectory

PROMPTS = [[1, 9, 12, 2], [1], [1, 30, 8, 8, 8, 17, 2], [1, 2]]
GUIDANCES = {
    "full": Guidance(beta=1.5),
    "gathered": Guidance(beta=1.5, top_k=6, twins="min", temperature=0.7),
    "top_p": Guidance(beta=1.5, top_p=0.8),
    "guided": Guidance(beta=1.5, top_k=4, candidates="guided"),
    "greedy": Guidance(beta=1.5, temperature=0.0),
}


def as_trajectory(prompt, completion):
    tokens = [*prompt, *completion.tokens]
    is_action = [False] * len(prompt) + [True] * len(completion.tokens)
    return Trajectory(tokens, is_action, [0.0] * len(tokens), completion.terminated)


def as_tensor(reports):
    return torch.tensor([[r.base_logprob, r.logprob, r.kl, r.q, r.v] for r in reports])


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
@pytest.mark.parametrize("chunk", [2**24, 100])
def test_scores_are_the_engines_reports(make_model, kind, guidance, chunk, monkeypatch):
    monkeypatch.setattr(vocab, "CHUNK_ELEMENTS", chunk)
    model = make_model(kind)
    requests = [Request(p, 12, guidance, seed=i) for i, p in enumerate(PROMPTS)]
    written = write(model, requests, report=True)
    texts = [as_trajectory(p, text) for p, text in zip(PROMPTS, written, strict=True)]
    scores = score(model, texts, guidance, batch_size=3)
    for found, text in zip(scores, written, strict=True):
        reports = text.reports
        assert found.tokens == text.tokens
        torch.testing.assert_close(as_tensor(found.reports), as_tensor(reports), atol=1e-5, rtol=0)
        assert found.kl == pytest.approx(text.kl, abs=1e-4)
        if guidance.temperature == 0:
            assert (found.logprob, found.kl) == (0.0, pytest.approx(-found.base_logprob))
        assert found.logprob == pytest.approx(sum(r.logprob for r in reports), abs=1e-4)
        assert found.advantage == pytest.approx(sum(r.q - r.v for r in reports), abs=1e-4)


@torch.no_grad()
def test_an_observation_lies_between_two_turns(model):
    tokens, is_action = [1, 9, 10, 11, 12, 13], [False, True, False, False, True, True]
    (found,) = score(model, [Trajectory(tokens, is_action, [0.0] * 6, False)])
    hidden = model.trunk.hidden(torch.tensor([tokens]))[0]
    logprob = (hidden @ model.trunk.output_weight.T).log_softmax(-1)
    assert found.tokens == [9, 12, 13]
    base = [report.base_logprob for report in found.reports]
    expected = [logprob[0, 9].item(), logprob[3, 12].item(), logprob[4, 13].item()]
    assert base == pytest.approx(expected, abs=1e-5)
    assert found.base_logprob == pytest.approx(sum(expected), abs=1e-4)
    assert found.end_value == pytest.approx(model.heads.v(hidden[-1]).item(), abs=1e-5)


def test_the_end_of_a_text_is_worth_nothing_more(model, plain):
    ended = Trajectory([1, 9, 3], [False, True, True], [0.0] * 3, True)
    (found,) = score(model, [ended])
    assert found.end_value == 0.0
    (found,) = score(plain, [ended])
    assert found.end_value is None
    assert found.advantage is None
    assert found.kl == 0.0


def test_what_is_no_candidate_is_impossible(model):
    text = Trajectory([1, 9, 3, 20], [False, True, True, True], [0.0] * 4, False)
    (found,) = score(model, [text], Guidance(beta=1.0, top_k=1))
    assert found.logprob == float("-inf")
    assert found.base_logprob > float("-inf")


def test_bad_texts_are_named(model):
    assert score(model, []) == []
    long = Trajectory([1] + [9] * 48, [False] + [True] * 48, [0.0] * 49, False)
    with pytest.raises(QvgptError, match="text 1 has 49 tokens, more than the context of 48"):
        score(model, [long])


@torch.no_grad()
@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
def test_kl_to_another_model_is_the_sum_over_the_whole_vocabulary(make_model, guidance):
    model, other = make_model("mlp"), make_model(noise=0.1, heads=False)
    requests = [Request(p, 12, guidance, seed=i) for i, p in enumerate(PROMPTS)]
    texts = [
        as_trajectory(p, text)
        for p, text in zip(PROMPTS, write(model, requests, report=True), strict=True)
    ]
    own = [found.kl for found in score(model, texts, guidance)]
    assert sequence_kl(model, guidance, model, texts, batch_size=3) == pytest.approx(own, abs=1e-4)
    for text, found in zip(texts, sequence_kl(model, guidance, other, texts, 3), strict=True):
        total, tokens = 0.0, torch.tensor([text.tokens])
        policy = next_token(model, model.trunk.hidden(tokens)[0], guidance)
        plain = (other.trunk.hidden(tokens)[0] @ other.trunk.output_weight.T).softmax(-1)
        for at in range(len(text.prompt) - 1, len(text.tokens) - 1):
            for token, logprob in zip(policy.tokens[at], policy.logprob[at], strict=True):
                if logprob > float("-inf"):
                    total += (logprob.exp() * (logprob - plain[at, token].log())).item()
        assert found == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("objective", ["FUDGE", "ControlledDecoding"])
def test_where_only_v_is_known_a_token_is_worth_v_after_it(make_model, objective):
    model = make_model("categorical", num_q=1, bins=2)
    with torch.no_grad():
        for head in (*model.heads.q, *model.heads.target_q):
            head.weight.zero_()
    model.info.objectives = [{objective: {}}]
    requests = [Request(p, 6, Guidance(), seed=i) for i, p in enumerate(PROMPTS)]
    written = write(model, requests, report=True)
    texts = [as_trajectory(p, text) for p, text in zip(PROMPTS, written, strict=True)]
    for found, text in zip(score(model, texts), written, strict=True):
        torch.testing.assert_close(
            as_tensor(found.reports), as_tensor(text.reports), atol=1e-5, rtol=0
        )
        # what each token adds sums up to what the text is worth less what the prompt was
        total = found.reports[-1].q - found.reports[0].v
        assert found.advantage == pytest.approx(total, abs=1e-5)
        assert total != 0
    model.info.objectives = []
    for call in (lambda g: score(model, texts, g), lambda g: sequence_kl(model, g, model, texts)):
        with pytest.raises(QvgptError, match="know V and no Q"):
            call(Guidance(beta=1.0))


STRENGTHS = {
    "plain": {},
    "top_k": {"beta": 1.3, "top_k": 6, "temperature": 0.7},
    "greedy": {"beta": 1.3, "top_k": 6, "temperature": 0.0},
    "budget": {"kl_budget": 0.3, "top_k": 6},
    "schedule": {"beta": 0.2, "beta_end": 2.0, "beta_tokens": 4, "top_k": 9},
}


@pytest.fixture(scope="module")
def guided(make_model):
    return {
        "gpt": make_model(num_q=1),
        "llama": small(7, HeadsConfig(num_q=1), CausalLM(make_hf("llama"))),
    }


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    ("trunk", "strength"), [*(("gpt", strength) for strength in STRENGTHS), ("llama", "top_k")]
)
def test_scores_by_any_source_are_the_engines_reports(guided, name, strength, trunk):
    """Texts of several lengths in batches of three, the last batch of one."""
    model, options = guided[trunk], STRENGTHS[strength]
    source, _ = make(name, model)
    guidance = Guidance(**options)
    if name == "soft" and strength in ("top_k", "greedy"):
        guidance = guidance_of(name, **{k: v for k, v in options.items() if k != "beta"})
    requests = [Request(p, 4 + 3 * i, guidance, seed=i) for i, p in enumerate(PROMPTS)]
    written = write(model, requests, report=True, values=source)
    texts = [as_trajectory(p, text) for p, text in zip(PROMPTS, written, strict=True)]
    scores = score(model, texts, guidance, batch_size=3, values=source)
    own = sequence_kl(model, guidance, model, texts, batch_size=3, values=source)
    for found, text, kl in zip(scores, written, own, strict=True):
        assert found.tokens == text.tokens
        assert kl == pytest.approx(text.kl, abs=1e-4)
        for ours, theirs in zip(found.reports, text.reports, strict=True):
            for key, value in vars(theirs).items():
                rough = (
                    1e-3 if key == "beta" else 1e-4
                )  # rounding moves β most where Q hardly varies
                expected = value if value is None else pytest.approx(value, abs=1e-4, rel=rough)
                assert getattr(ours, key) == expected, key


@torch.no_grad()
@pytest.mark.parametrize("name", ["other heads", "contrast", "prefix", "sum"])
def test_kl_to_a_base_is_the_sum_over_candidates_whatever_guides(guided, name):
    model, base = guided["gpt"], small(11)
    source, naive = make(name, model)
    text = Trajectory([1, 9, 3, 20], [False, True, True, True], [0.0] * 4, False)
    guidance = Guidance(beta=1.3, top_k=8)
    (found,) = sequence_kl(model, guidance, base, [text], values=source)
    total = 0.0
    for at in (1, 2, 3):
        before = text.tokens[:at]
        logits = log_pi(model, before)
        kept = logits.argsort(descending=True)[:8]
        logprob = (logits[kept] + 1.3 * naive(before)[kept]).log_softmax(-1)
        total += float((logprob.exp() * (logprob - log_pi(base, before)[kept])).sum())
    assert found == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize(("name", "reads"), [("own heads", 1), ("sum", 4), ("own prefix", 1)])
def test_a_batch_of_texts_is_read_once_by_each_trunk(guided, name, reads, monkeypatch):
    model, seen = guided["gpt"], []
    source, _ = make(name, model)
    every = {m.trunk for m in (model, *(source.models if source else ()))}
    for trunk in every:
        plain = trunk.hidden

        def spy(tokens, *more, plain=plain, **how):
            seen.append(tuple(tokens.shape))
            return plain(tokens, *more, **how)

        monkeypatch.setattr(trunk, "hidden", spy)
    texts = [Trajectory([1, 9, 3, k], [False, True, True, True], [0.0] * 4, False) for k in (5, 6)]
    score(model, texts, values=source)
    assert len(every) == reads + (name == "sum")
    assert seen == [(2, 4)] * len(every)


@torch.no_grad()
def test_a_contrast_scores_a_text_by_the_ratio_of_its_likelihoods(guided):
    """Σ A = log π₊(text)/π₋(text), the implicit reward of a tuned model over its base."""
    plus, minus = small(2), small(3)
    text = Trajectory([1, 9, 3, 20], [False, True, True, True], [0.0] * 4, False)
    (found,) = score(guided["gpt"], [text], values=Contrast(plus, minus))
    one, other = (score(m, [text])[0].base_logprob for m in (plus, minus))
    assert found.advantage == pytest.approx(one - other, abs=1e-5)
    assert found.end_value == 0.0


def test_the_shortest_context_and_foreign_values_are_refused(guided):
    text = Trajectory([1] + [9] * 44, [False] + [True] * 44, [0.0] * 45, False)
    other = HeadValues(small(1, HeadsConfig()))
    assert score(guided["gpt"], [text])
    with pytest.raises(QvgptError, match="text 1 has 45 tokens, more than the context of 40"):
        score(guided["gpt"], [text], values=other)
    with pytest.raises(QvgptError, match="more than the context of 40"):
        sequence_kl(guided["gpt"], Guidance(), small(1), [text])
