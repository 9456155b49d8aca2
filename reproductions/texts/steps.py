"""A prompt, one text, a metric: how the models of such a task are made, from files to files.

A recipe is a YAML file that says, in this order, what is trained and what is written:

    pretraining   a language model on plain text first (optional)
    base          the language model: `qvgpt train`'s options
    collect       what it writes to learn from: `qvgpt collect`'s options
    values        by name, the ways of learning values from that
    rivals        by name, what is fine-tuned from the base on the same texts
    decode        how much is written and what is tried on validation

With `folds: 2` or more the samples are not the base's own: where it has learned by heart what it is
asked to write, they would show few of the faults that it has elsewhere. Each part of the prompts is
answered by a model of the base's form, which learned from the other parts alone.

A step that is finished is not repeated.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from rich.console import Console

from qvgpt.collect import CollectConfig, collect
from qvgpt.run import check_run, write_json
from qvgpt.train_config import TrainConfig
from qvgpt.trainer import train

Row = dict[str, Any]
QUIET = Console(file=io.StringIO())


@dataclass(frozen=True)
class Files:
    """The splits of a task, as JSONL."""

    train: Path
    """What the language model learns from."""
    prompts: Path
    """What the base writes to, for values to learn from; their answers score the texts."""
    validation: Path
    """Everything is chosen here."""
    test: Path
    """Only reported."""
    text: Path | None = None
    """Plain text for pre-training."""


@dataclass(frozen=True)
class Decode:
    """How much is written, and what is tried on validation."""

    max_tokens: int
    betas: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    samples: int = 8
    """Of best-of-N and of minimum Bayes risk."""
    temperature: float = 0.6
    """Of those samples."""
    temperatures: tuple[float, ...] = ()
    """At which base and guided texts are sampled too, once, with a β chosen for each."""
    end_biases: tuple[float, ...] = ()
    """Nats for the end token, one of which tunes the length of the base's greedy texts, if any does
    them good: guided ones are held against those."""
    beams: int = 5
    length_penalties: tuple[float, ...] = (0.6, 1.0, 1.4)
    rounds: int = 6
    """Of measuring time."""


@dataclass(frozen=True)
class Recipe:
    """What a recipe's file says."""

    base: Mapping[str, Any]
    collect: Mapping[str, Any]
    values: Mapping[str, Mapping[str, Any]]
    rivals: Mapping[str, Mapping[str, Any]]
    decode: Decode
    pretraining: Mapping[str, Any] | None = None
    folds: int = 1
    """Parts that prompts are divided in; of one the base itself writes."""
    quick: bool = False

    @classmethod
    def read(cls, path: Path, quick: bool = False) -> "Recipe":
        """`quick` shrinks every step to a toy of the same form."""
        said = yaml.safe_load(path.read_text())
        decode = {k: tuple(v) if isinstance(v, list) else v for k, v in said["decode"].items()}
        if quick:
            few = {"betas": (1.0,), "samples": 2, "length_penalties": (1.0,), "rounds": 1}
            few |= {key: decode.get(key, ())[:1] for key in ("temperatures", "end_biases")}
            decode |= few | {"beams": 2, "max_tokens": min(8, decode["max_tokens"])}
        return cls(**said | {"decode": Decode(**decode), "quick": quick})


@dataclass(frozen=True)
class Models:
    """The steps of one seed in one directory."""

    work: Path
    files: Files
    recipe: Recipe
    seed: int

    def base(self) -> Path:
        """The language model of the best validation loss."""
        where: dict[str, Any] = {"eval_data": [self.files.validation]}
        if self.recipe.pretraining is not None:
            said, text = self.recipe.pretraining, self.files.text
            where["model"] = self._trained("pretrained", said, data=[text])
        return self._trained("base", self.recipe.base, data=[self.files.train], **where)

    def samples(self) -> Path:
        """What the base writes to the prompts, rewarded."""
        if self.recipe.folds == 1:
            prompts = self.files.prompts
            return self._collected("samples", self.base(), self.recipe.collect, prompts)
        samples = self.work / "samples.jsonl"
        parts = [self._fold(i) for i in range(self.recipe.folds)]  # each as the recipe says
        if not samples.exists():
            write(samples, [row for part in parts for row in read(part)])
        return samples

    def _fold(self, fold: int) -> Path:
        """What a model that knows all but this part of the prompts writes to it."""
        work, base = self.work / f"fold-{fold}", self.base()
        parts = {"train": self.files.train, "prompts": self.files.prompts}
        for name, whole in parts.items():
            parts[name] = work / f"{name}.jsonl"
            if not parts[name].exists():
                asked = name == "prompts"
                rows = [r for r in read(whole) if (self._fold_of(r) == fold) == asked]
                write(parts[name], rows)
        said = {**self.recipe.base, "tokenizer": {"path": str(base)}}
        where = {"data": [parts["train"]], "eval_data": [self.files.validation]}
        model = self._trained(f"fold-{fold}/base", said, **where)
        name = f"fold-{fold}/samples"
        return self._collected(name, model, self.recipe.collect, parts["prompts"])

    def _fold_of(self, row: Row) -> int:
        shares = {str(i): 1 / self.recipe.folds for i in range(self.recipe.folds)}
        return int(split_of(f"fold {row['prompt']}", shares))  # not the hash that splits are of

    def values(self, name: str) -> Path:
        """The base with Q and V."""
        return self._tuned(f"values-{name}", self.recipe.values[name], self.samples())

    def rival(self, name: str) -> Path:
        """The base fine-tuned on the same texts, or, where its recipe says `best`, on each
        prompt's best one."""
        said = dict(self.recipe.rivals[name])
        data = self._best() if said.pop("best", False) else self.samples()
        return self._tuned(f"rival-{name}", said, data)

    def distilled(self, values: str, beta: float) -> Path:
        """The base fine-tuned on what the guided model writes greedily to the same prompts."""
        model, said = self.values(values), self.recipe.collect
        same = {k: said[k] for k in ("reward", "max_tokens", "max_batch", "limit") if k in said}
        how = {"samples": 1, "temperatures": [0.0], "beta": beta}
        data = self._collected("guided-texts", model, same | how, self.files.prompts)
        return self._tuned("rival-distilled", self.recipe.rivals["distilled"], data)

    def _tuned(self, name: str, said: Mapping[str, Any], data: Path) -> Path:
        return self._trained(name, said, model=self.base(), data=[data])

    def _best(self) -> Path:
        """Each prompt's text of the highest reward, if it is above 0."""
        best = self.work / "best.jsonl"
        if not best.exists():
            lines = []
            for row in read(self.samples()):
                reward = max(row["rewards"])
                at = row["rewards"].index(reward)
                if reward > 0:
                    lines.append({
                        "prompt": row["prompt"],
                        "completion": row["completions"][at],
                        "completion_ids": row["completion_ids"][at],
                    })  # fmt: skip
            write(best, lines)
        return best

    def _trained(self, name: str, said: Mapping[str, Any], **where: Any) -> Path:
        directory = self.work / name
        said = {**said, "fit": {**said["fit"], "seed": self.seed}}
        if self.recipe.quick:
            said["fit"] |= {"max_steps": 4, "batch_size": 8, "bf16": False}
            if "gpt" in said:
                said["gpt"] = {"embed_dim": 16, "num_heads": 2, "num_layers": 1, "seq_len": 256}
                said["tokenizer"] = {**said["tokenizer"], "vocab_size": 300}
        given = {
            k: [str(x) for x in v] if isinstance(v, list) else str(v) for k, v in where.items()
        }
        said |= given | {"output": str(directory), "resume": (directory / "run.json").exists()}
        parser = ArgumentParser()
        parser.add_class_arguments(TrainConfig, "config")
        config = parser.instantiate(parser.parse_object({"config": said})).config
        train(TrainConfig(**vars(config)), QUIET)
        return directory

    def _collected(self, name: str, model: Path, said: Mapping[str, Any], prompts: Path) -> Path:
        """Where it is finished it must have been made in this way."""
        output = self.work / name
        small: dict[str, Any] = {}
        if self.recipe.quick:  # nothing would be right
            small = {"limit": 12, "max_tokens": 8, "reward": "length"}
        resume = (output / "run.json").exists()
        where = {"model": str(model), "data": str(prompts), "output": str(output)}
        config = CollectConfig(
            **{**said, **small, **where, "seed": self.seed, "resume": resume},
        )
        if (output / "summary.json").exists():
            check_run(output, "collect", config, resume)
        else:
            collect(config)
        return output / "data.jsonl"


def read(path: Path) -> list[Row]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def write(path: Path, rows: Iterable[Row]) -> Path:
    """The rows as a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return part.replace(path)


def kept(path: Path, said: Any, make: Callable[[], Any]) -> Any:
    """What JSON holds if it was made as `said`, else made and written."""
    said = json.loads(json.dumps(said))
    if path.exists():
        content = json.loads(path.read_text())
        if content["said"] == said:
            return content["found"]
    found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"said": said, "found": found})
    return json.loads(json.dumps(found))


def split_of(text: str, shares: Mapping[str, float]) -> str:
    """The split that a text belongs to, by its hash; `shares` add up to 1."""
    left = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
    for name, share in shares.items():
        if left < share:
            return name
        left -= share
    return list(shares)[-1]


def divided(
    rows: Sequence[Row], shares: Mapping[str, float], key: Callable[[Row], str] | None = None
) -> dict[str, list[Row]]:
    """The rows of each split; those with one `key` (by default the prompt) stay together."""
    parts: dict[str, list[Row]] = {name: [] for name in shares}
    for row in rows:
        parts[split_of(key(row) if key else row["prompt"], shares)].append(row)
    return parts
