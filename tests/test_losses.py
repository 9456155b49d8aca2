import pytest
import torch
from jaxtyping import TypeCheckError

from qvgpt.losses import awac_weight, expectile_loss, masked_mean


def test_expectile_half_is_half_the_squared_error():
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(expectile_loss(a, b, 0.5), 0.5 * (a - b).square())


def test_expectile_by_hand():
    prediction, target = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 0.0]])
    found = expectile_loss(prediction, target, 0.9)
    torch.testing.assert_close(found, torch.tensor([[0.9 * 4, 0.1 * 1]]))


def test_no_gradient_reaches_the_target():
    prediction = torch.zeros(1, 1, requires_grad=True)
    target = torch.ones(1, 1, requires_grad=True)
    expectile_loss(prediction, target, 0.7).sum().backward()
    assert prediction.grad is not None
    assert target.grad is None


@pytest.mark.parametrize("padding", [99.0, float("nan"), float("inf")])
def test_padding_changes_nothing(padding):
    x = torch.tensor([[1.0, 3.0, padding]], requires_grad=True)
    mean = masked_mean(x, torch.tensor([[True, True, False]]))
    assert mean == 2.0
    mean.backward()
    assert x.grad.tolist() == [[0.5, 0.5, 0.0]]


def test_nothing_in_the_mask_gives_zero():
    assert masked_mean(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)) == 0.0


def test_p14_awac_weights_by_hand():
    advantage = torch.tensor([[0.0, 1.0, -2.0, 1000.0]], requires_grad=True)
    weight = awac_weight(advantage, temperature=2.0, max_weight=20.0)
    e = torch.tensor([0.5, -1.0]).exp().tolist()
    torch.testing.assert_close(weight, torch.tensor([[1.0, *e, 20.0]]))
    assert not weight.requires_grad
    alike = awac_weight(advantage[:, :3], temperature=1e9, max_weight=20.0)
    torch.testing.assert_close(alike, torch.ones(1, 3))


def test_wrong_shapes_are_caught():
    with pytest.raises(TypeCheckError):
        expectile_loss(torch.zeros(2, 3), torch.zeros(2, 4), 0.5)
