"""Rows → `Trajectory`; `FORMS` in `files.py` lists what a row may look like.

A fault is one line: file and row, column, what was expected.
"""

import difflib
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qvgpt.data.files import FORMS, KNOWN, DataError, Row, kind_of, path_list, read_rows
from qvgpt.data.sizes import CONTEXTS
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.errors import QvgptError, nearest
from qvgpt.trajectory import Trajectory

_PROMPTLESS = {
    "messages": "a whole dialogue, where a prompt to go on from is wanted: put its messages but "
    "the last answer into `prompt`, and that answer, or right ones, into `references`",
    "text": "a whole text, where a prompt to go on from is wanted: cut its beginning off as "
    "`prompt`, the rest is `completion` (of texts with a class `qvgpt reward-model` makes a judge)",
    "chosen": "a pair without a prompt to go on from: put what both begin with into `prompt`",
}
"""Columns of rows that need no prompt, and what to do where one is needed."""
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class LoadReport:
    """What loading did, to be shown: nothing is left out silently."""

    rows: int
    trajectories: int
    """How many are kept."""
    longest: int
    """In tokens, before any cut."""
    too_long: int
    """How many were longer than `max_length`: those cut and those dropped."""
    cut: int
    dropped: int
    judged_by: tuple[str, ...] = ()
    """SHA-256 of the reward models that gave the rewards, as `collect` notes them in the rows."""
    unrewarded: int = 0
    """Rows that name no reward of their texts: it is read as 0."""
    unknown: int = 0
    """Texts with characters that the tokenizer does not know."""


def load_trajectories(
    paths: str | Path | Iterable[str | Path],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    on_too_long: Literal["error", "drop", "cut"] = "error",
) -> tuple[list[Trajectory], LoadReport]:
    """All texts of `paths` in tokens, each at most `max_length` of them.

    A longer one is an error, or is dropped, or cut on the right and so truncated. One whose
    reward or whose every action lies beyond the cut is dropped instead.
    Raises `DataError` at the first faulty row (`check` finds them all).
    """
    every: list[Trajectory] = []
    rows, unrewarded, judges = 0, 0, set[str]()
    for path in path_list(paths):
        for row in read_rows(path):
            rows += 1
            unrewarded += not is_rewarded(row)
            judges.update(_judges(row))
            every += row_to_trajectories(row, tokenizer)
    limit = sys.maxsize if max_length is None else max_length
    kept = [t for t in every if len(t.tokens) <= limit]
    longest = max((len(t.tokens) for t in every), default=0)
    too_long = len(every) - len(kept)
    if too_long and on_too_long == "error":
        raise QvgptError(
            f"{too_long} of {len(every)} texts are longer than max_length {max_length} (the longest"
            f" has {longest} tokens): raise max_length (by default the context; of a new model"
            f" gpt.seq_len, fitted up to {CONTEXTS[1]}), or set on_too_long to 'drop' or 'cut'"
        )
    cut = 0
    if too_long and on_too_long == "cut":
        kept = [c for t in every if (c := _cut(t, limit)) is not None]
        cut = len(kept) - (len(every) - too_long)
    return kept, LoadReport(
        rows, len(kept), longest, too_long, cut, too_long - cut, tuple(sorted(judges)), unrewarded,
        tokenizer.count_unknown(t.tokens for t in kept),
    )  # fmt: skip


def is_rewarded(row: Row) -> bool:
    """Whether a row says what its texts earned."""
    fields = row.fields
    if {"reward", "rewards", "token_rewards", "rejected"} & fields.keys():
        return True
    if "label" in fields and "text" not in fields:  # else it is a class, for a reward model
        return True
    given = [fields.get("messages"), fields.get("completion")]
    if isinstance(fields.get("completions"), list):
        given += fields["completions"]
    messages = [m for several in given if isinstance(several, list) for m in several]
    return any(isinstance(m, dict) and "reward" in m for m in messages)


def _judges(row: Row) -> list[str]:
    """The reward models that `collect` notes; whoever else is said to have judged is metadata."""
    found = row.fields.get("judged_by")
    texts = found if isinstance(found, list) else []
    return [x for x in texts if isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x)]


def _cut(t: Trajectory, limit: int) -> Trajectory | None:
    if len(t.tokens) <= limit:
        return t
    if any(t.reward[limit:]) or not any(t.is_action[:limit]):
        return None
    return Trajectory(t.tokens[:limit], t.is_action[:limit], t.reward[:limit], terminated=False)


def row_to_trajectories(row: Row, tokenizer: Tokenizer) -> list[Trajectory]:
    """The one text of a row, or the K samples; raises `DataError`.

    The end token is an action; a truncated text gets none, and is not terminated. Rewards stand
    on the last token of what they are given for, and are 0 where none is given.
    """
    form = row_form(row)
    for column in row.fields:
        if column in KNOWN and column not in FORMS[form]:
            fits = next(f for f in FORMS if column in FORMS[f])
            hint = f"; it belongs to {fits!r}" if fits != column else ""
            raise row.fault(column, f"does not go with {form!r}{hint}: rename or remove it")
    try:
        if form == "chosen":
            return _preference(row, tokenizer)
        if form == "completions":
            return _samples(row, tokenizer)
        single = {"steps": _steps, "messages": _dialogue, "text": _text, "completion": _completion}
        return [single[form](row, tokenizer)]
    except DataError:
        raise
    except QvgptError as error:
        raise row.fault(form, str(error)) from error


def row_form(row: Row) -> str:
    """The key of `FORMS` that a row takes; raises `DataError` where it takes none."""
    fields = row.fields
    if "rejected" in fields:
        return "chosen"
    for form in FORMS:
        if form in fields:
            return form
    ids = fields.get("completion_ids")
    if ids is not None:
        return "completions" if isinstance(ids, list) and _all(ids, list) else "completion"
    expected = "expected text, messages, or prompt with completion, completions, steps or chosen"
    raise row.fault(None, f"nothing to train on: {expected}, found {sorted(fields)}")


def _text(row: Row, tokenizer: Tokenizer) -> Trajectory:
    end = [] if _truncated(row) else [tokenizer.template.eos]
    tokens = [*tokenizer.encode(_string(row, "text")), *end]
    return _finish(row, [tokenizer.template.bos, *tokens], [False] + [True] * len(tokens))


def _completion(row: Row, tokenizer: Tokenizer) -> Trajectory:
    fields = row.fields
    if "label" in fields:
        if not isinstance(fields["label"], bool):
            problem = f"expected true or false, found {fields['label']!r}"
            raise row.fault("label", f"{problem}: a number stands in `reward`")
        if "reward" in fields or "token_rewards" in fields:
            raise row.fault("label", "a row with a reward needs no label: remove one of them")
        row = Row(row.where, {**fields, "reward": float(fields["label"])})
    if isinstance(fields.get("completion"), list) and "completion_ids" not in fields:
        return _conversation(row, tokenizer)
    prompt = prompt_tokens(row, tokenizer)
    if "completion_ids" in fields:
        tokens = _ids(row, "completion_ids", tokenizer)
    else:
        end = [] if _truncated(row) else [tokenizer.template.eos]
        if isinstance(fields.get("prompt"), list) and "prompt_ids" not in fields:
            return _conversation(row, tokenizer)
        tokens = [*tokenizer.encode(_string(row, "completion")), *end]
    return _finish(row, [*prompt, *tokens], [False] * len(prompt) + [True] * len(tokens))


def _conversation(row: Row, tokenizer: Tokenizer) -> Trajectory:
    """Prompt and completion as messages: the assistant's in the completion are the actions."""
    if "prompt_ids" in row.fields:
        raise row.fault("prompt_ids", "needs completion_ids where the completion is of messages")
    before = _messages(row, "prompt", "user") if "prompt" in row.fields else []
    after = _messages(row, "completion", "assistant")
    return _encode_dialogue(row, "completion", before + after, len(before), tokenizer)


def _dialogue(row: Row, tokenizer: Tokenizer) -> Trajectory:
    return _encode_dialogue(row, "messages", _messages(row, "messages", ""), 0, tokenizer)


def _encode_dialogue(
    row: Row, column: str, messages: list[dict[str, Any]], first: int, tokenizer: Tokenizer
) -> Trajectory:
    """Tokens of a dialogue whose assistant messages from index `first` on are actions."""
    if not any(m["role"] == "assistant" for m in messages[first:]):
        raise row.fault(column, "no assistant message: there is nothing to learn from")
    tokens, is_action, owner = tokenizer.encode_messages(messages)
    is_action = [a and o >= first for a, o in zip(is_action, owner, strict=True)]
    if _truncated(row) and messages[-1]["role"] == "assistant":
        # Take back the end token, never emitted, and what the template puts after it.
        length = max((k + 1 for k, a in enumerate(is_action) if a), default=0)
        length -= tokens[length - 1] in tokenizer.template.end_ids
        tokens, is_action, owner = tokens[:length], is_action[:length], owner[:length]
    reward = [0.0] * len(tokens)
    for i, message in enumerate(messages):
        at = f"prompt[{i}].reward" if i < first else f"{column}[{i - first}].reward"
        given = _number(row, at, message.get("reward", 0))
        if given == 0:
            continue
        # A template may render several observations as one: the reward stands on its last token.
        shown = next((o for o in owner if o >= i), None)
        last = max((k for k, o in enumerate(owner) if o == shown), default=-1)
        if not any(is_action[: last + 1]):
            raise row.fault(at, "a reward before the first action belongs to no decision")
        reward[last] += given
    return _finish(row, tokens, is_action, reward)


def _messages(row: Row, column: str, role: str) -> list[dict[str, Any]]:
    """A checked list of messages; a plain string is one message of `role`."""
    value = row.fields.get(column)
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        found = "an empty one" if value == [] else kind_of(value)
        raise row.fault(column, f"expected a list of messages, found {found}")
    for i, message in enumerate(value):
        at = f"{column}[{i}]"
        if not isinstance(message, dict):
            raise row.fault(
                at, f"expected an object with role and content, found {kind_of(message)}"
            )
        for key in message:
            if key not in ("role", "content", "reward") and difflib.get_close_matches(
                key.lower(), ("role", "content", "reward"), cutoff=0.85
            ):
                hint = nearest(key.lower(), ("role", "content", "reward"))
                raise row.fault(f"{at}.{key}", f"unknown{hint}")
        if message.get("role") not in ROLES:
            hint = nearest(str(message.get("role")), ROLES)
            found = repr(message.get("role"))
            raise row.fault(
                f"{at}.role", f"expected one of {', '.join(ROLES)}, found {found}{hint}"
            )
        if not isinstance(message.get("content"), str):
            kind = kind_of(message.get("content"))
            raise row.fault(f"{at}.content", f"expected text, found {kind}")
    return [{k: v for k, v in m.items() if v is not None} for m in value]


def _preference(row: Row, tokenizer: Tokenizer) -> list[Trajectory]:
    """As two samples of rewards +1 and -1; a prompt not given is the messages both begin with."""
    pair, fields = ("chosen", "rejected"), dict(row.fields)
    for column, other in (pair, pair[::-1]):
        if column not in fields:
            raise row.fault(column, f"missing: a row with {other!r} needs both")
    both = [fields.pop(column) for column in pair]
    if "prompt" not in fields and "prompt_ids" not in fields and _all(both, list):
        same = next((i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b), None)
        shared = min(map(len, both)) - 1 if same is None else same
        fields["prompt"] = both[0][:shared]
        both = [messages[shared:] for messages in both]
    elif _all(both, list):  # where both repeat the prompt, it is read once
        given = fields.get("prompt")
        before = [{"role": "user", "content": given}] if isinstance(given, str) else given
        if isinstance(before, list) and all(m[: len(before)] == before for m in both):
            both = [messages[len(before) :] for messages in both]
    inner = {**fields, "completions": both, "rewards": [1.0, -1.0]}
    try:
        return _samples(Row(row.where, inner), tokenizer)
    except DataError as error:
        for i, column in enumerate(pair):
            if error.column and error.column.startswith(at := f"completions[{i}]"):
                raise row.fault(column + error.column[len(at) :], error.problem) from None
        raise


def _samples(row: Row, tokenizer: Tokenizer) -> list[Trajectory]:
    """K samples of one prompt, each as a row of its own."""
    singular = {
        "completions": "completion",
        "rewards": "reward",
        "completion_ids": "completion_ids",
        "token_rewards": "token_rewards",
    }
    counted = "completions" if "completions" in row.fields else "completion_ids"
    number = len(_list(row, counted))
    if number == 0:
        raise row.fault(counted, "expected at least one sample, found none")
    shared = {k: v for k, v in row.fields.items() if k not in singular and k != "truncated"}
    each: list[dict[str, Any]] = [dict(shared) for _ in range(number)]
    for column in [*singular, "truncated"]:
        value = row.fields.get(column)
        if isinstance(value, bool) and column == "truncated":
            value = [value] * number
        if value is None:
            continue
        row = Row(row.where, {**row.fields, column: value})
        for fields, part in zip(each, _list(row, column, number, counted), strict=True):
            fields[singular.get(column, column)] = part
    plural = {one: many for many, one in singular.items()} | {"truncated": "truncated"}
    trajectories: list[Trajectory] = []
    for i, fields in enumerate(each):
        try:
            trajectories.append(_completion(Row(row.where, fields), tokenizer))
        except DataError as error:
            column, bracket, rest = (error.column or singular[counted]).partition("[")
            named = f"{plural[column]}[{i}]" if column in plural else column
            raise row.fault(named + bracket + rest, error.problem) from None
    return trajectories


def _steps(row: Row, tokenizer: Tokenizer) -> Trajectory:
    """One completion in steps, joined with nothing between; each is rewarded on its last token."""
    steps = _list(row, "steps")
    rewards = _list(row, "rewards", len(steps), "steps") if "rewards" in row.fields else []
    tokens = prompt_tokens(row, tokenizer)
    prompt = len(tokens)
    credit: dict[int, float] = {}
    for i, step in enumerate(steps):
        added = tokenizer.encode(_string(row, f"steps[{i}]", step))
        if not added:
            raise row.fault(f"steps[{i}]", "an empty step has no token to reward")
        tokens += added
        credit[len(tokens) - 1] = _number(row, f"rewards[{i}]", rewards[i]) if rewards else 0.0
    if not _truncated(row):
        tokens.append(tokenizer.template.eos)
    is_action = [i >= prompt for i in range(len(tokens))]
    return _finish(row, tokens, is_action, [credit.get(i, 0.0) for i in range(len(tokens))])


def prompt_tokens(row: Row, tokenizer: Tokenizer) -> list[int]:
    """The tokens before the completion. Raises `DataError` where a row has no prompt."""
    for column, problem in _PROMPTLESS.items():
        if column in row.fields and not {"prompt", "prompt_ids"} & row.fields.keys():
            raise row.fault(column, problem)
    if "prompt_ids" in row.fields:
        return _ids(row, "prompt_ids", tokenizer)
    if isinstance(row.fields.get("prompt"), list):
        messages = _messages(row, "prompt", "user")
        return tokenizer.encode_messages(messages, add_generation_prompt=True)[0]
    return tokenizer.encode_prompt(_string(row, "prompt"))


def _finish(
    row: Row, tokens: list[int], is_action: list[bool], reward: Sequence[float] | None = None
) -> Trajectory:
    """Add what the row says of rewards, and check that something can be learnt."""
    actions = [i for i, a in enumerate(is_action) if a]
    if not actions:
        raise row.fault(None, "no action: a truncated text needs a token to learn from")
    if actions[0] == 0:
        raise row.fault("prompt_ids", "expected a token or more before the first action")
    total = [0.0] * len(tokens) if reward is None else list(reward)
    if "token_rewards" in row.fields:
        if "reward" in row.fields:
            raise row.fault("token_rewards", "holds all the reward: remove the column of totals")
        given = _list(row, "token_rewards", len(actions), "the completion's tokens, end included")
        for i, value in zip(actions, given, strict=True):
            total[i] += _number(row, "token_rewards", value)
    total[actions[-1]] += _number(row, "reward", row.fields.get("reward", 0.0))
    if not isinstance(row.fields.get("references", []), list):
        raise row.fault("references", f"expected a list, found {kind_of(row.fields['references'])}")
    return Trajectory(tokens, is_action, total, terminated=not _truncated(row))


def _string(row: Row, column: str, value: Any = None) -> str:
    value = row.fields.get(column) if value is None else value
    if not isinstance(value, str):
        raise row.fault(column, f"expected text, found {kind_of(value)}")
    return value


def _number(row: Row, column: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise row.fault(column, f"expected a number, found {kind_of(value)}")
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    if not abs(number) < 3.4e38:  # what fp32 holds
        raise row.fault(column, f"expected a finite number, below 3.4e38, found {kind_of(value)}")
    return number


def _list(row: Row, column: str, length: int | None = None, of: str = "") -> list[Any]:
    """The list in a column, of the same length as `of`, where that is known."""
    value = row.fields.get(column)
    if not isinstance(value, list):
        raise row.fault(column, f"expected a list, found {kind_of(value)}")
    if length is not None and len(value) != length:
        raise row.fault(column, f"expected {length} entries, one for each of {of}: {len(value)}")
    return value


def _ids(row: Row, column: str, tokenizer: Tokenizer) -> list[int]:
    ids = _list(row, column)
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < tokenizer.vocab_size:
            last = tokenizer.vocab_size - 1
            raise row.fault(column, f"expected token ids from 0 to {last}, found {i!r}")
    return list(ids)


def _truncated(row: Row) -> bool:
    value = row.fields.get("truncated", False)
    if not isinstance(value, bool):
        raise row.fault("truncated", f"expected true or false, found {kind_of(value)}")
    return value


def _all(values: list[Any], kind: type) -> bool:
    return bool(values) and all(isinstance(v, kind) for v in values)
