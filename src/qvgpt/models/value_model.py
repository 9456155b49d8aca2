"""A trunk with value heads: what objectives read."""

import copy
import math
from collections.abc import Callable, Set
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.errors import QvgptError
from qvgpt.models import artefact
from qvgpt.models.artefact import Artefact, ValueInfo
from qvgpt.models.backbone import Backbone, Dtype, as_module
from qvgpt.models.decision_time import decides, rows_of, scatter, states_of, used_states
from qvgpt.models.disk import one_line
from qvgpt.models.gpt import GPT
from qvgpt.models.heads import ValueHeads, exact
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.reference import Reference, SlowTrunk
from qvgpt.models.vocab import best, chunk_rows, entropy, log_prob, logits, lookup_tied, wide
from qvgpt.objectives import NEEDS, Candidates, Values
from qvgpt.trajectory import TrajectoryBatch

OF_THE_TRUNK = frozenset(
    {"logprob", "entropy", "token_logprob", "ref_logprob", "max_ratio", "dummy_logprob"}
)
"""The `Values` that no value heads are asked for."""
AMONG_CANDIDATES = frozenset({"candidate_q_max", "any_q_max", "q_spread", "logit_spread"})
"""The `Values` that the likeliest tokens are asked for, and one of all tokens beside them."""
_CANDIDATES = 20
_DECISIONS = 128  # of a batch, at which all tokens are looked at


class ValueModel(nn.Module):
    """A causal language model that also knows Q and V. `heads` is None for a plain LM."""

    def __init__(
        self,
        trunk: Backbone,
        heads: HeadsConfig | None = None,
        tokenizer: Tokenizer | None = None,
        freeze_trunk: bool = False,
    ):
        super().__init__()
        if tokenizer is not None and tokenizer.vocab_size > trunk.vocab_size:
            raise QvgptError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only "
                f"{trunk.vocab_size}: they do not belong together"
            )
        self.trunk: Any = as_module(trunk)
        self.heads = ValueHeads(trunk.embed_dim, trunk.vocab_size, heads) if heads else None
        if self.heads is not None and self.heads.config.kind == "bilinear":
            self.heads.tell_tokens_by(trunk.output_weight)
        self.tokenizer = tokenizer
        self.info = ValueInfo()
        self.reference: Reference | None = None
        self.slow: SlowTrunk | None = None
        """What the slow heads read while training; None: the trunk itself."""
        self.candidates = Candidates()
        """Among which tokens `q_max` seeks the best."""
        self.judged: Callable[[Tensor], Tensor] | None = None
        """Hidden states [rows, embed] → probabilities [rows, vocab] of the policy that `expected_q`
        is of."""
        self.trunk_is_frozen = freeze_trunk
        if freeze_trunk or trunk.lora is None:  # else the adapters alone are trained
            self.trunk.requires_grad_(not freeze_trunk)

    def train(self, mode: bool = True) -> "ValueModel":
        """A frozen trunk stays in evaluation mode: no dropout under the heads."""
        super().train(mode)
        if self.trunk_is_frozen:
            self.trunk.eval()
        return self

    @property
    def _no_split_modules(self) -> list[str]:
        """The layers' class names, as Accelerate asks for them where it shards."""
        return sorted({type(block).__name__ for block in self.trunk.blocks})

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.trunk.output_weight.device

    states = staticmethod(states_of)

    @property
    def offers(self) -> frozenset[str]:
        """The `Values` that a model of its kind can give."""
        without = set() if self.reference else {"ref_logprob", "max_ratio", "dummy_logprob"}
        without |= set() if self.judged is not None else {"expected_q"}
        if self.heads is None or self.heads.config.support is None:
            return NEEDS - without - {"return_logits", "v_return_logits"}
        return NEEDS - without - {"q_logsumexp"}

    @property
    def dummy(self) -> int:
        """A token that is never an action: padding. Raises `QvgptError` where there is none."""
        template = None if self.tokenizer is None else self.tokenizer.template
        if template is not None and template.pad in template.end_ids:
            raise QvgptError(
                "this tokenizer pads with an end token: no token is left for no action"
            )
        return 0 if template is None else template.pad

    def keep_reference(self, trunk: Backbone | None = None) -> None:
        """Let π_ref be a trunk, by default this one as it is: a copy, or its adapters' base."""
        if trunk is None and self.trunk.lora is not None:
            self.reference = Reference(self.trunk)
            return
        kept = as_module(copy.deepcopy(self.trunk) if trunk is None else trunk)
        self.reference = Reference(kept.requires_grad_(False).eval())

    def keep_slow_trunk(self) -> None:
        """Let the slow heads read a slow copy of the trunk, which begins as the trunk is."""
        self.slow = SlowTrunk(self.trunk)

    def forward(
        self, batch: TrajectoryBatch, needs: Set[str] | None = None, even: bool = True
    ) -> Values:
        """Only what `needs` names is computed, and only at decisions that count; None: all.

        `even`: no log-prob will weigh more than another in the loss; it spares time, no more.
        """
        needs = self.offers if needs is None else needs
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.trunk_is_frozen):
            weight, known = self.trunk.output_weight, {}
            if isinstance(self.trunk, GPT) and self.trunk.shape["tied"]:
                known["embedded"], weight = lookup_tied(weight, batch.tokens)
            hidden = self.trunk.hidden(batch.tokens, positions=batch.positions, **known)
        used = used_states(batch.mask)
        states = rows_of(hidden, batch, used)
        taken, action = states[decides(batch.mask, used)], batch.action[batch.mask]
        found: dict[str, Tensor] = {}
        softcap = self.trunk.softcap
        if "logprob" in needs:
            flat = log_prob(taken, weight, action, softcap, even)
            found["logprob"] = scatter(flat, batch.mask)
        if "entropy" in needs:
            found["entropy"] = scatter(entropy(taken, weight, softcap), batch.mask)
        if "token_logprob" in needs:
            at = batch.predicted
            rows, token = hidden[:, :-1][at], batch.tokens[:, 1:][at]
            found["token_logprob"] = scatter(log_prob(rows, weight, token, softcap, even), at)
        if "dummy_logprob" in needs:
            nothing = torch.full_like(action, self.dummy)
            flat = log_prob(taken, weight, nothing, softcap, even)
            found["dummy_logprob"] = scatter(flat, batch.mask)
        if needs & {"ref_logprob", "max_ratio"}:
            if self.reference is None:
                raise QvgptError("this model keeps no reference: call `keep_reference` first")
            dummy = self.dummy if "max_ratio" in needs else None
            found |= self.reference.read(batch, self.trunk, states, used, needs, dummy)
        if needs - OF_THE_TRUNK:
            slow = self._slow_rows(batch, used, needs)
            distributions = self.heads is not None and self.heads.config.support is not None
            with exact(hidden) if distributions else nullcontext():
                found |= self._values(
                    wide(states), wide(taken), slow, action, batch.mask, used, needs
                )
            if needs & {"q_max", "target_q_at_argmax", "expected_q"}:
                with exact(hidden):
                    found |= self._over_actions(wide(states), slow, used, needs)
            if needs & AMONG_CANDIDATES:
                found |= self._among_candidates(taken, batch.mask, needs)
        return Values(**found, support=self.heads.config.support if self.heads else None)  # type: ignore[arg-type]

    def _slow_rows(
        self, batch: TrajectoryBatch, used: Bool[Tensor, "batch states"], needs: Set[str]
    ) -> Float[Tensor, "used embed"] | None:
        """What the slow heads read, where that is not what the others do."""
        if self.slow is None or not needs & {"target_q", "target_q_at_argmax"}:
            return None
        return wide(rows_of(self.slow.hidden(batch), batch, used))

    def _values(
        self,
        states: Float[Tensor, "used embed"],
        taken: Float[Tensor, "rows embed"],
        slow_rows: Float[Tensor, "used embed"] | None,
        action: Int[Tensor, "rows"],
        mask: Bool[Tensor, "batch steps"],
        used: Bool[Tensor, "batch states"],
        needs: Set[str],
    ) -> dict[str, Tensor]:
        if self.heads is None:
            raise QvgptError("this model has no value heads; give it some to learn Q and V")
        heads, found = self.heads, {}
        fast: Any = heads.q
        slow: Any = heads.target_q
        if "q_logsumexp" in needs:
            both = [head.of_and_logsumexp(taken, action) for head in fast]
            for name, flat in zip(("q", "q_logsumexp"), zip(*both, strict=True), strict=True):
                if name in needs:
                    found[name] = torch.stack([scatter(x, mask) for x in flat])
        elif "q" in needs:
            found["q"] = torch.stack([scatter(head.of(taken, action), mask) for head in fast])
        if "target_q" in needs:
            with torch.no_grad():
                there = taken if slow_rows is None else slow_rows[decides(mask, used)]
                q = [scatter(head.of(there, action), mask) for head in slow]
            found["target_q"] = torch.stack(q)
        if "v" in needs:
            found["v"] = scatter(heads.v(states), used)
        if "return_logits" in needs:
            logits = [head.logits(taken, action[:, None])[:, 0] for head in fast]
            found["return_logits"] = torch.stack([scatter(x, mask) for x in logits])
        if "v_return_logits" in needs:
            found["v_return_logits"] = scatter(heads.v.logits(states), used)
        return found

    @torch.no_grad()
    def _over_actions(
        self,
        rows: Float[Tensor, "used embed"],
        slow_rows: Float[Tensor, "used embed"] | None,
        used: Bool[Tensor, "batch states"],
        needs: Set[str],
    ) -> dict[str, Tensor]:
        """Best and expected Q of the states in use."""
        assert self.heads is not None
        found = {}
        if needs & {"q_max", "target_q_at_argmax"}:
            among = None if self.candidates.are_all and not self._is_padded else self._among
            value, slow = self.heads.best(rows, rows if slow_rows is None else slow_rows, among)
            found = {"q_max": scatter(value, used)}
            found["target_q_at_argmax"] = torch.stack([scatter(x, used) for x in slow])
        if "expected_q" in needs:
            if self.judged is None:
                raise QvgptError("expected_q: this model was told no policy to judge")
            means = self.heads.expected(rows, self.judged)
            found["expected_q"] = torch.stack([scatter(x, used) for x in means])
        return {name: x for name, x in found.items() if name in needs}

    @property
    def _is_padded(self) -> bool:
        """Whether the LM head has rows of tokens that do not exist."""
        return self.tokenizer is not None and self.tokenizer.vocab_size < self.trunk.vocab_size

    def _among(self, hidden: Float[Tensor, "rows embed"]) -> Bool[Tensor, "rows vocab"]:
        """Which tokens the language model might say, of those that the tokenizer knows."""
        weight = self.trunk.output_weight
        known = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        if self.tokenizer is not None:
            known[self.tokenizer.vocab_size :] = False
        if self.candidates.are_all:
            return known.expand(len(hidden), -1)
        found = logits(hidden.to(weight.dtype), weight, self.trunk.softcap)
        return self.candidates.among(found.masked_fill_(~known, -math.inf)) & known

    @torch.no_grad()
    def _among_candidates(
        self, taken: Float[Tensor, "rows embed"], mask: Bool[Tensor, "batch steps"], needs: Set[str]
    ) -> dict[str, Tensor]:
        """What guidance finds where a token is chosen: the best Q, of likely tokens and of all, and
        how far Q and log π vary."""
        assert self.heads is not None
        slow: Any = self.heads.target_q
        size, embed = self.trunk.vocab_size, taken.size(-1)
        known = size if self.tokenizer is None else self.tokenizer.vocab_size
        kept, found = min(_CANDIDATES, known), []
        for h in taken.split(chunk_rows(max(size, 2 * kept * embed), tensors=3)):
            said = logits(h, self.trunk.output_weight, self.trunk.softcap)[:, :known]
            logprob, tokens = said.log_softmax(-1).topk(kept)
            with exact(h):
                q = torch.stack([head.of_many(wide(h), tokens) for head in slow]).mean(0)
            both, pi = torch.stack([q, logprob]), logprob.softmax(-1)
            mean = (pi * both).sum(-1, keepdim=True)
            spread = (pi * (both - mean).square()).sum(-1).sqrt()
            found.append(torch.cat([q.amax(-1)[None], spread]))
        names = ("candidate_q_max", "q_spread", "logit_spread")
        columns: dict[str, Tensor] = dict(zip(names, torch.cat(found, dim=1), strict=True))
        if "any_q_max" in needs:

            def of_all(h: Tensor) -> Tensor:
                return torch.stack([head(h) for head in slow]).mean(0)[:, :known]

            step = max(1, math.ceil(len(taken) / _DECISIONS))
            columns["any_q_max"] = torch.full_like(columns["q_spread"], math.nan)
            with exact(taken):
                of_some, _ = best(of_all, wide(taken[::step]), size, tensors=len(slow) + 1)
            columns["any_q_max"][::step] = of_some
        return {name: scatter(flat, mask) for name, flat in columns.items() if name in needs}

    def save(self, path: str | Path, merged: bool = True) -> None:
        """Write the directory that `models.artefact` describes.

        Without `merged`, adapters of the trunk are all that is written of it.
        """
        artefact.save(Path(path), self.trunk, self.heads, self.tokenizer, self.info, merged)

    def save_config(self, path: str | Path) -> None:
        """Write `value_config.json` alone, in one piece: the tensors stay."""
        assert self.heads is not None
        artefact.save_config(Path(path), self.heads, self.tokenizer, self.info)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        freeze_trunk: bool = False,
        as_causal_lm: bool = False,
        dtype: Dtype = "float32",
        device_map: str | dict[str, Any] | None = None,
    ) -> "ValueModel":
        """Read such a directory, or a plain Hugging Face one (then without heads).

        The other arguments are those of `artefact.load_trunk`. Heads are in fp32, and lie where the
        LM head does.
        """
        found = Artefact.read(Path(path), as_causal_lm, dtype, device_map)
        model = cls(found.trunk, found.heads, found.tokenizer, freeze_trunk)
        model.info = found.info
        if model.heads is not None:
            try:
                as_module(model.heads).load_state_dict(found.tensors)
            except RuntimeError as error:
                raise QvgptError(
                    f"{path}/value_heads.safetensors: does not fit value_config.json: "
                    f"{one_line(error)}"
                ) from None
            as_module(model.heads).to(model.device)
            model.heads.reward_scale = found.reward_scale
        return model
