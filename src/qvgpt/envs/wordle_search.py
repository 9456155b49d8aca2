"""Wordle solved: the best policy there is, and what a scripted player is worth, exactly.

Costs are wrong guesses, summed over the answers that are left, so whole numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from qvgpt.envs.wordle import WON, Left, Player, Wordle


@dataclass
class Search:
    """Depth first, with what was found remembered.

    A guess that parts n answers into k classes (the right guess one of them) costs at least
    2n − k − [it may be right]: all but the right one are wrong now, and in each class of m, all
    but one will be once more. Guesses are tried in the order of that bound until it reaches the
    best cost found; no guess is left out, so the result is the optimum, the limit on guesses
    included.
    """

    game: Wordle
    found: dict[tuple[bytes, int], tuple[int, int]] = field(default_factory=dict)
    """(answers left, guesses left) → cost, and the guess that has it."""

    def best(self, left: Left, turns: int) -> tuple[int, int]:
        """The least cost with so many guesses left, one or more, and the guess that has it."""
        n = len(left)
        if n < 3 or turns == 1:
            return n - 1, int(left[0])
        key = left.tobytes(), turns
        if key not in self.found:
            self.found[key] = self._search(left, turns)
        return self.found[key]

    def _search(self, left: Left, turns: int) -> tuple[int, int]:
        n, answered = len(left), np.sort(self.game.matrix[:, left], axis=1)
        classes = 1 + (answered[:, 1:] != answered[:, :-1]).sum(1)
        bounds = 2 * n - classes - (answered[:, -1] == WON)
        best = 2 * n * turns, -1
        for guess in np.argsort(bounds, kind="stable"):
            if bounds[guess] >= best[0]:
                break
            cost = int(bounds[guess])
            for part in split(self.game, left, int(guess)):
                cost += self.best(part, turns - 1)[0] - (len(part) - 1)
                if cost >= best[0]:
                    break
            else:
                best = cost, int(guess)
        return best


def split(game: Wordle, left: Left, guess: int) -> Iterator[Left]:
    """The answers that stay possible after each answer to a wrong guess, larger classes first."""
    answered = game.matrix[guess, left]
    counts = np.bincount(answered)
    counts[WON:] = 0
    for pattern in np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]:
        yield left[answered == pattern]


def optimal_return(game: Wordle) -> float:
    """Mean return of the best policy that knows the answers to be equally likely."""
    cost, _ = Search(game).best(game.all_left, game.max_turns)
    return -cost / len(game.answers)


def expected_return(game: Wordle, player: Player) -> float:
    """Mean return of a player, exactly. For players of few options, or few answers."""
    known: dict[tuple[bytes, int], float] = {}

    def cost(left: Left, turn: int) -> float:
        if turn == game.max_turns:
            return 0.0
        key = left.tobytes(), turn
        if key not in known:
            options = player(game, left, turn)
            known[key] = sum(after(left, int(g), turn) for g in options) / len(options)
        return known[key]

    def after(left: Left, guess: int, turn: int) -> float:
        parts = list(split(game, left, guess))
        return float(sum(len(part) + cost(part, turn + 1) for part in parts))

    return -cost(game.all_left, 0) / len(game.answers)
