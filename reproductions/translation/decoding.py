"""The ways of decoding that are compared, each from a model directory to one text per prompt."""

import time
from collections.abc import Sequence
from pathlib import Path

import sacrebleu
import torch
from transformers import AutoModelForCausalLM

from qvgpt.decode.engine import Engine, Request
from qvgpt.decode.policy import Guidance
from qvgpt.envs.rewards import bleu_prefixes
from qvgpt.models.value_model import ValueModel

MAX_TOKENS = 80
MAX_BATCH = 128


def write(
    model: ValueModel, prompts: Sequence[str], guidance: Guidance, seed: int = 0, samples: int = 1
) -> tuple[list[list[str]], dict[str, float]]:
    """`samples` texts per prompt, and what they cost."""
    engine = Engine(model, MAX_BATCH)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    place = {}
    for i in order:
        tokens = tokenizer.encode_prompt(prompts[i])
        for k in range(samples):
            request = Request(tokens, MAX_TOKENS, guidance, seed=seed + i * samples + k)
            place[engine.submit(request)] = (i, k)
    written: dict[int, list[int]] = {request: [] for request in place}
    started, tokens_out = time.perf_counter(), 0
    while engine.busy:
        for event in engine.step():
            written[event.request_id].append(event.token)
            tokens_out += 1
    seconds = time.perf_counter() - started
    texts = [[""] * samples for _ in prompts]
    for request, (i, k) in place.items():
        texts[i][k] = tokenizer.decode(written[request])
    return texts, {
        "seconds": seconds,
        "tokens": tokens_out,
        "forward_tokens": engine.forward_tokens,
    }


@torch.no_grad()
def beam(
    directory: Path, prompts: Sequence[str], beams: int, length_penalty: float
) -> tuple[list[str], dict[str, float]]:
    """Hugging Face's beam search on an ordinary checkpoint (plain, or folded by `export`)."""
    model = ValueModel.from_pretrained(directory)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    plain = AutoModelForCausalLM.from_pretrained(directory).eval()
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    started, forward_tokens = time.perf_counter(), 0
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        rows = [tokenizer.encode_prompt(prompts[i]) for i in part]
        width = max(map(len, rows))
        pad = tokenizer.template.pad
        tokens = torch.tensor([[pad] * (width - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        found = plain.generate(
            tokens,
            attention_mask=mask,
            num_beams=beams,
            length_penalty=length_penalty,
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            early_stopping=False,
        )[:, width:]
        forward_tokens += int(mask.sum()) + found.numel() * beams
        for i, row in zip(part, found.tolist(), strict=True):
            texts[i] = tokenizer.decode(row)
    return texts, {"seconds": time.perf_counter() - started, "forward_tokens": forward_tokens}


def minimum_bayes_risk(candidates: Sequence[Sequence[str]]) -> list[str]:
    """Of each prompt's samples, the one with the highest mean sentence BLEU against the others."""
    chosen = []
    for texts in candidates:
        counts = {text: texts.count(text) for text in texts}
        utility = {
            text: sum(
                n * bleu_prefixes([text], {"references": [other]})[0]
                for other, n in counts.items()
                if other
            )
            for text in counts
        }
        chosen.append(max(utility, key=utility.__getitem__))
    return chosen


def corpus(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU, its brevity penalty, and chrF, by sacreBLEU's defaults."""
    bleu = sacrebleu.corpus_bleu(list(hypotheses), [list(references)])
    chrf = sacrebleu.corpus_chrf(list(hypotheses), [list(references)])
    return {"bleu": bleu.score, "brevity_penalty": bleu.bp, "chrf": chrf.score}
