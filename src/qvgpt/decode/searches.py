"""The searches by name, and texts written by them as the engine writes texts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from qvgpt.decode.beam import BeamSearch
from qvgpt.decode.blocks import BlockSearch
from qvgpt.decode.engine import OnStep, Request, Text, TokenEvent
from qvgpt.decode.score import score
from qvgpt.decode.search import Search, at_one
from qvgpt.decode.sources import ValueSource
from qvgpt.decode.tree import TreeSearch
from qvgpt.errors import QvgptError, nearest
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Trajectory

SEARCHES: dict[str, type[Any]] = {"block": BlockSearch, "beam": BeamSearch, "tree": TreeSearch}


def parse_search(spec: str | Mapping[str, Any], max_tokens: int, max_batch: int) -> Search:
    """`"tree"` or `{"tree": {"simulations": 32}}` → the search.

    Raises `QvgptError` for an unknown search or option, with the nearest known one.
    """
    entry = {spec: {}} if isinstance(spec, str) else spec
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise QvgptError(f"search: one of {', '.join(SEARCHES)} was expected, not {spec!r}")
    name, options = next(iter(entry.items()))
    if name not in SEARCHES:
        raise QvgptError(f"search: unknown search {name!r}{nearest(str(name), SEARCHES)}; there "
                         f"are {', '.join(SEARCHES)}")  # fmt: skip
    if not isinstance(options, Mapping | None):
        raise QvgptError(f"search: {name}: options were expected, not {options!r}")
    kind = SEARCHES[name]
    known = {f.name: f.default for f in fields(kind) if f.name not in ("max_tokens", "max_batch")}
    given = {}
    for option, value in (options or {}).items():
        if option not in known:
            said = nearest(str(option), known)
            if option in ("max_tokens", "max_batch"):
                said = ": it is an option of the command"
            raise QvgptError(f"search: {name} has no option {option!r}{said}")
        given[option] = _like(known[option], value, f"search: {name}: {option}")
    return kind(**given, max_tokens=max_tokens, max_batch=max_batch)


def _like(default: Any, value: Any, where: str) -> Any:
    """The value, if it is of the default's type; None stands for a number that may be left out."""
    wanted: type = float if default is None else type(default)
    if default is None and value is None:
        return None
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise QvgptError(f"{where} is a {wanted.__name__}, not {value!r}")
    return value


def search_name(search: Search) -> str:
    """For people: its name, and the options that are not as usual."""
    name = next(name for name, kind in SEARCHES.items() if isinstance(search, kind))
    changed = [
        f"{f.name} {getattr(search, f.name)}"
        for f in fields(type(search))  # type: ignore[arg-type]
        if f.name not in ("max_tokens", "max_batch") and getattr(search, f.name) != f.default
    ]
    return f"{name} search" + (f" ({', '.join(changed)})" if changed else "")


def by_values(search: Search) -> bool:
    """Whether it needs values; beams may do without."""
    return not isinstance(search, BeamSearch) or search.value_weight != 0


def is_sampled(search: Search | None) -> bool:
    """Whether another seed gives another text."""
    return search is None or isinstance(search, BlockSearch)


def write_searched(
    search: Search,
    model: ValueModel,
    requests: Sequence[Request],
    *,
    report: bool = False,
    keep_reports: Collection[int] | None = None,
    on_step: OnStep | None = None,
    values: ValueSource | None = None,
    spent: list[int] | None = None,
) -> list[Text]:
    """One text per request, the best that the search found; they all share one guidance.

    Options as of `engine.write`. With `report` the texts are read once more: the reports are those
    of the guided model, at temperature 1 where the search knows no other. `Text.kl` then is −log π₀
    of the text where nothing was left to chance; else log π − log π₀ and what choosing adds at
    most, whose mean bounds the KL. Raises `QvgptError` for what cannot be searched.
    """
    if not requests:
        return []
    if any(request.stop for request in requests):
        raise QvgptError("search: stop strings are not known to searches")
    seeds, prompts = [r.seed for r in requests], [r.tokens for r in requests]
    guidance = requests[0].guidance if is_sampled(search) else at_one(requests[0].guidance)
    found = search(model, prompts, guidance, values, seeds)
    if spent is not None:
        spent.append(found.forward_tokens)
    texts = [Text(h.tokens, terminated=h.terminated) for h in found.best]
    if model.tokenizer is not None:
        for text in texts:
            text.text = model.tokenizer.decode_completion(text.tokens)
    if report:
        read = [_read(p, text) for p, text in zip(prompts, texts, strict=True)]
        scores = score(model, read, guidance, values=values)
        for i, (text, h, scored) in enumerate(zip(texts, found.best, scores, strict=True)):
            sampled = 0.0 if h.choice_kl is None else h.logprob + h.choice_kl
            text.kl = sampled - scored.base_logprob
            if keep_reports is None or i in keep_reports:
                text.reports = scored.reports
    if on_step is not None:
        on_step([event for i, text in enumerate(texts) for event in _events(i, text)])
    return texts


def _events(index: int, text: Text) -> list[TokenEvent]:
    found = [TokenEvent(index, token, None) for token in text.tokens]
    return [*found[:-1], replace(found[-1], finished="end" if text.terminated else "length")]


def _read(prompt: Sequence[int], text: Text) -> Trajectory:
    tokens = [*prompt, *text.tokens]
    is_action = [i >= len(prompt) for i in range(len(tokens))]
    return Trajectory(tokens, is_action, [0.0] * len(tokens), text.terminated)
