import pytest
import torch

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel


@pytest.fixture(scope="session")
def make_model():
    """Tiny models with weights far from their start, so that no zero hides a mistake."""
    tokenizer = Tokenizer.train(["abcdefghijklmnopqrstuvwxyz :?"], "char")

    def make(kind="linear", num_q=2, tied=True, heads=True, noise=0.3, **more):
        torch.manual_seed(0)
        more = {"low": 0.0, "high": 1.0} | more
        trunk = GPT(tokenizer.vocab_size, 16, 2, 2, seq_len=48, tied=tied)
        config = HeadsConfig(kind, rank=5, num_q=num_q, **more) if heads else None
        model = ValueModel(trunk, config, tokenizer).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(noise * torch.randn_like(p))
        return model

    return make


@pytest.fixture(scope="session")
def model(make_model):
    return make_model()


@pytest.fixture(scope="session")
def plain(make_model):
    return make_model(heads=False)
