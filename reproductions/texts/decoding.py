"""The ways of decoding that are compared, each from a model directory to one text per prompt."""

import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import sacrebleu
import torch

from qvgpt.decode import engine
from qvgpt.decode.beam import BeamSearch
from qvgpt.decode.engine import Request, row_seed
from qvgpt.decode.policy import Guidance
from qvgpt.decode.score import sequence_kl
from qvgpt.decode.sources import TokenScorer, ValueSource
from qvgpt.envs.rewards import bleu_prefixes
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Trajectory, collate

MAX_TOKENS = 80
"""Of a text, where nobody says."""
MAX_BATCH = 128


def write(
    model: ValueModel,
    prompts: Sequence[str],
    guidance: Guidance,
    seed: int = 0,
    samples: int = 1,
    max_tokens: int = MAX_TOKENS,
    values: ValueSource | None = None,
) -> tuple[list[list[str]], dict[str, float]]:
    """`samples` texts per prompt, and what they cost; `values` guide instead of the model's own."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    requests = [
        Request(tokens, max_tokens, guidance, row_seed(seed, i * samples + k))
        for i in order
        for tokens in [tokenizer.encode_prompt(prompts[i])]
        for k in range(samples)
    ]
    started = time.perf_counter()
    written = engine.write(model, requests, max_batch=MAX_BATCH, values=values)
    seconds = time.perf_counter() - started
    texts = [[""] * samples for _ in prompts]
    for j, text in enumerate(written):
        texts[order[j // samples]][j % samples] = text.text
    read = {tuple(r.tokens) for r in requests}  # samples of one prompt read it once
    tokens = sum(len(t.tokens) for t in written)
    cost = {"forward_tokens": sum(map(len, read)) + tokens, "written_tokens": tokens}
    return texts, {"seconds": seconds, **cost}


def end_bias(model: ValueModel) -> ValueSource:
    """A nat for what ends a text: β of it make texts shorter, or longer where β is below 0."""
    assert model.tokenizer is not None
    ends = torch.tensor(model.tokenizer.template.end_ids)
    end = torch.isin(torch.arange(model.trunk.vocab_size), ends)

    def value(texts: list[list[int]], tokens: torch.Tensor | None) -> torch.Tensor:
        return (end.expand(len(texts), -1) if tokens is None else end[tokens]).float()

    return TokenScorer(value, most_candidates=None)


def beam(
    model: ValueModel,
    prompts: Sequence[str],
    beams: int,
    length_penalty: float,
    guidance: Guidance | None = None,
    max_tokens: int = MAX_TOKENS,
) -> tuple[list[str], dict[str, float]]:
    """The first text of a beam search for each prompt, and what it cost."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    started = time.perf_counter()
    search = BeamSearch(beams, length_penalty, max_tokens)
    found = search(model, [tokenizer.encode_prompt(p) for p in prompts], guidance)
    seconds = time.perf_counter() - started
    texts = [tokenizer.decode_completion(h.tokens) for h in found.best]
    return texts, {"seconds": seconds, "forward_tokens": found.forward_tokens}


def _sentence_bleu(text: str, row: dict) -> float:
    return bleu_prefixes([text], row)[0]


def minimum_bayes_risk(
    candidates: Sequence[Sequence[str]], reward: Callable[[str, dict], float] = _sentence_bleu
) -> list[str]:
    """Of each prompt's samples, the one that earns most with the others as references."""
    chosen = []
    for texts in candidates:
        counts = {text: texts.count(text) for text in texts}
        utility = {
            text: sum(
                n * reward(text, {"references": [other]}) for other, n in counts.items() if other
            )
            for text in counts
        }
        chosen.append(max(utility, key=utility.__getitem__))
    return chosen


def best_by(
    model: ValueModel,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    what: Literal["logprob", "value"],
) -> list[str]:
    """Of each prompt's samples, that of the highest mean log π₀ per token, or predicted return.

    The predicted return of a finished text is Q of its end token.
    """
    tokenizer = model.tokenizer
    assert tokenizer is not None
    texts = [
        _trajectory(tokenizer.encode_prompt(p), [*tokenizer.encode(t), tokenizer.template.eos])
        for p, several in zip(prompts, candidates, strict=True)
        for t in several
    ]
    keys = iter(_judge(model, texts, what))
    chosen = []
    for several in candidates:
        key = [next(keys) for _ in several]
        chosen.append(several[max(range(len(several)), key=key.__getitem__)])
    return chosen


@torch.no_grad()
def _judge(
    model: ValueModel, texts: Sequence[Trajectory], what: Literal["logprob", "value"]
) -> list[float]:
    found = [0.0] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].tokens))
    for start in range(0, len(order), MAX_BATCH):
        part = order[start : start + MAX_BATCH]
        batch = collate([texts[i] for i in part])
        length = batch.mask.sum(1)
        if what == "logprob":
            logprob = model(batch, frozenset({"logprob"})).logprob
            keys = logprob.sum(1) / length  # masked decisions are 0
        else:
            q = model(batch, frozenset({"target_q"})).target_q.mean(0)
            keys = q.gather(1, length[:, None] - 1)[:, 0]
        for i, key in zip(part, keys.tolist(), strict=True):
            found[i] = key
    return found


def mean_kl(
    model: ValueModel,
    guidance: Guidance,
    base: ValueModel,
    prompts: Sequence[str],
    texts: Sequence[str],
) -> float:
    """Mean exact KL per text, in nats, of a guided model to the base, along the texts it wrote."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    written = [
        _trajectory(tokenizer.encode_prompt(p), [*tokenizer.encode(t), tokenizer.template.eos])
        for p, t in zip(prompts, texts, strict=True)
    ]
    return float(np.mean(sequence_kl(model, guidance, base, written)))


def _trajectory(prompt: list[int], completion: list[int]) -> Trajectory:
    is_action = [False] * len(prompt) + [True] * len(completion)
    return Trajectory(prompt + completion, is_action, [0.0] * len(is_action), True)


def relative_seconds(
    base: ValueModel,
    plain: Guidance,
    guided_model: ValueModel,
    guided: Guidance,
    prompts: Sequence[str],
    rounds: int = 10,
    max_tokens: int = MAX_TOKENS,
) -> dict[str, object]:
    """Seconds, guided ÷ base: of a token that is read (prompts too) the median of interleaved
    rounds with its interval, of a token that is written and of a text the median."""
    units = {"median": "forward_tokens", "per_token_written": "written_tokens", "per_text": None}
    ratios: dict[str, list[float]] = {name: [] for name in units}
    for _ in range(rounds):
        pair = [
            write(model, prompts, guidance, max_tokens=max_tokens)[1]
            for model, guidance in ((base, plain), (guided_model, guided))
        ]
        for name, unit in units.items():
            theirs, ours = (cost["seconds"] / (cost[unit] if unit else 1.0) for cost in pair)
            ratios[name].append(ours / theirs)
    drawn = np.random.default_rng(0).choice(ratios["median"], size=(2000, rounds))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    medians = {name: float(np.median(several)) for name, several in ratios.items()}
    return {**medians, "ci95": [float(low), float(high)]}


def corpus(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU, its brevity penalty, and chrF, by sacreBLEU's defaults."""
    bleu = sacrebleu.corpus_bleu(list(hypotheses), [list(references)])
    chrf = sacrebleu.corpus_chrf(list(hypotheses), [list(references)])
    return {"bleu": bleu.score, "brevity_penalty": bleu.bp, "chrf": chrf.score}
