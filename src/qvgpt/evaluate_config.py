"""What `evaluate` can be told, and the methods that it then compares."""

import itertools
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qvgpt.categorical import Functional
from qvgpt.compare import Method
from qvgpt.decode.policy import Guidance
from qvgpt.decode.searches import is_sampled, parse_search, search_name
from qvgpt.errors import QvgptError
from qvgpt.models.backbone import Dtype


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare a model with itself guided by its values, on prompts with a reward."""

    model: str
    """Directory of a trained model."""
    data: str
    """Rows with prompts (and what the reward needs: references, completion, …)."""
    reward: str
    """What is compared, as of `collect`: bleu, chrf, classifier:DIR#LABEL … (docs/rewards.md). A
    classifier whose rewards the model learned from is refused, but where it only chooses
    (recommend)."""
    output: str
    """Where summary.json and report.html go; a new directory."""
    base: str | None = None
    """Directory of the language model before value learning: it writes the texts of beta 0, and KL
    is measured to it; same tokenizer. None: the model itself, unguided."""
    metrics: list[str] = field(default_factory=list)
    """Further rewards to report; also corpus_bleu[:zh] and corpus_chrf."""
    betas: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0])
    """Strengths of guidance, beside the base (0)."""
    best_of: int = 1
    """Beside them: of so many of the base's texts the one whose last token's Q is highest."""
    searches: list[str | dict[str, Any]] = field(default_factory=list)
    """Beside them: block, beam, tree, with options where they are not the usual ones, such as
    '{block: {samples: 16, block: 4}}'; docs/decoding.md lists them."""
    search_betas: list[float] = field(default_factory=lambda: [0.0])
    """Strengths of guidance of what is searched; 0: the plain model proposes, values choose."""
    kl_budgets: list[float] = field(default_factory=list)
    """Methods whose strength is found at each token: the KL to the base, in nats, that it may take;
    need top_k."""
    value_models: list[str] = field(default_factory=list)
    """Directories of models, of any size and the same tokenizer, whose values guide instead of the
    model's own; those of several are added up."""
    contrast: list[str] = field(default_factory=list)
    """Two directories of language models, PLUS and MINUS: log π₊ − log π₋ guides, in nats (proxy
    tuning, DExperts); beside value_models it is added to them."""
    weights: list[float] = field(default_factory=list)
    """Of each of value_models, then of the contrast; none: 1 each."""
    temperatures: list[float] = field(default_factory=lambda: [1.0])
    """Each is run with the base and with every beta; 0 is greedy."""
    top_k: int | None = None
    """Keep the k likeliest tokens, in the base too, so that only beta differs."""
    top_p: float | None = None
    """Keep the smallest set of tokens that holds this probability."""
    min_p: float | None = None
    """Keep tokens at least this likely, relative to the likeliest."""
    candidates: Literal["base", "guided"] = "base"
    """Which distribution top_k, top_p and min_p look at."""
    twins: Literal["mean", "min"] = "mean"
    """How several Q heads are joined."""
    functional: Functional = "mean"
    """What is read as Q from a distribution of returns: mean, soft (Q♯, η = 1 / beta) or cvar."""
    alpha: float = 0.1
    """Of cvar: the share of returns that are the worst."""
    samples: int = 1
    """Texts per prompt (greedy: always 1)."""
    max_tokens: int = 128
    """Where a text is cut if no end token came."""
    max_batch: int = 64
    """Texts written at the same time."""
    limit: int | None = None
    """Use only this many prompts, from the top."""
    seed: int = 0
    """Of sampling and of the bootstrap; the same for every method."""
    shaped: bool = False
    """The values were learned from shaped rewards: hold them against such."""
    brevity: bool = True
    """As in `collect`: BLEU's brevity penalty in every prefix (only read if shaped)."""
    texts: int = 4
    """Prompts whose texts are shown in the report."""
    recommend: bool = False
    """Write the guidance with the best mean reward into the model, for `generate` and `export` to
    use where nothing is said; not with base, which is another model. Choose it on validation data,
    never on those of the final figures."""
    card: bool = False
    """Write what is found into the model's card too (README.md beside its weights), in the place of
    what an earlier evaluation wrote there."""
    accept_training_judge: bool = False
    """Let a classifier judge though the model learned from its rewards; its figures are no
    evidence, and are marked so."""
    dtype: Dtype = "float32"
    """Of the language model's weights in memory; auto: as they are stored."""
    device_map: str | None = None
    """Where the model lies, as accelerate reads it: auto, cuda, cpu …; none: the CPU."""
    resume: bool = False
    """Go on with the same run: methods whose texts are there write no others. Of a finished one
    the results are made anew."""


def refuse_options(config: EvaluateConfig) -> None:
    """Raise `QvgptError` for what could only fail later, naming the option."""
    for name, least in {"samples": 1, "max_batch": 1, "texts": 0, "seed": 0}.items():
        if getattr(config, name) < least:
            raise QvgptError(f"evaluate: {name} must be at least {least}")
    for name in ("temperatures", *(["search_betas"] if config.searches else [])):
        if not getattr(config, name):
            raise QvgptError(f"evaluate: {name} must not be empty")
    searches = [parse_search(s, config.max_tokens, config.max_batch) for s in config.searches]
    if max(config.temperatures) == 0 and (config.best_of > 1 or any(map(is_sampled, searches))):
        raise QvgptError(
            "evaluate: best_of and block search choose among sampled texts, and temperature 0 "
            "writes one: add another temperature"
        )
    if config.recommend and config.base is not None:
        raise QvgptError(
            "evaluate: recommend compares the guided model with itself, unguided, and base is "
            "another model: leave base out to choose"
        )
    methods_of(config)  # refuses what has no meaning


def methods_of(config: EvaluateConfig) -> dict[str, Method]:
    """Base, every β and the best of N, at every temperature, by name; with the same candidates."""
    common = _common(config)
    found = {}
    for temperature in dict.fromkeys(config.temperatures):
        how = "greedy" if temperature == 0 else f"T = {temperature:g}"
        for beta in dict.fromkeys([0.0, *config.betas]):
            name = f"guided, β = {beta:g}" if beta else "base"
            found[f"{name}, {how}"] = Method(replace(common, beta=beta, temperature=temperature))
        for budget in dict.fromkeys(config.kl_budgets):
            guidance = replace(common, kl_budget=budget, temperature=temperature)
            found[f"guided, KL ≤ {budget:g} a token, {how}"] = Method(guidance)
        if config.best_of > 1 and temperature > 0:
            name = f"best of {config.best_of} by Q, {how}"
            found[name] = Method(replace(common, temperature=temperature), config.best_of)
    return found | _searches_of(config, common)


def _searches_of(config: EvaluateConfig, common: Guidance) -> dict[str, Method]:
    """Every search with every strength of guidance, by name.

    One that samples does so at every temperature above 0; the others write one text a prompt, and
    are compared with the greedy base where there is one.
    """
    found = {}
    for spec in config.searches:
        search = parse_search(spec, config.max_tokens, config.max_batch)
        temperatures = [t for t in dict.fromkeys(config.temperatures) if t > 0]
        if not is_sampled(search):
            temperatures = [min(config.temperatures)]
        for beta, temperature in itertools.product(
            dict.fromkeys(config.search_betas), temperatures
        ):
            name = search_name(search) + (f", β = {beta:g}" if beta else "")
            name += f", T = {temperature:g}" if is_sampled(search) else ""
            guidance = replace(common, beta=beta, temperature=temperature)
            found[name] = Method(guidance, search=search)
    return found


def _common(config: EvaluateConfig) -> Guidance:
    """What all methods share."""
    return Guidance(
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        candidates=config.candidates,
        twins=config.twins,
        functional=config.functional,
        alpha=config.alpha,
    )
