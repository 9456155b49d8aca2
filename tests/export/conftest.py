"""Tiny models with values, saved; `tiny_hf.make_hf` has those of other families."""

import pytest
import torch
from tiny_hf import TOKENIZER, make_hf

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.models.causal_lm import CausalLM
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    monkeypatch.setattr("qvgpt.export.source._TO_FIT", 32)
    monkeypatch.setattr("qvgpt.export.source._OWN_TOKENS", 16)


@pytest.fixture
def save_model(tmp_path):
    """Save a tiny model in `tmp_path/model`, weights far from their start; returns it.

    `family` "gpt2" is our GPT. Of heads, `trained` is what is done to them.
    """

    def save(heads=None, family="gpt2", tokenizer: Tokenizer = TOKENIZER, embed=16, **options):
        torch.manual_seed(0)
        if family == "gpt2":
            trunk = GPT(tokenizer.vocab_size, embed, 2, 2, 48, **options)
        else:
            trunk = CausalLM(make_hf(family, **options))
        model = ValueModel(trunk, heads or HeadsConfig(num_q=1, v="linear"), tokenizer).eval()
        with torch.no_grad():
            noisy = model.parameters() if family == "gpt2" else model.heads.parameters()
            for p in noisy:
                p.add_(0.3 * torch.randn_like(p))
        model.save(tmp_path / "model")
        return model

    return save


@pytest.fixture
def exact():
    """The exact guided log-probs after each of some random texts: [texts, time, vocab]."""
    from qvgpt.decode.policy import next_token

    def compute(model, tokens, guidance):
        with torch.no_grad():
            hidden = model.trunk.hidden(tokens).flatten(0, 1)
            return next_token(model, hidden, guidance).logprob.unflatten(0, tokens.shape)

    return compute
