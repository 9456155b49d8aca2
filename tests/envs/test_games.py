from dataclasses import dataclass

import pytest

from qvgpt.data.rows import Row, row_to_trajectories
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.envs.env import Step
from qvgpt.envs.games import Game, log_dialogue, play, row_return, score
from qvgpt.errors import QvgptError
from qvgpt.trajectory import Completion


@dataclass
class Countdown:
    """Say 'down' so often as the seed says; 'cut' cuts the episode short."""

    left: int = 0

    def reset(self, seed: int) -> str:
        self.left = seed
        return f"{seed} left"

    def allows(self, action: str) -> bool:
        return action in ("down", "cut")

    def step(self, action: str) -> Step:
        self.left -= action == "down"
        over = self.left == 0
        return Step(f"{self.left} left", 0.0 if over else -1.0, over, action == "cut")


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(["abcdefghijklmnopqrstuvwxyz: 0123456789"], kind="char", vocab_size=60)


def say(tok: Tokenizer, *texts: str):
    turns = iter(texts)

    def policy(prompts: list[list[int]]) -> list[Completion]:
        ids = [*tok.encode(next(turns)), tok.template.eot]
        return [Completion(list(ids), True) for _ in prompts]

    return policy


def test_a_dialogue_is_logged_as_it_would_be_rolled_out(tok):
    assert isinstance(Countdown(), Game)
    row = log_dialogue(Countdown(), lambda seen: "down", seed=2)
    assert row == {
        "messages": [
            {"role": "user", "content": "2 left"},
            {"role": "assistant", "content": "down", "reward": -1.0},
            {"role": "user", "content": "1 left"},
            {"role": "assistant", "content": "down", "reward": 0.0},
        ]
    }
    assert row_return(row) == -1.0
    (text,) = row_to_trajectories(Row("here", row), tok)
    assert text.total_reward == -1.0
    assert text.terminated


def test_an_episode_cut_short_says_so(tok):
    row = log_dialogue(Countdown(), lambda seen: "cut", seed=2)
    assert row["truncated"]
    assert row["messages"][-1] == {"role": "user", "content": "2 left"}
    (text,) = row_to_trajectories(Row("here", row), tok)
    assert not text.terminated


def test_a_policy_is_judged(tok):
    games = [Countdown(), Countdown()]
    policy = say(tok, "down", "up", "down")
    outcome = play(games, policy, tok, seeds=[1, 2], max_turns=9, dialogue=True)
    assert outcome.returns == (0.0, -2.0)
    assert outcome.mean == -1.0
    assert outcome.invalid_rate == 1 / 4


def test_the_score_is_0_for_the_logs_and_1_for_the_optimum():
    assert [score(x, -4.0, -2.0) for x in (-4.0, -3.0, -2.0, -6.0)] == [0.0, 0.5, 1.0, -1.0]
    assert row_return({"prompt": "", "completion": "", "reward": 0.5}) == 0.5


def test_faults(tok):
    with pytest.raises(QvgptError, match="not below the optimum"):
        score(1.0, 1.0, 1.0)
    with pytest.raises(QvgptError, match="no game"):
        play([], say(tok), tok, seeds=[])
