"""Are the values right? What Q and V foretold on texts whose returns are known.

    found = value_diagnostics(model, trajectories)      JSON-ready

`watch.py` looks at the same figures while a model is trained. Returns are known only of texts that
ended: what was cut short counts for TD errors and sizes, and not for calibration and correlations.
All figures are in the units that rewards were given in.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qvgpt.bootstrap import calibration, mean_ci, pearson, spearman
from qvgpt.errors import QvgptError
from qvgpt.models.value_model import AMONG_CANDIDATES, ValueModel
from qvgpt.objectives import Values
from qvgpt.objectives.base import discount
from qvgpt.objectives.distributional import ended
from qvgpt.returns import lambda_returns
from qvgpt.trajectory import Trajectory, TrajectoryBatch, centred, collate

BINS = 10
_TIE = 1e-6  # of the greatest return: what differs by less is equal but for rounding

Array = Float[np.ndarray, "decisions"]
Text = dict[str, Any]
"""The columns of `Foretold` for one text."""


@dataclass(frozen=True)
class Foretold:
    """What values said of each decision that counts, and what came. NaN: not asked."""

    text: Array
    """Which text it is of; the decisions of a text follow each other."""
    step: Array
    """Which decision of its text, from 0."""
    ended: Array
    """1 where the text was seen to its end, so that `to_come` is its return."""
    v: Array
    q: Array
    """Mean of the slow heads, as in decoding; of the token that was taken."""
    to_come: Array
    """The rewards still to come, discounted as the values are."""
    earned: Array
    """The rewards of the decisions before, discounted to the text's first."""
    so_far: Array
    """The discount from the text's first decision to this one."""
    td_error: Array
    """r + γ V(s′) − Q(s, a); with V(s) in the place of Q where V alone is learned."""
    twin_gap: Array
    """How far the slow heads are apart."""
    candidate_q_max: Array
    """These four: see `Values`."""
    any_q_max: Array
    q_spread: Array
    logit_spread: Array

    @classmethod
    def of(cls, rows: Float[Tensor, "decisions columns"]) -> "Foretold":
        """From what `foretold` gave for one batch or many, in any order."""
        found = rows.double().cpu().numpy()
        return cls(*found[np.argsort(found[:, 0], kind="stable")].T)

    def where(self, chosen: np.ndarray) -> "Foretold":
        """Only some of the decisions."""
        return Foretold(*(getattr(self, f.name)[chosen] for f in fields(self)))

    def texts(self) -> list[Text]:
        """Column by column for each text."""
        starts = np.flatnonzero(np.diff(self.text)) + 1
        columns = {f.name: np.split(getattr(self, f.name), starts) for f in fields(self)}
        texts = zip(*columns.values(), strict=True) if len(self.text) else ()
        return [dict(zip(columns, text, strict=True)) for text in texts]


def foretold(
    values: Values,
    batch: TrajectoryBatch,
    texts: Sequence[int],
    gamma: float,
    per_turn_discount: bool,
    reward_scale: float = 1.0,
) -> Float[Tensor, "decisions columns"]:
    """The columns of `Foretold`, a row for each decision of the batch that counts.

    `values` has v, and target_q where Q is learned; `texts` numbers the batch's texts.
    """
    assert values.v is not None
    step_gamma, reward = discount(batch, gamma, per_turn_discount).double(), batch.reward.double()
    to_come = lambda_returns(reward, step_gamma, torch.zeros_like(reward), batch.mask, lambda_=1.0)
    so_far = step_gamma.cumprod(1).roll(1, dims=1)
    so_far[:, 0] = 1.0
    earned = (so_far * reward).cumsum(1).roll(1, dims=1)
    earned[:, 0] = 0.0
    v, slow = values.v[:, :-1], values.target_q
    missing = torch.full_like(v, math.nan)
    q = missing if slow is None else slow.mean(0)
    twin_gap = missing if slow is None else slow.amax(0) - slow.amin(0)
    td_error = reward + step_gamma * values.v[:, 1:] - (v if slow is None else q)
    number = torch.tensor(texts, device=v.device)[:, None].expand_as(v)
    asked = values.candidate_q_max, values.any_q_max, values.q_spread
    among = [missing if x is None else x for x in asked]
    in_reward = [v, q, to_come, earned, td_error, twin_gap, *among]
    v, q, to_come, earned, td_error, twin_gap, best, best_of_all, q_spread = (
        x / reward_scale for x in in_reward
    )
    columns = [
        number, torch.arange(v.size(1), device=v.device).expand_as(v),
        ended(batch)[:, None].expand_as(v), v, q, to_come, earned, so_far, td_error, twin_gap, best,
        best_of_all, q_spread, missing if values.logit_spread is None else values.logit_spread,
    ]  # fmt: skip
    # in fp32's precision, which values have, lest a return of fp64 differ from V that equals it
    return torch.stack([c.float()[batch.mask].double() for c in columns], dim=1)


def value_diagnostics(
    model: ValueModel, trajectories: Sequence[Trajectory], batch_size: int = 64
) -> dict[str, Any]:
    """How well Q and V foretell what comes, on logged texts; JSON-ready, None where undefined.

    Over all decisions: correlation of q and v with the return still to come (discounted as the
    values are), of A = q − v with what v did not foretell, mean squared errors beside that of
    predicting the mean, calibration by tenths, TD errors by position, and the `figures` of a
    training log. Across prompts all of it can look well where guidance does nothing, so the figures
    to watch are `within_prompt`: rank correlations among the samples of one prompt, averaged over
    the prompts whose samples differ in return. Q is the mean of the slow heads, as in decoding.
    Where values were learned of centred returns, these are centred too.
    """
    f = foretell(model, trajectories, batch_size)
    known = f.where(f.ended > 0)
    if not len(known.v):
        raise QvgptError("no decision of a text that ended to diagnose the values on")
    q, v, to_come = known.q, known.v, known.to_come
    texts, first = known.texts(), known.where(known.step == 0)
    prompts = [t.prompt for t in trajectories]
    several = [group for group in _groups(texts, prompts) if len(group) > 1]
    return {
        "texts": len(texts),
        "decisions": len(q),
        "gamma": model.info.gamma,
        "per_turn_discount": model.info.per_turn_discount,
        "q": _fit(q, to_come),
        "v": _fit(v, to_come),
        "v_at_prompt": _fit(first.v, first.to_come),
        "advantage": _correlations(q - v, to_come - v),
        "within_prompt": {
            "v_middle": _within(several, lambda t: t["v"][_middle(t)], _middle_to_come),
            "total_middle": _within(several, lambda t: _total_at(t, _middle(t)), _total),
            "total_last": _within(several, lambda t: _total_at(t, -1), _total),
            "advantage_sum": _within(several, _advantage_sum, _total),
        },
        "td_error": by_position(f),
        "figures": figures(f, prompts),
    }


@torch.no_grad()
def foretell(
    model: ValueModel, trajectories: Sequence[Trajectory], batch_size: int = 64
) -> Foretold:
    """What a model's values say of logged texts, and what came."""
    if model.heads is None:
        raise QvgptError("this model has no value heads: there is nothing to diagnose")
    model.eval()
    template = model.tokenizer.template if model.tokenizer else None
    pad, ends = (template.pad, template.end_ids) if template else (0, ())
    order = sorted(range(len(trajectories)), key=lambda i: len(trajectories[i].tokens))
    if model.info.centred:
        trajectories = centred(trajectories)
    needs, rows = AMONG_CANDIDATES | {"target_q", "v"}, []
    if model.heads.know_v_alone:
        needs = needs - AMONG_CANDIDATES - {"target_q"}
    discounts = model.info.gamma, model.info.per_turn_discount
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([trajectories[i] for i in chosen], pad, ends).to(model.device)
        values = model(batch, needs)
        rows.append(foretold(values, batch, chosen, *discounts, model.heads.reward_scale))
    return Foretold.of(torch.cat(rows))


def figures(f: Foretold, prompts: Sequence[Any]) -> dict[str, float]:
    """All that one number says, by plain names; what is undefined is left out.

    `prompts[i]` is the prompt of text i. `reliability/k` and `td/k` are the k-th tenth of the
    predictions, and of the way through a text. docs/diagnostics.md says how to read them.
    """
    known = f.where(f.ended > 0)
    tenths = calibration(known.v, known.to_come, BINS)
    slope, intercept = _line(known.v, known.to_come)
    texts = known.texts()
    groups = _groups(texts, prompts)
    several = [group for group in groups if len(group) > 1]
    at_prompt = [[_mean([t[k][0] for t in group]) for group in groups] for k in ("v", "to_come")]
    total_middle = _ranked(several, lambda t: _total_at(t, _middle(t)), _total)
    across = spearman(*(_places(np.array(x), _tie(texts)) for x in at_prompt))
    found = {
        "slope": slope,
        "intercept": intercept,
        "ece": _mean(np.repeat([abs(t["predicted"] - t["actual"]) for t in tenths],
                               [int(t["n"]) for t in tenths])),
        "rank": spearman(known.v, known.to_come),
        "rank_across": across,
        "rank_within": _mean(total_middle),
        "q_rank": spearman(known.q, known.to_come),
        "advantage_rank": spearman(known.q - known.v, known.to_come - known.v),
        "advantage_within": _mean(_ranked(several, _advantage_sum, _total)),
        "td_error": _mean(f.td_error),
        "td_error_abs": _mean(np.abs(f.td_error)),
        "overestimation": _mean(f.candidate_q_max - f.q),
        "overestimation_return": _mean(known.candidate_q_max - known.to_come),
        "overestimation_any": _mean(f.any_q_max - f.q),
        "v_abs": _mean(np.abs(f.v)),
        "v_spread": _spread(f.v),
        "q_abs": _mean(np.abs(f.q)),
        "q_spread": _spread(f.q),
        "advantage_abs": _mean(np.abs(f.q - f.v)),
        "advantage_spread": _spread(f.q - f.v),
        "advantage_to_logits": _mean(f.q_spread) / (_mean(f.logit_spread) or math.nan),
        "expectile_gap": _mean(f.v - f.q),
        "twin_gap": _mean(f.twin_gap),
    }  # fmt: skip
    for k, t in enumerate(tenths):
        found |= {f"reliability/{k}/v": t["predicted"], f"reliability/{k}/return": t["actual"]}
    for t in by_position(f):
        found |= {f"td/{t['position']}/mean": t["mean"], f"td/{t['position']}/abs": t["abs"]}
    return {name: float(x) for name, x in found.items() if math.isfinite(x)}


def by_position(f: Foretold, bins: int = BINS) -> list[dict[str, Any]]:
    """TD errors by how far through its text a decision is: tenths of the text's decisions."""
    if not len(f.text):
        return []
    _, which, steps = np.unique(f.text, return_inverse=True, return_counts=True)
    position = (bins * (f.step + 0.5) / steps[which]).astype(int).clip(max=bins - 1)
    found = []
    for k in np.unique(position):
        errors = f.td_error[position == k]
        of_bin = {"mean": _mean(errors), "abs": _mean(np.abs(errors)), "n": len(errors)}
        found.append({"position": int(k), **of_bin})
    return found


def out_of_reach(f: Foretold, low: float, high: float) -> float:
    """How far values lie outside the returns that there are, in reaches of those; 0: inside.

    `low` and `high` are returns seen elsewhere, in the training data. The reach is the distance
    between the least and the greatest return, or the greatest size of one where that is more. The
    outermost hundredth of the values at either end does not count. NaN where no text ended.
    """
    known = f.where(f.ended > 0)
    if not len(known.v):
        return math.nan
    low, high = min(low, float(known.to_come.min())), max(high, float(known.to_come.max()))
    reach = max(high - low, abs(low), abs(high)) or 1.0
    values = known.v if np.isnan(known.q).any() else np.stack([known.v, known.q])
    least, most = np.quantile(values, [0.01, 0.99])
    return float(max(most - high, low - least, 0.0) / reach)


def _mean(x: Any) -> float:
    """Of what is finite; NaN where nothing is."""
    finite = np.asarray(x, dtype=float)
    finite = finite[np.isfinite(finite)]
    return float(finite.mean()) if len(finite) else math.nan


def _spread(x: Array) -> float:
    """Standard deviation; NaN where there are no numbers."""
    return float(np.std(x)) if len(x) else math.nan


def _line(x: Array, y: Array) -> tuple[float, float]:
    """Slope and intercept of the least squares y ≈ intercept + slope·x; NaN where x is constant."""
    if len(x) < 2 or np.ptp(x) == 0:
        return math.nan, math.nan
    slope = float(np.cov(x, y, bias=True)[0, 1] / np.var(x))
    return slope, float(y.mean() - slope * x.mean())


def _groups(texts: Sequence[Text], prompts: Sequence[Any]) -> list[list[Text]]:
    """The texts of each prompt."""
    groups: dict[Any, list[Text]] = {}
    for text in texts:
        groups.setdefault(prompts[int(text["text"][0])], []).append(text)
    return list(groups.values())


def _middle(text: Text) -> int:
    return len(text["v"]) // 2


def _total(text: Text) -> float:
    """The return from the first decision."""
    return text["to_come"][0]


def _total_at(text: Text, decision: int) -> float:
    """That return as foretold at a later decision: what came before is known."""
    at = range(len(text["v"]))[decision]
    return text["earned"][at] + text["so_far"][at] * text["v"][at]


def _middle_to_come(text: Text) -> float:
    return text["to_come"][_middle(text)]


def _advantage_sum(text: Text) -> float:
    return (text["q"] - text["v"]).sum()


def _ranked(
    groups: Sequence[Sequence[Text]],
    foretold: Callable[[Text], float],
    came: Callable[[Text], float],
) -> list[float]:
    """Rank correlation in each group whose outcomes differ; a constant prediction counts as 0."""
    found: list[float] = []
    for group in groups:
        tie = _tie(group)
        actual = _places(np.array([came(text) for text in group]), tie)
        predicted = np.array([foretold(text) for text in group])
        if actual.any() and not np.isnan(predicted).any():
            correlation = spearman(_places(predicted, tie), actual)
            found.append(0.0 if math.isnan(correlation) else correlation)
    return found


def _tie(texts: Sequence[Text]) -> float:
    """What returns of these texts that are equal may differ by: they are sums, and rounded."""
    return _TIE * max((float(np.abs(text["to_come"]).max()) for text in texts), default=0.0)


def _places(x: Float[np.ndarray, "n"], tie: float) -> Float[np.ndarray, "n"]:
    """Each number's place among the others, from 0; neighbours within `tie` share theirs."""
    order = np.argsort(x)
    places = np.zeros(len(x))
    places[order[1:]] = np.cumsum(np.diff(x[order]) > tie)
    return places


def _within(
    groups: Sequence[Sequence[Text]],
    foretold: Callable[[Text], float],
    came: Callable[[Text], float],
) -> dict[str, Any]:
    """The mean of `_ranked`, with its interval over prompts."""
    found = _ranked(groups, foretold, came)
    if not found:
        return {"mean": None, "ci95": None, "groups": 0}
    estimate = mean_ci(found)
    return {"mean": estimate.value, "ci95": list(estimate.ci95), "groups": len(found)}


def _fit(predicted: Array, actual: Array) -> dict[str, Any]:
    known = not np.isnan(predicted).any()
    return _correlations(predicted, actual) | {
        "mse": float(np.square(predicted - actual).mean()) if known else None,
        "mse_of_mean": float(actual.var()),
        "calibration": calibration(predicted, actual) if known else [],
    }


def _correlations(x: Array, y: Array) -> dict[str, float | None]:
    found = {"pearson": pearson(x, y), "spearman": spearman(x, y)}
    return {name: None if math.isnan(value) else value for name, value in found.items()}
