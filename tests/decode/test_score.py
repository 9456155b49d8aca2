"""Teacher-forced scores must be what the engine reported when it wrote the text."""

import pytest
import torch

from qvgpt.decode.engine import Request, write
from qvgpt.decode.policy import Guidance, next_token
from qvgpt.decode.score import score, sequence_kl
from qvgpt.errors import QvgptError
from qvgpt.models import vocab
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
    for call in (lambda g: score(model, texts, g), lambda g: sequence_kl(model, g, model, texts)):
        with pytest.raises(QvgptError, match="know V and no Q"):
            call(Guidance(beta=1.0))
