"""Learning objectives, one frozen dataclass per method, and how a list of them is written down."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from qvgpt.errors import QvgptError, nearest
from qvgpt.objectives.base import NEEDS, Loss, Objective, Values, sum_losses
from qvgpt.objectives.lm import AWAC, LM
from qvgpt.objectives.offline import ILQL, MonteCarlo
from qvgpt.trajectory import TrajectoryBatch

__all__ = [
    "AWAC",
    "ILQL",
    "LM",
    "NEEDS",
    "Loss",
    "MonteCarlo",
    "Objective",
    "Objectives",
    "Values",
    "parse_objectives",
]

METHODS: dict[str, Callable[..., Objective]] = {
    "LM": LM,
    "AWAC": AWAC,
    "ILQL": ILQL,
    "MonteCarlo": MonteCarlo,
}


@dataclass(frozen=True)
class Objectives:
    """A weighted sum of objectives, itself an objective."""

    terms: tuple[tuple[float, Objective], ...]

    @property
    def needs(self) -> frozenset[str]:
        """All that any of them reads."""
        return frozenset().union(*(objective.needs for _, objective in self.terms))

    @property
    def learns_values(self) -> bool:
        """Whether Q or V is read at all; language modelling alone needs no heads."""
        return bool(self.needs & {"q", "v"})

    def __call__(self, values: Values, batch: TrajectoryBatch) -> Loss:
        """Σ weight · loss."""
        return sum_losses((type(o).__name__, w, o(values, batch)) for w, o in self.terms)

    def as_list(self) -> list[dict[str, Any]]:
        """The same in the form that `parse_objectives` reads."""
        return [{type(o).__name__: {**asdict(o), "weight": w}} for w, o in self.terms]  # type: ignore[call-overload]


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
    if not isinstance(entry, Mapping):
        return 1.0, entry
    if len(entry) != 1:
        raise QvgptError(f"objectives: one method per entry was expected, not {list(entry)}")
    name, options = next(iter(entry.items()))
    if name not in METHODS:
        raise QvgptError(f"objectives: unknown method {name!r}{nearest(name, METHODS)}")
    options = dict(options or {})
    weight = float(options.pop("weight", 1.0))
    method = METHODS[name]
    known = [f.name for f in fields(method)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            hint = nearest(option, known)
            raise QvgptError(f"objectives: {name} has no option {option!r}{hint}")
    return weight, method(**options)
