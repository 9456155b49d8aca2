"""Methods side by side, over the same prompts and the same random numbers.

    rows = compare(model, prompts, score, {"base": Guidance(), "guided": Guidance(beta=4)})

Intervals are bootstrapped over prompts (samples of one prompt are not independent) and
differences are paired. To have single texts as the unit, give a prompt once for each of them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qvgpt.bootstrap import Estimate, mean_ci
from qvgpt.decode.engine import OnStep, Request, Text, row_seed
from qvgpt.decode.policy import Guidance
from qvgpt.decode.rerank import choice_kl, write_best
from qvgpt.decode.score import score as score_texts
from qvgpt.decode.score import sequence_kl
from qvgpt.decode.search import Search
from qvgpt.decode.searches import by_values, is_sampled, search_name, write_searched
from qvgpt.decode.sources import ValueSource
from qvgpt.errors import QvgptError
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Trajectory
from qvgpt.written import WrittenTexts

Score = Callable[[list[str], list[int]], list[float]]
"""Completions and the index of the prompt each belongs to → one score each."""
_TIMING_ROUNDS = 3


@dataclass(frozen=True)
class CompareOptions:
    """How texts are sampled, timed and resampled."""

    samples: int = 1
    """Texts per prompt; greedy writes one."""
    max_tokens: int = 128
    max_batch: int = 64
    seed: int = 0
    timing: int = 64
    """Texts to measure speed on, without token reports, which slow decoding down; 0: none."""
    keep_reports: int = 0
    """Of this many prompts the first sample keeps its token reports."""
    resamples: int = 2000


@dataclass(frozen=True)
class Method:
    """How texts are written."""

    guidance: Guidance
    best_of: int = 1
    """Of so many texts the one whose last token's Q is highest."""
    search: Search | None = None
    """What finds the texts, where they are not sampled one by one."""

    @property
    def valued(self) -> bool:
        """Whether values change its texts."""
        searched = self.search is not None and by_values(self.search)
        return self.guidance.guides or self.best_of > 1 or searched

    def samples(self, asked: int) -> int:
        """Texts of each prompt: one where it leaves nothing to chance, as greedy text does."""
        return asked if self.guidance.temperature > 0 and is_sampled(self.search) else 1


@dataclass(frozen=True)
class Sample:
    """One text that a method wrote."""

    prompt: int
    """Index of the prompt."""
    written: Text
    score: float


@dataclass(frozen=True)
class Row:
    """One method's results."""

    method: str
    baseline: str
    """The method its differences are to."""
    how: Method
    score: Estimate
    metrics: dict[str, Estimate]
    kl_per_sequence: float
    """Mean of `Text.kl`: how far the method has gone from the plain model (or `base`), in nats."""
    s_per_token: float | None
    """Wall seconds over tokens of a whole batch, prompts included, without token reports: to be
    compared where texts are alike in length, since short ones fill a batch less well."""
    forward_tokens_per_token: float | None
    """Tokens read by any trunk, prompts and candidates that were dropped included, over tokens of
    the texts: what a method costs on any machine."""
    tokens_mean: float
    cut: float
    """Share of texts that the length limit cut."""
    n: int
    """Prompts."""
    seed: int
    samples: list[Sample]

    @property
    def guidance(self) -> Guidance:
        """That of the method."""
        return self.how.guidance

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, without the samples."""
        names = ("kl_per_sequence", "s_per_token", "forward_tokens_per_token", "tokens_mean",
                 "cut", "n", "seed")  # fmt: skip
        return {
            "method": self.method,
            "beta": self.guidance.beta,
            "kl_budget": self.guidance.kl_budget,
            "temperature": self.guidance.temperature,
            "best_of": self.how.best_of,
            "search": None if self.how.search is None else search_name(self.how.search),
            **_estimate_dict(self.score, "mean"),
            **{name: getattr(self, name) for name in names},
            "metrics": {name: _estimate_dict(e, "value") for name, e in self.metrics.items()},
        }

    def by_prompt(self) -> list[list[Sample]]:
        """The samples of each prompt."""
        groups: list[list[Sample]] = [[] for _ in range(self.n)]
        for sample in self.samples:
            groups[sample.prompt].append(sample)
        return groups


def compare(
    model: ValueModel,
    prompts: Sequence[Sequence[int]],
    score: Score,
    methods: Mapping[str, Method | Guidance],
    options: CompareOptions | None = None,
    *,
    base: ValueModel | None = None,
    metrics: Mapping[str, Score] | None = None,
    on_step: OnStep | None = None,
    values: ValueSource | None = None,
    kept: WrittenTexts | None = None,
) -> list[Row]:
    """Write texts by every method from the same prompts and seeds, and compare their scores.

    A row's difference is to the first method with β = 0 at its temperature, else to the first
    of all. `metrics` are further scores of the same texts. With `base`, a model of the same
    tokenizer, it writes the texts of β = 0 in place of `model`, and KL is to it. Of texts chosen
    among several KL is a bound (`decode.rerank.choice_kl`), of searches what
    `searches.write_searched` has. `values` guide and rank instead of the model's own; KL is then
    to the model itself. A method whose texts are `kept` does not write them again; they are judged
    anew.
    """
    options = options or CompareOptions()
    if not prompts or not methods:
        raise QvgptError("a comparison needs prompts and methods")
    if base is not None:
        refuse_other_tokens(model, base)
    ways = {n: Method(m) if isinstance(m, Guidance) else m for n, m in methods.items()}
    writers = {
        name: _Writer(model if how.valued or base is None else base, how, values)
        for name, how in ways.items()
    }
    written: dict[str, list[Sample]] = {}
    for name, writer in writers.items():
        texts = None if kept is None else kept.find(name)
        if texts is None:
            texts = _write(writer, prompts, options, on_step)
            if kept is not None:
                kept.keep(name, texts)
        owners, _ = writer.requests(prompts, options)
        scores = score([text.text for text in texts], owners)
        scored = zip(owners, texts, scores, strict=True)
        written[name] = [Sample(i, text, float(s)) for i, text, s in scored]
    for name, how in ways.items():
        if how.valued and base is not None:
            _measure_kl(writers[name], base, prompts, written[name])
        for sample in written[name]:
            sample.written.kl += choice_kl(how.best_of)
    judges = {"": None, **(metrics or {})}  # "" is the score itself, known already
    means = {
        name: {key: _prompt_means(samples, judge, len(prompts)) for key, judge in judges.items()}
        for name, samples in written.items()
    }
    costs = _time(writers, prompts, options)
    rows: list[Row] = []
    for name, samples in written.items():
        baseline = _baseline(name, ways)
        estimates = {
            key: mean_ci(ours, means[baseline][key], options.resamples, options.seed)
            for key, ours in means[name].items()
        }
        row = Row(
            method=name,
            baseline=baseline,
            how=ways[name],
            score=estimates.pop(""),
            metrics=estimates,
            kl_per_sequence=float(np.mean([s.written.kl for s in samples])),
            s_per_token=costs[name].seconds if name in costs else None,
            forward_tokens_per_token=costs[name].forward_tokens if name in costs else None,
            tokens_mean=float(np.mean([len(s.written.tokens) for s in samples])),
            cut=float(np.mean([not s.written.terminated for s in samples])),
            n=len(prompts),
            seed=options.seed,
            samples=samples,
        )
        rows.append(row)
    return rows


def refuse_other_tokens(model: ValueModel, base: ValueModel) -> None:
    """Raise `QvgptError` where the two do not read the same tokens."""
    ours, theirs = (m.tokenizer.sha256 if m.tokenizer else None for m in (model, base))
    if ours != theirs or model.trunk.vocab_size != base.trunk.vocab_size:
        raise QvgptError("the base has another tokenizer than the model: they cannot be compared")


def _measure_kl(
    writer: "_Writer",
    base: ValueModel,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[Sample],
) -> None:
    """Put the KL to `base` in the place of that to the plain model. Of texts that were chosen or
    searched it holds log π − log π₀, of which π₀ alone is another one."""
    texts = [
        Trajectory(
            [*prompts[s.prompt], *s.written.tokens],
            [False] * len(prompts[s.prompt]) + [True] * len(s.written.tokens),
            [0.0] * (len(prompts[s.prompt]) + len(s.written.tokens)),
            s.written.terminated,
        )
        for s in samples
    ]
    if writer.how.search is not None or writer.how.best_of > 1:
        both = zip(score_texts(writer.model, texts), score_texts(base, texts), strict=True)
        plain = (own.base_logprob - theirs.base_logprob for own, theirs in both)
        found = [s.written.kl + more for s, more in zip(samples, plain, strict=True)]
    else:
        found = sequence_kl(writer.model, writer.how.guidance, base, texts, values=writer.values)
    for sample, kl in zip(samples, found, strict=True):
        sample.written.kl = kl


@dataclass(frozen=True)
class _Writer:
    """What writes a method's texts."""

    model: ValueModel
    how: Method
    values: ValueSource | None

    def write(self, requests: Sequence[Request], max_batch: int, **options: Any) -> list[Text]:
        options |= {"values": self.values}
        if self.how.search is not None:
            return write_searched(self.how.search, self.model, requests, **options)
        return write_best(self.model, requests, self.how.best_of, max_batch=max_batch, **options)

    def requests(
        self, prompts: Sequence[Sequence[int]], options: CompareOptions
    ) -> tuple[list[int], list[Request]]:
        """Each text's prompt and request; sample k of a prompt has the same seed everywhere."""
        copies, seed, each = self.how.samples(options.samples), options.seed, options.samples
        owners = [i for i in range(len(prompts)) for _ in range(copies)]
        return owners, [
            Request(prompt, options.max_tokens, self.how.guidance, row_seed(seed, i * each + k))
            for i, prompt in enumerate(prompts)
            for k in range(copies)
        ]


def _write(
    writer: _Writer,
    prompts: Sequence[Sequence[int]],
    options: CompareOptions,
    on_step: OnStep | None,
) -> list[Text]:
    """Every prompt's samples, with what was thought of them."""
    owners, requests = writer.requests(prompts, options)
    shown = {owners.index(i) for i in range(min(options.keep_reports, len(prompts)))}
    return writer.write(
        requests, options.max_batch, report=True, keep_reports=shown, on_step=on_step
    )


@dataclass(frozen=True)
class _Cost:
    """Of a token of the texts."""

    seconds: float
    forward_tokens: float


def _time(
    writers: Mapping[str, _Writer], prompts: Sequence[Sequence[int]], options: CompareOptions
) -> dict[str, _Cost]:
    """What a token of each method costs: seconds are the best of several rounds taken in turn,
    since what else the machine does only ever slows decoding down."""
    best: dict[str, _Cost] = {}
    for _ in range(_TIMING_ROUNDS if options.timing else 0):
        for name, writer in writers.items():
            if not writer.how.valued:  # the base pays for no other model
                writer = replace(writer, values=None)
            requests = writer.requests(prompts, options)[1][: options.timing]
            started, spent = time.perf_counter(), list[int]()
            texts = writer.write(requests, options.max_batch, spent=spent)
            seconds, tokens = time.perf_counter() - started, sum(len(t.tokens) for t in texts)
            cost = _Cost(seconds / tokens, sum(spent) / tokens)
            best[name] = min(cost, best.get(name, cost), key=lambda c: c.seconds)
    return best


def _baseline(name: str, ways: Mapping[str, Method]) -> str:
    temperature = ways[name].guidance.temperature
    plain = (
        n
        for n, how in ways.items()
        if not how.guidance.guides and how.guidance.temperature == temperature
    )
    return next(plain, next(iter(ways)))


def _prompt_means(samples: list[Sample], judge: Score | None, prompts: int) -> list[float]:
    """The mean score of each prompt's samples, by `judge` or as scored already."""
    owners = [s.prompt for s in samples]
    texts = [s.written.text for s in samples]
    scores = judge(texts, owners) if judge else [s.score for s in samples]
    total = np.bincount(owners, weights=scores, minlength=prompts)
    return (total / np.bincount(owners, minlength=prompts)).tolist()


def _estimate_dict(estimate: Estimate, name: str) -> dict[str, Any]:
    delta = None if estimate.delta_ci95 is None else list(estimate.delta_ci95)
    head = {name: estimate.value, "ci95": list(estimate.ci95)}
    return head | {"delta": estimate.delta, "delta_ci95": delta}
