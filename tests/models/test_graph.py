import pytest
import torch

from qvgpt.decode.engine import Request, write
from qvgpt.decode.policy import Guidance
from qvgpt.models import graph
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.kv_cache import KVCache
from qvgpt.models.laid_out import read
from qvgpt.models.value_model import ValueModel


class Again:
    """What a CUDA graph does, on a CPU: the same once more on the tensors that were recorded."""

    def __init__(self, gpt: GPT, cache: KVCache, rows: int):
        self.tokens = torch.zeros(rows, 1, dtype=torch.long)
        self.mask = torch.ones(rows, 1, dtype=torch.bool)
        self.hidden = torch.empty(rows, 1, gpt.embed_dim)
        self.gpt, self.kv, self.length = gpt, [*cache.kv], cache.length
        self.longest, self.recorded = cache.longest, self

    def replay(self) -> None:
        cache = KVCache(self.kv, self.length)
        cache.longest = self.longest
        self.hidden.copy_(self.gpt.hidden(self.tokens, self.mask, cache=cache))
        self.length.copy_(cache.length)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    if request.param == "cpu":
        monkeypatch.setattr(graph, "suits", lambda trunk, cache: True)
        monkeypatch.setattr(graph.Graph, "of", Again)
        # buffers that lie still, as on a GPU
        monkeypatch.setattr(KVCache, "_needed", property(lambda cache: cache.capacity))
    return request.param


def model_of_random_weights() -> ValueModel:
    torch.manual_seed(0)
    trunk = GPT(vocab_size=61, embed_dim=32, num_heads=4, num_layers=3, seq_len=128)
    model = ValueModel(trunk, HeadsConfig("mlp"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def requests() -> list[Request]:
    how = (Guidance(beta=1.0), Guidance(beta=2.0, top_k=5), Guidance(temperature=0.0))
    prompts = ([3, 1], [5, 9, 2, 6, 30, 31, 32], [8] * 40)
    return [
        Request(prompt, max_tokens=20 + 11 * i + 17 * j, guidance=how[i], seed=7 * i + j)
        for i in range(3)
        for j, prompt in enumerate(prompts)
    ]


def test_recorded_steps_write_the_same_texts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # rows of every length, over three buckets of the cache, joining and leaving
    model = model_of_random_weights().to(device)
    recorded = [text.tokens for text in write(model, requests(), max_batch=4)]
    monkeypatch.setattr(graph, "suits", lambda trunk, cache: False)
    assert recorded == [text.tokens for text in write(model, requests(), max_batch=4)]


def test_a_recorded_step_is_the_step(device: str) -> None:
    model = model_of_random_weights().to(device)
    tokens = torch.randint(0, 61, (60, 5), device=device)
    mask = torch.rand(60, 5, device=device) < 0.8
    mask[:, 0] = True
    plain, recorded = (model.trunk.new_cache(5, 60) for _ in range(2))
    with torch.no_grad():
        for now, real in zip(tokens, mask, strict=True):
            asked = now[:, None], real[:, None]
            expected = model.trunk.hidden(*asked, cache=plain)
            found = read(model.trunk, *asked, recorded)
            torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
    assert any(recorded.graphs.values())
    assert torch.equal(plain.length, recorded.length)


def test_a_cache_whose_rows_move_is_recorded_anew(device: str) -> None:
    model = model_of_random_weights().to(device)
    cache = model.trunk.new_cache(4, 64)
    one = torch.ones(4, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        for _ in range(3):
            read(model.trunk, one, None, cache)
        cache.reorder(torch.tensor([2, 1], device=device))
        assert not cache.graphs
        found = [read(model.trunk, one[:2], None, cache) for _ in range(3)][-1]
        plain = model.trunk.new_cache(2, 64)
        expected = [model.trunk.hidden(one[:2], cache=plain) for _ in range(6)][-1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
