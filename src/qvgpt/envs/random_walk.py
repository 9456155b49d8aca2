"""trlX's random walks: find the short way to node 'a' in a small graph, every value known exactly.

A walk is a text of letters, one per node: the prompt is its first letter, the completion the rest.
The game is small enough for dynamic programming, so every Q and V a model learns has a true value
to be held against. Rules and metric: CarperAI/trlx, examples/randomwalks/randomwalks.py.

Three things differ from trlX, where it would contradict itself: every node can reach the goal with
a node to spare (there the metric's denominator may be 0), a walk of more than `max_length` nodes
scores 0 (there it is negative), and so does a walk that starts at the goal (there it is scored
against another node's shortest path).
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from qvgpt.envs.env import Step
from qvgpt.errors import QvgptError

GOAL = 0
END = ""
"""The action that ends a walk, as text: no letter, only the end token."""
_DRAWS = 10_000


@dataclass(frozen=True)
class RandomWalks:
    """A directed graph whose nodes are the letters from 'a', the goal, on."""

    edges: tuple[tuple[int, ...], ...]
    """The nodes one step away from each node, ascending; none from the goal."""
    max_length: int = 10
    """Nodes in the longest walk, the start included. A walk that reaches the goal as its
    `max_length`-th node scores 0, like one that never does."""

    def __post_init__(self):
        if not 2 <= len(self.edges) <= 26:
            raise QvgptError(f"random walks need 2 to 26 nodes, not {len(self.edges)}")
        if self.edges[GOAL]:
            raise QvgptError("random walks end at node 'a': it may have no edges")
        if any(n >= self.max_length for n in _shortest(self.edges)[1:]):
            raise QvgptError(f"every node must reach 'a' in fewer than {self.max_length} nodes")

    @classmethod
    def draw(
        cls,
        seed: int,
        num_nodes: int = 21,
        edge_probability: float = 0.1,
        max_length: int = 10,
    ) -> "RandomWalks":
        """A graph whose every node reaches the goal in fewer than `max_length` nodes.

        Each of the num_nodes·(num_nodes−1) edges exists with `edge_probability`; graphs are drawn
        until one qualifies. Raises `QvgptError` if none of 10,000 does.
        """
        rng = random.Random(seed)
        for _ in range(_DRAWS):
            drawn = tuple(
                tuple(j for j in range(num_nodes) if rng.random() < edge_probability and j != i)
                for i in range(num_nodes)
            )
            edges = ((), *drawn[1:])
            if all(n < max_length for n in _shortest(edges)[1:]):
                return cls(edges, max_length)
        raise QvgptError(
            f"none of {_DRAWS} graphs of {num_nodes} nodes with edge probability "
            f"{edge_probability} reaches 'a' from everywhere in fewer than {max_length} nodes"
        )

    @property
    def num_nodes(self) -> int:
        """Nodes of the graph, the goal included."""
        return len(self.edges)

    @property
    def letters(self) -> str:
        """The alphabet: one letter per node, 'a' the goal."""
        return "".join(map(_letter, range(self.num_nodes)))

    @property
    def starts(self) -> str:
        """The letters a walk may start at: all but the goal."""
        return self.letters[1:]

    @cached_property
    def shortest(self) -> tuple[int, ...]:
        """Nodes on the shortest path from each node to the goal, both ends included."""
        return tuple(int(n) for n in _shortest(self.edges))

    def logged_walks(self, count: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
        """Walks of the uniform policy from uniform starts, as rows {prompt, completion, reward}.

        A walk that is not at the goal by its `max_length`-th node is over, with reward 0: that is
        a rule of the game, so its row is terminated, not truncated.
        """
        rng = random.Random(seed)
        rows = []
        for _ in range(count):
            nodes = [rng.randrange(1, self.num_nodes)]
            while nodes[-1] != GOAL and len(nodes) < self.max_length:
                nodes.append(rng.choice(self.edges[nodes[-1]]))
            walk = "".join(map(_letter, nodes))
            row = {"prompt": walk[0], "completion": walk[1:], "reward": self.optimality(walk)}
            rows.append(row)
        return rows

    def optimality(self, walk: str) -> float:
        """(max_length − nodes) / (max_length − nodes of the shortest path), in [0, 1].

        `walk` is the whole walk, its start included; as in trlX, what follows the first 'a' does
        not count. 0 for a missing edge, an unknown letter, a walk too long or not at the goal.
        """
        length = walk.find(_letter(GOAL)) + 1
        if not 1 < length <= self.max_length or not self.is_walk(walk):
            return 0.0
        return (self.max_length - length) / (self.max_length - self.shortest[_node(walk[0])])

    def is_walk(self, walk: str) -> bool:
        """Whether `walk` begins at a start and follows edges, up to the first 'a'."""
        nodes = [_node(letter) for letter in walk[: walk.find(_letter(GOAL)) + 1 or None]]
        if not nodes or nodes[0] not in range(1, self.num_nodes):
            return False
        # `all` stops at the first missing edge, hence before it looks up an unknown node.
        return all(there in self.edges[here] for here, there in pairwise(nodes))

    def reward(self, completions: list[str], rows: list[Mapping[str, Any]]) -> list[float]:
        """`optimality` as a reward of completions, for `SingleTurn` and `shape`."""
        return [
            self.optimality(row["prompt"] + completion)
            for completion, row in zip(completions, rows, strict=True)
        ]

    def solve(self) -> "WalkValues":
        """Exact values of the optimal policy, by dynamic programming backwards in nodes so far."""
        return self._evaluate(max)

    def solve_data(self) -> "WalkValues":
        """Exact values of the uniform policy that wrote `logged_walks`: Monte Carlo's limit."""
        return self._evaluate(lambda values: sum(values) / len(values))

    def _evaluate(self, backup: Callable[[Sequence[float]], float]) -> "WalkValues":
        """V(node, n) = backup over successors of V(·, n+1), in nodes saved at the goal."""
        saved = [[0.0] * self.num_nodes for _ in range(self.max_length + 1)]
        for n in range(self.max_length, 0, -1):
            for node, successors in enumerate(self.edges):
                if node == GOAL:
                    saved[n][node] = float(self.max_length - n)
                elif n < self.max_length:
                    saved[n][node] = backup([saved[n + 1][s] for s in successors])
        return WalkValues(self, tuple(map(tuple, saved)))

    @cached_property
    def _star(self) -> "WalkValues":
        return self.solve()

    @cached_property
    def _data(self) -> "WalkValues":
        return self.solve_data()

    def q_star(self, walk_so_far: str) -> dict[str, float]:
        """Q* of each legal action after `walk_so_far`: see `WalkValues.q`."""
        return self._star.q(walk_so_far)

    def v_star(self, walk_so_far: str) -> float:
        """V* after `walk_so_far`: the optimality still within reach."""
        return self._star.v(walk_so_far)

    def q_data(self, walk_so_far: str) -> dict[str, float]:
        """Q of the uniform data policy for each legal action after `walk_so_far`."""
        return self._data.q(walk_so_far)

    def v_data(self, walk_so_far: str) -> float:
        """V of the uniform data policy after `walk_so_far`."""
        return self._data.v(walk_so_far)

    def optimal_return(self) -> float:
        """Mean V* over the starts: 1 by the metric's construction."""
        return sum(map(self.v_star, self.starts)) / len(self.starts)


@dataclass(frozen=True)
class WalkValues:
    """Exact Q and V of one policy. The state is (start, node now, nodes so far)."""

    walks: RandomWalks
    saved: tuple[tuple[float, ...], ...]
    """[nodes so far][node]: expected number of nodes left unused on arrival, 0 if none. The start
    only scales it: Q = saved / (max_length − shortest[start])."""

    def q(self, walk_so_far: str) -> dict[str, float]:
        """Legal next letter → Q. At the goal, and off it after `max_length` nodes, {END: value}.

        Raises `QvgptError` if `walk_so_far` is no walk of this graph (or goes on after the goal):
        such a text is worth 0 whatever follows.
        """
        start, here, length = self._state(walk_so_far)
        scale = self.walks.max_length - self.walks.shortest[start]
        if here == GOAL or length == self.walks.max_length:
            return {END: self.saved[length][here] / scale}
        return {_letter(s): self.saved[length + 1][s] / scale for s in self.walks.edges[here]}

    def v(self, walk_so_far: str) -> float:
        """The policy's expected optimality after `walk_so_far`. Raises as `q` does."""
        start, here, length = self._state(walk_so_far)
        return self.saved[length][here] / (self.walks.max_length - self.walks.shortest[start])

    def best(self, walk_so_far: str) -> str:
        """The action of greatest Q, the first in the alphabet among equals."""
        q = self.q(walk_so_far)
        return max(q, key=q.__getitem__)

    def _state(self, walk: str) -> tuple[int, int, int]:
        """Start, node now and nodes so far."""
        beyond = _letter(GOAL) in walk[:-1]
        if beyond or len(walk) > self.walks.max_length or not self.walks.is_walk(walk):
            raise QvgptError(f"{walk!r} is no walk of this graph: it has no values")
        return _node(walk[0]), _node(walk[-1]), len(walk)


@dataclass
class WalkEnv:
    """One game at a time: `reset` draws a start, the one action is the rest of the walk."""

    walks: RandomWalks
    start: str = ""

    def reset(self, seed: int) -> str:
        """A start letter, uniform over the nodes other than the goal."""
        self.start = random.Random(seed).choice(self.walks.starts)
        return self.start

    def allows(self, action: str) -> bool:
        """Whether the walk follows edges, however long it is and wherever it ends."""
        return self.walks.is_walk(self.start + action)

    def step(self, action: str) -> Step:
        """Ends the game with the optimality of start + action."""
        if not self.start:
            raise QvgptError("a random walk needs reset(seed) before its first step")
        reward = self.walks.optimality(self.start + action)
        return Step(observation=None, reward=reward, terminated=True, truncated=False)


def _shortest(edges: Sequence[Sequence[int]]) -> list[float]:
    """Nodes on the shortest path from each node to the goal; infinite where there is none."""
    length = [math.inf] * len(edges)
    length[GOAL] = 1.0
    for n in range(2, len(edges) + 1):
        arrived = [i for i, to in enumerate(edges) if any(length[j] == n - 1 for j in to)]
        for i in arrived:
            length[i] = min(length[i], float(n))
    return length


def _letter(node: int) -> str:
    return chr(ord("a") + node)


def _node(letter: str) -> int:
    """The node of a letter; for any other character a number that is no node."""
    return ord(letter) - ord("a")
