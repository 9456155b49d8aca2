"""β found by a budget of KL, or going from one number to another: exact, and reported."""

from types import SimpleNamespace

import pytest
import torch

from qvgpt.decode.beam import BeamSearch
from qvgpt.decode.budget import solve_beta
from qvgpt.decode.engine import Request, generate, write
from qvgpt.decode.guided_head import GuidedHead, guide
from qvgpt.decode.policy import Guidance, folds, guided_logits, next_token
from qvgpt.decode.score import score, sequence_kl
from qvgpt.decode.sources import TokenScorer
from qvgpt.errors import QvgptError
from qvgpt.models import native
from qvgpt.trajectory import Trajectory

PROMPTS = [[1], [1, 9, 2], [1, 30, 8, 8, 8, 17, 21, 25, 2], [1, 2], [1, 7, 7, 2]]


def kl_of(beta, base, q):
    """KL(π_β ‖ π₀) over the candidates that are any."""
    base = base.double().softmax(-1)
    kept = base > 0
    p = base[kept] * torch.exp(beta * (q.double()[kept] - q[kept].max()))
    p = p / p.sum()
    return float((p * (p / base[kept]).log())[p > 0].sum())


@pytest.fixture(params=["compiled", "numpy"])
def by(request, monkeypatch):
    """Both ways of solving for β."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "of", lambda dtype: None)
    elif native.of(torch.float32) is None:
        pytest.skip("no C compiler")


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("budget", [1e-3, 0.05, 0.7])
def test_a_budget_is_spent_to_the_last_digits(budget):
    torch.manual_seed(0)
    base, q = torch.randn(50, 64), 3 * torch.randn(50, 64)
    base[:, 40:] = -torch.inf  # cut by top_p
    beta, spent = solve_beta(base, q, budget, beta_max=1e4)
    assert torch.allclose(spent, torch.tensor(budget), atol=1e-6)
    for b, x, values in zip(beta, base, q, strict=True):
        assert kl_of(float(b), x, values) == pytest.approx(budget, abs=1e-5)
    # the ceiling comes first where it is lower
    capped, spent = solve_beta(base, q, budget, beta_max=float(beta.median()))
    assert torch.allclose(capped, beta.clamp(max=float(beta.median())))
    assert (spent <= budget + 1e-6).all()
    assert (spent[capped < beta] < budget).all()


@pytest.mark.usefixtures("by")
def test_where_values_tell_nothing_or_all_the_budget_is_not_reached():
    base = torch.tensor([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]]).log()
    equal, _ = solve_beta(base, torch.ones(2, 3), 0.1, 50.0)
    assert equal.tolist() == [50.0, 50.0]
    # all on the best token costs −log 0.7 = 0.357
    beta, spent = solve_beta(base[:1], torch.tensor([[1.0, 0.0, 0.0]]), 0.5, 1000.0)
    assert (float(beta), float(spent)) == (1000.0, pytest.approx(0.3567, abs=1e-4))
    lost = torch.tensor([[1.0, float("nan"), 0.0]])
    assert solve_beta(base[:1], lost, 0.1, 50.0)[1].isnan().all()


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_each_token_spends_its_budget_and_says_so(make_model, kind, temperature):
    model = make_model(kind)
    guidance = Guidance(kl_budget=0.2, top_k=20, top_p=0.95, temperature=temperature)
    requests = [Request(p, 8, guidance, seed=i) for i, p in enumerate(PROMPTS)]
    for prompt, written in zip(PROMPTS, write(model, requests, report=True), strict=True):
        text = list(prompt)
        for token, report in zip(written.tokens, written.reports, strict=True):
            h = model.trunk.hidden(torch.tensor([text]))[:, -1]
            base = (h @ model.trunk.output_weight.T).log_softmax(-1)
            cut = guided_logits(base, None, Guidance(top_k=20, top_p=0.95)).log_softmax(-1)
            q = torch.stack([head(h) for head in model.heads.target_q]).mean(0)
            assert report.spent == pytest.approx(0.2, abs=1e-4)
            assert report.beta > 0
            assert kl_of(report.beta, cut[0], q[0]) == pytest.approx(0.2, abs=1e-4)
            if temperature:
                pi = ((cut + report.beta * q) / temperature).log_softmax(-1)[0]
                assert report.logprob == pytest.approx(float(pi[token]), abs=1e-4)
            text.append(token)
    silent = write(model, requests)
    assert [t.tokens for t in silent] == [t.tokens for t in write(model, requests, max_batch=2)]
    assert [t.tokens for t in silent] == [t.tokens for t in write(model, requests, report=True)]


def test_a_budget_holds_for_any_source_and_while_scoring(model, plain):
    guidance = Guidance(kl_budget=0.1, top_k=10)
    odd = TokenScorer(lambda texts, tokens: (tokens % 2).float())
    for written in write(
        plain, [Request(p, 6, guidance) for p in PROMPTS], report=True, values=odd
    ):
        for report in written.reports:
            # all candidates may be odd, or even, nearly
            assert report.spent == pytest.approx(0.1, abs=1e-4) or report.beta == 1000.0
    (written,) = write(model, [Request([1, 9], 9, guidance)], report=True)
    text = [1, 9, *written.tokens]
    actions = [False] * 2 + [True] * len(written.tokens)
    trajectory = Trajectory(text, actions, [0.0] * len(text), True)
    (scored,) = score(model, [trajectory], guidance)
    for ours, theirs in zip(scored.reports, written.reports, strict=True):
        for name, value in vars(ours).items():
            assert value == pytest.approx(getattr(theirs, name), abs=1e-4), name
    assert sequence_kl(model, guidance, model, [trajectory]) == pytest.approx([scored.kl], abs=1e-4)
    found = BeamSearch(beams=3, max_tokens=4)(model, PROMPTS, guidance)
    assert all(len(texts) == 3 for texts in found.texts)


@torch.no_grad()
def test_beta_goes_where_it_is_told(model):
    """In the engine, in beams and in scoring, whatever the rest of the batch is at."""
    guidance = Guidance(beta=2.0, beta_end=-1.0, beta_tokens=3)
    assert [guidance.beta_at(i) for i in range(5)] == [2.0, 1.0, 0.0, -1.0, -1.0]
    assert Guidance(beta=2.0).beta_at(9) == 2.0
    assert not folds(model.heads, guidance)
    texts = write(model, [Request(p, 6 + i, guidance, seed=i) for i, p in enumerate(PROMPTS)],
                  report=True, max_batch=3)  # fmt: skip
    for prompt, written in zip(PROMPTS, texts, strict=True):
        text = list(prompt)
        for i, (token, report) in enumerate(zip(written.tokens, written.reports, strict=True)):
            h = model.trunk.hidden(torch.tensor([text]))[:, -1]
            exact = next_token(model, h, Guidance(beta=guidance.beta_at(i))).logprob[0, token]
            assert report.beta == pytest.approx(guidance.beta_at(i))
            assert report.logprob == pytest.approx(float(exact), abs=1e-5)
            text.append(token)
    one = BeamSearch(beams=1, max_tokens=6)(model, PROMPTS, guidance).best
    greedy = Guidance(**{**vars(guidance), "temperature": 0.0})
    written = generate(model, PROMPTS, greedy, max_tokens=6)
    assert [best.tokens for best in one] == [text.tokens for text in written]


@torch.no_grad()
def test_a_new_turn_begins_the_way_of_beta_anew(model):
    guidance = Guidance(beta=2.0, beta_end=0.0, beta_tokens=4)
    tokens, acts = [1, 9, 8, 7, 4, 20, 21, 5, 6], [0, 0, 1, 1, 1, 0, 0, 1, 1]
    text = Trajectory(tokens, [bool(a) for a in acts], [0.0] * 9, True)
    (scored,) = score(model, [text], guidance)
    assert [r.beta for r in scored.reports] == [2.0, 1.5, 1.0, 2.0, 1.5]
    each = [
        next_token(model, model.trunk.hidden(torch.tensor([tokens[:i]]))[:, -1],
                   Guidance(beta=guidance.beta_at(k))).kl().item()
        for k, i in ((0, 2), (1, 3), (2, 4), (0, 7), (1, 8))
    ]  # fmt: skip
    assert [r.kl for r in scored.reports] == pytest.approx(each, abs=1e-5)
    assert sequence_kl(model, guidance, model, [text]) == pytest.approx([sum(each)], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_budget": 0.1}, "top_k of at most 64"),
        ({"kl_budget": 0.1, "top_k": 65}, "top_k of at most 64"),
        ({"kl_budget": 0.1, "top_k": 9, "candidates": "guided"}, "top_k of at most 64"),
        ({"kl_budget": 0.1, "top_k": 9, "beta": 1.0}, "leave beta and beta_end out"),
        ({"kl_budget": 0.0, "top_k": 9}, "kl_budget must be above 0"),
        ({"kl_budget": 0.1, "top_k": 9, "beta_max": 0.0}, "beta_max must be above 0"),
        ({"kl_budget": 0.1, "top_k": 9, "functional": "soft"}, "one fixed beta"),
        ({"beta": 1.0, "beta_end": 2.0}, "belong together"),
        ({"beta": 1.0, "beta_tokens": 2}, "belong together"),
        ({"beta": 1.0, "beta_end": float("nan"), "beta_tokens": 2}, "beta_end must be finite"),
    ],
)
def test_senseless_strengths_are_refused(options, message):
    with pytest.raises(QvgptError, match=message):
        Guidance(**options)


def test_hugging_faces_generate_knows_no_position(model):
    class Stock(torch.nn.Module):
        config = type("C", (), {"get_text_config": lambda self: self})()
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(model.trunk.embed_dim, model.trunk.vocab_size, bias=False)

        def get_output_embeddings(self):
            return self.head

        def set_output_embeddings(self, head):
            self.head = head

        def forward(self, tokens, use_cache):
            hidden = torch.randn(*tokens.shape, model.trunk.embed_dim)
            return SimpleNamespace(logits=self.head(hidden))

    with pytest.raises(QvgptError, match="does not say which token"):
        guide(Stock(), model, Guidance(beta=1.0, beta_end=0.0, beta_tokens=5))
    guided = guide(Stock(), model, Guidance(kl_budget=0.3, top_k=8)).get_output_embeddings()
    assert isinstance(guided, GuidedHead)
    with torch.no_grad():
        hidden = torch.randn(4, model.trunk.embed_dim)
        logits = guided(hidden)
        base = (hidden @ guided.weight.T).log_softmax(-1)
        kept = logits.isfinite()
        assert kept.sum(-1).tolist() == [8] * 4
        for x, b, k in zip(logits, base, kept, strict=True):
            p, cut = x[k].double().exp(), b[k].double().log_softmax(-1)
            assert float((p * (p.log() - cut)).sum()) == pytest.approx(0.3, abs=1e-4)
