"""`qvgpt collect`: a model writes K completions per prompt, a reward scores them → data.jsonl.

Lines are written in chunks of prompts, each chunk synced to disk; with `resume` a stopped
collection goes on at its last whole chunk and ends with the file it would have ended with.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from qvgpt.collected import as_line, kept_fields, whole_chunks
from qvgpt.collected import summary as summary_of
from qvgpt.data.rows import Row, read_rows
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.beam import BeamSearch
from qvgpt.decode.engine import Request, Text, row_seed
from qvgpt.decode.policy import Guidance
from qvgpt.decode.rerank import write_best
from qvgpt.decode.sources import ValueSource
from qvgpt.envs.rewards import Metric, expected, get_reward, references, shape
from qvgpt.errors import QvgptError
from qvgpt.models.backbone import Dtype
from qvgpt.models.value_model import ValueModel
from qvgpt.remote import Server
from qvgpt.run import alone_in, check_run, open_run, write_json
from qvgpt.sampling import (
    TextProgress,
    check_guidance,
    check_references,
    check_values,
    load_prompts,
    load_values,
)

_BATCHES_PER_CHUNK = 8  # more would lose more when stopped, fewer idle at the ends of chunks
_LOCAL = (
    "beams", "best_of", "brevity", "contrast", "device_map", "dtype", "length_penalty", "shaped",
    "value_models", "weights",
)  # fmt: skip


@dataclass(frozen=True)
class CollectConfig:
    """Sample completions of prompts and score them: rewarded text to learn from."""

    model: str
    """Directory of a trained model."""
    data: str
    """Rows with prompts (and what the reward needs: references, completion, …)."""
    reward: str
    """bleu, chrf, rouge_l, exact_match, token_f1, length …, classifier:DIR#LABEL, a sum such as
    '0.7*chrf + 0.3*distinct', or module:function; docs/rewards.md lists them."""
    output: str
    """Where data.jsonl and summary.json go; a new directory."""
    samples: int = 8
    """Completions per prompt."""
    temperatures: list[float] = field(default_factory=lambda: [1.0])
    """A prompt's samples take these in turn."""
    beams: int = 0
    """Add the texts that a beam search with so many beams ends with: what decoding prefers."""
    length_penalty: float = 1.0
    """Of the beam search: 0 ranks by likelihood, 1 by that of the average token, more: longer."""
    beta: float = 0.0
    """Strength of guidance, if there are values already."""
    best_of: int = 1
    """Each sample is the one of so many texts whose last token's Q is highest."""
    kl_budget: float | None = None
    """In the place of beta: the KL to the base, in nats, that each token may take; needs top_k."""
    value_models: list[str] = field(default_factory=list)
    """Directories of models, of any size and the same tokenizer, whose values guide instead of the
    model's own; those of several are added up."""
    contrast: list[str] = field(default_factory=list)
    """Two directories of language models, PLUS and MINUS: log π₊ − log π₋ guides, in nats (proxy
    tuning, DExperts); beside value_models it is added to them."""
    weights: list[float] = field(default_factory=list)
    """Of each of value_models, then of the contrast; none: 1 each."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = None
    """Keep the smallest set of tokens that holds this probability."""
    min_p: float | None = None
    """Keep tokens at least this likely, relative to the likeliest."""
    compare_with: Literal["row", "samples"] = "row"
    """What the reward compares a text with: the row's own references, or the other samples of its
    prompt, so that a text earns what it would be expected to by the model's own belief (the
    utility of minimum Bayes risk: Kumar & Byrne, 2004). Beams are judged, but judge nothing."""
    shaped: bool = False
    """Spread the reward over the tokens that earn it; its sum stays the same."""
    brevity: bool = True
    """BLEU's brevity penalty in every prefix; false: settled by the last token (if shaped)."""
    include_references: bool = False
    """Add the row's own completion (else its first reference) to the samples, with its reward."""
    unique: bool = False
    """Keep one of identical samples of a prompt."""
    max_tokens: int = 128
    """Where a completion is cut if no end token came; it is marked as length_limited."""
    max_batch: int = 64
    """Completions written at the same time."""
    limit: int | None = None
    """Use only this many prompts, from the top."""
    seed: int = 0
    """Of sampling: every completion has its own, whatever the batch."""
    dtype: Dtype = "float32"
    """Of the language model's weights in memory; auto: as they are stored."""
    device_map: str | None = None
    """Where the model lies, as accelerate reads it: auto, cuda, cpu …; none: the CPU."""
    base_url: str | None = None
    """Of an OpenAI-compatible server (http://127.0.0.1:8000/v1), which writes in the place of a
    model here; `model` is then its name there. Rows hold text, since token ids are unknown."""
    api_key_env: str | None = None
    """The environment variable that holds the server's key; none: OPENAI_API_KEY."""
    as_chat: bool | None = None
    """Send text prompts to the server as a user's message, as prompts of messages always are."""
    resume: bool = False
    """Go on with a collection that was stopped."""


Write = Callable[[range, TextProgress], list[list[Text]]]
"""The texts of each of some prompts."""


def collect(config: CollectConfig) -> dict[str, Any]:
    """Write `data.jsonl`, one line a prompt, and return what summary.json holds.

    Counts and rewards there are those of the whole file, seconds and rate those of this session.
    """
    started = time.perf_counter()
    check_run(config.output, "collect", config, config.resume)
    if config.base_url is not None:
        rows, write = prepare_remote(config)
        reward, tokenizer = get_reward(config.reward), None
    else:
        model, values, rows, prompts, reward = prepare(config)
        tokenizer = model.tokenizer

        def write(chunk: range, progress: TextProgress, /) -> list[list[Text]]:
            return _written(model, values, prompts, chunk, config, progress)

    output = open_run(config.output, "collect", config, config.resume)
    with alone_in(output):
        return _collect(config, write, rows, reward, tokenizer, started)


def prepare(
    config: CollectConfig,
) -> tuple[ValueModel, ValueSource | None, list[Row], list[list[int]], Metric]:
    """Model, other values that guide it, rows, prompts and reward of a collection.

    Raises `QvgptError` for all that could only fail later; writes nothing.
    """
    _check_counts(config)
    for name in ("api_key_env", "as_chat"):
        if getattr(config, name):
            raise QvgptError(f"collect: {name} is for a server, and no base_url names one")
    reward = get_reward(config.reward)
    model = ValueModel.from_pretrained(
        config.model, dtype=config.dtype, device_map=config.device_map
    )
    values = load_values(
        model, config.model, config.value_models, config.contrast, config.weights,
        dtype=config.dtype, device_map=config.device_map,
    )  # fmt: skip
    check_values(model, config.model, [config.beta, config.kl_budget], config.best_of, values)
    rows, prompts = load_prompts(config.data, model, config.max_tokens, config.limit)
    _check_rows(config, rows)
    guidances = [_guidance(config, temperature) for temperature in config.temperatures]
    check_guidance(model, guidances, prompts, config.max_tokens, values)
    return model, values, rows, prompts, reward


def prepare_remote(config: CollectConfig) -> tuple[list[Row], Write]:
    """Rows and how a server writes to their prompts; raises `QvgptError` as `prepare` does."""
    _check_counts(config)
    plain = CollectConfig(config.model, config.data, config.reward, config.output)
    for name in _LOCAL:
        if getattr(config, name) != getattr(plain, name):
            raise QvgptError(f"collect: {name} needs the model here, not at a base_url")
    rows = list(islice(read_rows(config.data), config.limit))
    _check_rows(config, rows)
    guidances = [_guidance(config, temperature) for temperature in config.temperatures]
    key = os.environ.get(config.api_key_env or "OPENAI_API_KEY")
    server = Server(config.base_url or "", config.model, key, bool(config.as_chat))
    asked = [server.prompt(row) for row in rows]
    served = server.guided(guidances)

    def write(chunk: range, progress: TextProgress) -> list[list[Text]]:
        n = config.samples
        requests = [
            {
                **asked[i],
                **served[k % len(served)],
                "max_tokens": config.max_tokens,
                "seed": row_seed(config.seed, i * n + k) % 2**31,
            }
            for i in chunk
            for k in range(n)
        ]
        texts = server.write(requests, config.max_batch, progress.add)
        return [texts[k * n :][:n] for k in range(len(chunk))]

    return rows, write


def _check_counts(config: CollectConfig) -> None:
    if config.samples < (0 if config.beams else 1) or not config.temperatures:
        raise QvgptError(
            "collect: samples must be at least 1 (0 with beams), and temperatures not be empty"
        )
    if config.max_batch < 1:
        raise QvgptError("collect: max_batch must be at least 1")
    if config.beams < 0:
        raise QvgptError(f"collect: beams must be 0 or more, not {config.beams}")
    if config.max_tokens < 1 or (config.limit is not None and config.limit < 1):
        raise QvgptError("collect: max_tokens and limit must be at least 1")
    if config.compare_with == "samples" and config.samples < 2:
        raise QvgptError("collect: compare_with samples needs at least 2 samples")


def _check_rows(config: CollectConfig, rows: Sequence[Row]) -> None:
    """Raise `QvgptError` for rows that lack what is asked of them; say what they do twice."""
    kept = [kept_fields(row.fields) for row in rows]
    several: dict[str, set[str]] = {}
    for fields in kept:
        prompt = json.dumps(fields.get("prompt"))
        several.setdefault(prompt, set()).add(json.dumps(fields.get("references")))
    unlike = sum(len(found) > 1 for found in several.values())
    if unlike and config.compare_with == "row":
        print(
            f"collect: {unlike} prompts stand in several rows with other references, and what is "
            "written to each is judged by its own row alone: a row with all of them in "
            "`references` takes the best",
            file=sys.stderr,
        )
    if config.include_references:
        for row in rows:
            _own_completion(row)
    if config.compare_with == "row":
        check_references(rows, [config.reward])


def _collect(
    config: CollectConfig,
    write: Write,
    rows: list[Row],
    reward: Metric,
    tokenizer: Tokenizer | None,
    started: float,
) -> dict[str, Any]:
    """Sample, score and write what is not written yet, then the summary."""
    output = Path(config.output)
    file = output / "data.jsonl"
    each = config.samples * config.best_of + config.beams
    size = max(1, _BATCHES_PER_CHUNK * config.max_batch // each)
    done = whole_chunks(file, rows, size)
    progress = TextProgress("collect", len(rows) * each, done * each)
    with progress, file.open("ab") as lines:
        for start in range(done, len(rows), size):
            chunk = range(start, min(start + size, len(rows)))
            groups = write(chunk, progress)
            found = _collected([rows[i] for i in chunk], groups, reward, tokenizer, config)
            lines.write(b"".join(map(as_line, found)))
            lines.flush()
            os.fsync(lines.fileno())
    seconds = time.perf_counter() - started
    summary = summary_of(file) | {
        "reward": config.reward,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(progress.tokens / seconds, 1),
    }
    write_json(output / "summary.json", summary)
    return summary


def _requests(prompt: Sequence[int], index: int, config: CollectConfig) -> list[Request]:
    """The K requests of one prompt; seeds are those of prompt and sample alone."""
    return [
        Request(
            prompt,
            config.max_tokens,
            _guidance(config, config.temperatures[k % len(config.temperatures)]),
            row_seed(config.seed, index * config.samples + k),
        )
        for k in range(config.samples)
    ]


def _guidance(config: CollectConfig, temperature: float = 1.0) -> Guidance:
    return Guidance(
        beta=config.beta,
        temperature=temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        kl_budget=config.kl_budget,
    )


def _written(
    model: ValueModel,
    values: ValueSource | None,
    prompts: Sequence[Sequence[int]],
    chunk: range,
    config: CollectConfig,
    progress: TextProgress,
) -> list[list[Text]]:
    """The texts of each prompt of a chunk: samples, then beams."""
    requests = [r for i in chunk for r in _requests(prompts[i], i, config)]
    texts = write_best(
        model, requests, config.best_of,
        max_batch=config.max_batch, on_step=progress.step, values=values,
    )  # fmt: skip
    groups = [texts[k * config.samples :][: config.samples] for k in range(len(chunk))]
    if not config.beams:
        return groups
    beams = _beams(model, values, [prompts[i] for i in chunk], config)
    tokens = sum(len(text.tokens) for found in beams for text in found)
    progress.add(config.beams * len(chunk), tokens)
    return [a + b for a, b in zip(groups, beams, strict=True)]


def _beams(
    model: ValueModel,
    values: ValueSource | None,
    prompts: Sequence[Sequence[int]],
    config: CollectConfig,
) -> list[list[Text]]:
    """What a beam search ends with, best first."""
    assert model.tokenizer is not None
    search = BeamSearch(config.beams, config.length_penalty, config.max_tokens, config.max_batch)
    decode = model.tokenizer.decode_completion
    return [
        [Text(h.tokens, decode(h.tokens), h.terminated) for h in found]
        for found in search(model, prompts, _guidance(config), values).texts
    ]


def _collected(
    rows: Sequence[Row],
    groups: Sequence[Sequence[Text]],
    reward: Metric,
    tokenizer: Tokenizer | None,
    config: CollectConfig,
) -> list[dict[str, Any]]:
    """The lines of data.jsonl for the prompts of a chunk, whose texts are judged all at once.

    Without a tokenizer token ids are unknown.
    """
    chosen = [_chosen(r, texts, tokenizer, config) for r, texts in zip(rows, groups, strict=True)]
    fields: list[Mapping[str, Any]] = []
    for row, written, (texts, _) in zip(rows, groups, chosen, strict=True):
        if config.compare_with == "samples":
            fields += _others(row, texts, written[: config.samples])
        else:
            fields += [row.fields] * len(texts)
    judge = expected(reward) if config.compare_with == "samples" else reward
    every = [text for texts, _ in chosen for text in texts]
    if config.shaped:
        assert tokenizer is not None
        ids = [text.tokens for text in every]
        scores: Iterator[Any] = iter(shape(judge, ids, fields, tokenizer, brevity=config.brevity))
    else:
        scores = iter(judge([text.text for text in every], fields))
    lines = []
    for row, (texts, sampled) in zip(rows, chosen, strict=True):
        rewards = [next(scores) for _ in texts]
        line = {
            **kept_fields(row.fields),
            "completions": [text.text for text in texts],
            **({} if tokenizer is None else {"completion_ids": [text.tokens for text in texts]}),
            "token_rewards" if config.shaped else "rewards": rewards,
            # a reward for the whole text is final, also where the length limit cut it: a value to
            # bootstrap from on top of it would count twice
            "truncated": [config.shaped and not text.terminated for text in texts],
            "length_limited": [not text.terminated for text in texts],
            "sampled": sampled,
        }
        lines.append(line | ({"judged_by": sorted(reward.models)} if reward.models else {}))
    return lines


def _chosen(
    row: Row, texts: Sequence[Text], tokenizer: Tokenizer | None, config: CollectConfig
) -> tuple[list[Text], int]:
    """The texts of a prompt that are kept, and how many of them, the first, the model wrote."""

    def like(text: Text) -> Any:
        return text.text if tokenizer is None else tuple(text.tokens)

    texts = list(texts)
    if config.unique:
        first: dict[Any, Text] = {}
        for text in texts:
            first.setdefault(like(text), text)
        texts = list(first.values())
    sampled = len(texts)
    if config.include_references:
        reference = _reference(row, tokenizer)
        if not config.unique or all(like(reference) != like(text) for text in texts):
            texts.append(reference)
    return texts, sampled


def _others(row: Row, texts: Sequence[Text], samples: Sequence[Text]) -> list[Mapping[str, Any]]:
    """The row as each text is judged: with the samples but itself as references."""
    fields = []
    for text in texts:
        itself = next((i for i, sample in enumerate(samples) if sample is text), None)
        others = [sample.text for i, sample in enumerate(samples) if i != itself]
        fields.append({**row.fields, "references": others})
    return fields


def _own_completion(row: Row) -> str:
    own = row.fields.get("completion")
    if not isinstance(own, str) and not row.fields.get("references"):
        raise row.fault("completion", "include_references needs a text here, or references")
    return own if isinstance(own, str) else references(row.fields)[0]


def _reference(row: Row, tokenizer: Tokenizer | None) -> Text:
    """The row's own completion as if the model had written it."""
    text = _own_completion(row)
    tokens = [] if tokenizer is None else [*tokenizer.encode(text), _end_token(row, tokenizer)]
    return Text(tokens, text, terminated=True)


def _end_token(row: Row, tokenizer: Tokenizer) -> int:
    """What ends a completion: a message's end where the prompt is of messages."""
    template = tokenizer.template
    if isinstance(row.fields.get("prompt"), list) and template.eot is not None:
        return template.eot
    return template.eos
