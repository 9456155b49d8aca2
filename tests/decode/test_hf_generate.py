"""Every way to generate that Hugging Face has, with a guided head, against our own engine.

Families: GPT-2 (our GPT saved as one), Llama, Qwen3, Gemma 1 and 3, tied and untied. Texts are
equal unless two candidates are nearer than `NEAR` where they part.
"""

import itertools
import logging

import pytest
import torch
from tiny_hf import TOKENIZER, make_hf
from transformers import ContinuousBatchingConfig, GenerationConfig

from qvgpt.decode.beam import BeamSearch
from qvgpt.decode.engine import generate
from qvgpt.decode.guided_head import load_guided
from qvgpt.decode.policy import Guidance, next_token
from qvgpt.models.causal_lm import CausalLM
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel

PROMPTS = [
    [1, 12, 7, 20, 2],
    [1, 12],
    [1],
    [1, 30, 8, 8, 8, 17, 21, 9, 2],
    [1, 25, 9],
    [1, 6, 32, 2],
]
SOME = PROMPTS[:4]
ENDS, TOKENS, NEAR = (3, 4), 10, 1e-4
MODELS = {
    f"{family}-{'tied' if tied else 'untied'}": (family, tied)
    for family in ("gpt2", "llama", "qwen3", "gemma", "gemma3")
    for tied in (True, False)
}
GATHERED = Guidance(beta=2.0, top_k=6)
PATHS = {
    "folded": ("low_rank", Guidance(beta=2.0)),
    "gathered": ("low_rank", GATHERED),
    "vocabulary": ("mlp", Guidance(beta=2.0)),
    "min": ("linear", Guidance(beta=2.0, min_p=0.05, twins="min")),
    "guided": ("mlp", Guidance(beta=-1.0, top_k=4, candidates="guided")),
    "soft": ("categorical", Guidance(beta=9.0, functional="soft")),
    "cvar": ("categorical", Guidance(beta=9.0, top_k=9, functional="cvar", alpha=0.2)),
    "kl_budget": ("low_rank", Guidance(kl_budget=0.3, top_k=8)),
}
# the cache of continuous batching takes most of the free memory unless told otherwise
PAGED = ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=256, seed=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, its directory) of a family, a kind of heads; made once."""
    made = {}

    def get(family, tied=True, kind="low_rank", **options):
        key = (family, tied, kind, *options.items())
        if key not in made:
            torch.manual_seed(1)
            trunk = (
                GPT(TOKENIZER.vocab_size, 16, 2, 2, seq_len=48, tied=tied)
                if family == "gpt2"
                else CausalLM(make_hf(family, tie_word_embeddings=tied, **options))
            )
            config = HeadsConfig(kind, rank=5, low=0.0, high=1.0)
            model = ValueModel(trunk, config, TOKENIZER)
            with torch.no_grad():
                for p in model.heads.parameters() if family != "gpt2" else model.parameters():
                    p.add_(0.3 * torch.randn_like(p))
            path = tmp_path_factory.mktemp("model")
            model.save(path)
            made[key] = ValueModel.from_pretrained(path).eval(), path
        return made[key]

    return get


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model_and_path(request, saved):
    return saved(*request.param)


@torch.no_grad()
def batch_generate(hf, prompts, **options):
    """Texts by `hf.generate`, all prompts at once, padded on the left."""
    longest = max(map(len, prompts))
    x = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = hf.generate(
        x, attention_mask=mask, **{"do_sample": False, "max_new_tokens": TOKENS, **options}
    )
    return [cut(row) for row in out[:, longest:].tolist()]


def one_by_one(hf, prompts, **options):
    return [batch_generate(hf, [p], **options)[0] for p in prompts]


def cut(text):
    """Without what pads it."""
    return text[: next((i + 1 for i, t in enumerate(text) if t in ENDS), len(text))]


def greedy(model, guidance, prompts=PROMPTS):
    how = Guidance(**{**vars(guidance), "temperature": 0.0})
    return [c.tokens for c in generate(model, prompts, how, max_tokens=TOKENS)]


@torch.no_grad()
def logprob(model, guidance, prompt, text):
    """log π of each token of a text; −inf where it was no candidate."""
    hidden = model.trunk.hidden(torch.tensor([[*prompt, *text]]))[0, len(prompt) - 1 : -1]
    policy = next_token(model, hidden, guidance)
    taken = policy.tokens == torch.tensor(text)[:, None]
    return policy.logprob.where(taken, -torch.inf).amax(-1)


def agree(model, guidance, prompt, ours, theirs):
    """Whether two greedy texts are equal, or part where two candidates are as good as equal."""
    pairs = enumerate(itertools.zip_longest(ours, theirs))
    at = next((i for i, (a, b) in pairs if a != b), None)
    if at is None:
        return True
    if at >= min(len(ours), len(theirs)):
        return False
    a, b = (logprob(model, guidance, prompt, text)[at] for text in (ours, theirs))
    return bool((a - b).abs() < NEAR)


def assert_greedy(model, guidance, theirs, prompts=PROMPTS):
    for prompt, a, b in zip(prompts, greedy(model, guidance, prompts), theirs, strict=True):
        assert agree(model, guidance, prompt, a, b), (prompt, a, b)


def assert_beams(model, guidance, hf, **options):
    found = BeamSearch(beams=3, max_tokens=TOKENS)(model, PROMPTS, guidance).best
    texts = batch_generate(hf, PROMPTS, num_beams=3, **options)
    for prompt, ours, theirs in zip(PROMPTS, found, texts, strict=True):
        if ours.tokens != theirs:
            total = float(logprob(model, guidance, prompt, theirs).sum()) / len(theirs)
            assert total == pytest.approx(ours.score, abs=NEAR), (prompt, ours.tokens, theirs)


def assert_drawn_from(model, guidance, prompt, texts):
    """Texts of up to two tokens against the exact probability of each, by χ²."""
    first = next_token_of(model, guidance, prompt)
    exact = {}
    for a, p in first.items():
        after = {} if a in ENDS else next_token_of(model, guidance, [*prompt, a])
        exact |= {(a, b): p * q for b, q in after.items()} or {(a,): p}
    counts = dict.fromkeys(exact, 0)
    for text in texts:
        counts[tuple(text)] += 1  # another text than those of probability > 0: KeyError
    expected = {k: len(texts) * p for k, p in exact.items()}
    rare = [k for k in exact if expected[k] < 5]
    cells = [(counts[k], expected[k]) for k in exact if k not in rare]
    cells.append((sum(counts[k] for k in rare), sum(expected[k] for k in rare)))
    chi2 = sum((n - e) ** 2 / e for n, e in cells if e)
    free = len(cells) - 1
    assert chi2 < free + 4 * (2 * free) ** 0.5, (chi2, free)


@torch.no_grad()
def next_token_of(model, guidance, tokens):
    policy = next_token(model, model.trunk.hidden(torch.tensor([tokens]))[:, -1], guidance)
    found = zip(policy.tokens[0].tolist(), policy.logprob[0].exp().tolist(), strict=True)
    return {t: p for t, p in found if p > 0}


@pytest.fixture(params=["folded", "gathered"])
def guidance(request):
    return PATHS[request.param][1]


def test_greedy_beam_and_static_cache(model_and_path, guidance):
    model, path = model_and_path
    hf = load_guided(path, guidance)
    plain = greedy(model, Guidance())
    guided = greedy(model, guidance)
    assert plain != guided
    assert sum(map(len, guided)) > 2 * len(PROMPTS)
    for options in ({}, {"cache_implementation": "static"}):
        assert_greedy(model, guidance, batch_generate(hf, PROMPTS, **options))
        assert_beams(model, guidance, hf, **options)


def test_assisted(model_and_path):
    (model, path), guidance = model_and_path, GATHERED
    hf, assistant = load_guided(path, guidance), load_guided(path, Guidance())
    proposed, verified = [], []
    assistant.lm_head.register_forward_hook(lambda *_: proposed.append(1))
    hf.lm_head.register_forward_hook(lambda *_: verified.append(1))
    texts = one_by_one(hf, SOME, assistant_model=assistant)
    assert_greedy(model, guidance, texts, SOME)
    assert proposed
    assert len(verified) <= sum(map(len, texts)) + len(SOME)
    assert_greedy(model, guidance, one_by_one(hf, SOME, prompt_lookup_num_tokens=3), SOME)
    verified.clear()  # who is assisted by itself accepts all
    texts = one_by_one(hf, SOME, assistant_model=load_guided(path, guidance))
    assert_greedy(model, guidance, texts, SOME)
    assert len(verified) < sum(map(len, texts))


@pytest.mark.parametrize(("family", "tied"), [*list(MODELS.values())[::3], ("qwen3", True)])
def test_continuous_batching(saved, family, tied):
    model, path = saved(family, tied)
    hf = load_guided(path, GATHERED)
    options = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=list(ENDS))
    texts = paged(hf, SOME, options)
    assert_greedy(model, GATHERED, texts, SOME)
    assert_greedy(model, GATHERED, batch_generate(hf, SOME), SOME)  # as before, after it


def paged(hf, prompts, config):
    found = hf.generate_batch(
        [list(p) for p in prompts], config, continuous_batching_config=PAGED, warmup=False
    )
    assert [r.error for r in found.values()] == [None] * len(prompts)
    return [r.generated_tokens for r in found.values()]


@pytest.mark.parametrize(("kind", "how"), PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_path_of_guidance(saved, family, kind, how):
    model, path = saved(family, kind=kind)
    hf = load_guided(path, how)
    assert greedy(model, how) != greedy(model, Guidance())
    assert_greedy(model, how, batch_generate(hf, PROMPTS))
    assert_greedy(model, how, one_by_one(hf, PROMPTS, prompt_lookup_num_tokens=3))
    assert_beams(model, how, hf)


def test_samples_are_drawn_from_the_policy(model_and_path):
    (model, path), guidance = model_and_path, GATHERED
    torch.manual_seed(0)
    texts = batch_generate(
        load_guided(path, guidance), [PROMPTS[0]] * 2000, max_new_tokens=2,
        do_sample=True, temperature=0.7, top_k=0,
    )  # fmt: skip
    assert_drawn_from(model, Guidance(**{**vars(guidance), "temperature": 0.7}), PROMPTS[0], texts)


def test_samples_of_assisted_and_continuous_decoding_too(saved):
    model, path = saved("llama", tied=False)
    hf, assistant = load_guided(path, GATHERED), load_guided(path, Guidance())
    options = {"max_new_tokens": 2, "do_sample": True, "top_k": 0}
    torch.manual_seed(0)
    texts = one_by_one(hf, [PROMPTS[0]] * 250, assistant_model=assistant, **options)
    assert_drawn_from(model, GATHERED, PROMPTS[0], texts)
    config = GenerationConfig(eos_token_id=list(ENDS), **options)
    assert_drawn_from(model, GATHERED, PROMPTS[0], paged(hf, [PROMPTS[0]] * 600, config))


def test_tokens_that_only_pad_the_vocabulary_are_never_written(saved):
    model, path = saved("llama", vocab_size=TOKENIZER.vocab_size + 40)
    for how in (Guidance(beta=4.0), Guidance(beta=4.0, top_k=30), Guidance(beta=4.0, top_p=0.9)):
        hf = load_guided(path, how)
        assert_greedy(model, how, batch_generate(hf, PROMPTS))
        with torch.no_grad():
            logits = hf(torch.tensor([PROMPTS[0]])).logits
        assert not logits[..., TOKENIZER.vocab_size :].isfinite().any()


def test_the_comparison_sees_a_difference(saved):
    model, _ = saved("llama")
    ours = greedy(model, GATHERED)
    other = [ours[0][0], (ours[0][1] + 1) % 30, *ours[0][2:]]
    assert agree(model, GATHERED, PROMPTS[0], ours[0], ours[0])
    for text in (other, ours[0][:-1], [*ours[0], 5]):
        assert not agree(model, GATHERED, PROMPTS[0], ours[0], text)
    with pytest.raises(AssertionError):
        assert_drawn_from(
            model, GATHERED, PROMPTS[0],
            [[a, b] for a in next_token_of(model, GATHERED, PROMPTS[0]) if a not in ENDS
             for b in next_token_of(model, GATHERED, [*PROMPTS[0], a])] * 80,
        )  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.CRITICAL, "transformers")
