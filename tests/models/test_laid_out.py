"""Weights laid out for decoding must multiply as before, and be laid out anew once they change."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qvgpt.decode.engine import Engine, Request, generate
from qvgpt.decode.policy import Guidance
from qvgpt.models import laid_out, native
from qvgpt.models.blocked import Blocked, product
from qvgpt.models.gpt import GPT
from qvgpt.models.heads import ValueHeads
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.laid_out import head_of, lay_out
from qvgpt.models.value_model import ValueModel

pytestmark = pytest.mark.skipif(
    not Blocked.suits(torch.zeros(256, 256)), reason="no oneDNN in this build of torch"
)
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Of products of 256 numbers of order 1, whose sums are of order 16."""
COMPILED = native.of(torch.float32) is not None


@pytest.fixture
def trunk():
    torch.manual_seed(0)
    return GPT(vocab_size=200, embed_dim=256, num_heads=4, num_layers=2, seq_len=32).eval()


@pytest.mark.parametrize("rows", [1, 3, 4, 70])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@torch.no_grad()
def test_products_are_those_of_the_matrix(dtype, rows):
    torch.manual_seed(rows)
    weight, x = torch.randn(300, 256).to(dtype), torch.randn(rows, 1, 256).to(dtype)
    bias, laid_out = torch.randn(300).to(dtype), Blocked(weight)
    exact = (x.double() @ weight.double().T).float()
    bound = BOUNDS[dtype]
    for found in (laid_out(x), product(x, laid_out), laid_out(x, bias) - bias):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), exact, atol=bound, rtol=bound / 4)


@torch.no_grad()
def test_a_laid_out_trunk_says_the_same_and_is_used(trunk, monkeypatch):
    tokens = torch.randint(0, 200, (5, 9))
    plain = trunk.hidden(tokens)
    lay_out(trunk)
    used = []
    product = Blocked.__call__
    monkeypatch.setattr(
        Blocked, "__call__", lambda self, *x: used.append(self) or product(self, *x)
    )
    with laid_out.laid_out(trunk):
        found = trunk.hidden(tokens)
    assert len(used) == 4 * 2  # the matrices of two blocks
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    trunk.hidden(tokens)
    assert len(used) == 4 * 2, "outside of `with` nothing is changed"


@pytest.mark.parametrize("fused", [False, True])
def test_learned_weights_are_laid_out_anew(trunk, fused):
    lay_out(trunk)
    before = head_of(trunk)
    optimizer = torch.optim.AdamW(trunk.parameters(), lr=0.1, fused=fused)
    trunk(torch.randint(0, 200, (5, 9))).logsumexp(-1).sum().backward()
    optimizer.step()
    tokens = torch.randint(0, 200, (5, 9))
    lay_out(trunk)
    assert head_of(trunk) is not before
    with torch.no_grad():
        exact = trunk.hidden(tokens)
        with laid_out.laid_out(trunk):
            torch.testing.assert_close(trunk.hidden(tokens), exact, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_row_that_is_written_to_unseen_is_laid_out_anew(trunk):
    lay_out(trunk)
    trunk.output_weight.data[9] *= -30
    lay_out(trunk)
    states = torch.randn(5, 256)
    exact = states @ trunk.output_weight.T
    torch.testing.assert_close(product(states, head_of(trunk)), exact, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("what", ["trunk", "heads"])
def test_an_engine_follows_weights_that_change_between_its_texts(trunk, beta, what):
    """With β the LM head is a folded one, which is made anew too."""
    model = ValueModel(trunk, HeadsConfig("linear", num_q=1))
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    requests = [Request([1, i], 3, Guidance(beta), seed=i) for i in range(8)]

    def write(engine):
        ids = [engine.submit(request) for request in requests]
        written = {i: [] for i in ids}
        while engine.busy:
            for event in engine.step():
                written[event.request_id].append(event.token)
        return [*written.values()]

    kept = Engine(model)
    before = write(kept)
    assert write(kept) == before
    folded = kept.guide._fold(1.0)
    assert write(kept) == before
    assert kept.guide._fold(1.0) is folded
    model.train()
    with torch.no_grad():
        for parameter in (model.trunk if what == "trunk" else model.heads.target_q).parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    assert write(kept) == write(Engine(model))
    assert (write(kept) == before) == (what == "heads" and beta == 0)


def test_what_did_not_change_is_kept(trunk):
    lay_out(trunk)
    before = head_of(trunk)
    lay_out(trunk)
    assert head_of(trunk) is before


@torch.no_grad()
def test_a_copy_has_weights_of_its_own(trunk):
    lay_out(trunk)
    other = copy.deepcopy(trunk)
    for parameter in other.parameters():
        parameter.mul_(0.5)
    exact = other.hidden(torch.arange(9)[None])
    lay_out(other)
    with laid_out.laid_out(other):
        found = other.hidden(torch.arange(9)[None])
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)


def test_small_and_foreign_matrices_stay():
    assert not Blocked.suits(torch.zeros(8, 8))
    assert not Blocked.suits(torch.zeros(512, 512, dtype=torch.float64))
    assert not Blocked.suits(torch.zeros(512, 512, device="meta"))


def test_weights_elsewhere_are_let_alone(trunk):
    """On the meta device nothing can be read: looking at a number of them would fail."""
    elsewhere = trunk.to("meta")
    lay_out(elsewhere)
    assert head_of(elsewhere) is elsewhere.output_weight


def tokens_and_mask():
    """Three rows of unlike length, of which one idles."""
    prompts = torch.randint(0, 200, (3, 7))
    seen = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [1] * 2 + [0] * 5]).bool()
    return prompts, seen, torch.tensor([[5], [6], [7]]), torch.tensor([[True], [False], [True]])


@pytest.mark.parametrize("how", ["one call", "six calls a layer", "by torch"])
@pytest.mark.parametrize("embed", [32, 256])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@torch.no_grad()
def test_a_step_is_what_the_gpt_computes(embed, dtype, how, monkeypatch):
    """32 is too small for vectors: torch alone does it, however it is asked for."""
    torch.manual_seed(1)
    monkeypatch.setattr(native, "few", lambda rows, embed: how == "one call")
    if how == "by torch":
        monkeypatch.setattr(native, "of", lambda dtype: None)
    gpt = GPT(vocab_size=200, embed_dim=embed, num_heads=4, num_layers=3, seq_len=48).to(dtype)
    for p in gpt.eval().parameters():
        p.normal_(std=0.2)  # biases and norms too
    prompts, seen, tokens, real = tokens_and_mask()
    plain, ours = gpt.new_cache(3, 48), gpt.new_cache(3, 48)
    for cache in (plain, ours):
        gpt.hidden(prompts, seen, cache=cache)
    lay_out(gpt)
    step = laid_out.step_of(gpt)
    assert step is not None
    assert (step.compiled is not None) == (embed == 256 and how != "by torch" and COMPILED)
    bound = 2e-5 if dtype == torch.float32 else 0.15
    for _ in range(30):  # over the border of a bucket
        exact = gpt.hidden(tokens, real, cache=plain)
        found = laid_out.read(gpt, tokens, real, ours)
        difference = (found - exact)[real[:, 0]].abs().max()
        assert found.shape == exact.shape
        assert float(difference) < bound
        tokens = (tokens + 1) % 200
    assert ours.length.tolist() == plain.length.tolist() == [37, 4, 32]
    ours.reorder(torch.tensor([2, 0]))
    plain.reorder(torch.tensor([2, 0]))
    pair = laid_out.read(gpt, tokens[:2], None, ours), gpt.hidden(tokens[:2], cache=plain)
    torch.testing.assert_close(*pair, atol=bound, rtol=0.05)


@pytest.mark.parametrize("how", ["replaced", "hooked"])
@torch.no_grad()
def test_a_step_follows_its_gpt(how):
    """Also one so small that no matrix of it is laid out."""
    torch.manual_seed(1)
    gpt = GPT(vocab_size=20, embed_dim=8, num_heads=2, num_layers=1, seq_len=32).eval()
    lay_out(gpt)
    if how == "replaced":
        gpt.blocks[0].up.weight.data = torch.randn(32, 8)
    else:
        gpt.blocks[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    lay_out(gpt)
    tokens = torch.tensor([[3]])
    found = laid_out.read(gpt, tokens, None, gpt.new_cache(1, 4))
    torch.testing.assert_close(found, gpt.hidden(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "low_rank", "linear", "categorical"])
@torch.no_grad()
def test_short_states_have_hidden_layers_read_short_and_values_not(kind):
    """Of bf16 trunks; the rows of tokens and all that is summed to a value stay as they are."""
    torch.manual_seed(0)
    config = {"linear": HeadsConfig("linear"), "low_rank": HeadsConfig("low_rank", 128)}.get(
        kind, HeadsConfig(kind, 128, bins=4, low=0.0, high=1.0)
    )
    heads = ValueHeads(256, 50, config)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    states, tokens = torch.randn(9, 256).bfloat16().float(), torch.randint(0, 50, (9, 7))
    exact = heads.target_q[0].of_many(states, tokens)
    wrong = {}
    for dtype in (torch.float32, torch.bfloat16):
        lay_out(heads, dtype)
        with laid_out.laid_out(heads):
            wrong[dtype] = (heads.target_q[0].of_many(states, tokens) - exact).abs().max()
    assert wrong[torch.float32] <= 1e-5 * exact.abs().max()
    assert 1e-5 < wrong[torch.bfloat16] / exact.std() < 0.02


@pytest.mark.parametrize("compiled", [True, False])
def test_threads_do_not_disturb_one_another(trunk, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(laid_out, "_suits", lambda module: False)
    model = ValueModel(trunk, HeadsConfig("mlp"))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    prompts = [[1, 2, 3], list(range(1, 15))]

    def write(i):
        return generate(model, [prompts[i]], Guidance(), max_tokens=16, seed=1)[0].tokens

    alone = [write(0), write(1)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, [0, 1] * 8)) == alone * 8


def test_nothing_keeps_a_trunk_alive(trunk):
    lay_out(trunk)
    gc.collect()  # of what other tests left
    before = len(laid_out._known)
    other = copy.deepcopy(trunk)
    lay_out(other)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    assert len(laid_out._known) == before


@pytest.mark.parametrize("kind", ["low_rank", "mlp", "categorical"])
@torch.no_grad()
def test_twins_read_the_states_in_one_product_each_for_q_and_baseline(kind, monkeypatch):
    torch.manual_seed(0)
    heads = ValueHeads(256, 40, HeadsConfig(kind, rank=128, bins=4, low=0.0, high=1.0)).eval()
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    states = [torch.randn(3, 256), torch.randn(3, 256)]
    plain = [[head(x) for head in heads.target_q] for x in states]
    lay_out(heads)
    used = []
    product = Blocked.__call__
    monkeypatch.setattr(
        Blocked, "__call__", lambda self, *x: used.append(self) or product(self, *x)
    )
    for x, expected in zip(states, plain, strict=True):
        used.clear()
        with laid_out.laid_out(heads):
            found = [head(x) for head in heads.target_q]
        assert len(used) == 2
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
