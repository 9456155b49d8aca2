"""What the lens shows is what the model says: records against distributions made by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_hf import TOKENIZER

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.policy import Guidance
from qvgpt.decode.sources import HeadValues, PrefixValues
from qvgpt.errors import QvgptError
from qvgpt.lens import records as records_module
from qvgpt.lens.records import read_texts
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Trajectory

TEXT = Trajectory([1, 9, 12, 2, 10, 3], [False] * 4 + [True] * 2, [0.0] * 6, True)
MIXED = "Hé, 你好 👩‍👩‍👧 ok\n"
BPE = Tokenizer.train([MIXED, "plain words"], "bpe", 261)
CHAR = Tokenizer.train([MIXED], "char")


def small(seed=0, heads=None, tokenizer=TOKENIZER):
    torch.manual_seed(seed)
    model = ValueModel(GPT(tokenizer.vocab_size, 8, 2, 1, seq_len=60), heads, tokenizer).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.4 * torch.randn_like(p))
    return model


def by_hand(model, text, at, q_of, beta):
    """log π₀, log π, q of every token at a place of a text, without any cache."""
    hidden = model.trunk.hidden(torch.tensor([text.tokens[:at]]))[:, -1]
    base = (hidden @ model.trunk.output_weight.T).log_softmax(-1)[0]
    q = q_of(text.tokens[:at], hidden)
    return base, (base + beta * q).log_softmax(-1), q


@torch.no_grad()
@pytest.mark.parametrize("source", ["heads", "prefix"])
def test_records_are_what_the_model_says(source):
    model = small(0, HeadsConfig("linear", num_q=1))
    other = small(1, HeadsConfig("mlp", num_q=1))
    every = range(TOKENIZER.vocab_size)

    def q_of(before, hidden):
        if source == "heads":
            return model.heads.target_q[0](hidden)[0]
        after = torch.tensor([[*before, a] for a in every])
        return other.heads.v(other.trunk.hidden(after)[:, -1])

    values = None if source == "heads" else PrefixValues(other)
    guidance = Guidance(beta=0.9, top_k=None if source == "heads" else TOKENIZER.vocab_size)
    [records], _ = read_texts(model, [TEXT], guidance, alternatives=4, values=values)
    assert [r["token"] for r in records] == TOKENIZER.pieces(TEXT.tokens)
    assert ["q" in r for r in records] == TEXT.is_action
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    for at in (4, 5):
        base, guided, q = by_hand(model, TEXT, at, q_of, 0.9)
        record, token = records[at], TEXT.tokens[at]
        assert record["base_logprob"] == pytest.approx(base[token].item(), abs=1e-4)
        assert record["logprob"] == pytest.approx(guided[token].item(), abs=1e-4)
        assert record["q"] == pytest.approx(q[token].item(), abs=1e-4)
        assert record["advantage"] == pytest.approx(record["q"] - record["v"], abs=1e-5)
        kl = (guided.exp() * (guided - base)).sum().item()
        assert record["kl"] == pytest.approx(kl, abs=1e-4)
        best = guided.topk(4).indices.tolist()
        assert [a["token"] for a in record["alternatives"]] == TOKENIZER.pieces(best)
        for found, a in zip(record["alternatives"], best, strict=True):
            assert found["q"] == pytest.approx(q[a].item(), abs=1e-4)
            assert found["logprob"] == pytest.approx(guided[a].item(), abs=1e-4)
            assert found["base_logprob"] == pytest.approx(base[a].item(), abs=1e-4)


def test_greedy_is_shown_as_its_distribution_at_temperature_1():
    model = small(0, HeadsConfig("linear", num_q=1))
    [greedy], _ = read_texts(model, [TEXT], Guidance(beta=1.0, temperature=0.0))
    [sampled], _ = read_texts(model, [TEXT], Guidance(beta=1.0))
    assert greedy == sampled


def test_what_guidance_cuts_has_no_logprob():
    model = small(0, HeadsConfig("linear", num_q=1))
    [records], _ = read_texts(model, [TEXT], Guidance(beta=1.0, top_k=1), alternatives=3)
    assert [len(r["alternatives"]) for r in records[4:]] == [1, 1]
    assert [r["logprob"] for r in records[4:]] == [None, None]
    assert all(math.isfinite(r["base_logprob"]) for r in records[4:])


def test_without_values_there_are_probabilities_alone():
    [records], _ = read_texts(small(), [TEXT], alternatives=2)
    assert [records[4][k] for k in ("q", "v", "advantage")] == [None] * 3
    assert records[4]["logprob"] == records[4]["base_logprob"] < 0
    assert [a["q"] for a in records[4]["alternatives"]] == [None, None]


def test_an_action_without_a_target_is_shown_without_numbers(monkeypatch):
    """As `collate` would mask it: the last report is missing."""
    model = small(0, HeadsConfig("linear", num_q=1))
    whole = records_module.score

    def masked(*args, **how):
        return [replace(found, reports=found.reports[:-1]) for found in whole(*args, **how)]

    monkeypatch.setattr(records_module, "score", masked)
    [records], _ = read_texts(model, [TEXT])
    assert ["q" in r for r in records] == [False] * 4 + [True, False]


@pytest.mark.parametrize("tokenizer", [BPE, CHAR], ids=["bpe", "char"])
def test_bytes_of_a_text_are_the_text_and_special_tokens_have_none(tokenizer):
    model = small(0, HeadsConfig("linear", num_q=1), tokenizer)
    inside = tokenizer.encode(MIXED)
    tokens = [1, *inside, 3]
    text = Trajectory(tokens, [False] + [True] * (len(tokens) - 1), [0.0] * len(tokens), True)
    [records], [end] = read_texts(model, [text])
    assert bytes(b for r in records for b in r["bytes"]).decode() == MIXED
    assert [(r["token"], r["bytes"]) for r in (records[0], records[-1])] == [
        ("<bos>", []),
        ("<eos>", []),
    ]
    assert end == 0.0
    assert all(r["bytes"] for r in records[1:-1])


def test_bad_calls():
    model = small(0, HeadsConfig("linear", num_q=1))
    with pytest.raises(QvgptError, match="alternatives: from 0 to 20, not 21"):
        read_texts(model, [TEXT], alternatives=21)
    [records], _ = read_texts(model, [TEXT], alternatives=0, values=HeadValues(model))
    assert records[4]["alternatives"] == []
    model.tokenizer = None
    with pytest.raises(QvgptError, match="no tokenizer"):
        read_texts(model, [TEXT])
