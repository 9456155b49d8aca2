"""What is asked of the texts that a method wrote."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qvgpt.compare import CompareOptions, compare
from qvgpt.data.files import Row
from qvgpt.data.rows import row_to_trajectories
from qvgpt.decode.policy import Guidance
from qvgpt.decode.rerank import choice_kl
from qvgpt.decode.score import score, sequence_kl
from qvgpt.decode.sources import ValueSource
from qvgpt.envs.rewards import Metric, get_reward
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Trajectory

MAX_BATCH = 128


@dataclass(frozen=True)
class Judges:
    """Who judges: the reward that was trained on, the judge that was not, a language model."""

    reward: Metric
    judge: Metric
    reader: ValueModel

    @classmethod
    def of(cls, reward: str, judge: str, reader: str) -> "Judges":
        """From directories."""
        label = "#positive"
        return cls(
            get_reward(f"classifier:{reward}{label}"),
            get_reward(f"classifier:{judge}{label}"),
            ValueModel.from_pretrained(reader),
        )


@dataclass(frozen=True)
class Figures:
    """One method on one set of prompts; lists have an entry a prompt, the mean of its samples.

    Probabilities are of the positive class, whatever the direction.
    """

    method: str
    strength: float
    """β, or N, or the share of texts that were kept."""
    success: list[float]
    """The judge's P(positive) above ½."""
    judge: list[float]
    reward: list[float]
    kl: float
    """To the base, nats a text."""
    perplexity: float
    """Of a word, by a language model of the other half."""
    distinct: list[float]
    """Different words, pairs and triples over all of them."""
    tokens: float
    read_per_token: float | None
    seconds_per_token: float | None

    def towards(self, direction: str) -> dict[str, list[float]]:
        """What is to be maximised, in a direction."""
        lists = {"success": self.success, "judge": self.judge, "reward": self.reward}
        if direction == "positive":
            return lists
        return {name: [1 - x for x in values] for name, values in lists.items()}

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Written:
    """The samples of each prompt, judged one by one."""

    method: str
    strength: float
    texts: list[list[str]]
    truncated: list[list[bool]]
    judge: np.ndarray
    reward: np.ndarray
    kl: float
    tokens: float
    read_per_token: float | None = None
    seconds_per_token: float | None = None

    def figures(self, fields: Sequence[Mapping[str, Any]], reader: ValueModel) -> Figures:
        """The figures of all samples."""
        return Figures(
            self.method,
            self.strength,
            (self.judge > 0.5).mean(1).tolist(),
            self.judge.mean(1).tolist(),
            self.reward.mean(1).tolist(),
            self.kl,
            perplexity(reader, fields, self.texts, self.truncated),
            [distinct(self.texts, n) for n in (1, 2, 3)],
            self.tokens,
            self.read_per_token,
            self.seconds_per_token,
        )

    def best_of(self, n: int, direction: str) -> "Written":
        """Of each n samples of a prompt the one with the highest reward, at n times the cost."""
        groups = self.reward.shape[1] // n
        reward = self.reward[:, : groups * n].reshape(-1, groups, n)
        chosen = reward.argmax(2) if direction == "positive" else reward.argmin(2)
        at = chosen + n * np.arange(groups)
        at_beta = f", β = {self.strength:g}" if self.strength else ""

        def pick(rows: list[list[Any]]) -> list[list[Any]]:
            return [[row[i] for i in which] for row, which in zip(rows, at, strict=True)]

        return Written(
            f"{self.method}{at_beta}, best of N",
            n,
            pick(self.texts),
            pick(self.truncated),
            np.take_along_axis(self.judge, at, 1),
            np.take_along_axis(self.reward, at, 1),
            self.kl + choice_kl(n),
            self.tokens,
            None if self.read_per_token is None else n * self.read_per_token,
            None if self.seconds_per_token is None else n * self.seconds_per_token,
        )


def written(
    method: str,
    model: ValueModel,
    guidances: Mapping[float, Guidance],
    rows: Sequence[Mapping[str, Any]],
    judges: Judges,
    base: ValueModel,
    *,
    samples: int,
    seed: int,
    max_tokens: int,
    timing: int,
    values: ValueSource | None = None,
) -> list[Written]:
    """Sample and judge `samples` texts of each prompt, for each strength of guidance."""
    assert model.tokenizer is not None
    prompts = [model.tokenizer.encode_prompt(row["prompt"]) for row in rows]
    guided = all(guidance.guides for guidance in guidances.values())
    found = compare(
        model,
        prompts,
        lambda texts, index: judges.judge(texts, [rows[i] for i in index]),
        {str(strength): guidance for strength, guidance in guidances.items()},
        CompareOptions(samples, max_tokens, MAX_BATCH, seed, timing=timing, resamples=1),
        base=base if guided else None,
        values=values,
    )
    results = []
    for strength, row in zip(guidances, found, strict=True):
        owners = [rows[s.prompt] for s in row.samples]
        texts = [s.written.text for s in row.samples]
        kl = row.kl_per_sequence
        if not guided and model is not base:  # fine-tuned: as it is
            kl = float(np.mean(sequence_kl(model, row.guidance, base, [
                _trajectory(prompts[s.prompt], s.written.tokens, s.written.terminated)
                for s in row.samples
            ])))  # fmt: skip
        reward = judges.reward(texts, owners)
        groups = row.by_prompt()
        results.append(
            Written(
                method,
                strength,
                [[s.written.text for s in group] for group in groups],
                [[not s.written.terminated for s in group] for group in groups],
                np.array([[s.score for s in group] for group in groups]),
                np.array(reward).reshape(len(rows), samples),
                kl,
                row.tokens_mean,
                row.forward_tokens_per_token,
                row.s_per_token,
            )
        )
    return results


def perplexity(
    reader: ValueModel,
    fields: Sequence[Mapping[str, Any]],
    texts: Sequence[Sequence[str]],
    truncated: Sequence[Sequence[bool]],
) -> float:
    """exp(nats / words), the end of a text counting as a word; read as far as the context goes."""
    assert reader.tokenizer is not None
    read, words = [], 0
    for row, several, cut in zip(fields, texts, truncated, strict=True):
        for text, is_cut in zip(several, cut, strict=True):
            if is_cut and not text:
                continue
            while True:
                one = {"prompt": row["prompt"], "completion": text, "truncated": is_cut}
                (whole,) = row_to_trajectories(Row("a text", one), reader.tokenizer)
                if len(whole.tokens) <= reader.trunk.seq_len:
                    break
                text, is_cut = text[: len(text) * 3 // 4], True  # one word may be all of it
            read.append(whole)
            words += len(text.split()) + (not is_cut)
    return math.exp(-sum(scored.base_logprob for scored in score(reader, read)) / words)


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams of words over all n-grams, of the first sample of each prompt together."""
    grams = [
        tuple(words[i : i + n])
        for several in texts
        for words in [several[0].split()]
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / max(1, len(grams))


def _trajectory(prompt: list[int], tokens: list[int], terminated: bool) -> Trajectory:
    acts = [False] * len(prompt) + [True] * len(tokens)
    return Trajectory([*prompt, *tokens], acts, [0.0] * len(acts), terminated)
