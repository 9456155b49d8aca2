"""A Hugging Face directory: guidance merged into an untied LM head, V in two vocabulary rows.

Where Q is linear in the hidden state and β is fixed, LM head and guidance are one matrix,
W′ = W + β·F: V(s), the same for every next token, cancels. Two more rows tell V all the same,

    r₀ = the mean row of W′,  r_v = r₀ + c·w      ⇒      V(s) = (log p_v − log p₀) / c + bias

for V(s) = w·h + bias: a difference of two log-probs does not depend on how they are normalised,
so that any engine that reports log-probs reports V. c is such that the second logit stays within
`_REACH` of the first at the states that were looked at.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvgpt.errors import QvgptError
from qvgpt.export.fidelity import Rows
from qvgpt.export.linear import LinearV
from qvgpt.models.disk import add_to_json
from qvgpt.models.gpt import GPT
from qvgpt.models.value_model import ValueModel

VALUE_TOKENS = ("<|value_zero|>", "<|value|>")
_REACH = 3.0


def language_model(model: ValueModel, weight: Float[Tensor, "vocab embed"]) -> ValueModel:
    """The model without heads, its LM head untied and `weight`."""
    return ValueModel(model.trunk.with_head(weight), None, model.tokenizer)


@torch.no_grad()
def with_value_rows(
    plain: ValueModel, v: LinearV, hidden: Float[Tensor, "states embed"]
) -> tuple[ValueModel, Rows]:
    """The same model with two rows more, or two padded ones taken, that tell V.

    `hidden`: states that say how far V goes.
    """
    assert plain.tokenizer is not None
    known = plain.tokenizer.vocab_size
    tokenizer = plain.tokenizer.with_special(VALUE_TOKENS)
    spread = float((hidden.float() @ v.weight).abs().max())
    if not spread:
        raise QvgptError("value_rows: V is the same everywhere: there is nothing to tell")
    c = _REACH / spread
    trunk = _grown(plain.trunk, max(plain.trunk.vocab_size, known + len(VALUE_TOKENS)))
    head = trunk.output_weight
    head[known] = head[:known].mean(0)
    head[known + 1] = head[known] + c * v.weight.to(head)
    return ValueModel(trunk, None, tokenizer), Rows(known, known + 1, c, v.bias)


def save_language_model(plain: ValueModel, directory: Path, rows: Rows | None = None) -> None:
    """Write it; value rows, and rows that only pad the vocabulary, are not to be sampled."""
    plain.save(directory)
    assert plain.tokenizer is not None
    silent = [] if rows is None else [rows.zero, rows.value]
    silent += range(plain.tokenizer.vocab_size, plain.trunk.vocab_size)
    if silent:
        add_to_json(directory / "generation_config.json", {"suppress_tokens": silent})


def load_language_model(directory: Path) -> Any:
    """As any user of `transformers` reads it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def _grown(trunk: Any, size: int) -> Any:
    """A copy with `size` rows in the (untied) LM head and in the token embedding, whose new ones
    are the mean of the others."""
    if isinstance(trunk, GPT):
        other: Any = GPT(**{**trunk.shape, "vocab_size": size})
        state = trunk.state_dict()
        for name in ("head.weight", "token_embedding.weight"):
            state[name] = _longer(state[name], size)
        other.to(trunk.output_weight).load_state_dict(state)
        return other.eval()
    other = copy.deepcopy(trunk)
    model = other.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for part in (embedding, head):
        part.weight = nn.Parameter(_longer(part.weight, size))
    embedding.num_embeddings = head.out_features = other.vocab_size = size
    model.config.get_text_config().vocab_size = size
    return other


def _longer(weight: Float[Tensor, "rows embed"], size: int) -> Float[Tensor, "more embed"]:
    new = weight.mean(0, keepdim=True).expand(size - len(weight), -1)
    return torch.cat([weight.detach(), new.to(weight)])
