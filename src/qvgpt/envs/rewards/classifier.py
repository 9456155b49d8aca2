"""A sequence classifier or regressor as the judge: any directory that `transformers` reads as one.

`qvgpt reward-model` makes such directories. What of a row they read is said in their `config.json`
under the key `qvgpt` (`reads`); where that is missing, prompt and completion as one text.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from qvgpt.envs.rewards.metric import Metric, Row, is_cjk
from qvgpt.errors import QvgptError, nearest
from qvgpt.models.disk import one_line, read_config

Reads = Literal["text", "completion", "pair"]
"""Prompt and completion as one text; the completion alone; both, as the tokenizer's pair."""
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Classifier:
    """A judge in memory."""

    model: Any
    """A `transformers` model for sequence classification, in evaluation mode."""
    tokenizer: Any
    reads: Reads
    sha256: str
    """Of the weights: who it is, wherever it lies."""

    @classmethod
    def load(cls, path: str | Path) -> "Classifier":
        """Read a directory: known architectures and safetensors only, never code.

        Raises `QvgptError` where it holds no such model, or one whose head was not trained.
        """
        place = Path(path)
        if not place.is_dir():
            raise QvgptError(f"classifier: {place}: no such directory")
        reads = (read_config(place).get("qvgpt") or {}).get("reads", "text")
        if reads not in get_args(Reads):
            raise QvgptError(f"{place}/config.json: qvgpt.reads is one of {get_args(Reads)}")
        model, tokenizer = load_model(place), load_tokenizer(place)
        return cls(model.eval(), tokenizer, reads, _sha256(sorted(place.glob("*.safetensors"))))

    @property
    def labels(self) -> list[str]:
        """The names of the classes; of a regressor one that means nothing."""
        names = self.model.config.id2label
        return [str(names[i]) for i in range(self.model.config.num_labels)]

    @torch.no_grad()
    def logits(self, texts: Sequence[tuple[str, str | None]]) -> Float[Tensor, "texts labels"]:
        """What the model says of each (text, its pair or None); equal ones are read once."""
        different = list(dict.fromkeys(texts))
        ids = encode(self.tokenizer, different, longest(self.model, self.tokenizer))
        order = sorted(range(len(different)), key=lambda i: len(ids[i]["input_ids"]))
        found: dict[tuple[str, str | None], Tensor] = {}
        while order:
            width = len(ids[order[-1]]["input_ids"])
            part = [order.pop() for _ in range(min(len(order), max(1, _BATCH_TOKENS // width)))]
            padded = self.tokenizer.pad([ids[i] for i in part], return_tensors="pt")
            rows = self.model(**padded.to(self.model.device)).logits.float().cpu()
            found |= {different[i]: row for i, row in zip(part, rows, strict=True)}
        return torch.stack([found[text] for text in texts])


def classifier(said: str) -> Metric:
    """`DIR#label`: the label's probability; `DIR#label:logit`: its logit; `DIR`: a regressor's
    value.

    Raises `QvgptError` for an unknown label, and where a label is missing or is one too many.
    """
    place, _, wanted = said.partition("#")
    label, _, form = wanted.partition(":")
    judge = _loaded(str(Path(place).resolve()), _changed(place))
    if form not in ("", "logit"):
        raise QvgptError(f"classifier:{said}: after the label `:logit` may stand, not {form!r}")
    column = _column(judge, said, label)

    def batch(completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        if not completions:
            return []
        pairs = zip(completions, rows, strict=True)
        found = judge.logits([read_text(judge.reads, row, text) for text, row in pairs])
        if label and not form:
            found = found.softmax(-1)
        return found[:, column].tolist()

    return Metric(
        f"classifier:{said}",
        lambda text, row: batch([text], [row])[0],
        batch=batch,
        models=frozenset({judge.sha256}),
    )


def _column(judge: Classifier, said: str, label: str) -> int:
    labels = judge.labels
    if len(labels) == 1:
        if label:
            raise QvgptError(f"classifier:{said}: is a regressor, which has no labels")
        return 0
    names = " ".join(labels)
    if not label:
        raise QvgptError(f"classifier:{said}: say #LABEL, one of: {names}")
    if label not in labels:
        raise QvgptError(f"classifier:{said}: no label {label!r}{nearest(label, labels)}: {names}")
    return labels.index(label)


def load_model(path: Path, **options: Any) -> Any:
    """The model of a directory: known architectures and safetensors only, never code.

    `options` go to `from_pretrained`; without them a head that was not trained is refused.
    """
    read_config(path)
    if not list(path.glob("*.safetensors")):
        raise QvgptError(f"{path}: no safetensors file (weights are read from those only)")
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # whatever transformers raises for a damaged directory
        raise QvgptError(f"{path}: no classifier can be read: {one_line(error)}") from None
    missing = [*found["missing_keys"], *found["mismatched_keys"]]
    if missing and not options:
        raise QvgptError(f"{path}: is no trained classifier: {missing[0]} is not among its weights")
    return model


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a directory."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises for a damaged directory
        raise QvgptError(f"{path}: no tokenizer can be read: {one_line(error)}") from None


def read_text(reads: Reads, row: Mapping[str, Any], completion: str) -> tuple[str, str | None]:
    """What a judge reads of a completion: (text, its pair or None)."""
    prompt = row.get("prompt")
    if reads == "completion" or not prompt:
        return completion, None
    if isinstance(prompt, list):
        prompt = "\n".join(str(message.get("content", "")) for message in prompt)
    if reads == "pair":
        return str(prompt), completion
    return joined(str(prompt), completion), None


def joined(prompt: str, completion: str) -> str:
    """Both as one text: a space between, but where there is white space or Chinese at the joint."""
    left, right = prompt[-1:], completion[:1]
    if not left or not right or left.isspace() or right.isspace():
        return prompt + completion
    if is_cjk(left) or is_cjk(right):
        return prompt + completion
    return f"{prompt} {completion}"


def encode(
    tokenizer: Any, texts: Sequence[tuple[str, str | None]], max_length: int
) -> list[dict[str, list[int]]]:
    """`input_ids` and their like of each text or pair, cut on the right at `max_length` tokens.

    What is written like a special token, as `[SEP]`, is read as plain text.
    """
    how: dict[str, Any] = {"truncation": True, "max_length": max_length}
    how["split_special_tokens"] = True
    if any(pair is not None for _, pair in texts):
        return [dict(tokenizer(text, pair, **how).data) for text, pair in texts]
    found = tokenizer([text for text, _ in texts], **how).data if texts else {}
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]


def longest(model: Any, tokenizer: Any) -> int:
    """The most tokens that the model reads: positions there are, less those before the first."""
    positions = getattr(model.config, "max_position_embeddings", None) or 512
    if model.config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= (model.config.pad_token_id or 0) + 1  # the first token's position
    return min(positions, tokenizer.model_max_length)


def _changed(place: str) -> int:
    """When the weights were last written: a directory made anew is read anew."""
    times = [f.stat().st_mtime_ns for f in Path(place).glob("*.safetensors")]
    return max(times, default=0)


@lru_cache(maxsize=4)
def _loaded(place: str, changed: int) -> Classifier:
    return Classifier.load(place)


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
