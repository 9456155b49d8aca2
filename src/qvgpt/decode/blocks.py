"""Block search: several texts are continued by a block of tokens, and the values keep the best.

    width W, samples K, block M       W·K texts are begun; after each block of M tokens the W best
                                      go on, each by K continuations   (CD-blockwise with W = 1,
                                      Mudgal et al., 2024, arXiv:2310.17022; W > 1 is a beam
                                      search over blocks, arXiv:2405.19262)
    keep < 1                          of the W·K texts that are begun this share goes on after each
                                      block, each by itself, down to W  (speculative rejection, Sun
                                      et al., 2024, arXiv:2410.20290)

What a text is worth is said in `search.Judge`. A text that is over keeps its place among the best
and is not continued; a prompt is done when all that it keeps are over.

Limits: M ≥ max_tokens (or keep = 1) is best-of-N with N = W·K, the same texts as `write_best`
with the same seeds; W = K = 1 is plain sampling; M = 1, W = 1, K → ∞ takes the best next token.

Cost: each prompt is read once, then every token of every candidate but the last of one that is
over; values cost nothing more where they are read from the same trunk. That is W·K tokens read for
each token of the result, with `keep` fewer and fewer.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qvgpt.decode.engine import random_of, row_seed
from qvgpt.decode.guide import Guide
from qvgpt.decode.policy import Guidance
from qvgpt.decode.rerank import candidate_seed, choice_kl
from qvgpt.decode.search import (
    Found,
    Hypothesis,
    Judge,
    at_least,
    end_ids,
    forked,
    in_parts,
    read_prompts,
)
from qvgpt.decode.sources import ValueSource
from qvgpt.errors import QvgptError
from qvgpt.models.value_model import ValueModel


@dataclass(frozen=True)
class BlockSearch:
    """How to search. See the head of `decode/blocks.py`."""

    width: int = 1
    """Texts kept after each block."""
    samples: int = 8
    """Continuations of each text that is kept; of a prompt `width` times as many."""
    block: int = 8
    """Tokens of a block."""
    keep: float | None = None
    """Nothing is continued more than once: of the texts that were begun this share is kept after
    each block, until `width` are left. 1: all of them, to their ends."""
    per_token: bool = False
    """Rewards come on the way: rank by Σ advantages. A contrast always is."""
    max_tokens: int = 128
    """Where a text is cut if no end token came."""
    max_batch: int = 256
    """Texts written at the same time, over all prompts."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        at_least(self, width=1, samples=1, block=1, max_tokens=1, max_batch=1)
        if self.keep is not None and not 0 < self.keep <= 1:
            raise QvgptError(f"BlockSearch: keep must lie in (0, 1], not as in {self}")

    @property
    def candidates(self) -> int:
        """Texts that are written to each prompt at the same time."""
        return self.width * self.samples

    def kept_of(self, candidates: int) -> int:
        """How many of so many go on."""
        if self.keep is None:
            return self.width
        return max(self.width, math.ceil(self.keep * candidates))

    def choice_kl(self, tokens: int) -> float:
        """What choosing adds to the mean of log π − log π₀ of chosen texts of so many tokens, at
        most, in nats: with it, their KL to π₀ is bounded.

        One choice among N adds log N − (N − 1)/N (Beirami et al., 2024), for W = 1 one such is
        made after each block. Else a text's probability is at most how often it is to be expected
        among all that are written: with `keep` < 1 N times, else N·K^(blocks − 1) times as often
        as in one sample.
        """
        blocks = math.ceil(tokens / self.block)
        if self.keep is not None or blocks <= 1:
            sure = self.keep == 1 or self.keep is None
            return choice_kl(self.candidates) if sure else math.log(self.candidates)
        if self.width == 1:
            return blocks * choice_kl(self.samples)
        return math.log(self.candidates) + (blocks - 1) * math.log(self.samples)

    @torch.no_grad()
    def __call__(
        self,
        model: ValueModel,
        prompts: Sequence[Sequence[int]],
        guidance: Guidance | None = None,
        values: ValueSource | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Found:
        """Up to `width` texts of each prompt; `seeds` None: `row_seed(0, i)`.

        Tokens are sampled by `guidance`, its temperature included. A hypothesis' score is what
        the text is worth. Raises `QvgptError` for a prompt that does not fit, and where there are
        no values.
        """
        guidance, guide = guidance or Guidance(), Guide.of(model, values)
        judge = Judge.of(guide, guidance, self.per_token)
        for prompt in prompts:
            guide.refuse(prompt, self.max_tokens, guidance)
        if seeds is None:
            seeds = [row_seed(0, i) for i in range(len(prompts))]
        texts: list[list[Hypothesis]] = [[] for _ in prompts]
        forward_tokens = 0
        for part in in_parts(prompts, self.max_batch // self.candidates):
            some = [_Prompt(prompts[i], seeds[i]) for i in part]
            search = _Search(self, judge, some, guidance)
            for i, several in zip(part, search.run(), strict=True):
                texts[i] = several
            forward_tokens += sum(search.counts)
        return Found(texts, forward_tokens)


@dataclass
class _Text:
    """A candidate."""

    seed: int
    random: random.Random
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    value: float = 0.0
    """What it is worth, as far as it was written."""
    terminated: bool = False
    over: bool = False
    """Terminated or cut."""

    def fork(self, seed: int) -> "_Text":
        """The same text, to be continued by other random numbers."""
        more = {"seed": seed, "random": random_of(seed), "tokens": list(self.tokens)}
        return _Text(**{**vars(self), **more})


@dataclass
class _Prompt:
    tokens: Sequence[int]
    seed: int
    pool: list[_Text] = field(default_factory=list)
    """Its candidates, those that are over included."""


class _Search:
    """Some prompts side by side; `running` are the texts in the rows of `states`."""

    def __init__(self, how: BlockSearch, judge: Judge, prompts: list[_Prompt], guidance: Guidance):
        self.how, self.judge, self.guide = how, judge, judge.guide
        self.prompts, self.guidance = prompts, guidance
        self.end_ids = end_ids(self.guide.model)
        self.running: list[tuple[_Prompt, _Text]] = []
        for prompt in prompts:
            seeds = [candidate_seed(prompt.seed, k) for k in range(how.candidates)]
            prompt.pool = [_Text(seed, random_of(seed)) for seed in seeds]
            self.running += [(prompt, text) for text in prompt.pool]
        longest = max(len(p.tokens) for p in prompts)
        room = min(longest + how.max_tokens, self.guide.context)
        read = read_prompts(self.guide, [p.tokens for p in prompts], room, self._texts)
        self.states = forked(read, [i for i in range(len(prompts)) for _ in range(how.candidates)])
        self.counts, self.longest = read.reading.counts, longest
        # whether V of where a text is says what it is worth; else what its tokens said adds up
        self.reads_v = not judge.per_token and judge.v(self.states) is not None

    def _texts(self) -> list[list[int]]:
        return [[*prompt.tokens, *text.tokens] for prompt, text in self.running]

    def run(self) -> list[list[Hypothesis]]:
        """Write until nothing that is kept goes on."""
        rounds = 0
        while self.running:
            for _ in range(self.how.block):
                self._grow()
                if not self.running:
                    break
            rounds += 1
            self._choose(rounds)
        return [
            [self._hypothesis(t) for t in _best(p.pool)[: self.how.width]] for p in self.prompts
        ]

    def _hypothesis(self, text: _Text) -> Hypothesis:
        added = self.how.choice_kl(len(text.tokens))
        return Hypothesis(text.tokens, text.terminated, text.logprob, text.value, added)

    def _grow(self) -> None:
        """One token more of every text that runs; then read those that go on."""
        texts = [text for _, text in self.running]
        positions = [len(text.tokens) for text in texts]
        picked = self.guide.next_token(self.states, self.guidance, positions)
        numbers = torch.tensor([t.random.random() for t in texts], dtype=torch.float64)
        token, place = picked.sample(numbers.to(picked.logprob.device))
        logprob = picked.logprob.gather(1, place[:, None])[:, 0].tolist()
        tokens = token.tolist()
        ends = [t in self.end_ids for t in tokens]
        over = [e or n + 1 >= self.how.max_tokens for e, n in zip(ends, positions, strict=True)]
        self._value(token, over)
        for text, t, more, ended, is_over in zip(texts, tokens, logprob, ends, over, strict=True):
            text.tokens.append(t)
            text.logprob += more
            text.terminated, text.over = ended, is_over
        on = [i for i, text in enumerate(texts) if not text.over]
        states = self.states if len(on) == len(texts) else forked(self.states, on)
        self.running = [self.running[i] for i in on]
        if on:
            states.reading.expect(self.longest + max(len(texts[i].tokens) for i in on) - 1)
            last = token[torch.tensor(on, device=token.device)]
            self.states = states.reading.read(last, None, self._texts)

    def _value(self, token: Tensor, over: list[bool]) -> None:
        """What is read of texts before their last token is read itself: Q of it, where they are
        over or no V will be known; or advantages."""
        rows = [i for i, ended in enumerate(over) if ended or not self.reads_v]
        if not rows:
            return
        states = self.states if len(rows) == len(over) else self.states.take(rows)
        found = self.judge.q(states, token[torch.tensor(rows, device=token.device), None])[:, 0]
        if self.judge.per_token:
            v = self.judge.v(states)
            assert v is not None
            found = found - v
        for i, value in zip(rows, found.tolist(), strict=True):
            text = self.running[i][1]
            text.value = text.value + value if self.judge.per_token else value

    def _choose(self, rounds: int) -> None:
        """Keep the best of each prompt and continue them."""
        if self.running and self.reads_v:
            v = self.judge.v(self.states)
            assert v is not None
            for (_, text), value in zip(self.running, v.tolist(), strict=True):
                text.value = value
        rows = {id(text): row for row, (_, text) in enumerate(self.running)}
        on: list[tuple[_Prompt, _Text]] = []
        from_rows: list[int] = []
        for prompt in self.prompts:
            if all(text.over for text in prompt.pool):
                continue
            prompt.pool = _best(prompt.pool)[: self.how.kept_of(len(prompt.pool))]
            for text in [text for text in prompt.pool if not text.over]:
                copies = self._continued(text, rounds)
                prompt.pool += copies
                on += [(prompt, t) for t in (text, *copies)]
                from_rows += [rows[id(text)]] * (1 + len(copies))
        if on and from_rows != list(range(len(self.running))):
            self.states = forked(self.states, from_rows)
        self.running = on

    def _continued(self, text: _Text, rounds: int) -> list[_Text]:
        """The continuations of a text beside its own, with seeds that no other has."""
        if self.how.keep is not None:
            return []
        first = rounds * self.how.candidates
        return [text.fork(candidate_seed(text.seed, first + k)) for k in range(1, self.how.samples)]


def _best(texts: list[_Text]) -> list[_Text]:
    """The best first, of equals the first; the same text is worth the same, whatever rounding says
    (its next tokens differ by their random numbers, which must not hang on the batch)."""
    worth: dict[tuple[int, ...], float] = {}
    for text in texts:
        worth.setdefault(tuple(text.tokens), text.value)
    return sorted(texts, key=lambda text: -worth[tuple(text.tokens)])
