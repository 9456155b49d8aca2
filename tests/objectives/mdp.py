"""Random token games solved exactly, all their texts, and a model with a free table for values.

    tokens: 0 and 1 begin a text; actions 2, 3 and 4, of which 2 ends a turn; 5 and 6 are replies

At each depth there are two nodes. Actions lead to a node of the next depth, a turn's end by way of
a reply; some actions end the game, all do at the last depth. The data policy gives one action a
half and the others a quarter each, and a reply comes with certainty or by a fair coin, so that
every text can be there as often as it is likely: what is learned from them all has no noise.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from qvgpt.categorical import Support
from qvgpt.objectives import Candidates, Values
from qvgpt.trajectory import Trajectory, TrajectoryBatch, collate

END, ACTIONS, REPLIES, VOCAB, SIDES = 2, (2, 3, 4), (5, 6), 7, 2
CUT = 2  # the depth at which texts are cut


@dataclass(frozen=True)
class Outcome:
    """What may follow an action."""

    probability: float
    reply: int | None
    reward: float
    """That of the action and of the reply."""
    node: int | None
    """None: the game is over."""


@dataclass(frozen=True)
class Game:
    """See the head of this file; a node is depth · SIDES + side."""

    horizon: int
    outcomes: dict[tuple[int, int], tuple[Outcome, ...]]
    """Of each (node, action)."""
    reward: dict[tuple[int, int], float]
    """Of the action alone."""
    policy: dict[tuple[int, int], float]
    """Who wrote the data."""

    @classmethod
    def draw(cls, seed: int, horizon: int = 4, stochastic: bool = False, sparse: bool = False):
        """`sparse`: rewards of 0 but for 0 or 1 where the game ends."""
        rng = random.Random(seed)
        outcomes, rewards, policy = {}, {}, {}
        for node in range(horizon * SIDES):
            depth = node // SIDES
            shares = [0.5, 0.25, 0.25]
            rng.shuffle(shares)
            for action, share in zip(ACTIONS, shares, strict=True):
                over = depth == horizon - 1 or (action != END and rng.random() < 0.15)
                reward = float(over and rng.random() < 0.5) if sparse else rng.uniform(-1, 1)
                sides = [rng.randrange(SIDES)]
                if action == END and stochastic:
                    sides = [0, 1]
                then = []
                for i, side in enumerate(sides):
                    replied = action == END and not over
                    bonus = rng.uniform(-0.5, 0.5) if replied and not sparse else 0.0
                    following = None if over else (depth + 1) * SIDES + side
                    reply = REPLIES[i if len(sides) > 1 else side] if replied else None
                    then.append(Outcome(1 / len(sides), reply, reward + bonus, following))
                outcomes[node, action] = tuple(then[:1] if over else then)
                if over:
                    last = outcomes[node, action][0]
                    outcomes[node, action] = (Outcome(1.0, None, last.reward, None),)
                rewards[node, action], policy[node, action] = reward, share
        return cls(horizon, outcomes, rewards, policy)

    @property
    def nodes(self) -> int:
        """How many there are."""
        return self.horizon * SIDES

    def texts(self, cut: bool = True) -> list[Trajectory]:
        """Every text as often as it is likely; `cut`: and half as often as it is at depth 2, where
        those that go on are cut, in three ways."""
        found = [x for side in range(SIDES) for x in self._from(side, math.inf)]
        if cut:
            found += [(t, p / 2) for side in range(SIDES) for t, p in self._from(side, CUT)]
        least = min(p for _, p in found)
        return [t for t, p in found for _ in range(round(p / least))]

    def _from(self, side, depth):
        """(text, probability) of all that begins with `side`, cut after `depth` decisions.

        Those cut end in the middle of a turn, after a reply and, where another turn's end is put
        behind them, right after a turn: that last decision is masked.
        """
        whole: list[tuple[Trajectory, float]] = []

        def walk(tokens, actions, rewards, node, p, left):
            if left == 0:
                whole.append((Trajectory(tokens, actions, rewards, False), p / 2))
                masked = Trajectory([*tokens, END], [*actions, True], [*rewards, 9.0], False)
                whole.append((masked, p / 2))
                return
            for action in ACTIONS:
                for o in self.outcomes[node, action]:
                    reward = self.reward[node, action]
                    after = [*tokens, action], [*actions, True], [*rewards, reward]
                    if o.reply is not None:
                        bonus = o.reward - reward
                        after = [[*old, new] for old, new in
                                 zip(after, (o.reply, False, bonus), strict=True)]  # fmt: skip
                    q = p * self.policy[node, action] * o.probability
                    if o.node is None:
                        whole.append((Trajectory(*after, True), q))
                    else:
                        walk(*after, o.node, q, left - 1)

        walk([side], [False], [0.0], side, 1.0, depth)
        return whole

    def batch(self, cut: bool = True) -> TrajectoryBatch:
        """All texts at once."""
        return collate(self.texts(cut), end_ids=[END])

    def batch_with_noise(self) -> TrajectoryBatch:
        """All whole texts, and cut ones: noise to what learns of texts that ended alone."""
        cut = [t for t in self.texts() if not t.terminated]
        return collate([*self.texts(cut=False), *cut], end_ids=[END])

    def walk(self, tokens) -> int:
        """The node that a text's tokens lead to; one more than all nodes where there is none."""
        node: int | None = tokens[0]
        for i, token in enumerate(tokens[1:], 1):
            if token in REPLIES or node is None:
                continue
            reply = tokens[i + 1] if i + 1 < len(tokens) else None
            there = [o for o in self.outcomes[node, token] if o.reply in (None, reply)]
            node = there[0].node if there else None
        return self.nodes if node is None else node

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """(node, action) that texts come by."""
        seen, new = set(), set(range(SIDES))
        while new:
            seen |= new
            new = {o.node for (n, _), then in self.outcomes.items() if n in seen for o in then}
            new -= seen | {None}
        return [(node, action) for node in sorted(seen) for action in ACTIONS]

    def solve(self, backup, gamma=1.0, per_turn=False, within=None, cut=False, held=None):
        """Q and V by dynamic programming, V(s) = backup(q, p) of the actions' values and shares.

        Both are dictionaries, of (node, action) and node. `within`: another backup stands for what
        follows a token that does not end its turn, but in those texts that were `cut` there.
        `held`(q, p): what the targets of a node's actions are turned into.
        """
        q: dict[tuple[int, int], float] = {}
        v: dict[int | None, float] = {None: 0.0}
        u: dict[int | None, float] = {None: 0.0}
        for node in reversed(range(self.nodes)):
            for action in ACTIONS:
                discount = gamma if action == END or not per_turn else 1.0
                follows = v if action == END else u
                q[node, action] = sum(
                    o.probability * (o.reward + discount * follows[o.node])
                    for o in self.outcomes[node, action]
                )
            shares = [self.policy[node, a] for a in ACTIONS]
            known = [q[node, a] for a in ACTIONS]
            if held is not None:
                known = held(known, shares)
                q |= {(node, a): x for a, x in zip(ACTIONS, known, strict=True)}
            v[node], u[node] = backup(known, shares), (within or backup)(known, shares)
            if cut and node // SIDES == CUT:
                u[node] += (v[node] - u[node]) / 3  # one text of three is cut here
        return q, {node: value for node, value in v.items() if node is not None}

    def turns(self, node: int) -> dict[tuple[int, ...], tuple[float, float, list]]:
        """Every whole turn that may be said at a node: how likely it is, the rewards it may expect,
        those of the reply included, and where it leads, as (probability, node)."""
        found: dict[tuple[int, ...], tuple[float, float, list]] = {}

        def say(said, node, share, reward):
            for action in ACTIONS:
                outcomes, p = self.outcomes[node, action], share * self.policy[node, action]
                total = reward + sum(o.probability * o.reward for o in outcomes)
                if action == END or outcomes[0].node is None:
                    then = [(o.probability, o.node) for o in outcomes]
                    found[(*said, action)] = p, total, then
                else:
                    say((*said, action), outcomes[0].node, p, total)

        say((), node, 1.0, 0.0)
        return found

    def solve_turns(self, backup, gamma: float = 1.0, cut: bool = False):
        """Q of (node, turn) and V of node where a whole turn is one decision; `cut`: V is of the
        turns that were not, of those that end early three where there are two others."""
        q: dict[tuple[int, tuple[int, ...]], float] = {}
        v: dict[int | None, float] = {None: 0.0}
        for node in reversed(range(self.nodes)):
            turns = self.turns(node)
            for said, (_, reward, then) in turns.items():
                q[node, said] = reward + gamma * sum(p * v[n] for p, n in then)
            early = {said: cut and node // SIDES + len(said) <= CUT for said in turns}
            seen = [p * (1.5 if early[said] else 1.0) for said, (p, _, _) in turns.items()]
            v[node] = backup([q[node, said] for said in turns], seen)
        return q, v

    def returns(self, node, action: int | None = None, known=None) -> Counter[float]:
        """The distribution of the undiscounted return under the data policy, exactly; `known`: the
        values of nodes not to look beyond."""
        known = {None: 0.0, **(known or {})}
        if action is None and node in known:
            return Counter({known[node]: 1.0})
        found: Counter[float] = Counter()
        for a in ACTIONS if action is None else (action,):
            share = self.policy[node, a] if action is None else 1.0
            for o in self.outcomes[node, a]:
                for value, p in self.returns(o.node, known=known).items():
                    found[round(o.reward + value, 9)] += share * o.probability * p
        return found


def mean(q, p):
    """The data policy's own value."""
    return sum(x * y for x, y in zip(q, p, strict=True))


def best(q, _):
    """The optimal value."""
    return max(q)


def soft(eta: float):
    """η·log E exp(q/η): optimal where each nat away from the data policy costs η."""
    return lambda q, p: max(q) + eta * math.log(mean([math.exp((x - max(q)) / eta) for x in q], p))


def expectile(tau: float):
    """The v where τ·E(q − v)⁺ = (1 − τ)·E(v − q)⁺."""

    def backup(q, p):
        low, high = min(q), max(q)
        for _ in range(60):
            v = (low + high) / 2
            above = tau * mean([max(x - v, 0) for x in q], p)
            below = (1 - tau) * mean([max(v - x, 0) for x in q], p)
            low, high = (v, high) if above > below else (low, v)
        return low

    return backup


def conservative(weight: float):
    """The q where Σ p (q − target)² + weight·(log Σ exp q − Σ p q) is least."""

    def held(target, p):
        wanted, shares = (torch.tensor(x, dtype=torch.double) for x in (target, p))
        q = wanted
        for _ in range(60):  # a contraction where weights are below twice the least p
            q = wanted - weight / 2 * (q.softmax(-1) / shares - 1)
        return q.tolist()

    return held


class Table(nn.Module):
    """What `ValueModel` is to objectives, with a free number for everything."""

    def __init__(self, game: Game, heads: int = 2, support: Support | None = None, dummy=()):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        rows = game.nodes + 1
        self.game = game
        self.q = nn.Parameter(0.3 * torch.randn(heads, rows, VOCAB, generator=generator))
        self.v = nn.Parameter(torch.zeros(rows))
        self.logits = nn.Parameter(torch.zeros(rows, VOCAB))
        self.support = support
        self.said = [*ACTIONS, *dummy]  # what the policy may say; a dummy is never an action
        bins = 2 if support is None else support.bins
        self.returns = nn.Parameter(torch.zeros(heads, rows, VOCAB, bins))
        self.v_returns = nn.Parameter(torch.zeros(rows, bins))
        shares = [[game.policy.get((n, a), 1e-9) for a in range(VOCAB)] for n in range(rows)]
        self.ref = torch.tensor(shares).log()  # π_ref is the data policy
        self.judged = torch.zeros(rows, VOCAB)
        self.candidates = Candidates()
        self._at: dict[int, torch.Tensor] = {}

    def where(self, prefix: tuple[int, ...]) -> int:
        """The row of a text so far: that of its node."""
        return self.game.walk(prefix)

    def at(self, batch: TrajectoryBatch) -> torch.Tensor:
        """The node of each state, [batch, states]."""
        if id(batch) not in self._at:
            tokens, index = batch.tokens.tolist(), batch.state_index.tolist()
            walk = {}
            for row, states in zip(tokens, index, strict=True):
                for i in states:
                    walk.setdefault(tuple(row[: i + 1]), None)
            walk = {prefix: self.where(prefix) for prefix in walk}
            self._at[id(batch)] = torch.tensor(
                [[walk[tuple(row[: i + 1])] for i in states]
                 for row, states in zip(tokens, index, strict=True)]
            )  # fmt: skip
        return self._at[id(batch)]

    def log_pi(self) -> torch.Tensor:
        """The policy, [nodes, tokens]; −∞ for what it never says."""
        only = torch.full((VOCAB,), -math.inf)
        only[self.said] = 0.0
        return (self.logits + only).log_softmax(-1)

    def forward(self, batch: TrajectoryBatch, needs, even: bool = True) -> Values:
        """Only what is needed; slow copies are exact ones."""
        at, action = self.at(batch), batch.action
        here, only = at[:, :-1], torch.full((VOCAB,), -math.inf)
        only[list(ACTIONS)] = 0.0
        q = self.q[:, here, action]
        known = (self.q + only).detach()
        log_pi = self.log_pi()
        ratio = (log_pi - self.ref)[:, list(ACTIONS)].amax(-1).exp().detach()

        def among() -> torch.Tensor:
            return known.mean(0).masked_fill(~self.candidates.among(self.ref), -math.inf)

        found: dict[str, Callable[[], torch.Tensor]] = {
            "q": lambda: q,
            "target_q": q.detach,
            "v": lambda: self.v[at],
            "q_max": lambda: among().amax(-1)[at],
            "target_q_at_argmax": lambda: known[:, at, among().argmax(-1)[at]],
            "expected_q": lambda: (self.judged * self.q).sum(-1).detach()[:, at],
            "q_logsumexp": lambda: (self.q + only).logsumexp(-1)[:, here],
            "return_logits": lambda: self.returns[:, here, action],
            "v_return_logits": lambda: self.v_returns[at],
            "ref_logprob": lambda: self.ref[here, action],
            "max_ratio": lambda: ratio[at],
            "dummy_logprob": lambda: log_pi[here, 0].where(batch.mask, 0.0),
            "logprob": lambda: log_pi[here, action].where(batch.mask, 0.0),
        }
        return Values(**{name: found[name]() for name in needs}, support=self.support)


class Histories(Table):
    """A row for every text so far: what a turn has said decides what its end is worth."""

    def __init__(self, game: Game):
        super().__init__(game)
        texts = {tuple(t.tokens[:i]) for t in game.texts() for i in range(1, len(t.tokens) + 1)}
        self.rows = {text: i for i, text in enumerate(sorted(texts))}
        generator = torch.Generator().manual_seed(0)
        self.q = nn.Parameter(0.3 * torch.randn(2, len(self.rows), VOCAB, generator=generator))
        self.v = nn.Parameter(torch.zeros(len(self.rows)))

    def where(self, prefix: tuple[int, ...]) -> int:
        """Its own."""
        return self.rows[prefix]


def learn(objective, model, batch, steps: int = 450, rate: float = 0.1):
    """Full-batch descent with a rate that falls to 0."""
    optimizer = torch.optim.Adam(model.parameters(), rate, betas=(0.9, 0.98), fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        objective(model(batch, objective.needs), batch).total.backward()
        optimizer.step()
    return model


def same_q(model, expected, game, atol=1e-2, q=None):
    """Compare what was learned with what is so, where texts come by."""
    for head in model.q.detach() if q is None else q:
        found = torch.stack([head[pair] for pair in game.pairs])
        wanted = torch.tensor([expected[pair] for pair in game.pairs])
        torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


def same_v(model, expected, game, atol=1e-2, v=None):
    """The same of V."""
    nodes = sorted({node for node, _ in game.pairs})
    wanted = torch.tensor([expected[node] for node in nodes])
    found = (model.v.detach() if v is None else v)[nodes]
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


def same_policy(model, weight, game, atol=1e-2):
    """π(a|s) ∝ π_data(a|s)·weight(s, a)."""
    for node in {n for n, _ in game.pairs}:
        wanted = torch.tensor([game.policy[node, a] * weight(node, a) for a in ACTIONS])
        found = model.logits.detach()[node, list(ACTIONS)].softmax(-1)
        torch.testing.assert_close(found, wanted / wanted.sum(), atol=atol, rtol=0)


def weighted_returns(game: Game):
    """Mean return of (node, action) over the texts themselves: checks the recursion above."""
    total, count = Counter(), Counter()
    for t in game.texts(cut=False):
        to_come = list(itertools.accumulate(reversed(t.reward)))[::-1]
        for i, is_action in enumerate(t.is_action):
            if is_action:
                pair = game.walk(t.tokens[:i]), t.tokens[i]
                total[pair] += to_come[i]
                count[pair] += 1
    return {pair: total[pair] / n for pair, n in count.items()}
