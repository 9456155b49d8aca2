"""Learning objectives, one frozen dataclass per method, and how a list of them is written down."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from qvgpt.categorical import Support
from qvgpt.errors import QvgptError, nearest
from qvgpt.objectives.base import (
    NEEDS,
    Candidates,
    Loss,
    Objective,
    Values,
    counted,
    sum_losses,
    teaches_values,
)
from qvgpt.objectives.distributional import FUDGE, ControlledDecoding, ReturnDistribution
from qvgpt.objectives.lm import AWAC, AWR, LM
from qvgpt.objectives.logits_as_q import QSFT, PathConsistency
from qvgpt.objectives.offline import FQE, ILQL, SARSA, DoubleQ, MonteCarlo
from qvgpt.trajectory import Trajectory, TrajectoryBatch, collate, returns_to_go

__all__ = [
    "AWAC",
    "AWR",
    "FQE",
    "FUDGE",
    "ILQL",
    "LM",
    "NEEDS",
    "QSFT",
    "SARSA",
    "Candidates",
    "ControlledDecoding",
    "DoubleQ",
    "Loss",
    "MonteCarlo",
    "Objective",
    "Objectives",
    "PathConsistency",
    "ReturnDistribution",
    "Values",
    "counted",
    "discount_of",
    "parse_objectives",
]

METHODS: dict[str, Callable[..., Objective]] = {
    "LM": LM,
    "AWAC": AWAC,
    "AWR": AWR,
    "ILQL": ILQL,
    "MonteCarlo": MonteCarlo,
    "SARSA": SARSA,
    "DoubleQ": DoubleQ,
    "ReturnDistribution": ReturnDistribution,
    "FUDGE": FUDGE,
    "ControlledDecoding": ControlledDecoding,
    "PathConsistency": PathConsistency,
    "QSFT": QSFT,
    "FQE": FQE,
}


@dataclass(frozen=True)
class Objectives:
    """A weighted sum of objectives, itself an objective."""

    terms: tuple[tuple[float, Objective], ...]

    @property
    def names(self) -> list[str]:
        """What each term is called in a log: by its class, the second of one class `LM 2`."""
        kinds = [type(o).__name__ for _, o in self.terms]
        before = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]
        return [f"{k} {n + 1}" if n else k for k, n in zip(kinds, before, strict=True)]

    @property
    def needs(self) -> frozenset[str]:
        """All that any of them reads."""
        return frozenset().union(*(objective.needs for _, objective in self.terms))

    @property
    def learns_values(self) -> bool:
        """Whether Q or V is read at all; language modelling alone needs no heads."""
        return self.teaches_values or bool(self.needs & {"q", "v"})

    @property
    def weighs_by_values_alone(self) -> bool:
        """Whether values are read (AWAC, AWR) that no objective here teaches."""
        return self.learns_values and not self.teaches_values

    @property
    def weighs(self) -> bool:
        """Whether some log-probs weigh more than others in the loss."""
        reads = [o for _, o in self.terms if o.needs & {"logprob", "token_logprob"}]
        return len(reads) > 1 or any(getattr(o, "weighs", False) for o in reads)

    @property
    def teaches_values(self) -> bool:
        """Whether Q or V is trained, and not just read as a weight."""
        return any(map(teaches_values, (o for _, o in self.terms)))

    @property
    def teaches_v_alone(self) -> bool:
        """Whether V is trained and Q is not."""
        return self.teaches_values and not self.needs & {"q", "return_logits"}

    @property
    def needs_reference(self) -> bool:
        """Whether the model as it was is asked for."""
        return bool(self.needs & {"ref_logprob", "max_ratio"})

    @property
    def discount(self) -> tuple[float, bool]:
        """γ of the values that are taught, and whether it applies at the ends of turns only: the
        same for all that teach them."""
        found = {discount_of(o) for _, o in self.terms if teaches_values(o)}
        if len(found) > 1:
            raise QvgptError(
                "objectives: values of one model have one discount, not "
                + " and ".join(_as_discount(*each) for each in sorted(found))
            )
        return found.pop()

    def refuse_other_discounts(self, gamma: float, per_turn: bool) -> None:
        """Raise `QvgptError` where AWR would hold returns against values of another discount."""
        for _, o in self.terms:
            if isinstance(o, AWR) and discount_of(o) != (gamma, per_turn):
                raise QvgptError(
                    f"objectives: AWR compares returns with values, whose discount is "
                    f"{_as_discount(gamma, per_turn)}, its own {_as_discount(*discount_of(o))}: "
                    "give it the same"
                )

    @property
    def candidates(self) -> Candidates:
        """Among which tokens a best one is sought: the same for all that seek one."""
        found = {o.candidates for _, o in self.terms if isinstance(o, DoubleQ)}
        if len(found) > 1:
            raise QvgptError("objectives: several DoubleQ with different top_k or min_p")
        return found.pop() if found else Candidates()

    @property
    def level(self) -> str:
        """What a decision is: a token, or a whole turn; the same for all that read values."""
        reads = [o for _, o in self.terms if o.needs & {"q", "v", "target_q", "v_return_logits"}]
        found = {getattr(o, "level", "token") for o in reads}
        if len(found) > 1:
            raise QvgptError(
                "objectives: values of whole turns (level 'turn') and of tokens do not mix, nor do "
                "AWAC and AWR weigh tokens by them"
            )
        return found.pop() if found else "token"

    def returns_of(self, t: Trajectory) -> list[float]:
        """The returns that a text teaches; none where it was cut, for then they were not seen."""
        taught = [o for _, o in self.terms if teaches_values(o) and t.terminated]
        found: list[float] = []
        for o in taught:
            if isinstance(o, FUDGE):  # all prefixes learn of the whole text's
                found.append(t.total_reward)
            else:
                found += returns_to_go(t, *discount_of(o))
        return found

    @property
    def parts(self) -> list[str]:
        """The names a log will have: those that one decision gives, all its values being 0."""
        text = Trajectory([0, 0], [False, True], [0.0, 0.0], True)
        one, q, v = torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 2)
        shapes = {"q": q, "target_q": q, "q_logsumexp": q, "target_q_at_argmax": v[None]}
        shapes["expected_q"] = v[None]
        shapes |= {"v": v, "q_max": v, "max_ratio": v, "return_logits": torch.zeros(1, 1, 1, 2)}
        shapes |= {"v_return_logits": torch.zeros(1, 2, 2)}
        found = {name: shapes.get(name, one) for name in NEEDS}
        nothing = Values(**found, support=Support(0.0, 1.0, 2))
        return ["total", *self.fitted_to([text])(nothing, collate([text])).parts]

    def __call__(self, values: Values, batch: TrajectoryBatch) -> Loss:
        """Σ weight · loss."""
        both = zip(self.names, self.terms, strict=True)
        return sum_losses((name, w, o(values, batch)) for name, (w, o) in both)

    def fitted_to(self, data: Sequence[Trajectory]) -> "Objectives":
        """The same with all that is said relative to the data (`LM.top_share`) put in numbers."""
        returns = [t.total_reward for t in data]
        fitted = [(w, o.fitted_to(returns) if isinstance(o, LM) else o) for w, o in self.terms]
        return Objectives(tuple(fitted))

    def as_list(self) -> list[dict[str, Any]]:
        """The same in the form that `parse_objectives` reads."""
        return [{type(o).__name__: {**asdict(o), "weight": w}} for w, o in self.terms]  # type: ignore[call-overload]


def discount_of(objective: Objective) -> tuple[float, bool]:
    """γ, and whether it applies at the ends of turns only."""
    per_turn = getattr(objective, "per_turn_discount", False)
    return getattr(objective, "gamma", 1.0), per_turn


def _as_discount(gamma: float, per_turn: bool) -> str:
    return f"gamma {gamma:g}{', per_turn_discount' if per_turn else ''}"


def parse_objectives(
    spec: Sequence[str | Mapping[str, Any] | Objective] | str | Objectives,
) -> Objectives:
    """`["LM", {"ILQL": {"expectile": 0.8, "weight": 1.0}}]` → objectives with weights.

    Raises `QvgptError` for an unknown method or option, with the nearest known one.
    """
    if isinstance(spec, Objectives):
        return spec
    entries = [spec] if isinstance(spec, str) else list(spec)
    if not entries:
        raise QvgptError(f"objectives: at least one of {', '.join(METHODS)} is needed")
    terms = [_parse_objective(entry) for entry in entries]
    return Objectives(tuple(terms))


def _parse_objective(entry: Any) -> tuple[float, Objective]:
    if isinstance(entry, str):
        entry = {entry: {}}
    if isinstance(entry, Objective):
        return 1.0, entry
    if not isinstance(entry, Mapping):
        raise QvgptError(f"objectives: a method was expected, not {entry!r}")
    if len(entry) != 1:
        raise QvgptError(f"objectives: one method per entry was expected, not {list(entry)}")
    name, options = next(iter(entry.items()))
    if name not in METHODS:
        raise QvgptError(f"objectives: unknown method {name!r}{nearest(name, METHODS)}")
    if not isinstance(options, Mapping | None):
        raise QvgptError(f"objectives: {name}: options were expected, not {options!r}")
    method = METHODS[name]
    known = {f.name: f for f in fields(method)}  # type: ignore[arg-type]
    given = {}
    for key, value in (options or {}).items():
        # YAML makes `on` true
        option = "on" if key in (True, "true") and "on" in known else str(key)
        if option != "weight" and option not in known:
            hint = nearest(option, [*known, "weight"])
            raise QvgptError(f"objectives: {name} has no option {option!r}{hint}")
        default = 1.0 if option == "weight" else known[option].default
        if default is None and value is not None:  # unless given
            default = 0 if known[option].type == int | None else 0.0
        given[option] = _like(default, value, f"objectives: {name}: {option}")
    weight = given.pop("weight", 1.0)
    if not 0 <= weight < math.inf:
        raise QvgptError(f"objectives: {name}: weight must be finite, 0 or more, not {weight}")
    return weight, method(**given)


def _like(default: Any, value: Any, where: str) -> Any:
    """The value, if it is of the default's type; whole numbers do for fractions."""
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        expected = type(default).__name__
        raise QvgptError(f"{where} is a {expected}, not {value!r}")
    return value
