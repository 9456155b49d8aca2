"""What all searches share: how they are called, what they find, and what a text is worth to them.

A search is called with a model and prompts, and finds texts:

    found = BlockSearch(samples=8)(model, prompts, Guidance(), values=None, seeds=[0, 1, 2])
    found.best, found.forward_tokens

`values` (None: the model's own) say what texts are worth. They may guide too, by `Guidance.beta`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qvgpt.decode.guide import Guide
from qvgpt.decode.policy import Guidance
from qvgpt.decode.reading import Reading, States
from qvgpt.decode.sources import Contrast, HeadValues, PrefixValues, ValueSource, leaves
from qvgpt.errors import QvgptError
from qvgpt.models.value_model import ValueModel


@dataclass(frozen=True)
class Hypothesis:
    """One text that a search found."""

    tokens: list[int]
    """The end token included where there is one."""
    terminated: bool
    """False if the length limit cut it."""
    logprob: float
    """Σ log π of its tokens, in nats."""
    score: float
    """What the search ranks by."""
    choice_kl: float | None = None
    """Where tokens are sampled: what choosing adds to the mean of log π − log π₀, at most, in nats.
    None: nothing is left to chance, the KL is −log π₀ of the text."""


@dataclass(frozen=True)
class Found:
    """What a search found, and what it cost."""

    texts: list[list[Hypothesis]]
    """Those of each prompt, best first."""
    forward_tokens: int
    """Tokens that any trunk has read, prompts and tried candidates included."""

    @property
    def best(self) -> list[Hypothesis]:
        """The first of each prompt."""
        return [several[0] for several in self.texts]


@runtime_checkable
class Search(Protocol):
    """A way to look for texts; a frozen dataclass whose fields are its options."""

    @property
    def max_tokens(self) -> int:
        """Where a text is cut if no end token came."""
        ...

    @property
    def max_batch(self) -> int:
        """Texts written at the same time, over all prompts."""
        ...

    def __call__(
        self,
        model: ValueModel,
        prompts: Sequence[Sequence[int]],
        guidance: Guidance | None = None,
        values: ValueSource | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Found:
        """Search for the texts of each prompt. `seeds`: one each, of searches that sample."""
        ...


@dataclass(frozen=True)
class Judge:
    """What texts are worth to a search, in units of reward.

    Rewards at the end (`per_token` False): a text that is over is worth Q of its last token, one
    that goes on V of where it is (where a source knows no V: Q of its last token). Both are what
    it is expected to earn in the end, and for exact values that is what they compare. With a
    discount a running text's value is discounted to the present, and a text that is over has the
    advantage of what waiting would cost.

    Rewards on the way (`per_token`): what was earned so far is not in V, and unknown. By values it
    is known all the same: Σ A over the tokens written is return so far + value to go − V of the
    prompt, if γ = 1, of any text (Q(s, a) = r + V(s')). The difference of two language models has
    no other value than this sum, which is what weak-to-strong search ranks by (Zhou et al., 2024,
    arXiv:2405.19262).
    """

    guide: Guide
    per_token: bool
    """Whether advantages are summed."""
    twins: Literal["mean", "min"] = "mean"

    @classmethod
    def of(cls, guide: Guide, guidance: Guidance, per_token: bool = False) -> "Judge":
        """Raises `QvgptError` where there are no values to judge by."""
        guide.refuse_to_judge()
        sums = any(isinstance(leaf, Contrast) for leaf in leaves(guide.source))
        return cls(guide, per_token or sums, guidance.twins)

    @property
    def gamma(self) -> float:
        """The discount of each token. Raises `QvgptError` where values have several."""
        named = [leaf.model.info for leaf in leaves(self.guide.source)
                 if isinstance(leaf, HeadValues | PrefixValues)]  # fmt: skip
        found = {1.0 if info.per_turn_discount else info.gamma for info in named} or {1.0}
        if len(found) > 1:
            raise QvgptError(f"values of several discounts ({found}) have no common scale of time")
        return found.pop()

    @property
    def reads_candidates(self) -> bool:
        """Whether q costs a token read for each candidate."""
        return any(isinstance(leaf, PrefixValues) for leaf in leaves(self.guide.source))

    def q(
        self, states: States, tokens: Int[Tensor, "rows candidates"] | None
    ) -> Float[Tensor, "rows candidates"]:
        """Q of candidates; None: of the whole vocabulary."""
        return self.guide.values(states, tokens, Guidance(twins=self.twins))

    def v(self, states: States) -> Float[Tensor, "rows"] | None:
        """V of the states, where it is known. Raises `QvgptError` where a sum needs it and it is
        not."""
        assert self.guide.source is not None
        found = self.guide.source.state_value(states)
        if found is None and self.per_token:
            raise QvgptError(
                "advantages cannot be summed by values that know no V of a state (functions): "
                "leave per_token and contrasts out"
            )
        return None if found is None else found.to(self.guide.model.device)


def at_one(guidance: Guidance) -> Guidance:
    """The same at temperature 1."""
    return replace(guidance, temperature=1.0)


def read_prompts(
    guide: Guide,
    prompts: Sequence[Sequence[int]],
    capacity: int,
    texts: Callable[[], list[list[int]]],
) -> States:
    """The prompts, read to their ends, with room for `capacity` tokens a row."""
    reading = Reading.of(guide.trunks, [p[:-1] for p in prompts], capacity)
    reading.expect(max(map(len, prompts)) - 1)
    return reading.read(torch.tensor([p[-1] for p in prompts]), None, texts)


def forked(states: States, rows: Sequence[int]) -> States:
    """Copies of states and of what was read to them; a row may be taken more than once."""
    at = torch.tensor(rows, dtype=torch.long)
    reading = states.reading
    if len(rows) <= len(states):
        reading.reorder(at)
    else:
        reading = reading.select(at)
    hidden = tuple(h[at.to(h.device)] for h in states.hidden)
    return States(reading, hidden, None, states.read_texts)


def end_ids(model: ValueModel) -> frozenset[int]:
    """The tokens that end a text."""
    return frozenset(model.tokenizer.template.end_ids if model.tokenizer else ())


def in_parts(prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Indices of the prompts, those of like length together, at most `size` (at least 1) a part."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return [order[i : i + max(1, size)] for i in range(0, len(order), max(1, size))]


def at_least(search: object, **least: int) -> None:
    """Raise `QvgptError` for the first option below its least value, NaN or infinite."""
    for name, bound in least.items():
        if not bound <= getattr(search, name) < float("inf"):
            kind = type(search).__name__
            raise QvgptError(f"{kind}: {name} must be at least {bound}, not as in {search}")
