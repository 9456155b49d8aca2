"""Distributions over a grid of returns: targets and what is read from them, by hand."""

import math

import pytest
import torch

from qvgpt.categorical import Support, read_distribution
from qvgpt.errors import QvgptError
from qvgpt.losses import cross_entropy

HALF = Support(0.0, 2.0, 5)  # 0, ½, 1, 1½, 2


def test_two_hot_by_hand():
    assert HALF.centres(torch.zeros(1)).tolist() == [0, 0.5, 1, 1.5, 2]
    found = HALF.target(torch.tensor([0.0, 0.6, 1.5, 9.0, -9.0]))
    expected = torch.tensor(
        [[1.0, 0, 0, 0, 0], [0, 0.8, 0.2, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0]]
    )
    torch.testing.assert_close(found, expected)


def test_a_target_has_the_mean_of_its_return():
    value = torch.linspace(0, 2, 41)
    for support in (HALF, Support(0.0, 2.0, 21, sigma=0.75)):
        target = support.target(value)
        torch.testing.assert_close(target.sum(-1), torch.ones(41))
        mean = target @ support.centres(value)
        torch.testing.assert_close(mean, value, atol=2e-3, rtol=0)


def test_hl_gauss_by_hand():
    support = Support(0.0, 2.0, 11, sigma=1.0)  # 3 bins more at either end
    centres = support.centres(torch.zeros(1))
    torch.testing.assert_close(centres, torch.linspace(-1.5, 3.5, 11))
    at_one = support.target(torch.tensor(1.0))
    inside = math.erf(0.5 / math.sqrt(2))  # half a bin to each side of the middle one
    assert at_one[5].item() == pytest.approx(inside, abs=1e-6)
    torch.testing.assert_close(at_one, at_one.flip(0))


def test_functionals_by_hand():
    returns = torch.tensor([0.0, 1.0, 3.0])
    logits = torch.tensor([0.2, 0.5, 0.3]).log() + 7.0

    def read(functional, **options):
        return read_distribution(logits, returns, functional, **options).item()

    assert read("mean") == pytest.approx(1.4)
    expected = 0.5 * math.log(0.2 + 0.5 * math.exp(2) + 0.3 * math.exp(6))
    assert read("soft", eta=0.5) == pytest.approx(expected, abs=1e-5)
    assert read("soft", eta=1e3) == pytest.approx(1.4, abs=2e-3)
    assert read("soft", eta=1e-3) == pytest.approx(3.0, abs=2e-3)
    assert read("soft", eta=-1e-3) == pytest.approx(0.0, abs=2e-3)
    assert read("cvar", alpha=0.1) == 0.0
    assert read("cvar", alpha=0.4) == pytest.approx(0.5)  # half 0, half 1
    assert read("cvar", alpha=1.0) == pytest.approx(1.4)


def test_in_two_bins_the_loss_is_that_of_a_bernoulli():
    support = Support(0.0, 1.0, 2)
    outcome, logits = torch.tensor([[1.0, 0.0, 0.25]]), torch.randn(1, 3, 2)
    found = cross_entropy(logits, support.target(outcome))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits[..., 1] - logits[..., 0], outcome, reduction="none"
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((1.0, 1.0, 5), "low must be below high"),
        ((0.0, math.inf, 5), "low must be below high"),
        ((0.0, 1.0, 1), "bins must be 2 or more"),
        ((0.0, 1.0, 7, 0.75), "bins must be 2 or more, beside those that sigma adds"),
        ((0.0, 1.0, 7, -1.0), "sigma must be 0 or more"),
    ],
)
def test_no_grid_of_returns(options, message):
    with pytest.raises(QvgptError, match=message):
        Support(*options)
