"""A model and what guides it, side by side: which trunks read, and what they can do together."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from qvgpt.decode.next_token import NextToken
from qvgpt.decode.policy import (
    NEG_INF,
    V_ALONE,
    Guidance,
    distribution,
    fold,
    folds,
    functional_options,
)
from qvgpt.decode.reading import States
from qvgpt.decode.sources import (
    Contrast,
    HeadValues,
    PrefixValues,
    TokenScorer,
    ValueSource,
    describe,
    heads_of,
    leaves,
    own_values,
)
from qvgpt.errors import QvgptError
from qvgpt.models.blocked import Blocked
from qvgpt.models.heads import ValueHeads
from qvgpt.models.laid_out import head_of, lay_out, mark
from qvgpt.models.value_model import ValueModel


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that might have been written, and what was thought of it."""

    token: int
    logprob: float
    """log π."""
    base_logprob: float
    """log π₀, over the whole vocabulary at temperature 1."""
    q: float | None
    """Expected return of the text continued with this token; None: unknown."""


@dataclass(frozen=True)
class TokenReport:
    """What the model thought of a token it wrote."""

    base_logprob: float
    """log π₀, over the whole vocabulary at temperature 1."""
    logprob: float
    """log π of the distribution sampled from; greedy is one on a single token."""
    kl: float
    """KL(π ‖ π₀) of the step, in nats, exact; π₀ is the plain model, untruncated, at
    temperature 1."""
    q: float | None
    """Expected return of the text continued with this token."""
    v: float | None
    """Expected return of the text so far."""
    beta: float | None = None
    """β of this token, where guidance has not one for all."""
    spent: float | None = None
    """What it took of the `kl_budget`: KL(π ‖ π₀) over the candidates at temperature 1, in nats."""
    alternatives: tuple[Alternative, ...] = ()
    """The likeliest tokens by log π, this one perhaps among them, where they were asked for."""

    @property
    def advantage(self) -> float | None:
        """Q − V."""
        return None if self.q is None or self.v is None else self.q - self.v


@dataclass(frozen=True)
class Guide:
    """A source beside the model that it guides: what both can do together, checked once."""

    model: ValueModel
    source: ValueSource | None
    foldable: Collection[float] | None = None
    """The β that may be folded into the LM head, each a matrix of its size; None: any. Where β
    comes from strangers there is no end of them."""

    @classmethod
    def of(cls, model: ValueModel, source: ValueSource | None = None, look: bool = True) -> "Guide":
        """None: the model's own values. Raises `QvgptError` for a source of another tokenizer.

        Without `look` the caller does that before anything is read.
        """
        for other in () if source is None else source.models:
            refuse_other_tokenizer(model, other)
            other.eval()
        guide = cls(model.eval(), own_values(model) if source is None else source)
        if look:
            guide.look()
        return guide

    def look(self) -> None:
        """Lay out what weights there are now, and forget what was made of others."""
        others = () if self.source is None else self.source.models
        for model in (self.model, *others):
            if model.training:
                model.eval()
        for trunk in self.trunks:
            lay_out(trunk)
        for model in others:
            if model.heads:
                lay_out(model.heads, model.trunk.output_weight.dtype)
        made = vars(self)
        made.pop("_knows_q", None)
        if "_folded" in made and self._folded[0] != self._folded_weights:
            del made["_folded"]

    @property
    def trunks(self) -> list[Any]:
        """That of the model first; each once, whoever reads it."""
        others = [m.trunk for m in self.source.models] if self.source is not None else []
        every = [self.model.trunk, *others]
        return [t for i, t in enumerate(every) if not any(t is other for other in every[:i])]

    @property
    def heads(self) -> ValueHeads | None:
        """The model's own heads where their Q is what guides: that may fold into its LM head."""
        own = isinstance(self.source, HeadValues) and self.source.model is self.model
        return self.model.heads if own else None

    @property
    def context(self) -> int:
        """The longest text that every trunk holds."""
        return min(trunk.seq_len for trunk in self.trunks)

    @property
    def known(self) -> int:
        """How many tokens exist: of a padded vocabulary the first ones."""
        size = self.model.trunk.vocab_size
        return min(size, self.model.tokenizer.vocab_size) if self.model.tokenizer else size

    def next_token(
        self,
        states: States,
        guidance: Guidance,
        positions: Sequence[int],
        report: bool = False,
    ) -> NextToken:
        """The guided distribution after each state, of which so many tokens were written before.

        With a `report` base log-probs are asked for too, which a folded head does not know.
        """
        trunk, folded, beta = self.model.trunk, None, None
        if guidance.beta_end is not None:
            beta = torch.tensor(list(map(guidance.beta_at, positions)), device=self.model.device)
        may_fold = self.foldable is None or guidance.beta in self.foldable
        if not report and may_fold and folds(self.heads, guidance, trunk.softcap):
            folded = self._fold(guidance.beta)
        hidden = states.of(trunk)
        values = partial(self.values, states, guidance=guidance, relative=True)
        known = self.known if self.known < trunk.vocab_size else None
        head, cap = head_of(trunk), trunk.softcap
        return distribution(head, hidden, guidance, values, folded, cap, known, beta)

    def _fold(self, beta: float) -> Tensor | Blocked:
        """LM head and β·Q as one matrix, made once."""
        _, matrices = self._folded
        if beta not in matrices:
            assert self.heads is not None
            matrix = fold(self.model.trunk.output_weight, self.heads, beta)
            matrices[beta] = Blocked(matrix) if Blocked.suits(matrix) else matrix
        return matrices[beta]

    @cached_property
    def _folded(self) -> tuple[list[Any], dict[float, Tensor | Blocked]]:
        """Of which weights, and the matrices by their β."""
        return self._folded_weights, {}

    @property
    def _folded_weights(self) -> list[Any]:
        assert self.heads is not None
        slow = [p for p in self.heads.target_q.parameters() if p.dim() == 2]
        marks = [mark(weight) for weight in (self.model.trunk.output_weight, *slow)]
        return [self.heads.reward_scale, *marks]

    def values(
        self,
        states: States,
        tokens: Int[Tensor, "rows candidates"] | None,
        guidance: Guidance,
        relative: bool = False,
    ) -> Float[Tensor, "rows candidates"]:
        """The source's values of candidates, or (None) of the model's whole vocabulary.

        With `relative` up to a number per state, where that is cheaper.
        """
        assert self.source is not None
        # what pads a vocabulary may be a candidate, of probability 0; other models lack it
        asked = None if tokens is None else tokens.clamp(max=self.known - 1)
        if tokens is None and self.source.most_candidates is not None:
            asked = torch.arange(self.known).expand(len(states), -1)
        if relative and asked is not None and isinstance(self.source, HeadValues):
            found = self.source.relative(states, asked, guidance).to(self.model.device)
        else:
            found = self.source(states, asked, guidance).to(self.model.device)
        if tokens is None:  # there 0 does
            size = self.model.trunk.vocab_size
            if found.size(1) < self.known:
                raise QvgptError(f"values of {found.size(1)} tokens where there are {self.known}")
            found = F.pad(found[:, :size], (0, max(0, size - found.size(1))))
        return found

    def report(
        self, states: States, token: Int[Tensor, "rows"], twins: Literal["mean", "min"]
    ) -> tuple[list[float | None], list[float | None]]:
        """q of the given tokens and v of the states, None where they are unknown."""
        unknown: list[float | None] = [None] * len(states)
        if self.source is None:
            return unknown, unknown
        v = self.source.state_value(states)
        q = unknown
        if self._knows_q:
            q = self.source(states, token[:, None], Guidance(twins=twins))[:, 0].tolist()
        return q, unknown if v is None else v.tolist()

    def alternatives(
        self, states: States, picked: NextToken, count: int, twins: Literal["mean", "min"]
    ) -> list[tuple[Alternative, ...]]:
        """The `count` likeliest candidates after each state, likeliest first, none of them cut."""
        if count == 0:
            return [()] * len(states)
        logprob, place = picked.logprob.topk(min(count, picked.logprob.size(1)), dim=-1)
        tokens, base = (x.gather(1, place) for x in (picked.tokens, picked.base_logprob))
        q = [[None] * tokens.size(1)] * len(states)
        if self.source is not None and self._knows_q:
            asked = tokens.clamp(max=self.known - 1)
            q = self.source(states, asked, Guidance(twins=twins)).tolist()
        rows = zip(tokens.tolist(), logprob.tolist(), base.tolist(), q, strict=True)
        return [
            tuple(Alternative(*each) for each in zip(*row, strict=True) if each[1] > NEG_INF)
            for row in rows
        ]

    @cached_property
    def _knows_q(self) -> bool:
        """Whether all heads that are asked for Q know it: weights are looked through but once."""
        asked = [s.model for s in leaves(self.source) if isinstance(s, HeadValues)]
        return not any(heads_of(model).know_v_alone for model in asked)

    def refuse(self, tokens: Sequence[int], max_tokens: int, guidance: Guidance) -> None:
        """Raise `QvgptError` for what cannot be written: no room, no prompt, no values."""
        limit, size = self.context, self.model.trunk.vocab_size
        if isinstance(tokens, str) or not isinstance(tokens, Sequence):
            raise QvgptError(
                f"a prompt is a list of token ids, not {tokens!r}: tokenizer.encode_prompt(text) "
                "makes one of a text, .tolist() of a tensor"
            )
        if not tokens:
            raise QvgptError("an empty prompt: a token must stand before the first action")
        if not 0 <= min(tokens) <= max(tokens) < size:
            raise QvgptError(f"a prompt has tokens that are not of the model's {size}: {tokens}")
        if max_tokens < 1:
            raise QvgptError(f"max_tokens must be at least 1, not {max_tokens}")
        if len(tokens) + max_tokens > limit:
            whose = "" if limit == self.model.trunk.seq_len else " of the model of the values"
            raise QvgptError(
                f"a prompt of {len(tokens)} tokens and max_tokens {max_tokens} "
                f"do not fit the context of {limit}{whose}: give another max_tokens"
            )
        if guidance.guides:
            self.refuse_values(guidance)

    def refuse_stops(self, stop: Sequence[str]) -> None:
        """Raise `QvgptError` for strings that could not end a text, or would end any."""
        if isinstance(stop, str):
            raise QvgptError(f"stop: a list of strings was expected, not {stop!r}")
        if stop and "" in stop:
            raise QvgptError("stop: an empty string would end every text: leave it out")
        if stop and self.model.tokenizer is None:
            raise QvgptError("stop: the model has no tokenizer to find strings with: leave it out")

    def refuse_values(self, guidance: Guidance) -> None:
        """Raise `QvgptError` where no value can be had of each of the guidance's candidates."""
        if self.source is None:
            raise QvgptError("this model has no value heads: it can only be run with beta 0")
        if self._of_turns:
            raise QvgptError(
                "these values are of whole turns and guide no token: leave beta 0 and let them "
                "rank texts, by best_of"
            )
        if not self._knows_q:
            raise QvgptError(V_ALONE)
        for leaf in leaves(self.source):
            if isinstance(leaf, HeadValues | PrefixValues):
                functional_options(heads_of(leaf.model), guidance)
        if guidance.functional != "mean" and all(map(_ignores_functionals, leaves(self.source))):
            raise QvgptError(
                f"guidance: functional {guidance.functional!r} reads a distribution of returns, "
                f"and {describe(self.source)} is none: leave it out"
            )
        most, candidates = self.source.most_candidates, self.known
        if guidance.top_k is not None and guidance.candidates == "base":
            candidates = min(candidates, guidance.top_k)
        if most is not None and candidates > most:
            raise QvgptError(
                f"these values are read after each candidate, and there are {candidates}: say "
                f"top_k, at most {most} (20 is usual), with candidates 'base'"
            )

    def refuse_to_judge(self, whole: bool = False) -> None:
        """Raise `QvgptError` where the values cannot say what a text is worth that goes on, or
        (`whole`) one that is over."""
        if self.source is None:
            raise QvgptError("this model has no value heads to rank texts by")
        if self._of_turns and not whole:
            raise QvgptError("these values are of whole turns: they rank whole texts, by best_of")
        if not self._knows_q:
            raise QvgptError(V_ALONE)

    @property
    def _of_turns(self) -> bool:
        asked = [s.model for s in leaves(self.source) if isinstance(s, HeadValues)]
        return any(model.info.level == "turn" for model in asked)


def _ignores_functionals(source: ValueSource) -> bool:
    log = isinstance(source, PrefixValues) and source.log
    return log or isinstance(source, Contrast | TokenScorer)


def refuse_other_tokenizer(model: ValueModel, other: ValueModel, what: str = "") -> None:
    """Raise `QvgptError` where two models do not read the same tokens, by the tokenizers' hash."""
    ours, theirs = (m.tokenizer.sha256 if m.tokenizer else None for m in (model, other))
    same_size = model.trunk.vocab_size == other.trunk.vocab_size
    if ours != theirs or (ours is None and not same_size):
        raise QvgptError(
            f"{what + ': ' if what else ''}another tokenizer than that of the model to be guided: "
            "its values are of other tokens"
        )
