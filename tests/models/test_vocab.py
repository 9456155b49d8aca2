"""Operations over the vocabulary are the naive ones, chunked, capped or half precise."""

import pytest
import torch

from qvgpt.models import vocab

ROWS, VOCAB, WIDTH = 9, 13, 6


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    token = torch.randint(0, VOCAB, (ROWS,))
    hidden = torch.randn(ROWS, WIDTH, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, dtype=dtype).requires_grad_()
    return hidden, weight, token


def naive(hidden, weight, token, softcap, centred=False):
    z = hidden @ (weight - weight.mean(0) if centred else weight).T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_pi = z.log_softmax(-1)
    taken = z.gather(1, token[:, None])[:, 0]
    return {
        "taken": taken,
        "logsumexp": z.logsumexp(-1),
        "log_prob": log_pi.gather(1, token[:, None])[:, 0],
        "entropy": torch.distributions.Categorical(logits=z).entropy(),
    }


def chunked(hidden, weight, token, softcap, even):
    taken, total = vocab.taken_and_logsumexp(hidden, weight, token, softcap, even)
    return {
        "taken": taken,
        "logsumexp": total,
        "log_prob": vocab.log_prob(hidden, weight, token, softcap, even),
        "entropy": vocab.entropy(hidden, weight, softcap),
    }


@pytest.mark.parametrize("chunk", [1, 40, 2**24])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("weights", ["mean", "uneven"])
@pytest.mark.parametrize(("dtype", "below"), [(torch.float32, 3), (torch.float64, 0)])
def test_chunked_is_naive_with_its_gradients(
    monkeypatch, chunk, softcap, even, weights, dtype, below
):
    def aligned(weight):  # as on a GPU
        return torch.nn.functional.pad(weight, (0, 0, 0, below))

    monkeypatch.setattr(vocab, "_aligned", aligned)
    monkeypatch.setattr(vocab, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(vocab, "_BLOCK_ELEMENTS", max(1, chunk // 2))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    weigh = torch.full((ROWS,), 0.3) if weights == "mean" else torch.rand(ROWS)
    for name in ("taken", "logsumexp", "log_prob", "entropy"):
        results = []
        for function, more in ((naive, ()), (chunked, (even,))):
            hidden, weight, token = inputs(dtype)
            value = function(hidden, weight, token, softcap, *more)[name]
            (weigh.to(dtype) * value).sum().backward()
            results.append((value, hidden.grad, weight.grad))
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("chunk", [40, 2**24])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_centred_is_of_the_weights_without_their_mean(monkeypatch, chunk, even, dtype):
    monkeypatch.setattr(vocab, "CHUNK_ELEMENTS", chunk)
    results = []
    for ours in (False, True):
        hidden, weight, token = inputs(dtype)
        if ours:
            taken, total = vocab.taken_and_logsumexp(hidden, weight, token, even=even, centred=True)
        else:
            found = naive(hidden, weight, token, None, centred=True)
            taken, total = found["taken"], found["logsumexp"]
        (taken.square() + 0.1 * total).mean().backward()
        results.append((taken, total, hidden.grad, weight.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_second_backward_pass_is_as_good_as_the_first():
    hidden, weight, token = inputs()
    value = vocab.log_prob(hidden, weight, token).mean()
    value.backward(retain_graph=True)
    first = weight.grad.clone()
    weight.grad = None
    value.backward()
    torch.testing.assert_close(weight.grad, first)


@pytest.mark.parametrize("learns", ["hidden", "weight"])
def test_only_what_learns_gets_a_gradient(learns):
    hidden, weight, token = inputs()
    expected = inputs()
    naive(*expected, None)["log_prob"].mean().backward()
    (weight if learns == "hidden" else hidden).requires_grad_(False)
    vocab.log_prob(hidden, weight, token).mean().backward()
    found = {"hidden": hidden.grad, "weight": weight.grad}
    wanted = {"hidden": expected[0].grad, "weight": expected[1].grad}
    torch.testing.assert_close(found[learns], wanted[learns])
    assert sum(g is None for g in found.values()) == 1


def test_half_precision_products_leave_the_taken_exact():
    hidden, weight, token = inputs()
    exact, total = vocab.taken_and_logsumexp(hidden, weight, token)
    with torch.autocast("cpu", torch.bfloat16):
        taken, rounded = vocab.taken_and_logsumexp(hidden, weight, token)
    assert torch.equal(taken, exact)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, total, atol=0.05, rtol=0)
    assert not torch.equal(rounded, total)


def test_gradients_are_those_of_finite_differences():
    hidden, weight, token = inputs(torch.float64)
    for even in (True, False):
        assert torch.autograd.gradcheck(
            lambda h, w, even=even: vocab.taken_and_logsumexp(h, w, token, 2.0, even),
            (hidden, weight),
        )


@pytest.mark.parametrize("chunk", [1, 80, 2**24])
def test_the_best_token_is_found_in_chunks(monkeypatch, chunk):
    monkeypatch.setattr(vocab, "CHUNK_ELEMENTS", chunk)
    hidden, weight, _ = inputs()
    most = []

    def score(rows):
        most.append(len(rows))
        return rows @ weight.T

    value, token = vocab.best(score, hidden, VOCAB, tensors=3)
    expected = (hidden @ weight.T).max(-1)
    torch.testing.assert_close(value, expected.values)
    assert torch.equal(token, expected.indices)
    assert not value.requires_grad
    assert max(most) <= max(1, chunk // (3 * VOCAB))
    assert vocab.best(score, hidden[:0], VOCAB)[0].shape == (0,)


def test_no_rows_are_no_trouble():
    _, weight, _ = inputs()
    nothing = torch.zeros(0, WIDTH, requires_grad=True)
    value = vocab.log_prob(nothing, weight, torch.zeros(0, dtype=torch.long))
    value.sum().backward()
    assert value.shape == (0,)
    assert weight.grad.eq(0).all()
    assert vocab.entropy(nothing, weight).shape == (0,)


def test_nothing_as_large_as_the_logits_is_kept(monkeypatch):
    monkeypatch.setattr(vocab, "CHUNK_ELEMENTS", 4 * VOCAB)
    hidden, weight, token = inputs()
    kept = []
    hooks = (lambda x: kept.append(x.numel()) or x, lambda x: x)
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        vocab.log_prob(hidden, weight, token)
    assert kept
    assert max(kept) <= max(VOCAB * WIDTH, ROWS * WIDTH)


@pytest.mark.parametrize("chunk", [1, 40, 2**24])
@pytest.mark.parametrize("weights", ["mean", "uneven"])
def test_half_precision_products_give_nearly_the_exact_gradients(monkeypatch, chunk, weights):
    monkeypatch.setattr(vocab, "CHUNK_ELEMENTS", chunk)
    weigh, results = torch.full((ROWS,), 0.3) if weights == "mean" else torch.rand(ROWS), []
    for half in (False, True):
        hidden, weight, token = inputs()
        before = weight.detach().clone()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = vocab.log_prob(hidden, weight, token)
        (weigh * value).sum().backward()
        assert torch.equal(weight, before)
        results.append((hidden.grad, weight.grad))
    for exact, found in zip(*results, strict=True):
        assert (found - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("uses", ["both", "rows", "head", "head twice"])
def test_a_tied_matrix_gets_the_gradients_of_both_its_uses(uses):
    tokens, results = torch.tensor([[1, 3, 3], [0, 12, 1]]), []
    for ours in (False, True):
        hidden, weight, token = inputs()
        rows, head = vocab.lookup_tied(weight, tokens) if ours else (weight[tokens], weight)
        loss = 0.0 * hidden.sum()
        if uses in ("both", "rows"):
            loss = loss + (rows**3).sum()
        if uses != "rows":
            loss = loss + vocab.log_prob(hidden, head, token).mean()
        if uses == "head twice":
            loss = loss + vocab.log_prob(hidden + rows[0, 0], head, 0 * token).mean()
            loss = loss + vocab.entropy(hidden, head).mean()
        loss.backward()
        results.append(weight.grad)
    torch.testing.assert_close(*results)
