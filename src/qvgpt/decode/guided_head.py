"""Guidance in the place of `lm_head`: Hugging Face's own `generate` runs guided, unmodified.

    model = load_guided("runs/demo/model", Guidance(beta=2.0))
    model.generate(**inputs, do_sample=True, temperature=0.7)

Greedy, sampling, beam search, assisted decoding, static caches and continuous batching alike, since
all of them ask the LM head (docs/decoding.md says what was tried). The model is otherwise
untouched, so `unguide` gives the plain one back. A guided model is for writing: it is neither
trained nor saved. `qvgpt export` writes one that can be.
"""

import copy
from collections.abc import Callable
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
    functional_options,
    own_q,
    recommended,
    refuse_v_alone,
)
from qvgpt.decode.sources import ValueSource, describe
from qvgpt.errors import QvgptError
from qvgpt.models.backbone import Dtype
from qvgpt.models.heads import ValueHeads
from qvgpt.models.value_model import ValueModel


class GuidedHead(nn.Module):
    """Hidden states → log π₀ + β·A of the candidates, −inf elsewhere, in fp32.

    `weight` stays the very parameter of the head it replaces, so that tied input embeddings stay
    tied. Where guidance and head are one matrix it is folded once, here: later training of
    either is not seen. Of a padded vocabulary the first `known` tokens exist. Temperature is left
    to the caller of `generate`, as are its own processors (`top_k` and the like), which then look
    at the guided distribution.
    """

    def __init__(
        self,
        head: nn.Module,
        heads: ValueHeads | None,
        guidance: Guidance,
        known: int | None = None,
    ):
        super().__init__()
        self.weight = head.weight
        self.replaced = (head,)  # in a tuple, lest it counts as a part of this module
        self.guidance = replace(guidance, temperature=1.0)
        self.known = known
        folded = None
        if heads is not None:
            heads = _slow_alone(heads).to(self.weight.device)  # type: ignore[arg-type]
        if heads is not None and folds(heads, guidance):
            folded, heads = fold(self.weight, heads, guidance.beta), None  # type: ignore[arg-type]
        self.heads = heads if guidance.guides else None
        self.register_buffer("folded", folded, persistent=False)

    def forward(self, hidden: Float[Tensor, "*shape embed"]) -> Float[Tensor, "*shape vocab"]:
        """The guided log-probabilities of the next token after each state.

        Raises `QvgptError` where gradients would be taken in training.
        """
        if self.training and torch.is_grad_enabled():
            raise QvgptError("a guided model is for writing: `unguide` it before it is trained")
        weight: Any = self.weight
        rows = hidden.reshape(-1, hidden.size(-1)).to(weight.device)
        values = own_q(self.heads, rows, self.guidance)
        picked = distribution(
            weight, rows, self.guidance, values, self.folded, known=self.known  # type: ignore[arg-type]
        )  # fmt: skip
        logits = picked.logprob
        if picked.tokens.size(1) < weight.size(0):  # only the candidates were looked at
            everything = logits.new_full((len(rows), weight.size(0)), NEG_INF)
            logits = everything.scatter(1, picked.tokens, logits)
        return logits.view(*hidden.shape[:-1], -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GuidedHead":
        """`.half()`, `.bfloat16()` and the like are for the model: values stay in fp32."""

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        for child in self.children():
            child._apply(moved)
        return super()._apply(fn, recurse=False)

    def _save_to_state_dict(self, *args: Any, **options: Any) -> None:
        raise QvgptError(
            "a guided model is not saved: `unguide` it to save the plain one, or write the guided "
            "one with `qvgpt export --to hf`"
        )


def _slow_alone(heads: ValueHeads) -> ValueHeads:
    """The slow Q heads, frozen: they share memory, and moving or casting them leaves `heads`."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in heads.parameters()
    }
    slow = copy.deepcopy(heads, memo)
    del slow.q, slow.v
    return slow


def guide(hf_model: Any, values: ValueModel | ValueHeads | ValueSource, guidance: Guidance) -> Any:
    """Put a `GuidedHead` in the place of the model's output embeddings, and return the model.

    `values` are those learned on this very trunk; a `ValueModel` also says which tokens exist.
    `guidance.temperature` is ignored: give `temperature` to `generate`. A model already guided is
    guided anew. Raises `QvgptError` where the heads are missing, do not fit the model or know
    nothing of tokens, and for a model that changes what its LM head gives.
    """
    unguide(hf_model)
    if not isinstance(values, ValueModel | ValueHeads):
        raise QvgptError(
            "`generate` of transformers reads the guided model alone, so that only value heads on "
            f"its own trunk guide there, not {describe(values)}: use qvgpt.generate(…, values=…)"
        )
    heads = values.heads if isinstance(values, ValueModel) else values
    head = hf_model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise QvgptError("guidance needs a model whose LM head is a matrix without bias")
    if getattr(hf_model.config.get_text_config(), "final_logit_softcapping", None) is not None:
        raise QvgptError(
            "this model caps its logits after the LM head, so that none there can guide it: use "
            "qvgpt.generate, which caps before it guides"
        )
    if guidance.guides:
        refuse_v_alone(heads)
        if guidance.beta_end is not None:
            raise QvgptError("beta_end: `generate` of transformers does not say which token it is")
        if isinstance(values, ValueModel) and values.info.level == "turn":
            raise QvgptError("these values are of whole turns and guide no token")
        assert heads is not None
        functional_options(heads, guidance)
    if heads is not None and heads.shape != tuple(head.weight.shape):
        raise QvgptError(
            f"value heads for {heads.shape} tokens and dimensions do not fit "
            f"an LM head of {tuple(head.weight.shape)}"
        )
    _refuse_changed_logits(hf_model, head)
    tokenizer = values.tokenizer if isinstance(values, ValueModel) else None
    known = tokenizer.vocab_size if tokenizer and tokenizer.vocab_size < len(head.weight) else None
    guided = GuidedHead(head, heads, guidance, known)
    hf_model.set_output_embeddings(guided.train(hf_model.training))
    return hf_model


@torch.no_grad()
def _refuse_changed_logits(hf_model: Any, head: nn.Module) -> None:
    """Raise `QvgptError` unless logits are what the LM head gives, tried on two tokens."""
    given: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: given.append(output.clone()))
    tokens = torch.tensor([[1, 2]], device=hf_model.device) % head.weight.size(0)  # type: ignore[operator]
    try:
        logits = hf_model(tokens, use_cache=False).logits
    finally:
        handle.remove()
    if not given or not torch.equal(given[-1].float(), logits.float()):
        raise QvgptError(
            f"{type(hf_model).__name__}: its logits are not what its LM head gives (it may scale "
            "them), so that none there can guide it"
        )


def unguide(hf_model: Any) -> Any:
    """Put the original LM head back; a model that is not guided stays as it is."""
    head = hf_model.get_output_embeddings()
    if isinstance(head, GuidedHead):
        hf_model.set_output_embeddings(head.replaced[0])
    return hf_model


def load_guided(
    path: str | Path,
    guidance: Guidance | None = None,
    dtype: Dtype = "float32",
    device_map: str | dict[str, Any] | None = None,
) -> Any:
    """The `transformers` model of a directory written by `ValueModel.save`, guided.

    Without `guidance` the directory's recommended one is used; raises `QvgptError` where it
    has none. `dtype` and `device_map` are those of the language model; values stay in fp32.
    """
    values = ValueModel.from_pretrained(path, as_causal_lm=True, dtype=dtype, device_map=device_map)
    if guidance is None:
        guidance = recommended(values.info, path)
        if guidance is None or not guidance.guides:
            raise QvgptError(f"{path}: recommends no guidance; say which, at least its beta")
    return guide(values.trunk.released(), values, guidance)
