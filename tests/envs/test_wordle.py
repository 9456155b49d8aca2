import random
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.envs.games import Game, row_return
from qvgpt.envs.wordle import (
    ADVERSARIAL,
    ALPHABET,
    INVALID,
    MIXED,
    WON,
    Wordle,
    WordleEnv,
    adversary,
    consistent,
    expert,
    feedback,
    hesitant,
    load_words,
    patterns,
    random_word,
)
from qvgpt.envs.wordle_search import Search, expected_return, optimal_return, split
from qvgpt.errors import QvgptError

WORDS = (
    "crane", "slate", "trace", "stare", "arise", "raise", "react", "caret", "cater", "crate",
    "eerie", "geese", "abbey", "babes", "mamma", "light", "night", "might",
)  # fmt: skip
GAME = Wordle(WORDS)


def slow_feedback(guess: str, answer: str) -> str:
    colours = ["g" if a == b else "b" for a, b in zip(guess, answer, strict=True)]
    spare = Counter(b for a, b in zip(guess, answer, strict=True) if a != b)
    for i, letter in enumerate(guess):
        if colours[i] == "b" and spare[letter]:
            colours[i] = "y"
            spare[letter] -= 1
    return "".join(colours)


@pytest.mark.parametrize(
    ("guess", "answer", "colours"),
    [
        ("crane", "crane", "ggggg"),
        ("crane", "light", "bbbbb"),
        ("babes", "abbey", "yyggb"),
        ("eerie", "geese", "ygbbg"),  # three e's for three
        ("mamma", "light", "bbbbb"),
        ("aabbb", "bbaaa", "yyyyb"),
    ],
)
def test_colours_by_hand(guess, answer, colours):
    assert slow_feedback(guess, answer) == colours
    assert feedback(guess, answer) == colours


def test_patterns_agree_with_a_slow_reference():
    rng = random.Random(0)
    words = ["".join(rng.choices("abc", k=5)) for _ in range(60)]
    found = patterns(words, words[:40])
    for i, guess in enumerate(words):
        for j, answer in enumerate(words[:40]):
            code = sum("byg".index(c) * 3**k for k, c in enumerate(slow_feedback(guess, answer)))
            assert found[i, j] == code
    assert (np.diag(found) == WON).all()


def brute_force(game: Wordle, turns: int) -> int:
    """Least cost by trying every guess everywhere, without bounds."""

    @cache
    def least(left: tuple[int, ...], turns: int) -> int:
        if turns == 0:
            return 0
        return min(after(left, g, turns) for g in range(len(game.words)))

    def after(left: tuple[int, ...], guess: int, turns: int) -> int:
        parts: dict[int, list[int]] = {}
        for answer in left:
            if answer != guess:
                parts.setdefault(int(game.matrix[guess, answer]), []).append(answer)
        return sum(len(p) + least(tuple(p), turns - 1) for p in parts.values())

    return least(tuple(range(len(game.answers))), turns)


@pytest.mark.parametrize("turns", [1, 2, 3, 6])
@pytest.mark.parametrize("others", [(), ("aabbc", "ccbba")])
def test_the_search_finds_the_optimum(turns, others):
    rng = random.Random(1)
    words = tuple(dict.fromkeys("".join(rng.choices("abc", k=5)) for _ in range(14)))
    game = Wordle(words, others, max_turns=turns)
    assert -optimal_return(game) * len(words) == pytest.approx(brute_force(game, turns))


def test_the_best_tree_earns_its_value():
    search = Search(GAME)

    def best(game, left, turn):
        return [search.best(left, game.max_turns - turn)[1]]

    assert expected_return(GAME, best) == optimal_return(GAME)


def test_players_are_as_good_as_their_names():
    values = [expected_return(GAME, p) for p in (adversary, random_word, hesitant, consistent)]
    assert values == sorted(values)
    assert values[-1] < expected_return(GAME, expert) <= optimal_return(GAME)
    assert expected_return(GAME, adversary) == -6 * (len(WORDS) - 1) / len(WORDS)


@pytest.mark.parametrize("player", [random_word, consistent, expert, hesitant, adversary])
def test_logs_average_to_the_player_s_value(player):
    rows = GAME.logged_games(600, seed=3, players=[player])
    mean = sum(map(row_return, rows)) / len(rows)
    assert mean == pytest.approx(expected_return(GAME, player), abs=0.25)


def test_one_step_of_improvement_prefers_the_poor_opening_and_several_the_good_one():
    """By exact values: what the adversarial mixture is for."""
    good, poor = GAME.greedy(GAME.all_left), GAME.dullest
    assert good != poor
    shares = {expert: 1 / 6, adversary: 5 / 6}  # of the games that open well
    after_good = sum(p * expected_return(GAME, player) for player, p in shares.items())
    assert after_good < expected_return(GAME, hesitant) < expected_return(GAME, expert)
    rows = GAME.logged_games(1500, seed=0, players=ADVERSARIAL)
    openings = Counter(row["messages"][1]["content"] for row in rows)
    assert set(openings) == {WORDS[good], WORDS[poor]}
    assert openings[WORDS[good]] / 1500 == pytest.approx(6 / 11, abs=0.05)


def test_classes_and_spread():
    parts = list(split(GAME, GAME.all_left, 0))
    assert sorted(i for part in parts for i in part) == list(range(1, len(WORDS)))
    assert [len(p) for p in parts] == sorted(map(len, parts), reverse=True)
    sizes = np.array([1, *map(len, parts)]) / len(WORDS)
    assert GAME.spread(GAME.all_left)[0] == pytest.approx(-(sizes * np.log(sizes)).sum())


def test_logs_are_rows_of_35_symbols():
    tok = Tokenizer.train(ALPHABET, "char")
    assert tok.vocab_size == 35
    rows = GAME.logged_games(30, seed=1)
    assert rows == GAME.logged_games(30, seed=1, players=MIXED) != GAME.logged_games(30, seed=2)
    for row in rows:
        tokens, _, _ = tok.encode_messages(row["messages"])
        assert "<unk>" not in tok.decode(tokens, skip_special=False)
        assert row["messages"][0]["content"] == "wordle:"


def test_environment():
    env = WordleEnv(GAME)
    assert isinstance(env, Game)
    with pytest.raises(QvgptError, match="reset"):
        env.step("crane")
    assert env.reset(5) == "wordle:"
    answer = env.answer
    other = next(w for w in WORDS if w != answer)
    step = env.step(other)
    assert (step.observation, step.reward) == (feedback(other, answer), -1.0)
    assert not env.allows("xxxxx")
    step = env.step("xxxxx")
    assert (step.observation, step.reward, step.terminated) == (INVALID, -1.0, False)
    step = env.step(answer)
    assert (step.observation, step.reward, step.terminated) == (None, 0.0, True)
    env.reset(5)
    ends = [env.step(other).terminated for _ in range(6)]
    assert ends == [False] * 5 + [True]
    assert [env.reset(seed) and env.answer for seed in range(18)] == list(WORDS)


def test_faults(tmp_path: Path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("crane\nslate\n")
    bad.write_text("crane\nSlate\n")
    game = Wordle.load(good, good)
    assert game.words == ("crane", "slate") == load_words(good)
    with pytest.raises(QvgptError, match=r"bad.txt:2: .*'Slate'"):
        load_words(bad)
    with pytest.raises(QvgptError, match="no readable"):
        load_words(tmp_path / "none.txt")
    for arguments, message in [
        ((("crane",),), "2 answers"),
        ((("crane", "crane"),), "twice"),
        ((("crane", "slate"), ("four",)), "'four'"),
        ((WORDS, (), 0), "a guess or more"),
    ]:
        with pytest.raises(QvgptError, match=message):
            Wordle(*arguments)
