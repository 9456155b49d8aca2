"""One seed of a task: models made, the choice on validation, what every system writes to test."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from texts import decoding
from texts.judging import Judge
from texts.steps import Models, Row, kept, read

from qvgpt.decode.policy import Guidance
from qvgpt.decode.sources import ValueSource
from qvgpt.models.value_model import ValueModel

GREEDY = Guidance(temperature=0.0)


@dataclass(frozen=True)
class Cell:
    """All of one seed."""

    models: Models
    judge: Judge

    def found(self) -> dict[str, Any]:
        """`chosen`, `time`, `made_in` (seconds of trainings and collections) and `systems`: texts,
        tokens read, seconds, KL to the base."""
        work, said = self.models.work, [asdict(self.models.recipe), self.judge.metrics]
        chosen = kept(work / "chosen.json", said, self._choose)
        return kept(work / "cell.json", [*said, chosen], lambda: self._compare(chosen))

    @cached_property
    def _base(self) -> ValueModel:
        return ValueModel.from_pretrained(self.models.base())

    def _choose(self) -> dict[str, Any]:
        """Values and β for greedy, length penalties of beams: by the first metric."""
        decode = self.models.recipe.decode
        rows = read(self.models.files.validation)
        greedy = [{"values": None, "beta": 0.0, "score": self._score(self._base, rows)}]
        for name in self.models.recipe.values:
            model = ValueModel.from_pretrained(self.models.values(name))
            for beta in (0.0, *decode.betas):
                how = replace(GREEDY, beta=beta)
                found = {"values": name, "beta": beta, "score": self._score(model, rows, how)}
                greedy.append(found)
        guided = [g for g in greedy if g["beta"] > 0]
        best = max(guided, key=lambda g: g["score"])
        model = ValueModel.from_pretrained(self.models.values(best["values"]))
        penalties = {
            "base": self._penalty(self._base, rows, 0.0),
            "guided": self._penalty(model, rows, best["beta"]),
        }
        sampled = {str(t): self._sharpest(model, rows, t) for t in decode.temperatures}
        return {
            **best,
            "end_bias": self._end_bias(rows, greedy[0]["score"]),
            "length_penalty": penalties,
            "sampled": sampled,
            "greedy": greedy,
        }

    def _end_bias(self, rows: Sequence[Row], unbiased: float) -> float:
        """What tunes the length of the base's greedy texts; 0: they are best as they are."""
        values = decoding.end_bias(self._base)
        found = {0.0: unbiased}
        for bias in self.models.recipe.decode.end_biases:
            how = replace(GREEDY, beta=bias)
            found[bias] = self._score(self._base, rows, how, values)
        return max(found, key=found.__getitem__)

    def _sharpest(self, model: ValueModel, rows: Sequence[Row], temperature: float) -> float:
        """The best β for samples at a temperature."""

        def score(beta: float) -> float:
            return self._score(model, rows, Guidance(beta=beta, temperature=temperature))

        return max(self.models.recipe.decode.betas, key=score)

    def _score(
        self,
        model: ValueModel,
        rows: Sequence[Row],
        guidance: Guidance = GREEDY,
        values: ValueSource | None = None,
    ) -> float:
        limit, prompts = self.models.recipe.decode.max_tokens, [r["prompt"] for r in rows]
        texts, _ = decoding.write(model, prompts, guidance, max_tokens=limit, values=values)
        return self.judge.value(texts, rows)

    def _penalty(self, model: ValueModel, rows: Sequence[Row], beta: float) -> float:
        """The best length penalty for beams, on at most 300 rows."""
        rows, decode = rows[:300], self.models.recipe.decode

        def score(penalty: float) -> float:
            texts, _ = self._beams(model, rows, beta, penalty)
            return self.judge.value([[t] for t in texts], rows)

        return max(decode.length_penalties, key=score)

    def _beams(
        self, model: ValueModel, rows: Sequence[Row], beta: float, penalty: float
    ) -> tuple[list[str], dict[str, float]]:
        decode, prompts = self.models.recipe.decode, [r["prompt"] for r in rows]
        guidance = Guidance(beta=beta)
        return decoding.beam(model, prompts, decode.beams, penalty, guidance, decode.max_tokens)

    def _compare(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """Every system on the test rows."""
        recipe, rows = self.models.recipe, read(self.models.files.test)
        decode, prompts, base = recipe.decode, [r["prompt"] for r in rows], self._base
        beta, penalty = chosen["beta"], chosen["length_penalty"]
        guided = ValueModel.from_pretrained(self.models.values(chosen["values"]))
        by_beta = replace(GREEDY, beta=beta)
        systems: dict[str, Any] = {}

        def add(name: str, found: tuple[Any, Any], kl: float | None = None) -> None:
            texts = [t if isinstance(t, str) else t[0] for t in found[0]]
            systems[name] = {"texts": texts, **found[1], "kl": kl}

        def once(name: str, model: ValueModel, guidance: Guidance = GREEDY) -> None:
            found = decoding.write(model, prompts, guidance, max_tokens=decode.max_tokens)
            texts = [t[0] for t in found[0]]
            add(name, found, decoding.mean_kl(model, guidance, base, prompts, texts))

        bias = chosen["end_bias"]
        if bias:
            how, values = replace(GREEDY, beta=bias), decoding.end_bias(base)
            limit = decode.max_tokens
            add("base", decoding.write(base, prompts, how, max_tokens=limit, values=values))
        once("base, its length not tuned" if bias else "base", base)
        for name in recipe.rivals:
            where = self.models.distilled if name == "distilled" else None
            path = where(chosen["values"], beta) if where else self.models.rival(name)
            once(f"rival: {name}", ValueModel.from_pretrained(path))
        once("values, unguided", guided)
        once("guided", guided, by_beta)
        for name in recipe.values:
            if name != chosen["values"]:
                own = max(
                    (g for g in chosen["greedy"] if g["values"] == name and g["beta"] > 0),
                    key=lambda g: g["score"],
                )
                model = ValueModel.from_pretrained(self.models.values(name))
                once(f"guided, {name}", model, replace(GREEDY, beta=own["beta"]))
        for t, sharpest in chosen["sampled"].items():
            plain = Guidance(temperature=float(t))
            once(f"base, T = {t}", base, plain)
            once(f"guided, T = {t}", guided, replace(plain, beta=sharpest))
        for name, model, b in (("base", base, 0.0), ("guided", guided, beta)):
            how, n = Guidance(beta=b, temperature=decode.temperature), decode.samples
            many, cost = decoding.write(
                model, prompts, how, samples=n, max_tokens=decode.max_tokens
            )
            by = decoding.best_by(model, prompts, many, "logprob")
            add(f"{name}, best of {n} by log-prob", (by, cost))
            add(f"{name}, MBR over {n}", (
                decoding.minimum_bayes_risk(many, self.judge.one), cost
            ))  # fmt: skip
            if name == "guided":
                by = decoding.best_by(model, prompts, many, "value")
                add(f"guided, best of {n} by Q", (by, cost))
            add(f"{name}, beam {decode.beams}", self._beams(model, rows, b, penalty[name]))
        time = decoding.relative_seconds(
            base, GREEDY, guided, by_beta, prompts[:256], decode.rounds, decode.max_tokens
        )
        seconds = sum(
            json.loads(summary.read_text())["seconds"]
            for summary in self.models.work.glob("**/summary.json")
        )
        return {"chosen": chosen, "time": time, "made_in": seconds, "systems": systems}
