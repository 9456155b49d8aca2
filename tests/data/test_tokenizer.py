import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from qvgpt.data.tokenizer import SPECIALS, Template, Tokenizer
from qvgpt.errors import QvgptError

BPE = Tokenizer.train(["some English text, and <eos> too"] * 5, vocab_size=290)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(deadline=None, max_examples=100)
@given(UNICODE)
def test_bpe_gives_back_any_text(text):
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert "".join(BPE.pieces(ids)) == text
    assert not set(ids) & set(range(5))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 289), max_size=20))
def test_pieces_of_any_ids_are_one_each_and_join_to_the_text(ids):
    pieces = BPE.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces).replace("\ufffd", "") == BPE.decode(ids, False).replace("\ufffd", "")


def test_a_character_is_shown_where_it_is_complete_and_specials_by_name():
    ids = [BPE.template.bos, *BPE.encode("é日"), BPE.template.eos]
    assert BPE.pieces(ids) == ["<bos>", "", "é", "", "", "日", "<eos>"]


def test_specials_of_a_trained_tokenizer():
    for kind in ("bpe", "char"):
        tokenizer = Tokenizer.train(["ab"], kind)
        assert tokenizer.pieces(range(5)) == list(SPECIALS)
        assert tokenizer.template == Template(bos=1, sep=2, eos=3, eot=4, pad=0)
        assert tokenizer.template.end_ids == (3, 4)
    assert tokenizer.vocab_size == 8  # specials, <unk>, a, b


@pytest.mark.parametrize("special", [*SPECIALS, "<unk>"])
def test_special_text_of_a_user_stays_text(special):
    char = Tokenizer.train(["<>abdeknopstu "], "char")
    for tokenizer in (BPE, char):
        ids = tokenizer.encode(f"a {special} b")
        assert min(ids) > 4
        assert tokenizer.decode(ids) == f"a {special} b"
    assert len(char.encode(special)) == 5


def test_a_vocabulary_that_holds_its_end_token_as_a_piece_cannot_smuggle_it():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "a</s>")]
    hf = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    hf.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(hf)
    assert tokenizer.template.eos == 1
    assert tokenizer.encode("a</s>") == [hf.token_to_id(c) for c in "a</s>"]


def test_unknown_characters(char):
    assert char.encode("aЖ") == [char.encode("a")[0], 5]
    with pytest.raises(QvgptError, match="surrogate"):
        char.encode("\ud800")


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_auto_tokenizer_reads_what_we_save(tmp_path, kind):
    from transformers import AutoTokenizer, GPT2Config

    tokenizer = Tokenizer.train(["hello world, it is\n  me"] * 3, kind, 300)
    tokenizer.save(tmp_path)
    GPT2Config().save_pretrained(tmp_path)  # a checkpoint's config must not change the class
    auto = AutoTokenizer.from_pretrained(tmp_path)
    text = "hello  me, wo\nrld."
    ids = tokenizer.encode(text)
    assert auto(text)["input_ids"] == ids
    assert auto.decode(ids) == tokenizer.decode(ids, skip_special=False)
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (1, 3, 0)
    auto.save_pretrained(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again", tmp_path / "tokenizer.json"):
        again = Tokenizer.load(folder)
        assert again.template == tokenizer.template
        assert again.sha256 == tokenizer.sha256
        assert again.encode(text + "<eos>") == tokenizer.encode(text + "<eos>")


def test_sha256_tells_tokenizers_apart():
    assert BPE.sha256 != Tokenizer.train(["other"], vocab_size=290).sha256


def test_gpt2_files(tmp_path):
    vocab = {"h": 0, "i": 1, "Ġ": 2, "hi": 3, "<|endoftext|>": 4}
    (tmp_path / "encoder.json").write_text(json.dumps(vocab))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nh i\n")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("hi hi") == [3, 2, 3]
    assert tokenizer.template == Template(bos=4, sep=None, eos=4, eot=None, pad=4)
    assert tokenizer.encode_prompt("hi") == [4, 3]
    assert tokenizer.encode_messages([{"role": "assistant", "content": "hi"}])[0] == [4, 3, 4]
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.template == tokenizer.template
    assert again.sha256 == tokenizer.sha256


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(QvgptError, match=r"nowhere: expected a directory with tokenizer\.json"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(QvgptError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(QvgptError, match=r"tokenizer_config\.json: not valid JSON"):
        Tokenizer.load(tmp_path)
    with pytest.raises(QvgptError, match="vocab_size 100 is too small: bpe needs 261"):
        Tokenizer.train(["a"], vocab_size=100)


def test_end_token_from_generation_config(tmp_path):
    hf = tokenizers.Tokenizer(models.BPE({"a": 0, "[end]": 1, "[pad]": 2}, []))
    hf.add_special_tokens(["[end]", "[pad]"])
    hf.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(QvgptError, match="no end token is known"):
        Tokenizer.load(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 9], "pad_token_id": 2}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.template == Template(bos=1, sep=None, eos=1, eot=None, pad=2)
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").template == tokenizer.template


def test_prompt_and_messages_of_our_template(char):
    e = char.encode
    assert char.encode_prompt("ab") == [1, *e("ab"), 2]
    tokens, is_action, owner = char.encode_messages(
        [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "no"}]
    )
    assert tokens == [1, *e("hi"), 4, *e("user: no"), 4]
    assert is_action == [False] + [True] * 3 + [False] * 9
    assert owner == [-1] + [0] * 3 + [1] * 9


DIALOGUE = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": "cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "mat"},
]


def test_chat_template(hf_folder):
    tokenizer = Tokenizer.load(hf_folder)
    assert tokenizer.chat_template
    tokens, is_action, owner = tokenizer.encode_messages(DIALOGUE, add_generation_prompt=True)
    text = "".join(tokenizer.pieces(tokens))
    assert text == (
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\ncat<|im_end|>\n"
        "<|im_start|>assistant\nsat<|im_end|>\n<|im_start|>user\nmat<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    actions = [t for t, a in zip(tokens, is_action, strict=True) if a]
    assert tokenizer.decode(actions, skip_special=False) == "sat<|im_end|>"
    assert {o for o, a in zip(owner, is_action, strict=True) if a} == {2}
    assert tokenizer.template.end_ids == (actions[-1],)


def test_chat_template_is_kept_by_save_and_by_auto_tokenizer(hf_folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.load(hf_folder)
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert again.template == tokenizer.template
    auto = AutoTokenizer.from_pretrained(tmp_path)
    ids = auto.apply_chat_template(DIALOGUE, return_dict=False)
    assert ids == again.encode_messages(DIALOGUE)[0]


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        (
            "{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}",
            "x",
            "rewrites",
        ),
        ("{{ raise_exception('no such role') }}", "x", "fails on 1 messages: no such role"),
        (None, "x <|im_end|>", "message 1 holds the special token '<|im_end|>' as text"),
        (None, "\ud800", "lone surrogate"),
    ],
)
def test_chat_templates_that_cannot_be_used(hf_folder, template, content, expected):
    tokenizer = Tokenizer.load(hf_folder)
    tokenizer.chat_template = template or tokenizer.chat_template
    with pytest.raises(QvgptError, match=expected.replace("|", r"\|")):
        tokenizer.encode_messages([{"role": "user", "content": content}, *DIALOGUE[2:]])
