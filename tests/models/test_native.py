"""What is compiled in C must compute what torch does, within its buffers, or be done without."""

import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qvgpt.decode.next_token import _place
from qvgpt.decode.policy import slow_q
from qvgpt.models import laid_out, native
from qvgpt.models.gpt import GPT
from qvgpt.models.heads import ValueHeads
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.laid_out import lay_out, values_of
from qvgpt.models.native import Native

needs_compiler = pytest.mark.skipif(native.of(torch.float32) is None, reason="no C compiler")
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Relative; sums are fp32 in both, so that bf16 rounds once, at the end."""


@pytest.fixture(autouse=True)
def forget():
    """What was compiled belongs to a test's environment."""
    native.of.cache_clear()
    yield
    native.of.cache_clear()


def compiled(dtype):
    found = native.of(dtype)
    assert found is not None
    return found


def of_order(one, other):
    """The largest difference in units of what is expected."""
    return float((one.double() - other).abs().max() / other.abs().max())


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "out"), [(1, 32, 1), (3, 96, 37), (2, 64, 64), (9, 160, 50)]
)
def test_a_product_is_that_of_torch(rows, width, out, dtype, threads):
    torch.manual_seed(rows)
    x, onto = torch.randn(rows, 1, width).to(dtype), torch.randn(rows, 1, out).to(dtype)
    weight, bias = torch.randn(out, width).to(dtype), torch.randn(out).to(dtype)
    plain = F.linear(x.double(), weight.double())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        linear = compiled(dtype).linear
        found = {
            "plain": linear(x, weight, None),
            "bias": linear(x, weight, bias),
            "gelu": linear(x, weight, bias, gelu=True),
            "onto": linear(x, weight, None, onto=onto),
        }
    finally:
        torch.set_num_threads(before)
    exact = {
        "plain": plain,
        "bias": plain + bias,
        "gelu": F.gelu(plain + bias, approximate="tanh"),
        "onto": plain + onto,
    }
    for name, value in found.items():
        assert value.dtype == dtype
        assert value.shape == (rows, 1, out)
        assert of_order(value, exact[name]) < BOUNDS[dtype], name


@needs_compiler
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_attention_stores_and_sees_what_is_there_and_nothing_else(dtype):
    """Rows of unlike length; one is full, one idles and claims more than there is room for."""
    torch.manual_seed(0)
    lengths, slots, heads, dim = torch.tensor([0, 5, 20, 34, 99]), 36, 3, 16
    kv, qkv = torch.randn(2, 5, heads, slots, dim), torch.randn(5, 3 * heads * dim).to(dtype)
    expected = kv.clone()
    query, key, value = qkv.float().view(5, 3, heads, dim).unbind(1)
    exact = torch.empty(5, heads, dim)
    for row, length in enumerate(lengths.clamp(max=slots - 1).tolist()):
        expected[0, row, :, length], expected[1, row, :, length] = key[row], value[row]
        keys, values = expected[:, row, :, : length + 1].double()
        scores = (keys @ query[row].double()[:, :, None])[..., 0] / dim**0.5
        exact[row] = (scores.softmax(-1)[:, None] @ values)[:, 0]
    found = compiled(dtype).attend(qkv, kv, lengths)
    assert torch.equal(kv, expected)
    assert of_order(found, exact.flatten(1)) < BOUNDS[dtype]


@needs_compiler
@pytest.mark.parametrize(("rows", "picks", "width"), [(1, 50, 32), (7, 3, 160)])
def test_rows_of_tokens_are_gathered(rows, picks, width):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, width), torch.randn(90, width)
    tokens = torch.randint(0, 90, (picks, rows)).T  # laid out otherwise than they are read
    exact = torch.einsum("rf,rcf->rc", x.double(), weight.double()[tokens])
    gathered = compiled(torch.float32).gathered
    assert of_order(gathered(x, weight, tokens), exact) < BOUNDS[torch.float32]
    mean, plus = torch.randn(width), torch.randn(rows)
    exact += (plus.double() - x.double() @ mean.double())[:, None]
    assert of_order(gathered(x, weight, tokens, mean, plus), exact) < BOUNDS[torch.float32]
    with pytest.raises(IndexError, match="beyond the vocabulary of 90"):
        gathered(x, weight, tokens + 90)


HEADS = [
    HeadsConfig("linear", v="linear"), HeadsConfig("low_rank", 32, v="linear"),
    HeadsConfig("bilinear", num_q=3), HeadsConfig("mlp", num_q=1), HeadsConfig("mlp"),
    HeadsConfig("categorical", 16, bins=21, low=-1.0, high=2.0, v="linear"),
    HeadsConfig("categorical", 16, num_q=1, bins=2),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("config", HEADS, ids=lambda c: f"{c.kind}_{c.num_q}_{c.v}")
@torch.no_grad()
def test_value_heads_in_one_call_say_what_they_do(config, dtype, rows):
    torch.manual_seed(0)
    heads = ValueHeads(96, 300, config)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for layer in heads.hidden_layers:  # so that shortening them changes nothing
        for parameter in layer.parameters():
            parameter.copy_(parameter.to(dtype))
    hidden, tokens = torch.randn(rows, 96).to(dtype), torch.randint(0, 300, (rows, 50))
    exact = {how: slow_q(heads, hidden, tokens, how) for how in ("mean", "min")}
    lay_out(heads, dtype)
    step = values_of(heads)
    assert step is not None
    for how, q in exact.items():
        assert of_order(step(hidden, tokens, how == "min", False), q) < 1e-5, how
    if config.support is None:
        found, q = step(hidden, tokens, False, True), exact["mean"]
        assert of_order(found - found[:, :1] + 1, q - q[:, :1] + 1) < 1e-5
    many = torch.randn(100, 96).to(dtype)
    assert step(many, torch.zeros(100, 1, dtype=torch.int64), False, False) is None
    with pytest.raises(IndexError, match="beyond the vocabulary of 300"):
        step(hidden, tokens + 300, False, False)


@needs_compiler
@torch.no_grad()
def test_value_heads_that_go_on_learning_are_laid_out_anew():
    """What is kept of the weights, their mean say, is not that of yesterday."""
    heads = ValueHeads(96, 300, HeadsConfig("linear", v="linear"))
    hidden, tokens = torch.randn(1, 96), torch.arange(300)[None]
    for _ in range(2):
        for parameter in heads.target_q.parameters():
            parameter.add_(torch.randn_like(parameter))
        lay_out(heads, torch.float32)
        found = values_of(heads)(hidden, tokens, False, False)
        assert of_order(found, slow_q(heads, hidden, tokens, "mean")) < 1e-5


@needs_compiler
@torch.no_grad()
def test_twins_of_which_one_is_no_number_are_none():
    heads = ValueHeads(96, 30, HeadsConfig("mlp"))
    lay_out(heads, torch.float32)
    for twin in heads.target_q:
        twin.weight[3] = float("nan")
        lay_out(heads, torch.float32)
        found = values_of(heads)(torch.randn(1, 96), torch.tensor([[3, 4]]), True, False)
        assert found.isnan().tolist() == [[True, True]]  # of token 4 by the mean of all rows
        twin.weight.zero_()


@needs_compiler
@pytest.mark.parametrize("candidates", [1, 50, 255, 256, 1000, 5000])
def test_a_token_is_where_the_sum_passes_the_level(candidates):
    torch.manual_seed(candidates)
    logits = 3 * torch.randn(40, candidates)
    logits[::2, 1::3] = -torch.inf
    level = torch.rand(40, 1, dtype=torch.float64)
    level[:4] = torch.tensor([0.0, 0.0, 1 - 2**-53, 1 - 2**-53])[:, None]
    if candidates > 1:
        logits[[0, 3], 0], logits[[1, 2], -1] = -torch.inf, -torch.inf
    place = compiled(torch.float32).sample(logits, level)
    p = logits.double().softmax(-1)
    until, own = p.cumsum(-1).gather(1, place), p.gather(1, place)
    assert (own > 0).all()
    assert (until >= level - 1e-6).all()
    assert (until - own <= level + 1e-6).all()
    assert torch.equal(place, _place(logits.softmax(-1), level))  # as torch does it, beyond 1e-6


@needs_compiler
def test_logits_that_are_no_numbers_end_somewhere():
    """As they do without C: the first place, which exists."""
    level = torch.full((1, 1), 0.5, dtype=torch.float64)
    for bad in (float("nan"), -torch.inf):
        assert compiled(torch.float32).sample(torch.full((1, 600), bad), level).item() == 0


@needs_compiler
def test_what_is_no_number_is_seen():
    """Large scores do not overflow; NaN and infinity are not softened to numbers."""
    kv, lengths = torch.zeros(2, 1, 1, 3, 16), torch.tensor([1])
    attend = compiled(torch.float32).attend
    huge = torch.full((1, 48), 1e18)
    assert attend(huge, kv, lengths).isfinite().all()
    assert attend(torch.full((1, 48), float("nan")), kv, lengths).isnan().all()
    x, weight = torch.full((1, 32), float("nan")), torch.randn(32, 32)
    assert compiled(torch.float32).linear(x, weight, None, gelu=True).isnan().all()
    far = torch.tensor([[-3e4, 3e4, 0.0, -5.0] * 8])
    found = compiled(torch.float32).linear(far, torch.eye(32), None, gelu=True)
    torch.testing.assert_close(found, F.gelu(far, approximate="tanh"), atol=1e-6, rtol=1e-6)


@needs_compiler
@torch.no_grad()
def test_a_token_beyond_the_vocabulary_is_named():
    gpt = GPT(vocab_size=20, embed_dim=64, num_heads=4, num_layers=1, seq_len=32).eval()
    lay_out(gpt)
    for token in (20, -1):
        with pytest.raises(IndexError, match="beyond the vocabulary of 20"):
            laid_out.read(gpt, torch.tensor([[token]]), None, gpt.new_cache(1, 4))


@needs_compiler
def test_it_is_compiled_once_for_a_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled(torch.float32)
    (first,) = (tmp_path / "qvgpt").iterdir()
    made = first.stat().st_mtime_ns
    native.of.cache_clear()
    compiled(torch.float32)
    compiled(torch.bfloat16)
    files = set((tmp_path / "qvgpt").iterdir())
    assert len(files) == 2
    assert first.stat().st_mtime_ns == made


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of what is loaded")
def test_it_runs_on_the_threads_of_torch():
    """A second OpenMP would be a second team, each waiting for the cores of the other."""
    compiled(torch.float32)
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split()[-1] for line in lines if "omp" in line.split("/")[-1]}
    assert len({Path(path).resolve() for path in paths}) == 1, paths


@pytest.mark.parametrize("compiler", ["", "no-such-compiler", "false"])
@torch.no_grad()
def test_it_is_done_without_where_nothing_compiles(compiler, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("QVGPT_CC", compiler)
    with caplog.at_level(logging.WARNING):
        assert native.of(torch.float32) is None
    assert ("torch decodes alone" in caplog.text) == (compiler == "false")
    gpt = GPT(vocab_size=20, embed_dim=64, num_heads=4, num_layers=1, seq_len=32).eval()
    lay_out(gpt)
    tokens = torch.tensor([[3]])
    found = laid_out.read(gpt, tokens, None, gpt.new_cache(1, 4))
    torch.testing.assert_close(found, gpt.hidden(tokens), atol=1e-5, rtol=1e-5)
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_other_numbers_than_it_reads_are_refused():
    linear = compiled(torch.float32).linear
    x, weight = torch.randn(1, 32), torch.randn(4, 32)
    for wrong in (weight.bfloat16(), torch.randn(32, 4).T, weight.to("meta")):
        with pytest.raises(TypeError, match="in order on a CPU"):
            linear(x, wrong, None)
    with pytest.raises(TypeError):
        linear(x, weight, torch.randn(4).double())


def test_a_matrix_must_lie_as_it_is_read():
    assert Native.fits(torch.zeros(3, 64))
    assert not Native.fits(torch.zeros(3, 40))
    assert not Native.fits(torch.zeros(64, 64).T[:32])
