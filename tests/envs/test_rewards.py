import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.envs.random_walk import RandomWalks
from qvgpt.envs.rewards import KINDS, bleu_prefixes, compares, get_reward, shape
from qvgpt.errors import QvgptError

BUILT_IN = [
    "bleu",
    "bleu:zh",
    "chrf",
    "rouge_1",
    "rouge_l",
    "rouge_2",
    "exact_match",
    "token_f1",
    "length",
]
WORDS = ["the", "cat", "sat", "on", "mat", ",", "3.5", "1-2", "a.b", "Hund", "läuft", "&quot;", "-"]
sentence = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
anything = st.one_of(sentence, st.text(st.characters(codec="utf-8"), max_size=30))
TOK = Tokenizer.train([" ".join(WORDS)] * 3, vocab_size=280)
SACRE = BLEU(effective_order=True)


def score(name: str, text: str, *references: str) -> float:
    return get_reward(name)([text], [{"references": list(references)}])[0]


def test_bleu_by_hand():
    # 4 words of 4, 3 pairs of 3, 2 triples of 2, 1 quadruple of 1
    assert score("bleu", "a b c d", "a b c d") == pytest.approx(1.0)
    # words 3/4, pairs 2/3, triples 1/2, quadruples 0 of 1 smoothed to 1/2
    expected = (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** (1 / 4)
    assert score("bleu", "a b c x", "a b c d") == pytest.approx(expected)
    # two words: the orders there are, 2/2 and 1/1, times exp(1 − 4/2)
    assert score("bleu", "a b", "a b c d") == pytest.approx(math.exp(-1))
    assert score("bleu", "x y", "a b c d") == 0.0
    assert score("bleu", "", "a b") == 0.0
    # clipping: one of the two a's counts; pairs 0 of 1 smoothed to 1/2
    assert score("bleu", "a a", "a b") == pytest.approx((1 / 2 * 1 / 2) ** (1 / 2))


def test_the_others_by_hand():
    # words shared in order: a, c; F1 = 2·2/(3+4)
    assert score("rouge_l", "a c x", "a b c d") == pytest.approx(4 / 7)
    # pairs (a b), (b c) of 3 and 3 shared
    assert score("rouge_2", "a b c x", "a b c d") == pytest.approx(2 / 3)
    assert score("rouge_l", "zzz", "a b", "zzz") == 1.0  # the best reference counts
    assert score("exact_match", "The  Cat!", "cat") == 1.0
    assert score("exact_match", "cats", "cat") == 0.0
    # after normalisation: {red, cat} and {big, red, cat}: 2·2/(2+3)
    assert score("token_f1", "a red cat", "The big, red cat.") == pytest.approx(4 / 5)
    assert score("token_f1", "the", "a") == 1.0  # both empty
    assert score("token_f1", "x", "a") == 0.0
    assert score("token_f1", "x x y", "x", "x x") == pytest.approx(4 / 5)
    assert score("length", " three words  here ", "") == 3.0
    assert score("chrf", "a cat", "a cat") == 1.0


@settings(max_examples=300, deadline=None)
@given(anything, st.lists(anything, min_size=1, max_size=3))
def test_bleu_equals_sacrebleu(text, references):
    ours = bleu_prefixes([text], {"references": references})[0]
    assert ours == pytest.approx(SACRE.sentence_score(text, references).score / 100, abs=1e-9)


def test_bleu_equals_sacrebleu_on_changing_texts():
    """Prefixes that grow, shrink and change: nothing may stay in the counts."""
    rng = random.Random(0)
    for _ in range(60):
        texts = [" ".join(rng.choices(WORDS, k=rng.randrange(14))) for _ in range(12)]
        long = " ".join(rng.choices(WORDS, k=14))
        texts += [long[:n] for n in range(0, len(long), 2)]
        references = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 14))) for _ in range(2)]
        expected = [SACRE.sentence_score(t, references).score / 100 for t in texts]
        ours = bleu_prefixes(texts, {"references": references})
        assert ours == pytest.approx(expected, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(anything, anything)
def test_chrf_equals_sacrebleu(text, reference):
    expected = CHRF().sentence_score(text, [reference]).score / 100
    assert score("chrf", text, reference) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="ascii")), sentence.filter(str.isascii))
def test_rouge_equals_rouge_score_on_ascii(text, reference):
    expected = RougeScorer(["rougeL", "rouge2"]).score(reference, text)
    assert score("rouge_l", text, reference) == pytest.approx(expected["rougeL"].fmeasure)
    assert score("rouge_2", text, reference) == pytest.approx(expected["rouge2"].fmeasure)


def test_rouge_keeps_letters_that_rouge_score_drops():
    assert score("rouge_l", "Ärzte „läuft“!", "ärzte läuft") == 1.0
    assert score("rouge_l", "кот спит", "кот ест") == 0.5
    assert score("rouge_l", "don’t", "don't") == 1.0
    assert RougeScorer(["rougeL"]).score("кот", "кот")["rougeL"].fmeasure == 0.0


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BUILT_IN),
    st.lists(st.integers(5, TOK.vocab_size - 1), min_size=1, max_size=12),
    sentence,
    st.booleans(),
)
def test_shaping_sums_to_the_metric(name, tokens, reference, ended):
    tokens = [*tokens, TOK.template.eos] if ended else tokens
    reward, row = get_reward(name), {"completion": reference}
    (shaped,) = shape(reward, [tokens], [row], TOK)
    (whole,) = reward([TOK.decode(tokens)], [row])
    assert len(shaped) == len(tokens)
    assert sum(shaped) == pytest.approx(whole, abs=1e-9)
    if ended and len(tokens) > 1:
        assert shaped[-1] == 0.0
    for n in range(1, len(tokens)):
        expected = reward([TOK.decode(tokens[:n])], [row])[0]
        assert sum(shaped[:n]) == pytest.approx(expected, abs=1e-9)


def test_without_brevity_the_last_token_settles_the_sum():
    row, text = {"references": ["the cat sat on the mat , 3.5 the cat"]}, "the cat sat"
    tokens = [*TOK.encode(text), TOK.template.eos]
    (late,) = shape(get_reward("bleu"), [tokens], [row], TOK)
    (early,) = shape(get_reward("bleu"), [tokens], [row], TOK, brevity=False)
    assert sum(early) == pytest.approx(sum(late)) == pytest.approx(math.exp(1 - 10 / 3))
    assert sum(early[:-1]) == pytest.approx(1.0)  # every n-gram so far is right
    assert early[-1] == pytest.approx(math.exp(1 - 10 / 3) - 1)
    assert late[-1] == 0.0
    with pytest.raises(QvgptError, match="'bleu'"):
        shape(get_reward("length"), [tokens], [row], TOK, brevity=False)


def test_any_callable_can_be_shaped():
    walks = RandomWalks(edges=((), (0,), (1,)), max_length=5)
    tok = Tokenizer.train([walks.letters], kind="char", vocab_size=20)
    tokens = [*tok.encode("ba"), tok.template.eos]
    rows = [{"prompt": "c"}] * 2
    assert shape(walks.reward, [tokens, tokens[:1]], rows, tok) == [[0.0, 1.0, 0.0], [0.0]]
    with pytest.raises(QvgptError, match="empty completion"):
        shape(walks.reward, [[]], rows[:1], tok)


def test_a_callable_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text(
        "def vowels(completion, row):\n    return sum(c in row['vowels'] for c in completion)\n"
        "def broken(completion, row):\n    return float('nan')\nnumber = 3\n"
        "def nothing(completion, row):\n    pass\n"
        "def text(completion, row):\n    return '0.5'\n"
        "def key(completion, row):\n    return row['nowhere']\n"
        "def one(completion):\n    return 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    reward = get_reward("own_reward:vowels")
    assert reward(["banana", "xyz"], [{"vowels": "a"}] * 2) == [3.0, 0.0]
    with pytest.raises(QvgptError, match=r"own_reward:broken.*nan for row 1 of 2.*'why'"):
        get_reward("own_reward:broken")(["x", "y"], [{"prompt": "why"}] * 2)
    for name, said in {
        "nothing": "gave None for 'x' .prompt 'why'.: a number was expected",
        "text": "gave '0.5' for 'x'",
        "key": r"failed on 'x' .*KeyError: 'nowhere' \(at .*own_reward.py:11\)",
        "one": "failed on 'x' .*TypeError: one.. takes 1 positional",
    }.items():
        with pytest.raises(QvgptError, match=f"own_reward:{name}' {said}"):
            get_reward(f"own_reward:{name}")(["x"], [{"prompt": "why"}])
    for spec in ("own_reward:number", "own_reward:none", "no_such_module:f", ":f"):
        with pytest.raises(QvgptError, match=spec):
            get_reward(spec)


def test_faults(monkeypatch):
    with pytest.raises(QvgptError, match="did you mean 'bleu'"):
        get_reward("blue")
    with pytest.raises(QvgptError, match="needs `references`"):
        get_reward("bleu")(["x"], [{"prompt": "y"}])
    with pytest.raises(QvgptError, match="list of texts"):
        get_reward("token_f1")(["x"], [{"references": "y"}])
    for row in ({"references": ["y", 1]}, {"completion": [{"role": "assistant"}]}):
        with pytest.raises(QvgptError, match="a text to compare with was expected"):
            get_reward("bleu")(["x"], [row])
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(QvgptError, match=r"needs rouge-score: pip install 'qvgpt\[text\]'"):
        get_reward("rouge_l")


def test_chinese_words_are_characters():
    assert score("token_f1", "我喜欢北京。", "我喜欢上海") == pytest.approx(3 / 5)
    assert score("exact_match", "答案：北京！", "答案北京") == 1.0
    assert score("rouge_l", "今天天气好", "今天好") == pytest.approx(2 * 3 / 8)
    assert score("rouge_1", "GPT很好。", "gpt 很坏") == pytest.approx(2 / 3)
    assert score("length", "我用GPT 写", "") == 4.0
    text, reference = "我喜欢北京，hello world。", "我很喜欢北京，hello world！"
    expected = BLEU(effective_order=True, tokenize="zh").sentence_score(text, [reference])
    assert 0 < score("bleu:zh", text, reference) == pytest.approx(expected.score / 100)
    assert score("bleu:zh", text, reference) != pytest.approx(score("bleu", text, reference))


def test_form_by_hand():
    assert score("length:4", "a b", "") == score("length:4", "a b c d e f", "") == 0.5
    assert score("length:2", "a b c d e", "") == 0.0
    assert score("distinct", "a b a b", "") == pytest.approx(2 / 3)  # ab ba ab
    assert score("distinct:1", "a b a b", "") == 0.5
    assert score("distinct:3", "a b", "") == 0.0
    assert score("repetition:2", "a b a c c a", "") == pytest.approx(-2 / 6)
    assert score("repetition", "a b a c c a", "") == pytest.approx(-3 / 6)
    assert score("repetition", "", "") == 0.0
    assert score(r"regex:^\d+: x$", "12: x", "") == 1.0
    assert score(r"regex:^\d+: x$", "12: xy", "") == 0.0
    assert score("json:a, b", '{"a": 1, "b": {}}', "") == 1.0
    assert (
        score("json", "[1]", "") == score("json:a", '{"b": 1}', "") == score("json", "{", "") == 0
    )
    assert score("number", "so 3 + 4 = 7.0 apples", "it is 7") == 1.0
    assert score("number", "-1,000.", "x", "-1000") == 1.0
    assert score("number", "3-5", "-5") == score("number", "none", "none") == 0.0
    for said, wanted in {
        "x = .5": "0.5", "it is −5": "-5", "6.02e23": "602000000000000000000000",
        "1e5": "100,000", "items 1,2,3": "3", "about 1,000, or so": "1000", "v1.2.3": "3",
    }.items():  # fmt: skip
        assert score("number", said, wanted) == 1.0, said
    for said, wanted in {"x = .5": "5", "it is −5": "5", "6.02e23": "23", "2,5": "25"}.items():
        assert score("number", said, wanted) == 0.0, said


def test_sums_of_rewards():
    both = score("0.7*rouge_l + 0.3*length:4", "a c x", "a b c d")
    assert both == pytest.approx(0.7 * 4 / 7 + 0.3 * 0.75)
    assert score("2*length - .5*length + 1e-1*length:8", "a b", "") == pytest.approx(3.025)
    assert score("1*regex:a\\*b+ + -1*length", "a*bb", "") == 0.0
    assert (compares("1*length + 2*bleu"), compares("1*length"), compares("bleu:zh")) == (
        True, False, True,
    )  # fmt: skip
    tokens, row = [*TOK.encode("the cat sat"), TOK.template.eos], {"references": ["the cat on"]}
    shaped = {
        spec: np.array(shape(get_reward(spec), [tokens], [row], TOK)[0])
        for spec in ("bleu", "length", "2*bleu - 0.1*length")
    }
    expected = 2 * shaped["bleu"] - 0.1 * shaped["length"]
    assert shaped["2*bleu - 0.1*length"] == pytest.approx(expected)


def test_a_program_of_ones_own(tmp_path):
    """Status, printed number, time-out; what the text says is data, never a command."""
    (tmp_path / "check.py").write_text(
        "import json, os, subprocess, sys\n"
        "row = json.loads(sys.stdin.readline())\n"
        "said = row['completion']\n"
        "if said == 'sleep':\n"
        "    subprocess.Popen(['sleep', '30']).wait()\n"
        "if said == 'half':\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"  # which keeps what is printed to
        "    print(child.pid, file=open(row['note'], 'w'))\n"
        "    print('log'); print(0.5)\n"
        "sys.exit(0 if said in ('half', row['reference']) else 3)\n"
    )
    reward = get_reward(f"command:timeout=20 {sys.executable} -S -E {tmp_path}/check.py")
    row = {"completion": "right; rm -rf $HOME", "note": str(tmp_path / "pid")}
    texts = ["right; rm -rf $HOME", "wrong", "half"]
    assert reward(texts, [row] * 3) == [1.0, 0.0, 0.5]
    child = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    for _ in range(100):  # what a program leaves behind ends with it
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the program's child goes on")
    started = time.monotonic()
    slow = get_reward(f"command:timeout=0.3 {sys.executable} -S -E {tmp_path}/check.py")
    assert slow(["sleep"], [row]) == [0.0]
    assert time.monotonic() - started < 10
    for spec, match in [
        ("command:no-such-program x", "no program 'no-such-program'"),
        ("command:timeout=0 true", "seconds above 0"),
        ("command:'", "No closing quotation"),
    ]:
        with pytest.raises(QvgptError, match=match):
            get_reward(spec)


def test_arguments_are_checked():
    for spec, match in [
        ("chrf:zh", "takes nothing after it"),
        ("regex", "say regex:PATTERN"),
        ("regex:(", "no pattern"),
        ("length:0", "at least 1"),
        ("distinct:x", "a whole number"),
        ("bleu:ja", "13a or zh"),
        ("0.5*rouge_l+length", "every term has a weight"),
        ("0.5*blue", "did you mean 'bleu'"),
    ]:
        with pytest.raises(QvgptError, match=match):
            get_reward(spec)


def test_every_reward_is_documented():
    """docs/rewards.md holds the registry, line by line."""
    lines = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    expected = [
        f"| `{name}{kind.argument}` | {kind.range} | {kind.direction} | "
        f"{'yes' if kind.compares else 'no'} | {kind.cost} |"
        for name, kind in KINDS.items()
    ]
    assert rows[:-1] == expected
    assert rows[-1].startswith("| `MODULE:FUNCTION` |")
