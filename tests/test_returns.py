"""Each multi-step target must reduce to the simpler one it generalises."""

import pytest
import torch

from qvgpt.returns import gae, lambda_returns

REWARD = torch.tensor([[1.0, 0.0, 2.0], [0.5, 3.0, 0.0]])
DISCOUNT = torch.tensor([[0.9, 0.9, 0.0], [0.9, 0.9, 0.0]])  # row 1 is cut short after two steps
NEXT_VALUE = torch.tensor([[10.0, 20.0, 30.0], [10.0, 20.0, 30.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_worked_example():
    # row 0 ended:     2;            0 + .9·2 = 1.8;       1 + .9·1.8 = 2.62
    # row 1 cut short: 3 + .9·20 = 21;                    .5 + .9·21 = 19.4
    returns = lambda_returns(REWARD, DISCOUNT, NEXT_VALUE, MASK, lambda_=1.0)
    torch.testing.assert_close(returns * MASK, torch.tensor([[2.62, 1.8, 2.0], [19.4, 21.0, 0.0]]))


def test_worked_example_half_way():
    # row 0: 2;  0 + .9·(.5·20 + .5·2) = 9.9;  1 + .9·(.5·10 + .5·9.9) = 9.955
    # row 1: 21;  .5 + .9·(.5·10 + .5·21) = 14.45
    returns = lambda_returns(REWARD, DISCOUNT, NEXT_VALUE, MASK, lambda_=0.5)
    expected = torch.tensor([[9.955, 9.9, 2.0], [14.45, 21.0, 0.0]])
    torch.testing.assert_close(returns * MASK, expected)


def test_lambda_zero_is_one_step_td():
    returns = lambda_returns(REWARD, DISCOUNT, NEXT_VALUE, MASK, lambda_=0.0)
    torch.testing.assert_close(returns, REWARD + DISCOUNT * NEXT_VALUE)


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95, 1.0])
def test_gae_is_the_sum_of_discounted_td_errors(lambda_):
    value = torch.tensor([[5.0, 10.0, 20.0], [5.0, 10.0, 20.0]])
    next_value = torch.tensor([[10.0, 20.0, 0.0], [10.0, 20.0, 0.0]])
    delta = REWARD + DISCOUNT * next_value - value
    a1 = delta[:, 1] + DISCOUNT[:, 1] * lambda_ * delta[:, 2] * MASK[:, 2]
    a0 = delta[:, 0] + DISCOUNT[:, 0] * lambda_ * a1
    advantage = gae(REWARD, DISCOUNT, value, next_value, MASK, lambda_)
    torch.testing.assert_close(advantage[:, :2], torch.stack([a0, a1], dim=1))


def test_no_power_of_gamma_underflows():
    steps = 4000
    reward = torch.zeros(1, steps)
    reward[0, -1] = 1.0
    discount = torch.full((1, steps), 0.9)
    zero, mask = torch.zeros(1, steps), torch.ones(1, steps, dtype=torch.bool)
    returns = lambda_returns(reward, discount, zero, mask, lambda_=1.0)
    assert returns.isfinite().all()
    torch.testing.assert_close(returns[0, -3:], torch.tensor([0.81, 0.9, 1.0]))


@pytest.mark.parametrize("steps", [1, 2, 37])
def test_many_steps_at_once_are_one_after_the_other(steps):
    torch.manual_seed(0)
    reward, next_value, lambda_ = torch.randn(3, 4, steps).unbind()
    discount, lambda_ = torch.rand(4, steps), lambda_.sigmoid()
    mask = torch.arange(steps) < torch.tensor([[steps], [max(1, steps // 2)], [1], [0]])
    expected = torch.zeros(4, steps)
    for k in reversed(range(steps)):
        goes_on = mask[:, k + 1] if k + 1 < steps else torch.zeros(4, dtype=torch.bool)
        later = expected[:, k + 1] if k + 1 < steps else torch.zeros(4)
        mixed = (1 - lambda_[:, k]) * next_value[:, k] + lambda_[:, k] * later
        future = torch.where(goes_on, mixed, next_value[:, k])
        expected[:, k] = reward[:, k] + discount[:, k] * future
    found = lambda_returns(reward, discount, next_value, mask, lambda_)
    torch.testing.assert_close(found * mask, expected * mask)
