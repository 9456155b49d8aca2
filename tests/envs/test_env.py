from dataclasses import dataclass

import pytest
import torch

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.engine import generate
from qvgpt.decode.policy import Guidance
from qvgpt.envs.env import SingleTurn, Step, encode_observation, rollout
from qvgpt.envs.rewards import get_reward
from qvgpt.errors import QvgptError
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Completion, collate


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(["abcdefghijklmnopqrstuvwxyz: ?!0123456789"], kind="char", vocab_size=60)


@dataclass
class Guess:
    """Say 'hi', then 'yes'; the reply to the first turn costs 1."""

    ends: str = "terminated"
    turn: int = 0

    def reset(self, seed: int) -> str:
        self.turn = 0
        return f"q{seed}"

    def step(self, action: str) -> Step:
        self.turn += 1
        if self.turn == 1:
            return Step("sure?", -1.0, action == "quit", False)
        cut = self.ends == "truncated"
        return Step("bye", 1.0 if action == "yes" else 0.5, not cut, cut)


def say(tok: Tokenizer, *texts: str, cut: bool = False):
    """A policy that says `texts` turn by turn, to every prompt the same."""
    turns = iter(texts)
    asked: list[list[list[int]]] = []

    def policy(prompts: list[list[int]]) -> list[Completion]:
        asked.append(prompts)
        ids = tok.encode(next(turns)) + ([] if cut else [tok.template.eot])
        return [Completion(list(ids), not cut) for _ in prompts]

    return policy, asked


def test_two_turns_put_rewards_and_actions_where_the_convention_says(tok):
    policy, asked = say(tok, "hi", "yes")
    (t,) = rollout([Guess()], policy, tok, seeds=[7])
    prompt, reply = tok.encode_prompt("q7"), encode_observation(tok, "sure?")
    hi, yes = [*tok.encode("hi"), tok.template.eot], [*tok.encode("yes"), tok.template.eot]
    assert t.tokens == prompt + hi + reply + yes  # 'bye', after the end, is dropped
    assert t.is_action == [False] * len(prompt) + [True] * 3 + [False] * len(reply) + [True] * 4
    assert [(i, r) for i, r in enumerate(t.reward) if r] == [
        (len(prompt) + 2, -1.0),
        (len(t.tokens) - 1, 1.0),
    ]
    assert t.terminated
    assert asked == [[prompt], [prompt + hi + reply]]
    batch = collate([t], end_ids=tok.template.end_ids)
    assert batch.reward.tolist() == [[0, 0, -1, 0, 0, 0, 1]]
    assert batch.ends_turn.tolist() == [[False, False, True, False, False, False, True]]
    assert batch.nonterminal.tolist() == [[1, 1, 1, 1, 1, 1, 0]]


def test_a_dialogue_opens_like_logged_messages(tok):
    policy, _ = say(tok, "hi", "yes")
    (t,) = rollout([Guess()], policy, tok, seeds=[7], dialogue=True)
    roles = ["user", "assistant", "user", "assistant"]
    texts = ["q7", "hi", "sure?", "yes"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, texts, strict=True)]
    tokens, is_action, _ = tok.encode_messages(messages)
    assert (t.tokens, t.is_action) == (tokens, is_action)


def test_a_truncated_episode_keeps_its_last_state_to_bootstrap_from(tok):
    policy, _ = say(tok, "hi", "no")
    (t,) = rollout([Guess(ends="truncated")], policy, tok, seeds=[0])
    bye = encode_observation(tok, "bye")
    assert not t.terminated
    assert list(t.tokens[-len(bye) :]) == bye
    batch = collate([t], end_ids=tok.template.end_ids)
    assert batch.nonterminal.min() == 1
    assert bool(batch.mask.all())
    policy, _ = say(tok, "hi")
    (t,) = rollout([Guess()], policy, tok, seeds=[0], max_turns=1)
    assert not t.terminated
    assert not t.is_action[-1]


def test_finished_episodes_are_not_asked_again(tok):
    answers = {"q1": "quit", "q2": "hi"}

    def policy(prompts):
        sizes.append(len(prompts))
        heads = [tok.decode(p)[:2] for p in prompts]
        texts = [answers[h] if len(sizes) == 1 else "yes" for h in heads]
        return [Completion([*tok.encode(text), tok.template.eos], True) for text in texts]

    sizes: list[int] = []
    first, second = rollout([Guess(), Guess()], policy, tok, seeds=[1, 2])
    assert sizes == [2, 1]
    assert (first.total_reward, second.total_reward) == (-1.0, 0.0)
    assert first.terminated


def test_a_cut_text_is_scored_and_the_one_turn_episode_is_over(tok):
    row = {"prompt": "say abc", "completion": "abc", "references": ["abc"]}
    policy, _ = say(tok, "abc", cut=True)
    (t,) = rollout([SingleTurn(row, get_reward("exact_match"))], policy, tok, seeds=[0])
    assert t.tokens == [*tok.encode_prompt("say abc"), *tok.encode("abc")]  # no end token gained
    assert t.terminated
    assert t.reward[-1] == t.total_reward == 1.0


def test_a_turn_cut_in_the_middle_goes_on_where_the_environment_does(tok):
    policy, _ = say(tok, "hi", "yes", cut=True)
    (t,) = rollout([Guess()], policy, tok, seeds=[0])
    assert t.terminated
    assert t.total_reward == 0.0
    assert sum(t.is_action) == 5  # h i y e s


def test_sampled_tokens_are_kept_as_sampled():
    tok = Tokenizer.train(["hello hello hello there"] * 5, vocab_size=270)
    sampled = [tok.encode(c)[0] for c in "hello"]  # not how the tokenizer would write it
    assert tok.encode("hello") != sampled
    row = {"prompt": "there", "references": ["hello"]}
    (t,) = rollout(
        [SingleTurn(row, get_reward("exact_match"))],
        lambda prompts: [Completion([*sampled, tok.template.eos], True)],
        tok,
        seeds=[0],
    )
    assert list(t.tokens[-6:]) == [*sampled, tok.template.eos]
    assert t.total_reward == 1.0


def test_faults(tok):
    env = SingleTurn({"text": "x"}, get_reward("length"))
    with pytest.raises(QvgptError, match="needs a `prompt`"):
        env.reset(0)
    with pytest.raises(QvgptError, match="as many seeds"):
        rollout([env], lambda p: [], tok, seeds=[])
    with pytest.raises(QvgptError, match="0 of 1 prompts"):
        rollout([Guess()], lambda p: [], tok, seeds=[0])
    with pytest.raises(QvgptError, match="sampled no token"):
        rollout([Guess()], lambda p: [Completion([], False)], tok, seeds=[0])


def test_the_engine_is_a_policy(tok):
    """Its tokens come back as sampled, each turn after what was said before."""
    torch.manual_seed(0)
    model = ValueModel(GPT(tok.vocab_size, 16, 2, 1, seq_len=96), HeadsConfig(), tok)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    asked, said = [], []

    def policy(prompts: list[list[int]]) -> list[Completion]:
        asked.append(prompts)
        said.append(generate(model, prompts, Guidance(beta=1.0), max_tokens=8, seed=len(asked)))
        return said[-1]

    texts = rollout([Guess(), Guess(), Guess()], policy, tok, seeds=[1, 2, 3])
    assert len(asked) == 2
    for i, text in enumerate(texts):
        written = [said[turn][i].tokens for turn in range(2)]
        assert asked[0][i] == tok.encode_prompt(f"q{i + 1}")
        assert asked[1][i] == asked[0][i] + written[0] + encode_observation(tok, "sure?")
        assert text.tokens == asked[1][i] + written[1]
        assert sum(text.is_action) == len(written[0]) + len(written[1])
        assert text.total_reward == -0.5
        assert text.terminated
    collate(texts, end_ids=tok.template.end_ids)
