"""A text maze: find the goal, one move a turn, with or without being told where one is.

The shape and the rewards are those of LMRL-Gym's maze (Abdulhai et al., 2023): 25 cells of
corridors, one goal, four moves, 0 for the move that arrives, −1 for any other, into a wall too,
which leaves all as it was, and −4 for a text that is no move, 100 moves at most. The mazes are our
own, drawn by seed, and so are the words. The tables of reproductions/games play 30 moves at most;
they were made when what is no move cost 1.

    full      "goal k. you d."        the observation is the state: cells are named by letters
    partial   "walls left, up."       the state must be made out from all that was seen

Values are exact in both. Who sees only walls knows the set of cells that agree with all that was
seen: every cell of the set is equally likely, since starts are, and moves never merge two cells
that look alike. With full sight the set holds one cell; so one dynamic programme over sets serves
both, backwards in moves left, the limit included.
"""

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from string import ascii_letters
from typing import Any

from qvgpt.envs.env import Step
from qvgpt.envs.games import log_dialogue
from qvgpt.errors import QvgptError

Cell = tuple[int, int]
"""Row, counted downwards, and column."""
Belief = frozenset[Cell]
"""The cells one may be in."""
DIRECTIONS: dict[str, Cell] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
MOVES = {f"move {name}": step for name, step in DIRECTIONS.items()}
"""The actions, as text."""
NO_MOVE = -4.0
"""The reward of a text that is none of them; the limit counts it as a move."""
NOISES = (1.0, 0.7, 0.3)
"""Players that write the logs: each moves at random so often, else as is best."""
_DRAWS = 1000


@dataclass(frozen=True)
class Maze:
    """Corridors on a grid, and how much of them is seen."""

    cells: frozenset[Cell]
    """Where one can be; all else is wall."""
    goal: Cell
    full: bool = True
    """Whether observations name position and goal, or walls alone."""
    max_moves: int = 100
    """The game is over after so many, wherever one is: a rule, so that is an end, not a cut."""

    def __post_init__(self):
        if self.goal not in self.cells or not 2 <= len(self.cells) <= len(ascii_letters):
            raise QvgptError("a maze needs 2 to 52 cells, the goal among them")
        if len(self.distance) < len(self.cells):
            raise QvgptError("every cell of a maze must reach the goal")
        if max(self.distance.values()) > self.max_moves:
            far = max(self.distance.values())
            raise QvgptError(f"a maze whose goal is {far} moves away needs max_moves of as many")

    @classmethod
    def draw(
        cls,
        seed: int,
        num_cells: int = 25,
        side: int = 9,
        full: bool = True,
        max_moves: int = 100,
    ) -> "Maze":
        """Corridors without loops on a grid of side × side, and a goal among them.

        Grown cell by cell, each next to exactly one that is there already.
        Raises `QvgptError` where the grid has no room.
        """
        rng = random.Random(seed)
        if num_cells < 2 or side < 1:
            raise QvgptError("a maze needs 2 cells or more, on a grid")
        for _ in range(_DRAWS):
            cells = _grow(rng, num_cells, side)
            if len(cells) == num_cells:
                return cls(frozenset(cells), rng.choice(cells), full, max_moves)
        raise QvgptError(f"no maze of {num_cells} cells found on a grid of {side} × {side}")

    @property
    def starts(self) -> list[Cell]:
        """The cells a game may begin in, each equally likely: all but the goal."""
        return sorted(self.cells - {self.goal})

    @cached_property
    def names(self) -> dict[Cell, str]:
        """A letter for each cell, row by row."""
        return dict(zip(sorted(self.cells), ascii_letters, strict=False))

    @cached_property
    def distance(self) -> dict[Cell, int]:
        """Moves on the shortest way from each cell to the goal."""
        found, edge = {self.goal: 0}, [self.goal]
        while edge:
            here = edge.pop(0)
            for move in MOVES:
                there = self.move(here, move)
                if there not in found:
                    found[there] = found[here] + 1
                    edge.append(there)
        return found

    def move(self, cell: Cell, action: str) -> Cell:
        """Where `action` leads: nowhere, if there is a wall or it is no move."""
        down, right = MOVES.get(action, (0, 0))
        there = (cell[0] + down, cell[1] + right)
        return there if there in self.cells else cell

    def observe(self, cell: Cell) -> str:
        """What is seen in a cell."""
        if self.full:
            return f"goal {self.names[self.goal]}. you {self.names[cell]}."
        walls = [name for name in DIRECTIONS if self.move(cell, f"move {name}") == cell]
        return f"walls {', '.join(walls) or 'none'}."

    def look(self, cells: Iterable[Cell]) -> list[Belief]:
        """What one may know after a look: the cells, apart where they look different."""
        parts: dict[str, set[Cell]] = {}
        for cell in cells:
            parts.setdefault(self.observe(cell), set()).add(cell)
        return [frozenset(part) for part in parts.values()]

    def solve(self) -> "MazeValues":
        """Exact values of the best policy for what is seen, at every number of moves left."""
        later: dict[Belief, dict[str, list[Belief]]] = {}
        waiting = self.look(self.starts)
        while waiting:
            belief = waiting.pop()
            if belief not in later:
                later[belief] = {move: self.look(self._after(belief, move)) for move in MOVES}
                waiting += [part for parts in later[belief].values() for part in parts]
        values = MazeValues(self, later, [dict.fromkeys(later, 0.0)])
        for left in range(1, self.max_moves + 1):
            values.table.append({b: max(values.q(b, left).values()) for b in later})
        return values

    def optimal_return(self) -> float:
        """Mean return of the best policy for what is seen, over all starts."""
        values = self.solve()
        parts = self.look(self.starts)
        return sum(len(p) * values.v(p, self.max_moves) for p in parts) / len(self.starts)

    def _after(self, belief: Collection[Cell], move: str) -> set[Cell]:
        """The cells one may be in after a move that did not end the game."""
        return {self.move(cell, move) for cell in belief} - {self.goal}

    def policy(self, belief: Collection[Cell], noise: float) -> dict[str, float]:
        """A scripted player who knows what is shown: each move and how likely it is.

        With probability `noise` any of the four, else the best for the cells one may be in, as if
        the game had just begun.
        """
        best = self._best[frozenset(belief)]
        return {move: noise / len(MOVES) + (1 - noise) * (move == best) for move in MOVES}

    @cached_property
    def _best(self) -> dict[Belief, str]:
        values = self.solve()
        every = {belief: values.q(belief, self.max_moves) for belief in values.later}
        return {belief: max(q, key=q.__getitem__) for belief, q in every.items()}

    def data_return(self, noises: Sequence[float] = NOISES, knowing: bool = False) -> float:
        """Expected return of the players who write the logs, exactly; as for `logged_games`."""
        players = replace(self, full=True) if knowing else self
        return sum(map(players._evaluate, noises)) / len(noises)

    def _evaluate(self, noise: float) -> float:
        """The mean return of a player, by a dynamic programme over (cell, cells it may be)."""
        starts = [(cell, belief) for belief in self.look(self.starts) for cell in belief]
        later: dict[tuple[Cell, Belief], list[tuple[float, Any]]] = {}
        waiting = list(starts)
        while waiting:
            cell, belief = state = waiting.pop()
            if state in later:
                continue
            later[state] = []
            for move, p in self.policy(belief, noise).items():
                there = self.move(cell, move)
                parts = self.look(self._after(belief, move)) if there != self.goal else []
                next_state = next(((there, part) for part in parts if there in part), None)
                later[state].append((p, next_state))
                waiting += [next_state] if next_state else []
        values = dict.fromkeys(later, 0.0)
        for _ in range(self.max_moves):
            values = {
                state: sum(p * (values[after] - 1) for p, after in ways if after is not None)
                for state, ways in later.items()
            }
        return sum(values[start] for start in starts) / len(starts)

    def logged_games(
        self,
        count: int = 1000,
        seed: int = 0,
        noises: Sequence[float] = NOISES,
        knowing: bool = False,
    ) -> list[dict[str, Any]]:
        """Games of players of mixed skill, as rows of messages; each row's player is drawn anew.

        Players know what the log shows. `knowing` ones know the cell where it shows walls alone:
        what they do tells then where they are, and values learned from it are wrong for whoever
        does not know (confounding).
        """
        if not noises or not all(0 <= noise <= 1 for noise in noises):
            raise QvgptError(f"a maze's players are told apart by noises in [0, 1], not {noises}")
        rows, players = [], replace(self, full=True) if knowing else self
        for i in range(count):
            rng, env = random.Random(f"logged {seed} {i}"), MazeEnv(self)
            act = _player(env, players, rng, rng.choice(noises))
            rows.append(log_dialogue(env, act, rng.getrandbits(32)))
        return rows


@dataclass(frozen=True)
class MazeValues:
    """Exact Q* and V* for what is seen. The state is (cells one may be in, moves left)."""

    maze: Maze
    later: Mapping[Belief, Mapping[str, list[Belief]]] = field(repr=False)
    """What may be known after each move, where it does not end the game."""
    table: list[dict[Belief, float]] = field(repr=False)
    """[moves left][cells one may be in]."""

    def v(self, belief: Collection[Cell], moves_left: int) -> float:
        """The best expected return. Raises as `q` does."""
        self._check(belief, moves_left, least=0)
        return self.table[moves_left][frozenset(belief)]

    def q(self, belief: Collection[Cell], moves_left: int) -> dict[str, float]:
        """Each move's expected return if all that follows is best.

        Raises `QvgptError` for a set of cells that no course of the game leaves possible.
        """
        self._check(belief, moves_left, least=1)
        before = self.table[moves_left - 1]
        return {
            move: sum(len(part) * (before[part] - 1) for part in parts) / len(belief)
            for move, parts in self.later[frozenset(belief)].items()
        }

    def _check(self, belief: Collection[Cell], moves_left: int, least: int) -> None:
        if frozenset(belief) not in self.later:
            raise QvgptError(f"no course of this maze leaves just these cells: {sorted(belief)}")
        if not least <= moves_left <= self.maze.max_moves:
            raise QvgptError(f"{moves_left} moves left: from {least} to {self.maze.max_moves}")


@dataclass
class MazeEnv:
    """One game at a time, a move a turn."""

    maze: Maze
    cell: Cell | None = None
    moves: int = 0
    """Moves made."""

    def reset(self, seed: int) -> str:
        """A start: seeds in a row take turns over the cells other than the goal."""
        starts = self.maze.starts
        self.cell, self.moves = starts[seed % len(starts)], 0
        return self.maze.observe(self.cell)

    def allows(self, action: str) -> bool:
        """Whether it is one of the four moves, be there a wall or not."""
        return action in MOVES

    def step(self, action: str) -> Step:
        """Move, if it is a move: 0 for arriving, −1 for another move, −4 for what is none."""
        if self.cell is None:
            raise QvgptError("a maze needs reset(seed) before its first step")
        self.cell, self.moves = self.maze.move(self.cell, action), self.moves + 1
        arrived = self.cell == self.maze.goal
        over = arrived or self.moves >= self.maze.max_moves
        seen = None if over else self.maze.observe(self.cell)
        reward = 0.0 if arrived else -1.0 if self.allows(action) else NO_MOVE
        return Step(seen, reward, terminated=over, truncated=False)


def _player(env: MazeEnv, players: Maze, rng: random.Random, noise: float) -> Callable[[str], str]:
    """Who plays one game and knows what `players` shows."""
    may_be: Collection[Cell] = players.starts

    def act(seen: str) -> str:
        nonlocal may_be
        assert env.cell is not None
        [belief] = [part for part in players.look(may_be) if env.cell in part]
        policy = players.policy(belief, noise)
        move = rng.choices(list(policy), list(policy.values()))[0]
        may_be = players._after(belief, move)
        return move

    return act


def _grow(rng: random.Random, num_cells: int, side: int) -> list[Cell]:
    """Cells of corridors without loops; fewer than `num_cells` where the grid is full."""
    cells = [(rng.randrange(side), rng.randrange(side))]
    while len(cells) < num_cells:
        near = [c for cell in cells for c in _beside(cell)]
        free = [c for c in near if near.count(c) == 1 and c not in cells]
        free = [c for c in free if min(c) >= 0 and max(c) < side]
        if not free:
            break
        cells.append(rng.choice(free))
    return cells


def _beside(cell: Cell) -> list[Cell]:
    return [(cell[0] + down, cell[1] + right) for down, right in DIRECTIONS.values()]
