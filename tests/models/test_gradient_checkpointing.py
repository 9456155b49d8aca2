"""Activations computed anew: the same loss, the same gradients, fewer tensors kept."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tiny_hf import FAMILIES, TOKENIZER, make_hf

from qvgpt.errors import QvgptError
from qvgpt.fit_options import FitOptions
from qvgpt.loop import fit
from qvgpt.models.causal_lm import CausalLM
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.lora import LoraConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import parse_objectives
from qvgpt.trajectory import Trajectory, collate

TEXTS = [
    Trajectory([1, 9 + i, 2, *range(10, 12 + i), 3], [False] * 3 + [True] * (3 + i),
               [0.0] * (5 + i) + [1.0], True)
    for i in range(4)
]  # fmt: skip


def make(family, lora=None, freeze=False):
    torch.manual_seed(0)
    if family == "gpt":
        trunk = GPT(TOKENIZER.vocab_size, 16, 2, 2, 32, dropout=0.2)
    else:
        trunk = CausalLM(make_hf(family, attention_dropout=0.2))
    model = ValueModel(trunk, HeadsConfig("linear"), TOKENIZER, freeze)
    if lora is not None:
        trunk.add_lora(lora)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model.train()


def loss_and_gradients(model, packed):
    """Also the bytes that autograd keeps of the trunk's forward pass."""
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    batch = collate(TEXTS, packed=packed)
    torch.manual_seed(3)  # of the dropout
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        values = model(batch)
    loss = values.logprob.mean() + values.q.square().mean() + values.v.mean()
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), [p.grad for p in trained if p.grad is not None], kept


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("gpt", None),
        *((family, lora) for family in FAMILIES for lora in (None, LoraConfig(2, dropout=0.2))),
    ],
)
def test_loss_and_gradients_are_those_without(family, lora, packed):
    plain, checkpointed = make(family, lora), make(family, lora)
    checkpointed.trunk.set_gradient_checkpointing(True)
    loss, gradients, kept = loss_and_gradients(plain, packed)
    ours, our_gradients, our_kept = loss_and_gradients(checkpointed, packed)
    torch.testing.assert_close(ours, loss, atol=1e-6, rtol=0)
    assert len(our_gradients) == len(gradients) > 8
    for one, other in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert our_kept < 0.6 * kept
    checkpointed.trunk.set_gradient_checkpointing(False)
    assert loss_and_gradients(checkpointed, packed)[2] == kept


@pytest.mark.parametrize("family", ["gpt", "qwen3"])
def test_fit_takes_the_same_steps(family):
    options = FitOptions(max_steps=3, epochs=9.0, batch_size=4)
    trained = []
    for on in (False, True):
        model = make(family)
        fit(model, TEXTS, parse_objectives(["LM", "MonteCarlo"]),
            replace(options, gradient_checkpointing=on), console=Console(quiet=True))  # fmt: skip
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, atol=1e-5, rtol=0)


def test_nothing_changes_where_nothing_is_trained():
    """In evaluation, and with a cache, layers are run as ever."""
    for family in ("gpt", "qwen3"):
        model = make(family).eval()
        tokens = collate(TEXTS).tokens
        expected = model.trunk.hidden(tokens)
        model.trunk.set_gradient_checkpointing(True)
        assert torch.equal(model.trunk.hidden(tokens), expected)
        cache = model.trunk.new_cache(len(tokens), 20)
        torch.testing.assert_close(model.trunk.hidden(tokens, cache=cache), expected)


def test_what_cannot_save_anything_is_refused():
    options = FitOptions(max_steps=1, gradient_checkpointing=True)
    with pytest.raises(QvgptError, match=r"fit.gradient_checkpointing: a frozen trunk"):
        fit(make("gpt", freeze=True), TEXTS, parse_objectives(["MonteCarlo"]), options)
    model = make("llama")
    model.trunk.model.supports_gradient_checkpointing = False
    with pytest.raises(QvgptError, match="LlamaForCausalLM: transformers cannot"):
        fit(model, TEXTS, parse_objectives(["LM"]), options)
