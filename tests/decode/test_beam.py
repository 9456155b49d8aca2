"""Beam search against Hugging Face's, against greedy, and against the whole tree."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.beam import BeamSearch
from qvgpt.decode.engine import generate
from qvgpt.decode.guided_head import load_guided
from qvgpt.decode.policy import Guidance
from qvgpt.errors import QvgptError
from qvgpt.models.gpt import GPT
from qvgpt.models.value_model import ValueModel

PROMPTS = [[1, 12, 7, 20, 2], [1, 12], [1], [1, 30, 8, 8, 8, 17, 2]]


def hf_beam(hf, model, prompt, beams, penalty, n):
    template = model.tokenizer.template
    x = torch.tensor([prompt])
    with torch.no_grad():
        out = hf.generate(
            x,
            attention_mask=torch.ones_like(x),
            max_new_tokens=20,
            num_beams=beams,
            num_return_sequences=n,
            length_penalty=penalty,
            do_sample=False,
            early_stopping=False,
            pad_token_id=template.pad,
            return_dict_in_generate=True,
            output_scores=True,
        )
    texts = []
    for row in out.sequences[:, len(prompt) :].tolist():
        end = next((i + 1 for i, t in enumerate(row) if t in template.end_ids), len(row))
        texts.append(row[:end])
    return texts, out.sequences_scores.tolist()


@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.4])
@pytest.mark.parametrize(
    "guidance", [Guidance(), Guidance(beta=2.0), Guidance(beta=1.0, top_k=9, twins="min")],
    ids=["plain", "folded", "gathered"],
)  # fmt: skip
def test_all_beams_are_hugging_faces(make_model, tmp_path, guidance, penalty):
    model = make_model("low_rank", noise=0.15)
    model.save(tmp_path)
    hf = load_guided(tmp_path, guidance) if guidance.beta else None
    hf = hf or AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = BeamSearch(beams=4, length_penalty=penalty, max_tokens=20)(
        model, PROMPTS, guidance
    ).texts
    for prompt, found in zip(PROMPTS, ours, strict=True):
        texts, scores = hf_beam(hf, model, prompt, 4, penalty, 4)
        assert [h.tokens for h in found] == texts
        assert [h.score for h in found] == pytest.approx(scores, abs=1e-4)


def test_one_beam_is_greedy(model):
    for guidance in (Guidance(), Guidance(beta=3.0), Guidance(beta=3.0, top_k=5)):
        greedy = Guidance(**{**vars(guidance), "temperature": 0.0})
        texts = generate(model, PROMPTS, greedy, max_tokens=15)
        found = BeamSearch(beams=1, max_tokens=15)(model, PROMPTS, guidance)
        assert [h.tokens for h in found.best] == [t.tokens for t in texts]
        assert [h.terminated for h in found.best] == [t.terminated for t in texts]
        read = sum(len(p) - 1 for p in PROMPTS) + sum(len(t.tokens) for t in texts)
        assert found.forward_tokens == read


def test_enough_beams_find_the_likeliest_of_all_texts():
    tokenizer = Tokenizer.train(["ab"], "char")
    torch.manual_seed(0)
    model = ValueModel(GPT(tokenizer.vocab_size, 16, 2, 2, seq_len=16), None, tokenizer).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    size, ends = tokenizer.vocab_size, tokenizer.template.end_ids
    best = {}
    for text in itertools.product(range(size), repeat=3):
        end = next((i + 1 for i, t in enumerate(text) if t in ends), 3)
        with torch.no_grad():
            logits = model.trunk(torch.tensor([[1, *text[:end]]]))[0, :-1].log_softmax(-1)
        best[text[:end]] = float(logits[range(end), list(text[:end])].sum())
    likeliest = max(best, key=best.__getitem__)
    search = BeamSearch(beams=size**2, length_penalty=0.0, max_tokens=3)
    [found] = search(model, [[1]]).texts
    assert tuple(found[0].tokens) == likeliest
    assert found[0].logprob == pytest.approx(best[likeliest], abs=1e-4)
    assert {tuple(h.tokens): h.logprob for h in found} == pytest.approx(
        {tuple(h.tokens): best[tuple(h.tokens)] for h in found}, abs=1e-4
    )


def test_a_batch_finds_what_each_prompt_alone_finds(model):
    search = BeamSearch(beams=3, max_tokens=12)
    together = search(model, PROMPTS, Guidance(beta=1.0)).texts
    small = BeamSearch(3, max_tokens=12, max_batch=6)(model, PROMPTS, Guidance(beta=1.0)).texts
    alone = [search(model, [p], Guidance(beta=1.0)).texts[0] for p in PROMPTS]
    for a, b, c in zip(together, small, alone, strict=True):
        assert [h.tokens for h in a] == [h.tokens for h in b] == [h.tokens for h in c]


def test_a_single_candidate_leaves_one_text(model):
    found = BeamSearch(beams=4, max_tokens=6)(model, PROMPTS, Guidance(beta=1.0, top_k=1))
    greedy = generate(model, PROMPTS, Guidance(temperature=0.0, top_k=1), max_tokens=6)
    assert [[h.tokens for h in texts] for texts in found.texts] == [[t.tokens] for t in greedy]


def test_what_cannot_be_searched_is_named(model, plain):
    with pytest.raises(QvgptError, match="beams must be at least 1"):
        BeamSearch(beams=0)
    with pytest.raises(QvgptError, match="do not fit the context"):
        BeamSearch(max_tokens=60)(model, PROMPTS)
    with pytest.raises(QvgptError, match="no value heads"):
        BeamSearch(max_tokens=5)(plain, PROMPTS, Guidance(beta=1.0))
