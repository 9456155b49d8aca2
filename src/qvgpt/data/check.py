"""The data linter: what would be trained on, and every fault at once instead of the first."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qvgpt.data.files import DataError, path_list, scan_rows
from qvgpt.data.rows import is_rewarded, row_form, row_to_trajectories
from qvgpt.data.sizes import context_for
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.errors import QvgptError
from qvgpt.trajectory import Trajectory

MAX_FAULTS_SHOWN = 20
_EXAMPLES = 3
_HEAD, _TAIL = 200, 100  # tokens shown of a text that has more


@dataclass(frozen=True)
class Lengths:
    """Tokens a text."""

    min: int = 0
    median: int = 0
    p95: int = 0
    max: int = 0


@dataclass(frozen=True)
class Rewards:
    """The undiscounted return of each text."""

    min: float = 0.0
    mean: float = 0.0
    max: float = 0.0
    nonzero: float = 0.0
    """Share of the texts whose return is not 0."""
    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    """A histogram in 10 equal bins: `counts[i]` from `edges[i]` to `edges[i + 1]`."""


@dataclass(frozen=True)
class CheckReport:
    """What `check` found."""

    rows: int
    """Faulty ones included."""
    trajectories: int
    forms: dict[str, int]
    """Good rows by the column that makes their form, such as `messages`."""
    faults: int
    """How many there are in all."""
    first_faults: tuple[str, ...]
    lengths: Lengths
    too_long: int
    """Texts of more than `max_length` tokens."""
    max_length: int | None
    action_share: float
    """Of the tokens, how many are actions."""
    rewards: Rewards
    unrewarded: int
    """Good rows that name no reward of their texts: it is read as 0."""
    unknown: int
    """Texts with characters that the tokenizer does not know."""
    columns: tuple[str, ...]
    """All that the good rows have."""
    terminated_share: float
    prompts: int
    """How many different ones."""
    group_sizes: dict[int, int]
    """How many prompts come with k texts, for each k."""
    examples: tuple[Trajectory, ...] = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether all of it can be trained on."""
        return self.faults == 0 and self.trajectories > 0

    def as_dict(self) -> dict[str, Any]:
        """The figures, and the context a new model needs, ready for JSON; without the examples."""
        content = {k: v for k, v in asdict(self).items() if k != "examples"}
        content["context"] = context_for(self.lengths.max)
        content["group_sizes"] = {str(k): v for k, v in self.group_sizes.items()}
        return content


def check(
    paths: str | Path | Iterable[str | Path], tokenizer: Tokenizer, max_length: int | None = None
) -> CheckReport:
    """Read and tokenise everything; faults are collected, never raised."""
    trajectories: list[Trajectory] = []
    forms: Counter[str] = Counter()
    faults: list[str] = []
    rows = unrewarded = 0
    columns: set[str] = set()
    for path in path_list(paths):
        for row in scan_rows(path):
            rows += 1
            try:
                if isinstance(row, DataError):
                    raise row
                trajectories += row_to_trajectories(row, tokenizer)
                forms[row_form(row)] += 1
                unrewarded += not is_rewarded(row)
                columns |= row.fields.keys()
            except QvgptError as error:
                faults.append(str(error))
    lengths = sorted(len(t.tokens) for t in trajectories)
    groups = Counter(t.prompt for t in trajectories)
    number = max(len(trajectories), 1)
    return CheckReport(
        rows=rows,
        trajectories=len(trajectories),
        forms=dict(forms),
        faults=len(faults),
        first_faults=tuple(faults[:MAX_FAULTS_SHOWN]),
        lengths=_lengths(lengths),
        too_long=sum(n > max_length for n in lengths) if max_length is not None else 0,
        max_length=max_length,
        action_share=sum(sum(t.is_action) for t in trajectories) / max(sum(lengths), 1),
        rewards=_rewards([t.total_reward for t in trajectories]),
        unrewarded=unrewarded,
        unknown=tokenizer.count_unknown(t.tokens for t in trajectories),
        columns=tuple(sorted(columns)),
        terminated_share=sum(t.terminated for t in trajectories) / number,
        prompts=len(groups),
        group_sizes=dict(sorted(Counter(groups.values()).items())),
        examples=_examples(trajectories),
    )


def _examples(trajectories: Sequence[Trajectory]) -> tuple[Trajectory, ...]:
    """The first few, of different prompts where there are enough."""
    firsts: dict[tuple[int, ...], int] = {}
    for i, trajectory in enumerate(trajectories):
        firsts.setdefault(trajectory.prompt, i)
        if len(firsts) == _EXAMPLES:
            break
    chosen = dict.fromkeys([*firsts.values(), *range(min(_EXAMPLES, len(trajectories)))])
    return tuple(trajectories[i] for i in sorted(list(chosen)[:_EXAMPLES]))


def _lengths(ordered: Sequence[int]) -> Lengths:
    if not ordered:
        return Lengths()
    last = len(ordered) - 1
    return Lengths(ordered[0], ordered[last // 2], ordered[round(0.95 * last)], ordered[last])


def _rewards(returns: Sequence[float], bins: int = 10) -> Rewards:
    if not returns:
        return Rewards()
    low, high = min(returns), max(returns)
    width = (high - low) / bins
    counts = [0] * bins
    for value in returns:
        counts[min(int((value - low) / width), bins - 1) if width > 0 else 0] += 1
    return Rewards(
        low,
        sum(returns) / len(returns),
        high,
        sum(r != 0 for r in returns) / len(returns),
        tuple(low + i * width for i in range(bins + 1)),
        tuple(counts),
    )


def render(
    report: CheckReport,
    trajectories: Sequence[Trajectory],
    tokenizer: Tokenizer,
    console: Console,
) -> None:
    """Print the figures, the faults, and the first few `trajectories` as they are seen in training.

    Mostly `trajectories` is `report.examples`.
    """
    console.print(_table(report))
    for fault in report.first_faults:
        console.print(Text(fault, style="red"), soft_wrap=True)
    if report.faults > len(report.first_faults):
        console.print(Text(f"... and {report.faults - len(report.first_faults)} more faults"))
    if not trajectories:
        return
    legend = Text("prompt", style="dim")
    legend.append("  action", style="green").append("  observation", style="blue")
    console.print(legend.append("  [reward]", style="bold magenta"))
    for trajectory in trajectories[:_EXAMPLES]:
        console.print(Text())
        console.print(picture(trajectory, tokenizer))


def picture(trajectory: Trajectory, tokenizer: Tokenizer) -> Text:
    """One text in colours: prompt, actions and observations, each reward behind its token.

    Of a long text the head and the tail, where the last reward sits.
    """
    text = Text(overflow="fold")
    length, first = len(trajectory.tokens), len(trajectory.prompt)
    parts = [range(length)]
    if length > _HEAD + _TAIL:
        parts = [range(_HEAD), range(length - _TAIL, length)]
    for part in parts:
        if part.start:
            text.append(f" … {part.start - _HEAD} tokens … ", style="italic")
        pieces = tokenizer.pieces(trajectory.tokens[part.start : part.stop])
        for i, piece in zip(part, pieces, strict=True):
            style = "green" if trajectory.is_action[i] else "blue" if i >= first else "dim"
            text.append(piece, style=style)
            if trajectory.reward[i] != 0:
                text.append(f"[{trajectory.reward[i]:+g}]", style="bold magenta")
    if not trajectory.terminated:
        text.append(" ... truncated", style="italic")
    return text


def _context(longest: int) -> str:
    """What a new model's context is fitted to."""
    context = context_for(longest)
    if context < longest:
        return f"{context} of a new model, unless more is said: the longest text does not fit"
    return f"{context} of a new model: room for the longest text, and {context - longest} tokens"


def _table(report: CheckReport) -> Table:
    table = Table(show_header=False)
    lengths, rewards = report.lengths, report.rewards
    forms = ", ".join(f"{form} {count}" for form, count in report.forms.items())
    groups = ", ".join(f"{k} texts: {n}" for k, n in list(report.group_sizes.items())[:8])
    long = ""
    if report.max_length is not None:
        long = f"; {report.too_long} longer than max_length {report.max_length}"
    lines = {
        "rows": f"{report.rows} ({forms or 'none is good'})",
        "faults": str(report.faults),
        "texts": f"{report.trajectories}, {report.terminated_share:.0%} of them terminated",
        "tokens a text": f"min {lengths.min}, median {lengths.median}, 95 % at most {lengths.p95}, "
        f"max {lengths.max}{long}",
        "context": _context(lengths.max),
        "actions": f"{report.action_share:.1%} of all tokens",
        "return a text": f"min {rewards.min:.4g}, mean {rewards.mean:.4g}, max {rewards.max:.4g}; "
        f"{rewards.nonzero:.0%} are not 0",
        "without a reward": f"{report.unrewarded} of {sum(report.forms.values())} rows, read as 0 "
        f"(columns: {', '.join(report.columns)})",
        "histogram": _bars(rewards),
        "prompts": f"{report.prompts} different ones ({groups})",
    }
    if not report.unrewarded:
        del lines["without a reward"]
    if report.unknown:
        lines["unknown"] = (
            f"{report.unknown} texts have characters that the tokenizer does not know"
        )
    for name, value in lines.items():
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _bars(rewards: Rewards) -> str:
    """The histogram as ten bars, each at least one eighth high where it is not empty."""
    if not rewards.counts or rewards.min == rewards.max:
        return "all the same"
    blocks, most = " ▁▂▃▄▅▆▇█", max(rewards.counts)
    bars = "".join(blocks[-(-8 * count // most)] for count in rewards.counts)
    return f"{rewards.edges[0]:.4g} |{bars}| {rewards.edges[-1]:.4g}"
