"""Attention by plain products is torch's, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from qvgpt.models.attention import (
    Packed,
    _additive,
    _Products,
    attention,
    packed_attention,
    seen_in_rows,
)
from qvgpt.models.dropout import Dropout, drawn


def inputs(dtype, batch=3, heads=2, time=9, head_dim=4):
    torch.manual_seed(0)
    found = [torch.randn(batch, heads, time, head_dim, dtype=dtype) for _ in range(4)]
    return [x.requires_grad_() for x in found[:3]], found[3]


def visible(kind, batch=3, time=9):
    if kind is None:
        return None
    text = torch.arange(time) // 4 if kind == "packed" else torch.zeros(time)
    return (text[:, None] == text).tril()[None, None].expand(batch, 1, time, time)


@pytest.mark.parametrize("kind", [None, "packed", "causal"])
def test_plain_products_are_torchs_attention(kind):
    results = []
    for ours in (False, True):
        (q, k, v), gradient = inputs(torch.float64)
        mask = visible(kind)
        if ours:
            flat = (x.reshape(6, 9, 4) for x in (q, k, v))
            out = _Products.apply(*flat, _additive(mask, q)).view_as(q)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        out.backward(gradient)
        results.append((out, q.grad, k.grad, v.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_in_bfloat16_it_is_as_near_to_fp32_as_torchs_own(monkeypatch):
    (q, k, v), gradient = inputs(torch.float32, time=64, head_dim=16)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    exact.backward(gradient)
    wanted = [exact, q.grad, k.grad, v.grad]
    errors = []
    for short in (512, 0):
        monkeypatch.setattr("qvgpt.models.attention.SHORT", short)
        half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
        out = attention(*half, None)
        out.backward(gradient.bfloat16())
        found = [out, *(x.grad for x in half)]
        errors.append([(a - b).abs().mean() for a, b in zip(found, wanted, strict=True)])
    for ours, theirs in zip(*errors, strict=True):
        assert ours < 1.5 * theirs


@pytest.mark.parametrize("kind", [None, "packed"])
def test_dropout_is_that_of_the_probabilities_in_values_and_gradients(kind):
    results = []
    for ours in (True, False):
        (q, k, v), gradient = inputs(torch.float64)
        mask = visible(kind)
        torch.manual_seed(1)
        if ours:
            out = attention(q, k, v, mask, 0.3)
        else:
            added = _additive(mask, q)
            p = q @ k.transpose(2, 3) / 2 + (added[:, None] if added.dim() == 3 else added)
            kept, scale = drawn((6, 9, 9), 0.3)
            out = p.softmax(-1) * kept.view(3, 2, 9, 9) * scale @ v
        out.backward(gradient)
        results.append((out, q.grad, k.grad, v.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5])
def test_so_many_are_dropped_and_the_mean_stays(dtype, rate):
    torch.manual_seed(0)
    x = torch.ones(1003, 401, dtype=dtype, requires_grad=True)
    out = Dropout(rate)(x)
    dropped = (out == 0).float()
    error = 4 * (rate * (1 - rate) / x.numel()) ** 0.5
    assert abs(dropped.mean() - rate) < error
    for lane in range(4):  # of each number's four
        assert abs(dropped.flatten()[lane::4].mean() - rate) < 2 * error
    rounding = 1e-4 if dtype == torch.float32 else 1e-2
    assert out.max().item() == pytest.approx(1 / (1 - rate), rel=rounding)
    gradient = torch.randn_like(x)
    out.backward(gradient)
    torch.testing.assert_close(x.grad, gradient * out)


def test_nothing_is_dropped_unless_it_learns_and_all_at_a_rate_of_one():
    x = torch.randn(50, 7)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert not Dropout(1.0)(x).any()


def test_what_a_token_sees_where_texts_share_prompts():
    """Of two prompts: ab, then c | de; f, then g; and padding, each token a text by itself."""
    positions = torch.tensor([[0, 1, 2, 2, 3, 0, 1, 0, 0]])
    seen = ["a", "ab", "abc", "abd", "abde", "f", "fg", ".", ","]
    found = seen_in_rows(positions)
    assert found is not None
    for row, expected in zip(found[0, 0].tolist(), seen, strict=True):
        assert "".join(x for x, sees in zip("abcdefg.,", row, strict=True) if sees) == expected
    assert seen_in_rows(torch.tensor([[0, 1, 2, 0, 1, 0, 0]])) is None
    longer = torch.tensor([[0, 1, 2, 3, 2, 3, 2]])  # the first text's own tokens are no prompt
    assert seen_in_rows(longer)[0, 0, 4].tolist() == [True, True, False, False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_packed_texts_attend_as_each_would_alone(dtype):
    torch.manual_seed(0)
    lengths = [[40, 3, 33], [2, 64], [1, 9]]  # of a row each; what is left of a row is padding
    rows = [[torch.arange(n) for n in row] for row in lengths]
    positions = torch.stack([F.pad(torch.cat(row), (0, 80 - sum(map(len, row)))) for row in rows])
    qkv = torch.randn(3, 80, 3, 2, 4, dtype=dtype).requires_grad_()
    gradient = torch.randn(3, 80, 2, 4, dtype=dtype)
    found = packed_attention(qkv, Packed.of(positions, heads=2))
    found.backward(gradient)
    ours, qkv.grad = qkv.grad, None
    tolerance = 1e-12 if dtype == torch.float64 else 0.02
    for row, texts in enumerate(lengths):
        at = 0
        for n in texts:
            one = slice(at, at + n)
            q, k, v = qkv[row : row + 1, one].transpose(1, 3).unbind(2)
            alone = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            torch.testing.assert_close(found[row, one], alone[0], atol=tolerance, rtol=0)
            alone.backward(gradient[row : row + 1, one])
            at += n
    real = torch.arange(80) < torch.tensor([sum(row) for row in lengths])[:, None]
    torch.testing.assert_close(ours[real], qkv.grad[real], atol=2 * tolerance, rtol=tolerance)
