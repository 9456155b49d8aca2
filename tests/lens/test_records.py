"""What the lens shows is what the model says: records against distributions made by hand."""

import json
import math

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_hf import TOKENIZER
from tokenizers import decoders, models, pre_tokenizers

from qvgpt.data.token_bytes import text_bytes, token_bytes
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.policy import Guidance
from qvgpt.decode.sources import HeadValues, PrefixValues
from qvgpt.errors import QvgptError
from qvgpt.lens.records import read_texts
from qvgpt.models.gpt import GPT
from qvgpt.models.heads import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Trajectory

TEXT = Trajectory([1, 9, 12, 2, 10, 3], [False] * 4 + [True] * 2, [0.0] * 6, True)
MIXED = "Hé, 你好 👩‍👩‍👧 ok\n"
BPE = Tokenizer.train([MIXED, "plain words"], "bpe", 261)
CHAR = Tokenizer.train([MIXED], "char")


def small(seed=0, heads=None):
    torch.manual_seed(seed)
    model = ValueModel(GPT(TOKENIZER.vocab_size, 8, 2, 1, seq_len=40), heads, TOKENIZER).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.4 * torch.randn_like(p))
    return model


def llama_like():
    """A vocabulary as SentencePiece writes it: spaces as ▁, unknown characters byte by byte."""
    words = ["<unk>", "<s>", "</s>", "▁He", "llo", "▁", "你"]
    entries = words + [f"<0x{b:02X}>" for b in range(256)]
    vocab = {entry: i for i, entry in enumerate(entries)}
    inner = models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    hf = tokenizers.Tokenizer(inner)
    hf.pre_tokenizer = pre_tokenizers.Metaspace()
    strip = decoders.Strip(" ", 1, 0)
    hf.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    hf.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(hf, {"eos_token": "</s>", "bos_token": "<s>"})


# ── bytes ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tokenizer", [BPE, CHAR], ids=["bpe", "char"])
def test_bytes_of_a_text_are_the_text(tokenizer):
    ids = tokenizer.encode(MIXED)
    found = text_bytes(tokenizer, ids)
    assert b"".join(spelled for _, spelled in found).decode() == MIXED
    assert [piece for piece, _ in found] == tokenizer.pieces(ids)
    if tokenizer is BPE:  # 261 entries are bytes alone
        assert [spelled for _, spelled in found] == [bytes([b]) for b in MIXED.encode()]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.integers(0, 3))
def test_bytes_of_any_text_even_cut_within_a_character(text, cut):
    ids = BPE.encode(text)
    ids = ids[: max(0, len(ids) - cut)]
    found = text_bytes(BPE, ids)
    assert b"".join(spelled for _, spelled in found) == text.encode()[: len(ids)]


def test_special_tokens_have_no_bytes():
    ids = [1, *BPE.encode("<eos>"), 3]
    found = text_bytes(BPE, ids)
    assert (found[0], found[-1]) == (("<bos>", None), ("<eos>", None))
    assert b"".join(spelled for _, spelled in found[1:-1]) == b"<eos>"


def test_bytes_of_sentencepiece_vocabularies():
    tokenizer = llama_like()
    ids = [tokenizer._hf.token_to_id(t) for t in ("▁He", "llo", "▁", "<0xC3>", "<0xA9>", "你")]
    found = text_bytes(tokenizer, ids)
    assert b"".join(spelled for _, spelled in found).decode() == "Hello é你"
    assert [spelled for _, spelled in found][3:5] == [b"\xc3", b"\xa9"]
    assert token_bytes(tokenizer, ids[0]) == b" He"  # wherever it may stand
    assert token_bytes(tokenizer, tokenizer.template.eos) is None


# ── numbers ──────────────────────────────────────────────────────────────────────────────────


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
    [records] = read_texts(model, [TEXT], guidance, alternatives=4, values=values)
    assert [r["token"] for r in records] == TOKENIZER.pieces(TEXT.tokens)
    assert ["q" in r for r in records] == TEXT.is_action
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    for at in (4, 5):
        base, guided, q = by_hand(model, TEXT, at, q_of, 0.9)
        record, token = records[at], TEXT.tokens[at]
        assert record["base_logprob"] == pytest.approx(base[token].item(), abs=1e-4)
        assert record["logprob"] == pytest.approx(guided[token].item(), abs=1e-4)
        assert record["q"] == pytest.approx(q[token].item(), abs=1e-4)
        assert record["advantage"] == record["q"] - record["v"]
        kl = (guided.exp() * (guided - base)).sum().item()
        assert record["kl"] == pytest.approx(kl, abs=1e-4)
        best = base.maximum(guided).topk(4).indices.tolist()
        best.sort(key=lambda a: -guided[a])
        assert [a["token"] for a in record["alternatives"]] == TOKENIZER.pieces(best)
        for found, a in zip(record["alternatives"], best, strict=True):
            assert found["q"] == pytest.approx(q[a].item(), abs=1e-4)
            assert found["logprob"] == pytest.approx(guided[a].item(), abs=1e-4)
            assert found["base_logprob"] == pytest.approx(base[a].item(), abs=1e-4)


def test_what_guidance_cuts_has_no_logprob_and_what_it_raised_is_shown():
    model = small(0, HeadsConfig("linear", num_q=1))
    [records] = read_texts(model, [TEXT], Guidance(beta=1.0, temperature=0.0), alternatives=3)
    for record in records[4:]:
        first, *others = record["alternatives"]
        assert first["logprob"] == 0.0
        assert all(a["logprob"] is None and math.isfinite(a["base_logprob"]) for a in others)
    strong = Guidance(beta=200.0)
    [records] = read_texts(model, [TEXT], strong, alternatives=1)
    [best] = records[4]["alternatives"]
    [everything] = read_texts(model, [TEXT], strong, alternatives=20)
    assert best["q"] == pytest.approx(max(a["q"] for a in everything[4]["alternatives"]))


def test_without_values_there_are_probabilities_alone():
    [records] = read_texts(small(), [TEXT], alternatives=2)
    assert [records[4][k] for k in ("q", "v", "advantage")] == [None] * 3
    assert records[4]["logprob"] == records[4]["base_logprob"] < 0
    assert [a["q"] for a in records[4]["alternatives"]] == [None, None]


def test_an_action_without_a_target_is_shown_without_numbers():
    """Cut right after a turn's end: collate masks that decision."""
    model = small(0, HeadsConfig("linear", num_q=1))
    text = Trajectory([1, 9, 10, 3], [False, False, True, True], [0.0] * 4, False)
    [records] = read_texts(model, [text])
    assert [r["token"] for r in records] == TOKENIZER.pieces(text.tokens)


def test_bad_calls():
    model = small(0, HeadsConfig("linear", num_q=1))
    with pytest.raises(QvgptError, match="alternatives: from 0 to 20, not 21"):
        read_texts(model, [TEXT], alternatives=21)
    [records] = read_texts(model, [TEXT], alternatives=0, values=HeadValues(model))
    assert records[4]["alternatives"] == []
