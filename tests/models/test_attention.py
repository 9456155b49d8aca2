"""Attention by plain products is torch's, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from qvgpt.models.attention import Packed, _additive, _ShortAttention, attention, packed_attention


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
            out = _ShortAttention.apply(*flat, _additive(mask, q)).view_as(q)
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


def test_dropout_drops():
    (q, k, v), _ = inputs(torch.bfloat16)
    assert not torch.equal(attention(q, k, v, None, 0.5), attention(q, k, v, None))


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
