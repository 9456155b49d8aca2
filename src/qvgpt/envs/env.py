"""What text is acted in: the protocol of an environment, the one-turn task, and the rollout.

The convention of tokens, actions and rewards is drawn at the head of `qvgpt/trajectory.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.errors import QvgptError
from qvgpt.trajectory import Completion, Trajectory

Reward = Callable[[list[str], list[Mapping[str, Any]]], list[float]]
"""Completions and the row each belongs to → one score each, in the same order."""
Policy = Callable[[list[list[int]]], list[Completion]]
"""Prompts as token ids → one completion each, in the same order."""


@dataclass(frozen=True)
class Step:
    """What an environment answers to one action."""

    observation: str | None
    """The text the policy reads before its next action; None if there is none."""
    reward: float
    terminated: bool
    """The episode is over and nothing of value follows."""
    truncated: bool
    """The episode was cut short: it ends here, but its last state still has a value."""


@runtime_checkable
class Env(Protocol):
    """A task in text, one episode at a time."""

    def reset(self, seed: int) -> str:
        """Begin an episode; the same seed gives the same one. Returns its first observation."""
        ...

    def step(self, action: str) -> Step:
        """Answer one whole turn of text."""
        ...


@dataclass(frozen=True)
class SingleTurn:
    """One data row and a reward as an environment: prompt, one completion, its score, the end.

    Summarise, translate and answer are a list of these: `[SingleTurn(row, reward) for row in
    rows]`. The seed is not used, for the row says everything.
    """

    row: Mapping[str, Any]
    """A row with a `prompt`; the reward is handed all of it (references, options, …)."""
    reward: Reward

    def reset(self, seed: int) -> str:
        """The row's prompt. Raises `QvgptError` if it has none."""
        if "prompt" not in self.row:
            raise QvgptError(f"a one-turn task needs a `prompt`; this row has {sorted(self.row)}")
        return self.row["prompt"]

    def step(self, action: str) -> Step:
        """The completion's score; the episode is over, also where the length limit cut the text."""
        (reward,) = self.reward([action], [self.row])
        return Step(observation=None, reward=reward, terminated=True, truncated=False)


def rollout(
    envs: Sequence[Env],
    policy: Policy,
    tokenizer: Tokenizer,
    *,
    seeds: Sequence[int],
    max_turns: int = 32,
    dialogue: bool = False,
) -> list[Trajectory]:
    """Play one episode in each environment, asking the policy for all that are still open at once.

    The first observation opens the text as a row's `prompt` would; with `dialogue` as the first of
    a row's `messages` would, so that many turns look like logged ones.
    Sampled tokens are kept as sampled, never re-tokenised. A turn's reward sits on its last token.
    An observation is appended only where it is a state: the policy acts on it, or the episode was
    truncated and its value is to be bootstrapped from; after termination it is dropped.

    Whether an episode is over is for the environment to say, not for the sampler. A completion
    that the length limit cut is stepped like any other, only without an end token: if the
    environment then terminates (as `SingleTurn` does) the trajectory is terminated, since its
    reward is final and a bootstrapped value would count it twice; if it goes on, so does the
    episode. `terminated` is False where the environment truncates or `max_turns` are used up.

    An environment with a state of its own may stand in `envs` only once.

    Raises `QvgptError` if `seeds` or completions do not match the environments in number, or a
    completion is empty, so that no token could carry its reward.
    """
    if len(seeds) != len(envs):
        raise QvgptError(f"{len(envs)} environments need as many seeds, not {len(seeds)}")
    episodes = [
        _Episode(env, _opening(tokenizer, env.reset(seed), dialogue))
        for env, seed in zip(envs, seeds, strict=True)
    ]
    for _ in range(max_turns):
        live = [episode for episode in episodes if not episode.over]
        if not live:
            break
        completions = policy([list(episode.tokens) for episode in live])
        if len(completions) != len(live):
            raise QvgptError(f"the policy answered {len(completions)} of {len(live)} prompts")
        for episode, completion in zip(live, completions, strict=True):
            episode.play(completion, tokenizer)
    return [episode.trajectory() for episode in episodes]


def encode_observation(tokenizer: Tokenizer, text: str) -> list[int]:
    """An environment's reply as a user's message: `user: ` text, end of turn.

    Raises `QvgptError` for a tokenizer with a chat template of its own, which frames it otherwise.
    """
    if tokenizer.chat_template is not None:
        raise QvgptError("several turns with a Hugging Face chat template are not supported yet")
    template = tokenizer.template
    end = template.eos if template.eot is None else template.eot
    return [*tokenizer.encode("user: " + text), end]


def _opening(tokenizer: Tokenizer, text: str, dialogue: bool) -> list[int]:
    if not dialogue:
        return tokenizer.encode_prompt(text)
    return [tokenizer.template.bos, *encode_observation(tokenizer, text)]


@dataclass
class _Episode:
    """An episode being played, token by token."""

    env: Env
    tokens: list[int]
    is_action: list[bool] = field(init=False)
    reward: list[float] = field(init=False)
    terminated: bool = False
    over: bool = False

    def __post_init__(self):
        self.is_action = [False] * len(self.tokens)
        self.reward = [0.0] * len(self.tokens)

    def play(self, completion: Completion, tokenizer: Tokenizer) -> None:
        """Take one turn and append what the environment answers."""
        if not completion.tokens:
            raise QvgptError("the policy sampled no token: there is none to carry the reward")
        step = self.env.step(tokenizer.decode_completion(completion.tokens))
        self._append(completion.tokens, is_action=True)
        self.reward[-1] = float(step.reward)
        self.terminated = step.terminated
        self.over = step.terminated or step.truncated
        if step.observation is not None and not step.terminated:
            self._append(encode_observation(tokenizer, step.observation), is_action=False)
        elif not self.over:
            raise QvgptError("an environment that goes on must give an observation")

    def _append(self, tokens: list[int], is_action: bool) -> None:
        self.tokens += tokens
        self.is_action += [is_action] * len(tokens)
        self.reward += [0.0] * len(tokens)

    def trajectory(self) -> Trajectory:
        """The episode as it stands."""
        return Trajectory(self.tokens, self.is_action, self.reward, self.terminated)
