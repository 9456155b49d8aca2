"""What all games share: scripted players that write logs, a policy judged, returns made comparable.

A game of many turns is logged as a row's `messages`, a game of one turn as prompt and completion.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol, runtime_checkable

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.envs.env import Env, Policy, Step, rollout
from qvgpt.errors import QvgptError

Act = Callable[[str], str]
"""A scripted player: what was just observed → what it does."""


@runtime_checkable
class Game(Env, Protocol):
    """An environment that knows which actions its rules allow."""

    def allows(self, action: str) -> bool:
        """Whether `action` is one that the rules know here; `step` answers any text."""
        ...


@dataclass
class Referee:
    """A game whose actions are counted."""

    game: Game
    actions: int = 0
    invalid: int = 0
    """How many of them the rules do not know."""

    def reset(self, seed: int) -> str:
        """Begin an episode of the game; the counts go on."""
        return self.game.reset(seed)

    def step(self, action: str) -> Step:
        """Count the action, then play it."""
        self.actions += 1
        self.invalid += not self.game.allows(action)
        return self.game.step(action)


@dataclass(frozen=True)
class Outcome:
    """What a policy earned."""

    returns: tuple[float, ...]
    """Sum of an episode's rewards, undiscounted; one for each episode."""
    invalid_rate: float
    """Share of all its actions that the rules do not know."""

    @property
    def mean(self) -> float:
        """The mean return."""
        return fmean(self.returns)


def play(
    games: Sequence[Game],
    policy: Policy,
    tokenizer: Tokenizer,
    *,
    seeds: Sequence[int],
    max_turns: int = 1,
    dialogue: bool = False,
) -> Outcome:
    """Judge a policy by one episode in each game. Arguments and errors are those of `rollout`."""
    if not games:
        raise QvgptError("a policy cannot be judged by no game at all")
    referees = [Referee(game) for game in games]
    episodes = rollout(
        referees, policy, tokenizer, seeds=seeds, max_turns=max_turns, dialogue=dialogue
    )
    actions = sum(r.actions for r in referees)
    returns = tuple(episode.total_reward for episode in episodes)
    return Outcome(returns, sum(r.invalid for r in referees) / max(actions, 1))


def log_dialogue(env: Env, act: Act, seed: int) -> dict[str, Any]:
    """One episode of a scripted player as a row of `messages`, a reward on each of its own.

    As `rollout` writes it: an observation after the end is left out, and where the environment
    cut the episode short the row says `truncated`.
    """
    messages: list[dict[str, Any]] = [{"role": "user", "content": env.reset(seed)}]
    while True:
        action = act(messages[-1]["content"])
        step = env.step(action)
        messages.append({"role": "assistant", "content": action, "reward": step.reward})
        if step.observation is not None and not step.terminated:
            messages.append({"role": "user", "content": step.observation})
        if step.terminated:
            return {"messages": messages}
        if step.truncated:
            return {"messages": messages, "truncated": True}


def row_return(row: Mapping[str, Any]) -> float:
    """The sum of a row's rewards, those of its messages and that of the whole."""
    rewards = [message.get("reward", 0.0) for message in row.get("messages", ())]
    return float(sum(rewards) + row.get("reward", 0.0))


def score(value: float, data_mean: float, optimum: float) -> float:
    """(value − data mean) / (optimum − data mean): 0 is what the logs earn, 1 the optimum.

    Raises `QvgptError` where the logs leave nothing to be gained.
    """
    if optimum <= data_mean:
        raise QvgptError(
            f"no score: the logs earn {data_mean:g}, which is not below the optimum of {optimum:g}"
        )
    return (value - data_mean) / (optimum - data_mean)
