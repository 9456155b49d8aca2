"""Text as it is written: what is shown, joined, is what the tokenizer says of the whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvgpt.data.token_bytes import TokenBytes
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.terminal import TextStream

BPE = Tokenizer.train(["今天天气很好 hello world 😀"] * 3, "bpe", 290)
CHARS = Tokenizer.train(["abc 今天"], "char")


def metaspace():
    """As Llama's: spaces are letters, the first one is left out, rare characters are bytes."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁hi", "hi", "天"]
    hf = tokenizers.Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    hf.pre_tokenizer = pre_tokenizers.Metaspace()
    hf.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    hf.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(hf, {"eos_token": "</s>", "bos_token": "<s>"})


KINDS = {"bpe": BPE, "char": CHARS, "metaspace": metaspace()}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_what_is_shown_is_the_whole(kind, data):
    tokenizer = KINDS[kind]
    # where a run of bytes breaks off, all of them are faulty to the last kind: letters alone there
    known = [1, 68, 100, *range(259, 263)] if kind == "metaspace" else range(tokenizer.vocab_size)
    ids = data.draw(st.lists(st.sampled_from(known), max_size=20))
    ids = [i for i in ids if i not in tokenizer.template.end_ids]
    ids += tokenizer.template.end_ids[: data.draw(st.integers(0, 1))]
    stream, shown = TextStream(tokenizer), ""
    while ids[len(stream.tokens) :]:
        rest = ids[len(stream.tokens) :]
        shown += stream.add(*rest[: data.draw(st.integers(1, 3))])
        assert tokenizer.decode_completion(stream.tokens).startswith(shown)
    assert shown + stream.rest() == tokenizer.decode_completion(ids)


def test_no_character_is_split():
    ids = BPE.encode("今天😀 hello 气")
    stream = TextStream(BPE)
    shown = [stream.add(i) for i in ids]
    assert "\ufffd" not in "".join(shown)
    assert "".join(shown) == "今天😀 hello 气"
    assert "" in shown


def test_a_token_costs_the_same_wherever_it_stands(monkeypatch):
    lengths = []
    decode = BPE.decode_completion
    monkeypatch.setattr(
        BPE, "decode_completion", lambda ids: lengths.append(len(ids)) or decode(ids)
    )
    stream = TextStream(BPE)
    for i in BPE.encode("今天天气很好 hello " * 90):
        stream.add(i)
    assert len(stream.tokens) > 200
    assert max(lengths) < 12


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_join_to_the_text(kind):
    tokenizer = KINDS[kind]
    text = "今天天 abc" if kind != "metaspace" else " hi天 hi今"
    of = TokenBytes(tokenizer)
    known = "".join(c for c in text if kind != "char" or c in "abc 今天")
    assert b"".join(of[i] for i in tokenizer.encode(known)).decode() == known
    for end in tokenizer.template.end_ids:
        assert of[end] == b""
        assert of.name(end).startswith("<")
    assert of[10**6] == b""


@given(st.text(max_size=40))
def test_bytes_of_any_text(text):
    of = TokenBytes(BPE)
    assert b"".join(of[i] for i in BPE.encode(text)) == text.encode()
