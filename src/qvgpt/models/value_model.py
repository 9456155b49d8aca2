"""A trunk with value heads: what objectives read, and the artefact on disk.

The directory is the trunk in its own Hugging Face format, so that
`AutoModelForCausalLM.from_pretrained(dir)` gives the plain language model, and beside it
`value_config.json` and `value_heads.safetensors`.
"""

import copy
import json
import math
import os
from collections.abc import Callable, Set
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.errors import QvgptError
from qvgpt.models.backbone import Backbone, Dtype, as_module
from qvgpt.models.decision_time import decides, rows_of, scatter, states_of, used_states
from qvgpt.models.disk import add_to_json, load_tensors, one_line, read_config, read_json, writing
from qvgpt.models.gpt import GPT
from qvgpt.models.heads import ValueHeads, exact
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.lora import ADAPTER
from qvgpt.models.reference import Reference, SlowTrunk
from qvgpt.models.vocab import best, chunk_rows, entropy, log_prob, logits, lookup_tied, wide
from qvgpt.objectives import NEEDS, Candidates, Values
from qvgpt.trajectory import TrajectoryBatch

FORMAT_VERSION = 1
OF_THE_TRUNK = frozenset(
    {"logprob", "entropy", "token_logprob", "ref_logprob", "max_ratio", "dummy_logprob"}
)
"""The `Values` that no value heads are asked for."""
AMONG_CANDIDATES = frozenset({"candidate_q_max", "any_q_max", "q_spread", "logit_spread"})
"""The `Values` that the likeliest tokens are asked for, and one of all tokens beside them."""
_CANDIDATES = 20
_DECISIONS = 128  # of a batch, at which all tokens are looked at


@dataclass
class ValueInfo:
    """What an artefact says about its values, beside the heads' shape."""

    objectives: list[dict[str, Any]] = field(default_factory=list)
    """What it was trained with, as `parse_objectives` reads it."""
    gamma: float = 1.0
    """Discount the values were learned with."""
    per_turn_discount: bool = False
    """Whether γ applied at the ends of turns only."""
    level: str = "token"
    """What a decision was: a token, or a whole turn, whose Q guides no token but ranks texts."""
    centred: bool = False
    """Whether returns were counted from the mean of each prompt's texts."""
    dialogues: bool = False
    """Whether it was trained on dialogues, so that it knows what `eot` is for."""
    judged_by: list[str] = field(default_factory=list)
    """SHA-256 of the reward models whose rewards it learned from: no judges of what it gained."""
    recommended_guidance: Any = None
    """Chosen on validation data; what `generate` uses when nothing is said: a dictionary of
    `Guidance`, or None. Checked where it is used, by `decode.policy.recommended`."""


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
        """Write the artefact described at the head of this file.

        Without `merged`, adapters of the trunk are all that is written of it.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        extra: dict[str, Any] = {}
        if self.tokenizer is not None:
            template = self.tokenizer.template
            extra = {
                "bos_token_id": template.bos,
                "eos_token_id": template.eos,
                "pad_token_id": template.pad,
            }
            self.tokenizer.save(path)
            said: dict[str, Any] = {
                "tokenizer_sha256": self.tokenizer.sha256,
                "dialogues": self.info.dialogues,
            }
            if self.info.judged_by:
                said["judged_by"] = self.info.judged_by
            extra["qvgpt"] = said
        if merged or self.trunk.lora is None:
            self.trunk.save(path, **extra)
        else:
            self.trunk.save_adapter(path / ADAPTER)
        if self.tokenizer is not None:
            # here and not before, for a trunk of transformers writes a file of its own
            ends = {"eos_token_id": sorted(self.tokenizer.template.end_ids)}
            generation = {k: v for k, v in extra.items() if k != "qvgpt"} | ends
            add_to_json(path / "generation_config.json", generation)
        if self.heads is None:
            for stale in ("value_config.json", "value_heads.safetensors"):
                (path / stale).unlink(missing_ok=True)
            return
        state = {k: v.contiguous() for k, v in self.heads.state_dict().items()}
        save_file(state, path / "value_heads.safetensors")
        self.save_config(path)

    def save_config(self, path: str | Path) -> None:
        """Write `value_config.json` alone, in one piece: the tensors stay."""
        assert self.heads is not None
        config: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "heads": asdict(self.heads.config),
            "trunk": "shared",
            **asdict(self.info),
            "reward_scale": self.heads.reward_scale,
        }
        if self.tokenizer is not None:
            config["template"] = asdict(self.tokenizer.template)
            config["end_ids"] = sorted(self.tokenizer.template.end_ids)
            config["tokenizer_sha256"] = self.tokenizer.sha256
        file = Path(path) / "value_config.json"
        staged = file.with_name(f".{file.name}.staged")
        with writing(file):
            staged.write_text(json.dumps(config, indent=2) + "\n")
            os.replace(staged, file)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        freeze_trunk: bool = False,
        as_causal_lm: bool = False,
        dtype: Dtype = "float32",
        device_map: str | dict[str, Any] | None = None,
    ) -> "ValueModel":
        """Read an artefact, or a plain Hugging Face directory (then without heads).

        The other arguments are those of `load_trunk`. Heads are in fp32, and lie where the LM
        head does.
        """
        path = Path(path)
        if not path.is_dir():
            raise QvgptError(f"{path}: no such directory; a model directory was expected")
        trunk = load_trunk(path, as_causal_lm, dtype, device_map)
        tokenizer = Tokenizer.load(path)
        if not (path / "value_config.json").exists():
            ours = read_json(path / "config.json").get("qvgpt") or {}
            if ours.get("tokenizer_sha256") not in (None, tokenizer.sha256):
                raise QvgptError(
                    f"{path}: tokenizer.json is not the one the model was saved with; restore it, "
                    "or delete the key `qvgpt` of config.json if they belong together"
                )
            plain = cls(trunk, None, tokenizer, freeze_trunk)
            plain.info.dialogues = ours.get("dialogues") is True
            plain.info.judged_by = [str(sha256) for sha256 in ours.get("judged_by") or ()]
            return plain
        config = read_json(path / "value_config.json")
        if config.get("format_version") != FORMAT_VERSION:
            found = config.get("format_version")
            raise QvgptError(f"{path}: value format {found!r}; this qvgpt reads {FORMAT_VERSION}")
        if config.get("tokenizer_sha256") not in (None, tokenizer.sha256):
            raise QvgptError(
                f"{path}: tokenizer.json is not the one the values were learned with; "
                "restore it, or train the values again"
            )
        heads = stored_heads(path)
        tensors = _head_tensors(path, heads)
        model = cls(trunk, heads, tokenizer, freeze_trunk)
        known = ValueInfo.__dataclass_fields__
        model.info = ValueInfo(**{k: v for k, v in config.items() if k in known})
        try:
            as_module(model.heads).load_state_dict(tensors)
        except RuntimeError as error:
            raise QvgptError(
                f"{path}/value_heads.safetensors: does not fit value_config.json: {one_line(error)}"
            ) from None
        as_module(model.heads).to(model.device)
        assert model.heads is not None
        model.heads.reward_scale = _reward_scale(path, config)
        return model


def stored_heads(path: Path) -> HeadsConfig:
    """What the value heads of an artefact look like."""
    try:
        return HeadsConfig(**read_json(path / "value_config.json")["heads"])
    except (KeyError, TypeError, QvgptError) as error:
        raise QvgptError(f"{path}/value_config.json: bad heads: {one_line(error)}") from None


def load_trunk(
    path: Path,
    as_causal_lm: bool = False,
    dtype: Dtype = "float32",
    device_map: str | dict[str, Any] | None = None,
) -> Backbone:
    """The language model of a directory: our GPT where it is a GPT-2, else transformers' own.

    `as_causal_lm`: transformers' own GPT-2 too, which can be adapted; a `device_map`
    (accelerate's; for reading alone) asks for it as well.
    """
    ours = read_config(path).get("model_type") == "gpt2"
    if ours and not as_causal_lm and device_map is None:
        return GPT.load(path, dtype)
    from qvgpt.models.causal_lm import CausalLM  # transformers takes seconds to import

    return CausalLM.load(path, dtype, device_map)


def _reward_scale(path: Path, config: dict[str, Any]) -> float:
    found = config.get("reward_scale", 1.0)
    if type(found) not in (int, float) or not 0 < found < math.inf:
        raise QvgptError(
            f"{path}/value_config.json: reward_scale: a number above 0 was expected, not {found!r}"
        )
    return float(found)


def _head_tensors(path: Path, heads: HeadsConfig) -> dict[str, Tensor]:
    """The heads' weights; refused before any head is made, lest sizes fill the memory."""
    tensors = load_tensors(path / "value_heads.safetensors")
    own = "project.weight" if heads.kind == "bilinear" else "weight"  # whose rows all heads share
    last = tensors.get(f"q.{heads.num_q - 1}.{own}")
    ranked = heads.kind in ("low_rank", "categorical")
    fits = last is not None and (not ranked or last.shape[-1:] == (heads.rank,))
    if heads.support is not None:
        project = tensors.get(f"q.{heads.num_q - 1}.project.weight")
        fits = fits and project is not None and len(project) == heads.rank * heads.bins
    if not fits:
        raise QvgptError(
            f"{path}/value_heads.safetensors: does not fit value_config.json, which says {heads}"
        )
    return tensors
