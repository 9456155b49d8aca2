"""A game of short texts, enumerated: a tiny model writes them, every text has a reward, and values
are exact, by dynamic programming over all of its texts."""

import itertools
import random
from functools import cache

import torch

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.sources import HeadValues
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel

TOKENIZER = Tokenizer.train(["ab"], "char")
SIZE = TOKENIZER.vocab_size
ENDS = TOKENIZER.template.end_ids
LENGTH = 3
PROMPTS = [[2], [1, 5], [1, 6, 2], [5, 5, 6, 2]]


def make_model(gamma=1.0):
    """A GPT far from its start; its own heads say nothing true."""
    torch.manual_seed(0)
    model = ValueModel(GPT(SIZE, 16, 2, 2, seq_len=16), HeadsConfig(num_q=1), TOKENIZER).eval()
    model.info.gamma = gamma
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


class Game:
    """Rewards of all texts of at most `LENGTH` tokens to each prompt, and what follows from them.

    `per_token`: every token earns something, else the last one alone. `policy` says who goes on
    after a text: the model, the best there is ("best"), or nobody knows ("blind", V = 0).
    """

    def __init__(self, model, per_token=False, gamma=1.0):
        self.model, self.per_token, self.gamma = model, per_token, gamma

    def texts(self):
        """Every text that is over."""
        every = itertools.product(range(SIZE), repeat=LENGTH)
        return sorted({t[: self._end(t)] for t in every})

    def _end(self, text):
        return next((i + 1 for i, t in enumerate(text) if t in ENDS), LENGTH)

    def is_over(self, text):
        """Whether nothing may follow."""
        return len(text) == LENGTH or (len(text) > 0 and text[-1] in ENDS)

    @cache  # noqa: B019
    def reward(self, prompt, text):
        """Of the last token of the text, undiscounted: seldom 1, else at most a half, so that a
        search need not tell the best from what is almost as good."""
        if not self.per_token and not self.is_over(text):
            return 0.0
        rng = random.Random(hash((7, prompt, text)))
        return 1.0 if rng.random() < 0.02 else rng.uniform(-1, 0.5)

    def returns(self, prompt, text):
        """Σ of the rewards of a whole text, discounted."""
        each = (self.reward(prompt, text[:i]) for i in range(1, len(text) + 1))
        return sum(self.gamma**i * r for i, r in enumerate(each))

    @cache  # noqa: B019
    @torch.no_grad()
    def policy(self, prompt, text):
        """π₀ after a text, without any cache."""
        hidden = self.model.trunk.hidden(torch.tensor([[*prompt, *text]]))[0, -1]
        return (self.model.trunk.output_weight @ hidden).double().softmax(-1).tolist()

    @cache  # noqa: B019
    def v(self, prompt, text, who):
        """Value of a text so far."""
        if self.is_over(text) or who == "blind":
            return 0.0
        each = [self.q(prompt, text, a, who) for a in range(SIZE)]
        if who == "best":
            return max(each)
        return sum(p * q for p, q in zip(self.policy(prompt, text), each, strict=True))

    def q(self, prompt, text, a, who):
        """Value of a text continued by a token."""
        then = (*text, a)
        return self.reward(prompt, then) + self.gamma * self.v(prompt, then, who)

    def best(self, prompt):
        """The greatest return there is."""
        return max(self.returns(prompt, text) for text in self.texts())


class Exact(HeadValues):
    """A source that says what the game says. `seen` counts the states it valued."""

    def __init__(self, game, who, prompts=PROMPTS):
        super().__init__(game.model)
        by_length = sorted(map(tuple, prompts), key=len, reverse=True)
        for name, value in {"game": game, "who": who, "prompts": by_length, "seen": []}.items():
            object.__setattr__(self, name, value)

    def _split(self, text):
        """No prompt begins another one."""
        prompt = next(p for p in self.prompts if tuple(text[: len(p)]) == p)
        return prompt, tuple(text[len(prompt) :])

    def __call__(self, states, tokens, guidance):
        rows = [range(SIZE)] * len(states) if tokens is None else tokens.tolist()
        return torch.tensor([
            [self.game.q(*self._split(text), a, self.who) for a in row]
            for text, row in zip(states.texts, rows, strict=True)
        ])  # fmt: skip

    def state_value(self, states):
        texts = states.texts
        self.seen.extend(map(tuple, texts))
        return torch.tensor([self.game.v(*self._split(text), self.who) for text in texts])
