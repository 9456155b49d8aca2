"""Tree search (PUCT): before each token, simulations look where the likely continuations lead.

    down the tree      argmaxₐ Q̂(s, a) + c_puct · P(a|s) · √N(s) / (1 + N(s, a))
    at an unseen a     the token is read: a new node, whose V is what the simulation found
    up the path        Q(s, a) = mean of what was found below, discounted by the model's γ
    then               the most visited token is written; its subtree stays, with its counts

as in AlphaZero, with values of text as in PPO-MCTS (Liu et al., 2024, arXiv:2309.15028). P is π
(plain or guided, temperature 1) over its `top_k` likeliest tokens. Q̂ is Q brought to 0..1 by the
least and the greatest value in the tree, as in MuZero (Schrittwieser et al., 2020): rewards have
any scale, and c_puct then needs none (PPO-MCTS leaves Q as it is, so that its c_puct = 8 is one of
its rewards' scale). A token not visited yet counts as Q(s, a) says, where the values know Q; else
as V(s), as in PPO-MCTS.

Cost: one token read for every new node, none for a text that ends. At most `simulations` a token;
visits that a subtree brings along count, so that it is less. Each node keeps a row of the KV cache:
`simulations + 1` rows a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qvgpt.decode.guide import Guide
from qvgpt.decode.policy import Guidance
from qvgpt.decode.reading import Reading, States
from qvgpt.decode.search import (
    Found,
    Hypothesis,
    Judge,
    at_least,
    at_one,
    end_ids,
    in_parts,
    read_prompts,
)
from qvgpt.decode.sources import ValueSource
from qvgpt.models.value_model import ValueModel


@dataclass(frozen=True)
class TreeSearch:
    """How to search. See the head of `decode/tree.py`."""

    simulations: int = 16
    """Visits of a state's continuations before its token is written."""
    top_k: int = 8
    """Tokens of each state that are looked at: the likeliest ones."""
    c_puct: float = 1.25
    """How much the policy and untried tokens weigh against values, which are brought to 0..1."""
    per_token: bool = False
    """Rewards come on the way: Q(s, a) − γ·V(s') is earned by each token. A contrast's are."""
    max_tokens: int = 128
    """Where a text is cut if no end token came."""
    max_batch: int = 256
    """Nodes held at the same time, over all prompts."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        at_least(self, simulations=1, top_k=1, c_puct=0, max_tokens=1, max_batch=1)

    @torch.no_grad()
    def __call__(
        self,
        model: ValueModel,
        prompts: Sequence[Sequence[int]],
        guidance: Guidance | None = None,
        values: ValueSource | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Found:
        """One text of each prompt.

        Guidance's temperature is ignored. The hypothesis' score is what the whole text is worth.
        Raises `QvgptError` for a prompt that does not fit, and where there are no values.
        """
        guidance, guide = at_one(guidance or Guidance()), Guide.of(model, values)
        judge = Judge.of(guide, guidance, self.per_token)
        for prompt in prompts:
            guide.refuse(prompt, self.max_tokens, guidance)
        texts: list[list[Hypothesis]] = [[] for _ in prompts]
        forward_tokens = 0
        for part in in_parts(prompts, self.max_batch // (self.simulations + 1)):
            forest = _Forest(self, judge, [prompts[i] for i in part], guidance)
            for i, found in zip(part, forest.run(), strict=True):
                texts[i] = [found]
            forward_tokens += sum(forest.counts)
        return Found(texts, forward_tokens)


@dataclass
class _Node:
    """A text that was read, and its candidates, the likeliest first."""

    text: list[int]
    row: int
    """Of the cache."""
    v: float
    """V(s)."""
    tokens: list[int]
    logprob: np.ndarray
    """log π."""
    prior: np.ndarray
    """π over the candidates alone."""
    q: np.ndarray | None
    """Q(s, a) of the values; None: not known without reading the token."""
    hidden: tuple[Tensor, ...]
    """What each trunk made of the text, where q is yet to be read."""
    visits: np.ndarray = field(init=False)
    total: np.ndarray = field(init=False)
    """Sum of what was found below each candidate."""
    reward: np.ndarray = field(init=False)
    """Earned by each candidate that was read."""
    children: dict[int, "_Node"] = field(default_factory=dict)
    """By the place of the candidate."""
    ends: dict[int, float] = field(default_factory=dict)
    """What the candidates are worth that end the text, as far as they were looked at."""

    def __post_init__(self) -> None:
        """Nothing was visited yet."""
        self.visits, self.total, self.reward = np.zeros((3, len(self.tokens)))

    def estimates(self) -> np.ndarray:
        """What each candidate seems to be worth."""
        unseen = np.full(len(self.tokens), self.v) if self.q is None else self.q
        return np.where(self.visits > 0, self.total / np.maximum(self.visits, 1), unseen)

    def all(self) -> list["_Node"]:
        """Itself and all below."""
        return [self, *(node for child in self.children.values() for node in child.all())]


@dataclass
class _Tree:
    """The search for one prompt's text."""

    prompt_length: int
    root: _Node
    free: list[int]
    """Rows of the cache that no node uses."""
    low: float = np.inf
    high: float = -np.inf
    logprob: float = 0.0
    value: float = 0.0
    done: Hypothesis | None = None

    def saw(self, estimates: np.ndarray) -> None:
        """Widen the range of values."""
        self.low = min(self.low, float(estimates.min()))
        self.high = max(self.high, float(estimates.max()))

    def select(self, node: _Node, c_puct: float) -> int:
        """The candidate to be followed."""
        estimates, span = node.estimates(), self.high - self.low
        scaled = (estimates - self.low) / span if span > 0 else np.zeros_like(estimates)
        untried = np.sqrt(1 + node.visits.sum()) / (1 + node.visits)
        return int((scaled + c_puct * node.prior * untried).argmax())


class _Forest:
    """A tree for each prompt. A simulation reads one new node of every tree, in one forward."""

    def __init__(
        self,
        how: TreeSearch,
        judge: Judge,
        prompts: Sequence[Sequence[int]],
        guidance: Guidance,
    ):
        self.how, self.judge, self.guidance, self.guide = how, judge, guidance, judge.guide
        self.end_ids, self.gamma = end_ids(self.guide.model), judge.gamma
        capacity = min(max(map(len, prompts)) + how.max_tokens, self.guide.context)
        each = how.simulations + 1
        states = read_prompts(self.guide, prompts, capacity, lambda: [list(p) for p in prompts])
        self.counts = states.reading.counts
        self.store = Reading.new(self.guide.trunks, each * len(prompts), capacity, self.counts)
        rows = [i * each for i in range(len(prompts))]
        self.store.insert(torch.tensor(rows), states.reading)
        nodes = self._nodes(states, [0] * len(prompts), rows, [list(p) for p in prompts])
        self.trees = [
            _Tree(len(prompt), node, list(range(row + 1, row + each)))
            for prompt, node, row in zip(prompts, nodes, rows, strict=True)
        ]
        for tree in self.trees:
            tree.saw(tree.root.estimates())

    def run(self) -> list[Hypothesis]:
        """Write until every text is over."""
        while alive := [tree for tree in self.trees if tree.done is None]:
            while short := [tree for tree in alive if self._wants(tree)]:
                self._simulate(short)
            for tree in alive:
                self._write(tree)
        return [tree.done for tree in self.trees if tree.done is not None]

    def _wants(self, tree: _Tree) -> bool:
        wanted = 1 if len(tree.root.tokens) == 1 else self.how.simulations
        return float(tree.root.visits.sum()) < wanted

    def _simulate(self, trees: list[_Tree]) -> None:
        """One visit of each root."""
        unread: list[tuple[_Tree, list[tuple[_Node, int]]]] = []
        for tree in trees:
            path = self._descend(tree)
            node, place = path[-1]
            if self._ends(tree, node, place):
                self._backup(tree, path, self._end_value(node, place))
            else:
                unread.append((tree, path))
        if not unread:
            return
        parents = [path[-1] for _, path in unread]
        texts = [[*node.text, node.tokens[place]] for node, place in parents]
        picked = self.store.select(torch.tensor([node.row for node, _ in parents]))
        picked.expect(max(map(len, texts)) - 1)
        states = picked.read(torch.tensor([text[-1] for text in texts]), None, lambda: texts)
        rows = [tree.free.pop() for tree, _ in unread]
        self.store.insert(torch.tensor(rows), picked)
        written = [
            len(text) - tree.prompt_length for text, (tree, _) in zip(texts, unread, strict=True)
        ]
        nodes = self._nodes(states, written, rows, texts)
        for node, (tree, path) in zip(nodes, unread, strict=True):
            parent, place = path[-1]
            parent.children[place] = node
            worth = self.gamma * node.v
            if self.judge.per_token or np.isnan(node.v):
                assert parent.q is not None
                worth = float(parent.q[place])
                parent.reward[place] = worth - self.gamma * node.v
            tree.saw(node.estimates())
            self._backup(tree, path, worth)

    def _descend(self, tree: _Tree) -> list[tuple[_Node, int]]:
        """The nodes and candidates from the root to a candidate that has no node."""
        node, path = tree.root, list[tuple[_Node, int]]()
        while True:
            place = tree.select(node, self.how.c_puct)
            path.append((node, place))
            if place not in node.children:
                return path
            node = node.children[place]

    def _backup(self, tree: _Tree, path: list[tuple[_Node, int]], worth: float) -> None:
        """Add what was found, `worth` as of the last candidate, to all that led there."""
        for node, place in reversed(path):
            if node is not path[-1][0]:
                earned = node.reward[place] if self.judge.per_token else 0.0
                worth = earned + self.gamma * worth
            node.visits[place] += 1
            node.total[place] += worth
            tree.saw(node.total[place : place + 1] / node.visits[place])

    def _ends(self, tree: _Tree, node: _Node, place: int) -> bool:
        cut = len(node.text) + 1 - tree.prompt_length >= self.how.max_tokens
        return cut or node.tokens[place] in self.end_ids

    def _end_value(self, node: _Node, place: int) -> float:
        """Q of a candidate that ends the text."""
        if node.q is not None:
            return float(node.q[place])
        if place not in node.ends:
            row = self.store.select(torch.tensor([node.row]))
            row.expect(len(node.text))
            token = torch.tensor([[node.tokens[place]]])
            states = States(row, tuple(h[None] for h in node.hidden), None, lambda: [node.text])
            node.ends[place] = float(self.judge.q(states, token))
        return node.ends[place]

    def _write(self, tree: _Tree) -> None:
        """The most visited candidate, of equals the better one."""
        root = tree.root
        best = max(range(len(root.tokens)), key=lambda i: (root.visits[i], root.estimates()[i]))
        tree.logprob += float(root.logprob[best])
        over = self._ends(tree, root, best)
        if self.judge.per_token:
            assert root.q is not None
            tree.value += float(root.q[best]) - root.v
        elif over:
            tree.value = self._end_value(root, best)
        if over:
            token = root.tokens[best]
            tokens = [*root.text[tree.prompt_length :], token]
            tree.done = Hypothesis(tokens, token in self.end_ids, tree.logprob, tree.value)
            return
        kept = root.children.pop(best)
        tree.free += [node.row for node in root.all()]
        tree.root, tree.low, tree.high = kept, np.inf, -np.inf
        for node in kept.all():
            tree.saw(node.estimates())

    def _nodes(
        self,
        states: States,
        written: Sequence[int],
        rows: Sequence[int],
        texts: Sequence[list[int]],
    ) -> list[_Node]:
        """What is known of states that were just read."""
        picked = self.guide.next_token(states, self.guidance, written)
        logprob, at = picked.logprob.topk(min(self.how.top_k, picked.logprob.size(1)), dim=1)
        tokens, v = picked.tokens.gather(1, at), self.judge.v(states)
        known = None
        if v is None or self.judge.per_token or not self.judge.reads_candidates:
            known = self.judge.q(states, tokens).double().cpu().numpy()
        values = [float("nan")] * len(states) if v is None else v.tolist()
        found = []
        for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
            possible = int(logprob[i].isfinite().sum())  # they are sorted
            log_pi = logprob[i, :possible].double().cpu().numpy()
            prior = np.exp(log_pi - log_pi[0])
            q = None if known is None else known[i, :possible]
            hidden = tuple(h[i] for h in states.hidden) if known is None else ()
            candidates = tokens[i, :possible].tolist()
            node = _Node(text, row, values[i], candidates, log_pi, prior / prior.sum(), q, hidden)
            found.append(node)
        return found
