"""Wordle: a hidden word of five letters, six guesses, coloured answers; words given by path.

As in LMRL-Gym (Abdulhai et al., 2023) a guess that is not the word costs 1 and the right one
nothing, so that returns lie between −6 and 0. Each letter of a guess is answered by g (green:
right here), y (yellow: elsewhere in the word) or b (black: not, or not once more). A text that is
no known word is answered by "!!!!!", costs 1 and uses up a guess.

    wordle:  →  crane  →  bbygb  →  …

With the end tokens and the like, a character tokenizer of `ALPHABET` has 35 symbols, as ILQL's
(Snell et al., 2022). Whose logs these are, is said by players; the 'adversarial' mixture follows
theirs: the best opening is known mostly from games that were thrown away after it, so that by the
mean of the logs (one step of improvement) a poor opening looks better, and only who looks several
steps ahead (Q-learning) sees what the good one is worth.
"""

import random
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from qvgpt.envs.env import Step
from qvgpt.envs.games import log_dialogue
from qvgpt.errors import QvgptError

LETTERS = 5
COLOURS = "byg"
WON = 3**LETTERS - 1
"""The pattern of five greens."""
OPENING = "wordle:"
INVALID = "!" * LETTERS
ALPHABET = string.ascii_lowercase + " :!"
"""All characters of a game, the role before an observation included."""
Left = Int[np.ndarray, "left"]
"""The answers still possible, by index."""
Player = Callable[["Wordle", Left, int], Sequence[int] | Left]
"""Game, answers left and guesses made → the words it may guess, each equally likely."""
_CHUNK = 2**20  # pairs of words compared at once: about 100 MiB


def load_words(path: str | Path) -> tuple[str, ...]:
    """The words of a file, one a line. Raises `QvgptError` with file and line for what is none."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise QvgptError(f"{path}: no readable list of words: {error}") from None
    for number, word in enumerate(lines, 1):
        if not _is_word(word):
            raise QvgptError(f"{path}:{number}: expected five letters a–z, found {word!r}")
    return tuple(lines)


def patterns(
    guesses: Sequence[str], answers: Sequence[str]
) -> UInt8[np.ndarray, "guesses answers"]:
    """How each guess is answered for each hidden word: Σ colourᵢ·3ⁱ with b = 0, y = 1, g = 2.

    A letter of the guess is yellow only while the hidden word has one more of it that is neither
    green nor already yellow, counted from the left.
    """
    size = max(1, _CHUNK // max(len(answers), 1))
    parts = [guesses[i : i + size] for i in range(0, len(guesses), size)]
    return np.concatenate([_patterns(_codes(part), _codes(answers)) for part in parts])


@dataclass(frozen=True)
class Wordle:
    """The game with its lists of words."""

    answers: tuple[str, ...]
    """The words that may be hidden, each equally likely."""
    others: tuple[str, ...] = ()
    """Words that may be guessed, but are never hidden; answers among them do not count."""
    max_turns: int = 6
    """Guesses a game has."""

    def __post_init__(self):
        if len(self.answers) < 2 or len(set(self.answers)) < len(self.answers):
            raise QvgptError("wordle needs 2 answers or more, none of them twice")
        if bad := [w for w in (*self.answers, *self.others) if not _is_word(w)]:
            raise QvgptError(f"wordle's words have five letters a–z, unlike {bad[0]!r}")
        if self.max_turns < 1:
            raise QvgptError("wordle needs a guess or more")

    @classmethod
    def load(cls, answers: str | Path, guesses: str | Path | None = None) -> "Wordle":
        """From files with a word a line; without `guesses` only answers may be guessed."""
        return cls(load_words(answers), load_words(guesses) if guesses is not None else ())

    @cached_property
    def words(self) -> tuple[str, ...]:
        """All that may be guessed: the answers in their order, then the others."""
        return tuple(dict.fromkeys((*self.answers, *self.others)))

    @cached_property
    def place(self) -> dict[str, int]:
        """The index of each word."""
        return {word: i for i, word in enumerate(self.words)}

    @cached_property
    def matrix(self) -> UInt8[np.ndarray, "words answers"]:
        """The `patterns` of all words for all answers."""
        return patterns(self.words, self.answers)

    @property
    def all_left(self) -> Left:
        """What may be hidden before the first guess."""
        return np.arange(len(self.answers))

    def spread(self, left: Left) -> Float[np.ndarray, "words"]:
        """What each word tells about which of `left` is hidden: the entropy of its answer, nats."""
        n, rows = len(left), np.arange(len(self.words))[:, None] * (WON + 1)
        codes = (rows + self.matrix[:, left]).ravel()
        counts = np.bincount(codes, minlength=len(self.words) * (WON + 1))
        p = counts.reshape(-1, WON + 1) / n
        return -(p * np.log(np.where(p > 0, p, 1.0))).sum(1)

    def greedy(self, left: Left) -> int:
        """The word that tells most; among equals one of `left`, else the first. Near the best."""
        key = left.tobytes()
        if key not in self._greedy:
            told = self.spread(left).round(9)
            told[left] += 1e-6
            self._greedy[key] = int(left[0] if len(left) < 3 else told.argmax())
        return self._greedy[key]

    @cached_property
    def dullest(self) -> int:
        """The answer that tells least as an opening."""
        return int(self.spread(self.all_left)[: len(self.answers)].argmin())

    @cached_property
    def _greedy(self) -> dict[bytes, int]:
        return {}

    def logged_games(
        self, count: int, seed: int = 0, players: Sequence[Player] = ()
    ) -> list[dict[str, Any]]:
        """Games as rows of messages, each of a player drawn from `players` (none: `MIXED`)."""
        rows = []
        for i in range(count):
            rng = random.Random(f"logged {seed} {i}")
            act = _player(self, rng.choice(players or MIXED), rng)
            rows.append(log_dialogue(WordleEnv(self), act, rng.getrandbits(32)))
        return rows


def random_word(game: Wordle, left: Left, turn: int) -> Sequence[int]:
    """Guesses any word."""
    return range(len(game.words))


def consistent(game: Wordle, left: Left, turn: int) -> Left:
    """Guesses any answer that agrees with all it was told."""
    return left


def expert(game: Wordle, left: Left, turn: int) -> Sequence[int]:
    """Guesses what tells most."""
    return [game.greedy(left)]


def hesitant(game: Wordle, left: Left, turn: int) -> Sequence[int] | Left:
    """Opens with the dullest answer, says it once more, then plays on as `consistent` does."""
    return [game.dullest] if turn < 2 else left


def adversary(game: Wordle, left: Left, turn: int) -> Sequence[int]:
    """Opens as the expert does, and repeats that to the end."""
    return [game.greedy(game.all_left)]


MIXED: tuple[Player, ...] = (random_word, consistent, expert)
ADVERSARIAL: tuple[Player, ...] = (expert, *[hesitant] * 5, *[adversary] * 5)


@dataclass
class WordleEnv:
    """One game at a time, a guess a turn."""

    game: Wordle
    answer: str = ""
    turns: int = 0
    """Guesses made."""

    def reset(self, seed: int) -> str:
        """Hide an answer: seeds in a row take turns over all of them."""
        self.answer, self.turns = self.game.answers[seed % len(self.game.answers)], 0
        return OPENING

    def allows(self, action: str) -> bool:
        """Whether it is a word."""
        return action in self.game.place

    def step(self, action: str) -> Step:
        """0 for the hidden word, else −1 and the colours."""
        if not self.answer:
            raise QvgptError("wordle needs reset(seed) before its first step")
        self.turns += 1
        won = action == self.answer
        over = won or self.turns >= self.game.max_turns
        seen = None if over else self._answered(action)
        return Step(seen, 0.0 if won else -1.0, over, truncated=False)

    def _answered(self, action: str) -> str:
        if not self.allows(action):
            return INVALID
        place = self.game.place
        return colours(int(self.game.matrix[place[action], place[self.answer]]))


def feedback(guess: str, answer: str) -> str:
    """The colours of a guess, as text."""
    return colours(int(patterns([guess], [answer])[0, 0]))


def colours(pattern: int) -> str:
    """A pattern as text."""
    return "".join(COLOURS[pattern // 3**i % 3] for i in range(LETTERS))


def _player(game: Wordle, player: Player, rng: random.Random) -> Callable[[str], str]:
    """A player as it acts on what it sees: it keeps the answers that are left."""
    left, guesses = game.all_left, list[int]()

    def act(seen: str) -> str:
        nonlocal left
        if guesses:
            pattern = sum(COLOURS.index(c) * 3**i for i, c in enumerate(seen))
            left = left[game.matrix[guesses[-1], left] == pattern]
        options = player(game, left, len(guesses))
        guesses.append(int(options[rng.randrange(len(options))]))
        return game.words[guesses[-1]]

    return act


def _is_word(text: str) -> bool:
    return len(text) == LETTERS and set(text) <= set(string.ascii_lowercase)


def _codes(words: Iterable[str]) -> Int[np.ndarray, "words 5"]:
    return np.array([list(word.encode()) for word in words], dtype=np.int16).reshape(-1, LETTERS)


def _patterns(
    guesses: Int[np.ndarray, "guesses 5"], answers: Int[np.ndarray, "answers 5"]
) -> UInt8[np.ndarray, "guesses answers"]:
    same = guesses[:, None, :, None] == answers[None, :, None, :]  # guess' letter i, answer's j
    green = np.einsum("gaii->gai", same).copy()
    same &= ~green[:, :, None, :]  # a letter that made a green makes no yellow
    code = np.where(green, 2, 0).astype(np.uint8)
    used = np.zeros_like(green)
    for i in range(LETTERS):
        free = same[:, :, i, :] & ~used & ~green[:, :, i, None]
        first = free & (free.cumsum(-1) == 1)
        used |= first
        code[:, :, i] += first.any(-1).astype(np.uint8)
    return (code * 3 ** np.arange(LETTERS, dtype=np.uint8)).sum(-1, dtype=np.uint8)
