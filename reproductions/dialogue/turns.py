"""What was foretold at the beginning of each turn, held against what came."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from qvgpt.bootstrap import calibration, spearman
from qvgpt.diagnostics import foretell
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Trajectory, returns_to_go

FEWEST = 10
"""Games that must have come to a turn for a rank correlation there."""
PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
"""Of ridge regressions; the best on validation games is taken."""


@dataclass(frozen=True)
class Turns:
    """The beginnings of all turns of some games: nothing of the turn itself is known there."""

    game: np.ndarray
    turn: np.ndarray
    """From 0: so many questions were asked before."""
    to_come: np.ndarray
    """The rewards of this turn and of all after it."""

    @classmethod
    def of(cls, texts: Sequence[Trajectory]) -> "Turns":
        """In the order of the texts."""
        begins = [_begins(text) for text in texts]
        return cls(
            np.concatenate([np.full(b.sum(), i) for i, b in enumerate(begins)]),
            np.concatenate([np.arange(b.sum()) for b in begins]),
            np.concatenate(
                [np.array(returns_to_go(t))[b] for t, b in zip(texts, begins, strict=True)]
            ),
        )


def _begins(text: Trajectory) -> np.ndarray:
    """Which decisions of a text begin a turn."""
    at = np.flatnonzero(text.is_action)
    return np.diff(at, prepend=-1) > 1


def foretold(model: ValueModel, texts: Sequence[Trajectory]) -> np.ndarray:
    """V at the beginning of each turn, in the order of `Turns`."""
    return foretell(model, texts, batch_size=8).v[np.concatenate([*map(_begins, texts)])]


def means(texts: Sequence[Trajectory]) -> np.ndarray:
    """The mean return to come, by turn number."""
    turns = Turns.of(texts)
    return np.array([turns.to_come[turns.turn == t].mean() for t in range(turns.turn.max() + 1)])


def shaped(texts: Sequence[Trajectory], potential: np.ndarray) -> list[Trajectory]:
    """Rewards with Φ(next turn) − Φ(turn) added, Φ = 0 where a game is over (Ng et al., 1999).

    The return to come from turn t is then less by Φ(t), and which turn is better is the same.
    """
    found = []
    for text in texts:
        acts, reward = np.array(text.is_action), np.array(text.reward)
        ends = np.flatnonzero(acts & ~np.append(acts[1:], False))
        phi = np.append(potential[np.arange(len(ends)).clip(max=len(potential) - 1)], 0.0)
        reward[ends] += np.diff(phi)
        found.append(replace(text, reward=reward.tolist()))
    return found


@dataclass(frozen=True)
class Rivals:
    """What foretells without values, fitted to training games."""

    mean_of_turn: np.ndarray
    """The mean return to come, by turn number."""
    on_turn: np.ndarray
    """Ridge on the turn number."""
    on_words: tuple[np.ndarray, np.ndarray]
    """Ridge on it and on how often each token was said before: weights, scale of the features."""

    @classmethod
    def of(cls, learned: Sequence[Trajectory], chosen_on: Sequence[Trajectory]) -> "Rivals":
        """Fitted to the first games, penalties chosen on the others."""
        turns, held = Turns.of(learned), Turns.of(chosen_on)
        tokens = 1 + max(max(t.tokens) for t in [*learned, *chosen_on])
        x, x_held = _words(learned, tokens), _words(chosen_on, tokens)
        scale = x.std(0) + 1e-3
        return cls(
            means(learned),
            _best_ridge(_numbers(turns), turns, _numbers(held), held),
            (_best_ridge(x / scale, turns, x_held / scale, held), scale),
        )

    def foretell(self, texts: Sequence[Trajectory]) -> dict[str, np.ndarray]:
        """By name, in the order of `Turns`."""
        turns, (weights, scale) = Turns.of(texts), self.on_words
        known = turns.turn.clip(max=len(self.mean_of_turn) - 1)
        words = _words(texts, len(scale) - 2) / scale
        return {
            "mean of the turn": self.mean_of_turn[known],
            "ridge on the turn": _numbers(turns) @ self.on_turn,
            "ridge on turn and words": words @ weights,
        }


def _numbers(turns: Turns) -> np.ndarray:
    return np.stack([turns.turn, np.ones(len(turns.turn))], axis=1)


def _words(texts: Sequence[Trajectory], tokens: int) -> np.ndarray:
    """log(1 + how often each token stood before each turn), the turn's number and a 1."""
    rows = []
    for text in texts:
        at = np.flatnonzero(text.is_action)[_begins(text)]
        said = np.array(text.tokens).clip(max=tokens - 1)
        rows += [np.log1p(np.bincount(said[:i], minlength=tokens)) for i in at]
    return np.concatenate([np.array(rows), _numbers(Turns.of(texts))], axis=1).astype(np.float32)


def _best_ridge(x: np.ndarray, turns: Turns, x_held: np.ndarray, held: Turns) -> np.ndarray:
    """The weights whose penalty is best on held-out turns; the last feature, 1, has none."""
    squares, products = (x.T @ x).astype(float), x.T @ turns.to_come
    free = np.append(np.ones(x.shape[1] - 1), 0.0)
    tried = [np.linalg.solve(squares + np.diag(p * free + 1e-9), products) for p in PENALTIES]
    return min(tried, key=lambda w: np.square(x_held @ w - held.to_come).mean())


def figures(predicted: np.ndarray, turns: Turns, mean_of_turn: np.ndarray) -> dict[str, float]:
    """How right a prediction is; NaN: undefined.

    `skill` is 1 − its squared error over that of `mean_of_turn`; `within` the rank correlation
    among games at the same turn, the mean over turns: 0 for who knows the turn's number alone.
    """
    came, variance = turns.to_come, predicted.var()
    slope = np.cov(predicted, came, bias=True)[0, 1] / variance if variance else np.nan
    tenths = calibration(predicted, came)
    ranks = by_turn(predicted, turns)
    return {
        "skill": 1 - _mse(predicted, came) / _mse(mean_of_turn, came),
        "rmse": _mse(predicted, came) ** 0.5,
        "slope": float(slope),
        "intercept": float(came.mean() - slope * predicted.mean()),
        "ece": sum(t["n"] * abs(t["predicted"] - t["actual"]) for t in tenths) / len(came),
        "spearman": spearman(predicted, came),
        "within": fmean(ranks.values()) if ranks else np.nan,
        "after_5": ranks.get(5, np.nan),
        "after_10": ranks.get(10, np.nan),
    }


def _mse(predicted: np.ndarray, came: np.ndarray) -> float:
    return float(np.square(predicted - came).mean())


def by_turn(predicted: np.ndarray, turns: Turns) -> dict[int, float]:
    """Rank correlation among the games at each turn where outcomes differ; a constant's is 0."""
    found = {}
    for turn in np.unique(turns.turn):
        at = turns.turn == turn
        if at.sum() >= FEWEST and np.ptp(turns.to_come[at]) > 0 and turn > 0:
            found[int(turn)] = float(np.nan_to_num(spearman(predicted[at], turns.to_come[at])))
    return found


def clustered(
    statistics: Callable[[np.ndarray], Mapping[str, float]],
    cluster: np.ndarray,
    resamples: int,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals; drawn are clusters, `statistics` is asked of the rows of some."""
    rows = [np.flatnonzero(cluster == c) for c in np.unique(cluster)]
    generator = np.random.default_rng(seed)
    drawn = [
        statistics(np.concatenate([rows[i] for i in generator.integers(len(rows), size=len(rows))]))
        for _ in range(resamples)
    ]
    return {
        name: tuple(np.percentile([d[name] for d in drawn], [2.5, 97.5]).tolist())
        for name in drawn[0]
    }
