"""`qvgpt lens`: what the values say of given texts, token by token, as one HTML page."""

import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from qvgpt.data.files import Row, read_rows
from qvgpt.data.rows import is_rewarded, row_to_trajectories
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.guide import Guide
from qvgpt.decode.sources import PrefixValues
from qvgpt.errors import QvgptError
from qvgpt.guidance_options import GuidanceOptions
from qvgpt.lens.page import MARK, LensText, lens_page
from qvgpt.lens.records import read_texts
from qvgpt.report_page import write_page
from qvgpt.sampling import warn_of_unknown
from qvgpt.trajectory import Trajectory, returns_to_go


@dataclass(frozen=True)
class LensConfig(GuidanceOptions):
    """See what the model values: each token of given texts, coloured by advantage, on one page."""

    model: str
    """Directory of the model: its own values are read, where no others are named."""
    text: str | None = None
    """A text, all of it judged."""
    prompt: str | None = None
    """What stands before the completion."""
    completion: str | None = None
    """What is judged after the prompt."""
    data: list[str] = field(default_factory=list)
    """Files of rows: their texts are judged, their rewards shown."""
    rows: int = 20
    """So many rows of the data."""
    alternatives: int = 5
    """So many of the likeliest tokens are shown at each place; at most 20."""
    output: str = "lens.html"
    """The page. One that lens wrote before is replaced, nothing else is."""


@dataclass(frozen=True)
class _Given:
    """A text to be shown."""

    title: str
    text: Trajectory
    rewarded: bool


def lens(config: LensConfig) -> dict[str, Any]:
    """Read the texts with the model and write the page."""
    output = Path(config.output)
    _check_output(output)
    model, values = config.load(config.model)
    if model.tokenizer is None:
        raise QvgptError(f"{config.model}: has no tokenizer to read texts with")
    guide = Guide.of(model, values)
    if guide.source is None:
        raise QvgptError(
            f"{config.model}: has no values to show; --value_models or --contrast name others"
        )
    if values is None and model.info.level == "turn":
        raise QvgptError(
            f"{config.model}: its values are of whole turns and say nothing of a token; "
            "`qvgpt score` ranks texts by them"
        )
    given = _given(config, model.tokenizer)
    too_long = sum(len(each.text.tokens) > guide.context for each in given)
    if too_long:
        raise QvgptError(
            f"{too_long} of {len(given)} texts are longer than the context of {guide.context}"
        )
    warn_of_unknown([each.text.tokens for each in given], model)
    guidance = config.guidance(model, config.model, values)
    guide.refuse([0], 1, guidance)
    in_words = config.in_words(model, guidance, values)
    print(in_words, file=sys.stderr)
    texts = [each.text for each in given]
    how: dict[str, Any] = {"alternatives": config.alternatives, "values": values}
    records, ends = read_texts(model, texts, guidance, **how)
    own = values is None and not model.info.centred  # in the units of the rewards
    own = own and not (isinstance(guide.source, PrefixValues) and guide.source.log)
    shown = []
    for each, tokens, end in zip(given, records, ends, strict=True):
        returns = None
        if own and each.rewarded:
            discount = model.info.gamma, model.info.per_turn_discount
            returns = returns_to_go(each.text, *discount)
        reward = each.text.total_reward if each.rewarded else None
        over = each.text.terminated
        shown.append(LensText(tokens, each.title, reward, returns, None if over else end))
    about = f"{config.model}; {in_words}"
    write_page(output, lens_page(shown, about=about))
    actions = [token for tokens in records for token in tokens if "q" in token]
    return {"page": str(output), "texts": len(texts), "tokens": len(actions)}


def _given(config: LensConfig, tokenizer: Tokenizer) -> list[_Given]:
    """The texts, of one source alone."""
    pair = config.prompt is not None or config.completion is not None
    if [config.text is not None, pair, bool(config.data)].count(True) != 1:
        raise QvgptError("lens: give --text, or --prompt and --completion, or --data")
    if config.data:
        if config.rows < 1:
            raise QvgptError("--rows: at least 1")
        every = (row for path in config.data for row in read_rows(path))
        rows = list(islice(every, config.rows))
    elif config.text is not None:
        rows = [Row("", {"text": config.text})]
    elif config.prompt is None or config.completion is None:
        missing = "prompt" if config.prompt is None else "completion"
        raise QvgptError(f"--{missing}: missing; --prompt and --completion belong together")
    else:
        rows = [Row("", {"prompt": config.prompt, "completion": config.completion})]
    found = []
    for row in rows:
        texts = row_to_trajectories(row, tokenizer)
        for i, text in enumerate(texts):
            which = f" [{i + 1}]" if len(texts) > 1 else ""
            found.append(_Given(f"{Path(row.where).name}{which}", text, is_rewarded(row)))
    return found


def _check_output(output: Path) -> None:
    """Raise `QvgptError` where something stands that is no page of ours."""
    if output.is_dir():
        raise QvgptError(f"{output}: a directory; name a file, such as {output / 'lens.html'}")
    if output.exists() and MARK not in output.read_bytes():
        raise QvgptError(f"{output}: holds something other than a lens page; choose another output")
