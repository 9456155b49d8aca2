"""Guidance in the place of `lm_head`: Hugging Face's own `generate` runs guided, unmodified.

    model = load_guided("runs/demo/model", Guidance(beta=2.0))
    model.generate(**inputs, do_sample=True, temperature=0.7)

Greedy, sampling and beam search alike. The model is otherwise untouched, so `unguide` gives the
plain one back; save it only then, or use `qvgpt export`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvgpt.decode.policy import (
    NEG_INF,
    Guidance,
    distribution,
    fold,
    folds,
    own_q,
    recommended,
    refuse_v_alone,
)
from qvgpt.errors import QvgptError
from qvgpt.models.heads import ValueHeads
from qvgpt.models.value_model import ValueModel


class GuidedHead(nn.Module):
    """Hidden states → log π₀ + β·A of the candidates, −inf elsewhere, in fp32.

    `weight` stays the very parameter of the head it replaces, so that tied input embeddings stay
    tied. Where guidance and head are one matrix it is folded once, here: later training of
    either is not seen. Temperature is left to the caller of `generate`, as are its own
    processors (`top_k` and the like), which then look at the guided distribution.
    """

    def __init__(self, head: nn.Module, heads: ValueHeads | None, guidance: Guidance):
        super().__init__()
        self.weight = head.weight
        self.replaced = (head,)  # in a tuple, lest it counts as a part of this module
        self.heads = heads
        self.guidance = replace(guidance, temperature=1.0)
        folded = None
        if heads is not None and folds(heads, guidance):
            folded = fold(self.weight, heads, guidance.beta)  # type: ignore[arg-type]
        self.register_buffer("folded", folded, persistent=False)

    def forward(self, hidden: Float[Tensor, "*shape embed"]) -> Float[Tensor, "*shape vocab"]:
        """The guided log-probabilities of the next token after each state."""
        rows = hidden.reshape(-1, hidden.size(-1))
        weight: Any = self.weight
        values = own_q(self.heads, rows, self.guidance)
        picked = distribution(weight, rows, self.guidance, values, self.folded)  # type: ignore[arg-type]
        logits = picked.logprob
        if picked.tokens.size(1) < weight.size(0):  # only the candidates were looked at
            everything = logits.new_full((len(rows), weight.size(0)), NEG_INF)
            logits = everything.scatter(1, picked.tokens, logits)
        return logits.view(*hidden.shape[:-1], -1)


def guide(hf_model: Any, values: ValueModel | ValueHeads, guidance: Guidance) -> Any:
    """Put a `GuidedHead` in the place of the model's output embeddings, and return the model.

    `guidance.temperature` is ignored: give `temperature` to `generate`. With beam search, let
    there be at least two candidates for each beam. A model already guided is guided anew.
    Raises `QvgptError` where the heads are missing or do not fit the model.
    """
    unguide(hf_model)
    heads = values.heads if isinstance(values, ValueModel) else values
    head = hf_model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise QvgptError("guidance needs a model whose LM head is a matrix without bias")
    if getattr(hf_model.config.get_text_config(), "final_logit_softcapping", None) is not None:
        raise QvgptError(
            "this model caps its logits after the LM head, so that none there can guide it"
        )
    if guidance.guides:
        refuse_v_alone(heads)
        if guidance.beta_end is not None:
            raise QvgptError("beta_end: `generate` of transformers does not say which token it is")
    if heads is not None and heads.shape != tuple(head.weight.shape):
        raise QvgptError(
            f"value heads for {heads.shape} tokens and dimensions do not fit "
            f"an LM head of {tuple(head.weight.shape)}"
        )
    guided = GuidedHead(head, heads, guidance)
    hf_model.set_output_embeddings(guided.train(hf_model.training))
    return hf_model


def unguide(hf_model: Any) -> Any:
    """Put the original LM head back; a model that is not guided stays as it is."""
    head = hf_model.get_output_embeddings()
    if isinstance(head, GuidedHead):
        hf_model.set_output_embeddings(head.replaced[0])
    return hf_model


def load_guided(path: str | Path, guidance: Guidance | None = None) -> Any:
    """The `transformers` model of a directory written by `ValueModel.save`, guided.

    Without `guidance` the directory's recommended one is used; raises `QvgptError` where it
    has none.
    """
    from transformers import AutoModelForCausalLM

    values = ValueModel.from_pretrained(path)
    if guidance is None:
        guidance = recommended(values.info, path)
    if guidance is None:
        raise QvgptError(f"{path}: recommends no guidance; say which, at least its beta")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return guide(model, values, guidance)
