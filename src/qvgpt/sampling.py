"""What all that write texts share: prompts out of data rows, the values that guide, a policy for
games, a progress bar."""

import sys
import time
from collections.abc import Iterable, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

from qvgpt.data.rows import Row, prompt_tokens, read_rows
from qvgpt.decode.engine import Request, TokenEvent, row_seed
from qvgpt.decode.guide import Guide, refuse_other_tokenizer
from qvgpt.decode.policy import V_ALONE, Guidance
from qvgpt.decode.rerank import write_best
from qvgpt.decode.search import Search
from qvgpt.decode.searches import by_values, write_searched
from qvgpt.decode.sources import (
    Contrast,
    HeadValues,
    ValueSource,
    WeightedSum,
    own_values,
)
from qvgpt.envs.env import Policy
from qvgpt.envs.rewards import compares, references
from qvgpt.errors import QvgptError
from qvgpt.models.value_model import ValueModel
from qvgpt.run import RunProgress
from qvgpt.trajectory import Completion


def load_prompts(
    path: str | Path, model: ValueModel, max_tokens: int, limit: int | None = None
) -> tuple[list[Row], list[list[int]]]:
    """The first `limit` rows of a file and the token ids of their prompts.

    Raises `QvgptError` where prompts leave less room than `max_tokens` in the model's context.
    """
    if model.tokenizer is None:
        raise QvgptError("the model has no tokenizer to read prompts with")
    if max_tokens < 1 or (limit is not None and limit < 1):
        raise QvgptError(f"max_tokens ({max_tokens}) and limit ({limit}) must be at least 1")
    rows = list(islice(read_rows(path), limit))
    prompts = [prompt_tokens(row, model.tokenizer) for row in rows]
    check_room(prompts, model, max_tokens)
    warn_of_unknown(prompts, model)
    return rows, prompts


def warn_of_unknown(texts: Sequence[Sequence[int]], model: ValueModel) -> None:
    """Say on stderr where the model cannot see what it is asked."""
    count = model.tokenizer.count_unknown(texts) if model.tokenizer else 0
    if count:
        print(
            f"{count} of {len(texts)} texts have characters that the model's tokenizer does not "
            "know: each is read as <unk>",
            file=sys.stderr,
        )


def load_values(
    model: ValueModel,
    model_dir: str,
    value_models: Sequence[str],
    contrast: Sequence[str],
    weights: Sequence[float] = (),
    **options: Any,
) -> ValueSource | None:
    """What guides besides the model's own heads, from directories; None where none is named.

    The values of each of `value_models`, then log π₊ − log π₋ of the two of `contrast`, each times
    its weight. `options` are those of `ValueModel.from_pretrained`. Raises `QvgptError`, naming
    option and directory, for another tokenizer, a model without values, and weights that do not
    match.
    """
    if contrast and len(contrast) != 2:
        raise QvgptError(f"contrast: two directories, PLUS and MINUS, not {len(contrast)}")
    count = len(value_models) + bool(contrast)
    if weights and len(weights) != count:
        raise QvgptError(f"weights: {len(weights)} for {count} sources of values")
    read = {Path(model_dir).resolve(): model}

    def load(directory: str) -> ValueModel:
        place = Path(directory).resolve()
        if place not in read:
            read[place] = ValueModel.from_pretrained(directory, **options)
            refuse_other_tokenizer(model, read[place], directory)
        return read[place]

    found = [_values_of(load(directory), directory) for directory in value_models]
    if contrast:
        plus, minus = map(load, contrast)
        found.append(Contrast(plus, minus))
    if len(found) == 1 and not weights:
        return found[0]
    return WeightedSum(tuple(zip(weights or [1.0] * count, found, strict=True))) if found else None


def _values_of(model: ValueModel, directory: str) -> ValueSource:
    values = own_values(model)
    if values is None:
        raise QvgptError(f"value_models: {directory} has no value heads to guide with")
    if model.info.level == "turn":
        raise QvgptError(f"value_models: {directory}: its values are of turns and guide no token")
    if isinstance(values, HeadValues) and values.model.heads and values.model.heads.know_v_alone:
        raise QvgptError(f"value_models: {directory}: {V_ALONE}")
    return values


def check_guidance(
    model: ValueModel,
    guidances: Iterable[Guidance],
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    values: ValueSource | None = None,
) -> None:
    """Raise `QvgptError` for what the engine would refuse, before anything is written."""
    guide = Guide.of(model, values)
    for guidance in dict.fromkeys(guidances):
        for prompt in sorted(prompts, key=len)[-1:]:
            guide.refuse(prompt, max_tokens, guidance)


def check_room(prompts: Sequence[Sequence[int]], model: ValueModel, max_tokens: int) -> None:
    """Raise `QvgptError` where prompts leave less than `max_tokens` in the model's context."""
    context = model.trunk.seq_len
    too_long = sum(len(p) + max_tokens > context for p in prompts)
    if too_long:
        raise QvgptError(
            f"{too_long} of {len(prompts)} prompts (the longest has {max(map(len, prompts))} "
            f"tokens) leave less than {max_tokens} in the context of {context}: lower max_tokens, "
            "or shorten or remove those prompts"
        )


def check_values(
    model: ValueModel,
    name: str,
    betas: Iterable[float | None],
    best_of: int = 1,
    values: ValueSource | None = None,
    searches: Iterable[Search] = (),
) -> None:
    """Raise `QvgptError` where the model in `name` has no values to guide or to rank texts by.

    `betas` are strengths of guidance of either kind, β or a budget of KL. Other `values`, where
    they are given, must guide or rank.
    """
    guided, judged = any(betas), any(map(by_values, searches))
    ranked = best_of > 1 or judged
    if best_of < 1:
        raise QvgptError(f"best_of must be at least 1, not {best_of}")
    if judged:
        Guide.of(model, values).refuse_to_judge()
    if values is not None:
        if not guided and not ranked:
            raise QvgptError(
                "value_models and contrast: say how strongly they guide, by beta or kl_budget, or "
                "what they choose among, by best_of or a search"
            )
        return
    if model.heads is None and (guided or ranked):
        wanted = "to rank by: best_of must be 1"
        if guided:
            wanted = "to guide with: beta must be 0 (in `evaluate` --betas [])"
        raise QvgptError(f"{name}: has no value heads {wanted}")
    if guided and model.info.level == "turn":
        raise QvgptError(
            f"{name}: its values are of whole turns and guide no token: beta must be 0 (in "
            "`evaluate` --betas []), and best_of says how many texts they choose from"
        )


def check_references(rows: Iterable[Row], rewards: Iterable[str]) -> None:
    """Raise `DataError` for the first row without the texts that one of the rewards reads."""
    if not any(name.startswith("corpus_") or compares(name) for name in rewards):
        return
    for row in rows:
        try:
            references(row.fields)
        except QvgptError as error:
            raise row.fault(None, str(error)) from None


def engine_policy(
    model: ValueModel,
    guidance: Guidance | None = None,
    *,
    max_tokens: int = 128,
    seed: int = 0,
    max_batch: int = 256,
    best_of: int = 1,
    values: ValueSource | None = None,
    search: Search | None = None,
) -> Policy:
    """The model as a policy for `rollout`, a turn at a time; no two turns share random numbers.

    With `best_of` each turn is the one of so many candidates whose Q is highest, with `search` what
    that finds, of its own `max_tokens` and `max_batch`.
    """
    turns = count()

    def act(prompts: list[list[int]]) -> list[Completion]:
        requests = [
            Request(prompt, max_tokens, guidance or Guidance(), row_seed(seed, next(turns)))
            for prompt in prompts
        ]
        if search is None:
            written = write_best(model, requests, best_of, max_batch=max_batch, values=values)
        else:
            written = write_searched(search, model, requests, values=values)
        return [Completion(text.tokens, text.terminated) for text in written]

    return act


class TextProgress:
    """A bar on stderr (lines where that is no terminal): texts done, tokens/s, time left."""

    def __init__(self, what: str, total: int, done: int = 0):
        self.done, self.tokens, self.started = done, 0, time.monotonic()
        self._run = RunProgress(total, done, None, what=what)

    def __enter__(self) -> "TextProgress":
        self._run.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._run.__exit__(*error)

    def step(self, events: Sequence[TokenEvent]) -> None:
        """Count what the engine wrote in one step."""
        self.add(sum(event.finished is not None for event in events), len(events))

    def add(self, texts: int, tokens: int) -> None:
        """Count finished texts and their tokens."""
        self.done += texts
        self.tokens += tokens
        self._run.step(self.done, {}, self.tokens / (time.monotonic() - self.started + 1e-9))
