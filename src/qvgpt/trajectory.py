"""Tokens, actions and rewards, and the one time convention every other file relies on.

    tokens      p  p  a  a  o  o  a  a       p prompt, a action, o observation
    is_action   0  0  1  1  0  0  1  1
    reward      0  0  0  0  0 -1  0  1       received on emitting that token

A decision is the choice of one action token; its state is the token just before it.
Losses see decisions only, so step k+1 follows step k even across an observation:

    decision          0  1        2  3       the four a's
    state_index       1  2        5  6  7    the token before each; then the one that ends the text
    reward            0 -1        0  1       of an observation: goes to the decision before it
    ends_turn         0  1        0  1

Utterance-level methods see one decision a turn, the last of it (`ends_whole_turn`): its Q has the
whole turn in its history, its state is the turn's first, its reward the sum of the turn's.

Truncated is not terminated. Where a text was cut in the middle of a turn, its last state has a
value to bootstrap from. Where it was cut right after a turn's end token, the next observation was
never seen, so that decision has no target and is masked.
"""

import hashlib
from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from qvgpt.errors import QvgptError


@dataclass(frozen=True)
class Trajectory:
    """One episode, in tokens. The four lists' meaning is drawn at the head of this file."""

    tokens: Sequence[int]
    is_action: Sequence[bool]
    reward: Sequence[float]
    terminated: bool
    """False if the episode was cut short, so that its last state still has a value."""

    def __post_init__(self) -> None:
        """Refuse lists that do not belong together."""
        lengths = len(self.tokens), len(self.is_action), len(self.reward)
        if len(set(lengths)) > 1:
            raise QvgptError(
                "a trajectory has a token, an is_action and a reward at each place, not "
                f"{', '.join(map(str, lengths))} of them"
            )

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the first action: samples with the same prompt form a group."""
        first = next((i for i, a in enumerate(self.is_action) if a), len(self.tokens))
        return tuple(self.tokens[:first])

    @property
    def total_reward(self) -> float:
        """The undiscounted return of the whole text."""
        return float(sum(self.reward))


def by_prompt(trajectories: Sequence[Trajectory]) -> list[list[int]]:
    """The indices of each prompt's texts, prompts in the order of their first one."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, t in enumerate(trajectories):
        found.setdefault(t.prompt, []).append(i)
    return list(found.values())


def repeated_share(trajectories: Sequence[Trajectory]) -> float:
    """The share of all tokens that are of a prompt which an earlier text has."""
    again = sum(
        (len(several) - 1) * len(trajectories[several[0]].prompt)
        for several in by_prompt(trajectories)
    )
    return again / max(sum(len(t.tokens) for t in trajectories), 1)


def centred(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Texts whose return is counted from the mean of all texts of the same prompt.

    What makes a whole prompt easy or hard is then no longer to be learned, only which of its texts
    are better. The mean is taken off the reward of the last token.
    """
    found = list(trajectories)
    for several in by_prompt(trajectories):
        mean = sum(trajectories[i].total_reward for i in several) / len(several)
        for i in several:
            *before, last = trajectories[i].reward
            found[i] = replace(trajectories[i], reward=[*before, last - mean])
    return found


def scaled(trajectories: Sequence[Trajectory], factor: float) -> list[Trajectory]:
    """The same texts, all rewards multiplied."""
    return [replace(t, reward=[factor * r for r in t.reward]) for t in trajectories]


def fingerprint(trajectories: Iterable[Trajectory]) -> str:
    """SHA-256 of the texts in their order: tokens, actions, rewards, ends."""
    digest = hashlib.sha256()
    for t in trajectories:
        digest.update(array("q", [len(t.tokens), t.terminated, *t.tokens, *t.is_action]).tobytes())
        digest.update(array("d", t.reward).tobytes())
    return digest.hexdigest()


def mean_return(trajectories: Iterable[Trajectory]) -> float:
    """The undiscounted rewards still to come, in the mean over all decisions."""
    total, decisions = 0.0, 0
    for t in trajectories:
        to_come = 0.0
        for reward, is_action in zip(reversed(t.reward), reversed(t.is_action), strict=True):
            to_come += reward
            total += to_come * is_action
            decisions += is_action
    return total / max(decisions, 1)


def returns_to_go(t: Trajectory, gamma: float = 1.0, per_turn: bool = False) -> list[float]:
    """The discounted rewards still to come at each decision, first to last; γ is applied after
    every decision, or after every turn. Rewards only: what a cut text would have earned is left
    out."""
    found: list[float] = []
    to_come = 0.0
    for i in reversed(range(len(t.tokens))):
        to_come += t.reward[i]
        if t.is_action[i]:
            found.append(to_come)
            same_turn = i > 0 and t.is_action[i - 1]
            to_come *= 1.0 if per_turn and same_turn else gamma
    return found[::-1]


@dataclass(frozen=True)
class TrajectoryBatch:
    """Episodes side by side: tokens in token time, all else in decision time.

    A row of tokens holds one text and padding, or, packed, several texts one after another; or,
    `shared`, a prompt once and after it what follows it in each of its texts.
    """

    tokens: Int[Tensor, "rows time"]
    attention_mask: Bool[Tensor, "rows time"]
    text: Int[Tensor, "rows time"]  # which text a token belongs to; padding: the one before it
    positions: Int[Tensor, "rows time"] | None  # within its text; None: one whole text a row
    row: Int[Tensor, "batch"]  # where each text lies
    action: Int[Tensor, "batch steps"]
    reward: Float[Tensor, "batch steps"]
    nonterminal: Float[Tensor, "batch steps"]  # 1 where the next state has a value, else 0
    ends_turn: Bool[Tensor, "batch steps"]
    mask: Bool[Tensor, "batch steps"]
    state_index: Int[Tensor, "batch steps+1"]  # into time; the last one ends the episode

    @property
    def predicted(self) -> Bool[Tensor, "rows pairs"]:
        """The tokens that follow another of their text: all but the first of each."""
        follows = self.text[:, 1:] == self.text[:, :-1]
        return self.attention_mask[:, 1:] & follows

    @property
    def ends_whole_turn(self) -> Bool[Tensor, "batch steps"]:
        """The decisions that end a turn and count: one for each turn that was not cut."""
        return self.mask & self.ends_turn

    def turns(self) -> tuple[Int[Tensor, "batch steps"], Float[Tensor, "batch steps"]]:
        """Of each decision's turn: the step it began at, and the sum of its rewards."""
        begins = F.pad(self.ends_turn[:, :-1], (1, 0), value=True)
        step = torch.arange(begins.size(1), device=begins.device)
        first = step.where(begins, 0).cummax(dim=1).values
        total = torch.zeros_like(self.reward).scatter_add(1, first, self.reward)
        return first, total.gather(1, first)

    def to(self, device: torch.device | str) -> "TrajectoryBatch":
        """The same batch on another device."""
        moved: dict[str, Any] = {k: v if v is None else v.to(device) for k, v in vars(self).items()}
        return TrajectoryBatch(**moved)


@dataclass(frozen=True)
class Completion:
    """What a policy answered to one prompt."""

    tokens: list[int]
    """The sampled tokens, the end token or stop string included where one was sampled."""
    terminated: bool
    """True if an end token or a stop string was sampled, False if the length limit cut the text."""


def collate(
    trajectories: Sequence[Trajectory],
    pad_id: int = 0,
    end_ids: Collection[int] = (),
    packed: bool = False,
    shared: bool = False,
) -> TrajectoryBatch:
    """Make a batch of a list of episodes, a row each, or `packed` into as few rows as will do.

    `shared`: texts of one prompt share a row that holds it once. Of the tokens of prompts only the
    first text's are there then (`predicted` knows no others), decisions are what they were.
    `end_ids` are the tokens that end a turn: they tell a text cut after a whole turn from one
    cut in the middle of it. Packed rows may be up to twice as long as the longest text. Raises
    `QvgptError` for a text without an action, one whose first token is an action, or a reward
    before the first decision.
    """
    if not trajectories:
        raise QvgptError("an empty batch: there is no trajectory to learn from")
    length = torch.tensor([len(t.tokens) for t in trajectories])
    texts = _Flat.of(trajectories, length)
    spared = torch.zeros_like(length)  # tokens that an earlier text of the row has
    if shared:
        rows = by_prompt(trajectories)
        for several in rows:
            spared[several[1:]] = len(trajectories[several[0]].prompt)
    else:
        rows = _pack(length.tolist()) if packed else [[i] for i in range(len(length))]
    row, offset, filled = _places(length - spared, rows)
    offset -= spared  # of each text's first token, were all of it there
    longest = int(filled.max())
    own = texts.position >= spared[texts.text]
    place = (row[texts.text] * longest + offset[texts.text] + texts.position)[own]
    last = torch.tensor([inside[-1] for inside in rows])  # what the padding of `text` belongs to
    in_rows = partial(_scattered, (len(rows), longest), place)
    decisions = _decisions(texts, trajectories, length, end_ids)
    steps = torch.bincount(decisions.text, minlength=len(length))
    first = steps.cumsum(0) - steps
    step = torch.arange(len(decisions.text)) - first[decisions.text]
    most = int(steps.max())
    in_steps = partial(_scattered, (len(length), most), decisions.text * most + step)
    state = decisions.position - 1
    state += offset[decisions.text].where(state >= spared[decisions.text], 0)  # else the prompt's
    states = F.pad(in_steps(state), (0, 1))
    states[torch.arange(len(length)), steps] = offset + length - 1
    return TrajectoryBatch(
        tokens=in_rows(texts.token[own], pad_id),
        attention_mask=torch.arange(longest) < filled[:, None],
        text=in_rows(texts.text[own], last[:, None]),
        positions=in_rows(texts.position[own]) if packed or shared else None,
        row=row,
        action=in_steps(decisions.action),
        reward=in_steps(decisions.reward),
        nonterminal=in_steps(decisions.nonterminal),
        ends_turn=in_steps(decisions.ends_turn),
        mask=in_steps(decisions.mask),
        state_index=states,
    )


def _scattered(
    shape: tuple[int, int],
    place: Int[Tensor, "items"],
    content: Shaped[Tensor, "items"],
    padding: Tensor | int = 0,
) -> Shaped[Tensor, "rows columns"]:
    """Each item in its place, counted along the rows; padding, of any shape that spreads,
    elsewhere."""
    found = torch.as_tensor(padding, dtype=content.dtype).expand(shape).clone()
    found.view(-1)[place] = content
    return found


class _Flat(NamedTuple):
    """The tokens of all texts one after another."""

    token: Int[Tensor, "tokens"]
    is_action: Bool[Tensor, "tokens"]
    reward: Float[Tensor, "tokens"]
    text: Int[Tensor, "tokens"]
    position: Int[Tensor, "tokens"]
    """Within its text."""

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], length: Tensor) -> "_Flat":
        token, is_action, reward = (
            torch.tensor([x for t in trajectories for x in getattr(t, name)], dtype=dtype)
            for name, dtype in (
                ("tokens", torch.long),
                ("is_action", torch.bool),
                ("reward", torch.float32),
            )
        )
        text = torch.arange(len(length)).repeat_interleave(length)
        start = length.cumsum(0) - length
        return cls(token, is_action, reward, text, torch.arange(len(token)) - start[text])


class _Decisions(NamedTuple):
    """All texts' decisions one after another; fields as in `TrajectoryBatch`."""

    text: Int[Tensor, "decisions"]
    position: Int[Tensor, "decisions"]
    """Of the action within its text."""
    action: Int[Tensor, "decisions"]
    reward: Float[Tensor, "decisions"]
    nonterminal: Float[Tensor, "decisions"]
    ends_turn: Bool[Tensor, "decisions"]
    mask: Bool[Tensor, "decisions"]


def _decisions(
    flat: _Flat,
    trajectories: Sequence[Trajectory],
    length: Int[Tensor, "batch"],
    end_ids: Collection[int],
) -> _Decisions:
    """Rewards go to the last decision that is not after them."""
    at = flat.is_action.nonzero()[:, 0]
    text, position = flat.text[at], flat.position[at]
    steps = torch.bincount(text, minlength=len(length))
    if not steps.all() or not position.all():
        raise QvgptError("a trajectory needs a token before its first action, and an action")
    until = steps.cumsum(0)  # decisions up to the end of each text
    so_far = flat.is_action.cumsum(0)
    before = so_far == (until - steps)[flat.text]
    if flat.reward[before].any():
        raise QvgptError("a reward before the first action belongs to no decision")
    reward = torch.zeros(len(at)).index_add_(0, so_far[~before] - 1, flat.reward[~before])
    follows = F.pad(flat.is_action[1:] & (flat.position[1:] > 0), (0, 1))  # an action, in its text
    ends_turn, mask = ~follows[at], torch.ones(len(at), dtype=torch.bool)
    terminated = torch.tensor([t.terminated for t in trajectories])
    final, end = until - 1, length.cumsum(0) - 1  # the last decision, the last token
    nonterminal = torch.ones(len(at)).index_fill_(0, final[terminated], 0.0)
    cut = ~terminated & flat.is_action[end]
    is_whole = torch.isin(flat.token[end[cut]], torch.tensor(list(end_ids), dtype=torch.long))
    mask[final[cut]], ends_turn[final[cut]] = ~is_whole, is_whole
    return _Decisions(text, position, flat.token[at], reward, nonterminal, ends_turn, mask)


def _places(
    length: Int[Tensor, "batch"], rows: Sequence[Sequence[int]]
) -> tuple[Int[Tensor, "batch"], Int[Tensor, "batch"], Int[Tensor, "rows"]]:
    """Each text's row and where in it it begins, and how far each row is filled."""
    texts = torch.tensor([i for inside in rows for i in inside])
    many = torch.tensor([len(inside) for inside in rows])
    end = length[texts].cumsum(0)
    row, offset = torch.empty_like(texts), torch.empty_like(texts)
    row[texts] = torch.arange(len(rows)).repeat_interleave(many)
    filled = end[many.cumsum(0) - 1].diff(prepend=end.new_zeros(1))
    offset[texts] = end - length[texts]
    return row, offset - (filled.cumsum(0) - filled)[row], filled


def nothing_counts(batch: TrajectoryBatch) -> TrajectoryBatch:
    """The same batch, none of whose tokens or decisions is to be learned."""
    off = {name: torch.zeros_like(getattr(batch, name)) for name in ("mask", "attention_mask")}
    return replace(batch, **off)


def _pack(length: Sequence[int]) -> list[list[int]]:
    """Which texts share a row: of rows up to twice the longest text those that waste least."""
    most = max(length)
    ways = [_first_fit(length, room) for room in range(most, 2 * most + 1, max(1, most // 16))]
    return min(ways, key=lambda rows: len(rows) * max(sum(length[i] for i in r) for r in rows))


def _first_fit(length: Sequence[int], most: int) -> list[list[int]]:
    """Longest first, each text to the first row that then holds no more than `most` tokens."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(length)), key=lambda i: -length[i]):
        fits = next((r for r, free in enumerate(room) if free >= length[i]), None)
        if fits is None:
            fits = len(rows)
            rows.append([])
            room.append(most)
        rows[fits].append(i)
        room[fits] -= length[i]
    return rows
