"""Star graphs: which of d paths leads to the goal? The first step decides, and looks like a guess.

A start has d arms of equal length; the prompt lists all edges in random order, then start and
goal; the completion is the way there. Who is taught ways token by token learns to follow an arm
once on it, and never which one to take: a teacher-forced model picks the first step by chance
(Bachmann & Nagarajan, The pitfalls of next-token prediction, 2024). Values of whole arms tell
them apart, though nearly all that was logged went wrong (Q♯: Zhou et al., 2025).

    bc|af|fg|ab/ac  →  bc          d = 2, l = 3: from the start a the arms bc and fg, to the goal c

Nodes are letters, not numbers, so that each is one character.
"""

import random
import string
from dataclasses import dataclass
from typing import Any

from qvgpt.envs.env import Step
from qvgpt.errors import QvgptError

LETTERS = string.ascii_letters
END = ""
"""The action that ends a way, as text: no letter, only the end token."""


@dataclass(frozen=True)
class StarGraph:
    """One graph, with its start and goal."""

    prompt: str
    """The edges in random order, then start and goal."""
    arms: tuple[str, ...]
    """The nodes of each arm but for the start, which they share."""
    goal: str
    """The last node of one of them."""

    @property
    def path(self) -> str:
        """The one right completion: the nodes from after the start to the goal."""
        return next(arm for arm in self.arms if arm.endswith(self.goal))

    @property
    def wrong(self) -> tuple[str, ...]:
        """The arms that end elsewhere."""
        return tuple(arm for arm in self.arms if not arm.endswith(self.goal))


@dataclass(frozen=True)
class StarGraphs:
    """G(d, l): star graphs of d arms with l nodes each, the start included."""

    degree: int = 2
    length: int = 5
    num_labels: int = 26
    """Node labels are drawn from so many letters, without repetition."""
    right_first: float | None = None
    """How often the logged policy takes the right first step; None: 1/d, as by chance."""

    def __post_init__(self):
        if self.degree < 2 or self.length < 2:
            raise QvgptError("star graphs need 2 arms or more, of 2 nodes or more")
        if not self.num_nodes <= self.num_labels <= len(LETTERS):
            raise QvgptError(
                f"star graphs of {self.num_nodes} nodes need as many labels, of the "
                f"{len(LETTERS)} letters there are, not {self.num_labels}"
            )
        if self.right_first is not None and not 0 <= self.right_first <= 1:
            raise QvgptError(f"right_first must lie in [0, 1], not {self.right_first}")

    @property
    def num_nodes(self) -> int:
        """Nodes of a graph: the start, and l − 1 on each arm."""
        return 1 + self.degree * (self.length - 1)

    @property
    def alphabet(self) -> str:
        """All characters of prompts and completions."""
        return LETTERS[: self.num_labels] + "|/"

    def draw(self, seed: int | str) -> StarGraph:
        """The graph of a seed: labels, order of edges and goal at random."""
        rng = random.Random(seed)
        start, *rest = rng.sample(LETTERS[: self.num_labels], self.num_nodes)
        size = self.length - 1
        arms = ["".join(rest[i * size : (i + 1) * size]) for i in range(self.degree)]
        edges = [a + b for arm in arms for a, b in zip(start + arm, arm, strict=False)]
        rng.shuffle(edges)
        goal = rng.choice(arms)[-1]
        return StarGraph("|".join(edges) + f"/{start}{goal}", tuple(arms), goal)

    def logged_paths(self, count: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
        """Ways of the logged policy, each in a graph of its own: rows {prompt, completion, reward}.

        It takes the right first step with probability `right_first`, else one of the others, and
        follows that arm to its end.
        """
        rows = []
        for i in range(count):
            graph = self.draw(f"logged {seed} {i}")  # a text, so that no environment draws the same
            rng = random.Random(f"policy {seed} {i}")
            right = rng.random() < self.data_return()
            way = graph.path if right else rng.choice(graph.wrong)
            rows.append({"prompt": graph.prompt, "completion": way, "reward": float(right)})
        return rows

    def optimal_return(self) -> float:
        """Of the policy that always takes the right first step."""
        return 1.0

    def data_return(self) -> float:
        """Expected return of the logged policy, exactly."""
        return 1 / self.degree if self.right_first is None else self.right_first

    def q(self, graph: StarGraph, so_far: str) -> dict[str, float]:
        """Q of each legal next letter after `so_far`; at an arm's end {END: value}.

        Q* and that of the logged policy are the same: after the first step both follow the arm.
        Raises `QvgptError` where `so_far` leaves the arms.
        """
        arms = [arm for arm in graph.arms if arm.startswith(so_far)]
        if not arms:
            raise QvgptError(f"{so_far!r} is no way from the start of {graph.prompt!r}")
        return {arm[len(so_far) : len(so_far) + 1]: float(arm == graph.path) for arm in arms}

    def v_star(self, graph: StarGraph, so_far: str) -> float:
        """V* after `so_far`: 1 as long as the goal is ahead. Raises as `q` does."""
        return max(self.q(graph, so_far).values())

    def v_data(self, graph: StarGraph, so_far: str) -> float:
        """V of the logged policy after `so_far`. Raises as `q` does."""
        return self.v_star(graph, so_far) if so_far else self.data_return()


@dataclass
class StarEnv:
    """One graph at a time; the one action is the way from after the start to the goal."""

    graphs: StarGraphs
    graph: StarGraph | None = None

    def reset(self, seed: int) -> str:
        """The prompt of a new graph."""
        self.graph = self.graphs.draw(seed)
        return self.graph.prompt

    def allows(self, action: str) -> bool:
        """Whether `action` walks along edges from the start, as far as it goes."""
        return bool(action) and any(arm.startswith(action) for arm in self._graph.arms)

    def step(self, action: str) -> Step:
        """1 for the right way, else 0; the episode is over."""
        reward = float(action == self._graph.path)
        return Step(observation=None, reward=reward, terminated=True, truncated=False)

    @property
    def _graph(self) -> StarGraph:
        if self.graph is None:
            raise QvgptError("a star graph needs reset(seed) before its first step")
        return self.graph
