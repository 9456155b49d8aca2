"""Sentiment: a GPT from scratch on SST-2, guided to please a reward model, judged by another one.

    python reproductions/sentiment/run.py --data DIR --work DIR [--seeds 3]     hours on two cores
    python reproductions/sentiment/run.py --quick                               a toy, nothing kept

DIR holds sst2.train.jsonl, sst2.dev.jsonl ({"text", "label"}), prompts.neutral.jsonl ({"prompt"}).
Half A of SST-2 teaches language model and reward model, half B the judge (another architecture and
seed) and the language model that perplexity is of; the halves share no sentence (sst2.py). The base
writes texts, the reward model scores them, every method learns from those. Strengths are chosen on
prompts of validation sentences, by the reward model; what is reported is the judge's, on prompts of
SST-2's dev set and on neutral ones. What is finished in --work is not done again. Writes
results.json, table.md and frontier.html beside itself.
"""

import argparse
import hashlib
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from judging import Figures, Judges, Written, written
from methods import (
    CONTRAST_BETAS,
    FULL,
    PLAIN,
    QUICK,
    SHARES,
    VALUES,
    Setting,
    best_of,
    contrast,
    judge_model,
    language_model,
    samples_of,
    tuned,
)
from reporting import BEST_OF_N, EQUAL_KL, picture, summarise, table
from sst2 import Files, prepare, read, toy, write

sys.path.append(str(Path(__file__).parents[1]))

from texts.decoding import relative_seconds

from qvgpt.decode.policy import Guidance
from qvgpt.decode.rerank import choice_kl
from qvgpt.decode.sources import ValueSource
from qvgpt.models.value_model import ValueModel
from qvgpt.run import write_json

HERE = Path(__file__).parent
BILINEAR = tuple(
    f"MonteCarlo{trunk}, bilinear" for trunk in ("", ", filtered", ", half", ", frozen")
)
GUIDED = ("MonteCarlo", "MonteCarlo, filtered", *BILINEAR, "ILQL", "Q♯")
"""One forward a token: of these the headline is chosen."""
CANDIDATES = ("FUDGE", "CD")
"""As many as there are candidates."""
RIVALS = (*CANDIDATES, "contrast")
"""Compared at the headline's KL."""
KL_APART = 0.1
"""Nats a text, between what is compared at equal KL."""
MAX_PERPLEXITY, MIN_DISTINCT = 1.25, 0.9
"""Of the chosen strength on validation prompts, in terms of the base's: perplexity, and different
pairs of words."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="directory of the JSONL files")
    parser.add_argument("--work", type=Path, default=Path("runs/sentiment"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        with tempfile.TemporaryDirectory() as directory:
            data = toy(Path(directory) / "data")
            results, _ = run(data, Path(directory) / "work", 1, QUICK)
        print(json.dumps(results, indent=1))
        return
    if options.data is None:
        parser.error("say where the data are (--data), or --quick")
    results, frontiers = run(options.data, options.work, options.seeds, FULL)
    write_json(HERE / "results.json", results)
    (HERE / "table.md").write_text(table(results))
    picture(HERE / "frontier.html", frontiers)
    print((HERE / "table.md").read_text())


def run(data: Path, work: Path, seeds: int, setting: Setting) -> tuple[dict[str, Any], Any]:
    """Every step of every seed, and what they say together."""
    files = prepare(data, work / "data", setting.test)
    judge = judge_model(work / "judge", files, "B", setting, 1000, judge=True)
    reader = language_model(work / "reader", files, "B", setting, 1000)
    cells = [
        _Seed(seed, work / f"seed-{seed}", files, setting, judge, reader).cell()
        for seed in range(seeds)
    ]
    return summarise(cells, RIVALS, _facts(judge))


def _facts(judge: Path) -> dict[str, Any]:
    held = json.loads((judge / "summary.json").read_text())["held_out"]
    return {
        "judge_accuracy": held["accuracy"],
        "judge_calibration_error": held["calibration_error"],
    }


@dataclass(frozen=True)
class _Way:
    """A method that is ready to write."""

    model: ValueModel
    guidances: dict[float, Guidance]
    """By strength."""
    values: ValueSource | None = None

    def at(self, strength: float) -> Guidance:
        """Guidance of any strength."""
        return replace(next(iter(self.guidances.values())), beta=strength)


@dataclass(frozen=True)
class _Seed:
    """One seed, all in a directory."""

    seed: int
    work: Path
    files: Files
    setting: Setting
    judge: Path
    reader: Path

    def cell(self) -> dict[str, Any]:
        """The figures of both directions, from disk where they are there."""
        done = self.work / "cell.json"
        if not done.exists():
            base = language_model(self.work / "base", self.files, "A", self.setting, self.seed)
            reward = judge_model(
                self.work / "reward", self.files, "A", self.setting, self.seed, judge=False
            )
            samples = samples_of(
                self.work / "samples", base, reward, self.files, self.setting, self.seed
            )
            judges = Judges.of(str(reward), str(self.judge), str(self.reader))
            directions = {
                direction: self._direction(direction, base, samples[direction], judges)
                for direction in ("positive", "negative")
            }
            held = json.loads((reward / "summary.json").read_text())["held_out"]
            write_json(done, {"reward_accuracy": held["accuracy"], **directions})
        return json.loads(done.read_text())

    def _direction(
        self, direction: str, base_dir: Path, samples: Path, judges: Judges
    ) -> dict[str, Any]:
        """Train, choose on validation prompts, report on test prompts."""
        base = ValueModel.from_pretrained(base_dir)
        plain = _Way(base, {0.0: PLAIN})
        ways = self._ways(direction, base_dir, base, samples)
        val = self._figures("validation", direction, "base", plain, base, judges)
        found = {
            name: self._figures("validation", direction, name, way, base, judges)
            for name, way in ways.items()
        }
        guided = [name for name in GUIDED if name in ways]
        headline, beta = _chosen({n: found[n] for n in guided}, val[0], direction)
        test: dict[str, list[Figures]] = {
            "base": self._figures("test", direction, "base", plain, base, judges)
        }
        for name, way in ways.items():
            test[name] = self._figures("test", direction, name, way, base, judges)
        kl = next(f.kl for f in test[headline] if (f.method, f.strength) == (headline, beta))
        for name in (n for n in RIVALS if n in ways):
            equal = self._at_kl(direction, name, ways[name], test[name], kl, base, judges)
            test[f"{name}{EQUAL_KL}"] = [equal]
        test[f"{BEST_OF_N}{EQUAL_KL}"] = self._best_of_n(
            direction, max(2, _texts_at_kl(kl - test["base"][0].kl)), base, judges
        )
        way = self._distilled(direction, ways[headline], beta, base_dir, base, judges)
        test["distilled"] = self._figures("test", direction, "distilled", way, base, judges)
        return {
            "headline": headline,
            "beta": beta,
            "time": self._time(ways[headline], beta, base),
            "validation": {
                n: [f.as_dict() for f in fs] for n, fs in (found | {"base": val}).items()
            },
            "test": {n: [f.as_dict() for f in fs] for n, fs in test.items()},
        }

    def _ways(
        self, direction: str, base_dir: Path, base: ValueModel, samples: Path
    ) -> dict[str, _Way]:
        """Every method of a direction, trained."""
        setting, place = self.setting, self.work / direction
        ways: dict[str, _Way] = {}
        for name in setting.values:
            method = VALUES[name]
            model = tuned(place / name, base_dir, samples, method.objectives, setting.value_fit,
                          self.seed, method.heads, method.frozen)  # fmt: skip
            betas = method.betas[: setting.strengths]
            ways[name] = _Way(model, {b: replace(method.guidance, beta=b) for b in betas})
            if name == GUIDED[0]:  # what its trunk has learned by going on
                ways[f"{name}, unguided"] = _Way(model, {0.0: PLAIN})
        for share in SHARES[: setting.strengths]:
            model = tuned(place / f"filtered-{share}", base_dir, samples,
                          [{"LM": {"top_share": share}}], setting.tune_fit, self.seed)  # fmt: skip
            ways[f"filtered, best {share:.0%}"] = _Way(model, {share: PLAIN})
        model = tuned(place / "best-of-K", base_dir, best_of(samples), ["LM"], setting.tune_fit,
                      self.seed)  # fmt: skip
        ways["best of K"] = _Way(model, {float(setting.samples): PLAIN})
        values = contrast(self.work, base_dir, self.files, setting, self.seed, direction)
        betas = CONTRAST_BETAS[: setting.strengths]
        ways["contrast"] = _Way(base, {b: replace(PLAIN, beta=b) for b in betas}, values)
        return ways

    def _distilled(
        self,
        direction: str,
        way: _Way,
        beta: float,
        base_dir: Path,
        base: ValueModel,
        judges: Judges,
    ) -> _Way:
        """The base fine-tuned on as many guided texts, of the same prompts, as it wrote itself."""
        setting, place = self.setting, self.work / direction
        texts = place / "distilled.jsonl"
        if not texts.exists():
            rows = read(self.files.prompts("train"))[: setting.prompts]
            [found] = written(
                "distilled", way.model, {beta: way.at(beta)}, rows, judges, base,
                samples=setting.samples, seed=2, max_tokens=setting.max_tokens, timing=0,
                values=way.values,
            )  # fmt: skip
            write(texts, (
                {"prompt": row["prompt"], "completion": text, "truncated": cut}
                for row, several, ends in zip(rows, found.texts, found.truncated, strict=True)
                for text, cut in zip(several, ends, strict=True)
                if text or not cut
            ))  # fmt: skip
        model = tuned(place / "distilled", base_dir, texts, ["LM"], setting.tune_fit, self.seed)
        return _Way(model, {beta: PLAIN})

    def _at_kl(
        self,
        direction: str,
        name: str,
        way: _Way,
        found: Sequence[Figures],
        kl: float,
        base: ValueModel,
        judges: Judges,
    ) -> Figures:
        """A method at the strength where its KL is `kl`, to a tenth of a nat: in four tries."""
        tried = list(found)
        for attempt in range(4):
            equal = _strength_at(tried, kl)
            if attempt and any(f.strength == equal for f in tried):
                break
            once = replace(way, guidances={equal: way.at(equal)})
            tried += self._figures("test", direction, f"{name}{EQUAL_KL}", once, base, judges)
            if abs(tried[-1].kl - kl) <= KL_APART:
                break
        return min(tried[len(found) :], key=lambda f: abs(f.kl - kl))

    def _best_of_n(self, direction: str, n: int, base: ValueModel, judges: Judges) -> list[Figures]:
        """The base's best of n by the reward, two of each prompt."""
        rows, name = read(self.files.prompts("test")), f"{BEST_OF_N}{EQUAL_KL}"

        def measured() -> list[Figures]:
            [found] = written(
                "base", base, {0.0: PLAIN}, rows, judges, base, samples=2 * n, seed=1,
                max_tokens=self.setting.max_tokens, timing=0,
            )  # fmt: skip
            return [replace(found.best_of(n, direction), method=name).figures(rows, judges.reader)]

        said = {"n": n, "prompts": _hash(rows), "max_tokens": self.setting.max_tokens}
        return _kept(self.work / "figures" / f"test.{direction}.{name}.json", said, measured)

    def _figures(
        self, which: str, direction: str, name: str, way: _Way, base: ValueModel, judges: Judges
    ) -> list[Figures]:
        """Of every strength, and of best of N where that belongs to the method; kept on disk."""
        rows, samples = read(self.files.prompts(which)), self.setting.judged_samples
        if which == "validation":
            rows = rows[: self.setting.validation]
        elif name == "base":
            samples = self.setting.base_samples
        if name.removesuffix(EQUAL_KL) in CANDIDATES:
            samples = max(1, samples // 2)
        said = {
            "guidances": {str(k): asdict(g) for k, g in way.guidances.items()},
            "prompts": _hash(rows),
            "samples": samples,
            "max_tokens": self.setting.max_tokens,
        }
        many = which == "test" and (name == "base" or name in GUIDED)
        return _kept(
            self.work / "figures" / f"{which}.{direction}.{name}.json",
            said,
            lambda: self._measured(rows, samples, direction, name, way, base, judges, many),
        )

    def _measured(
        self,
        rows: list[dict[str, Any]],
        samples: int,
        direction: str,
        name: str,
        way: _Way,
        base: ValueModel,
        judges: Judges,
        many: bool,
    ) -> list[Figures]:
        setting = self.setting
        found: list[Written] = written(
            name, way.model, way.guidances, rows, judges, base,
            samples=samples, seed=1, max_tokens=setting.max_tokens,
            timing=setting.timed, values=way.values,
        )  # fmt: skip
        if many:
            found += [
                one.best_of(n, direction)
                for one in list(found)
                for n in (2, 4, 8, 16)
                if n <= min(setting.max_n, samples)
            ]
        return [one.figures(rows, judges.reader) for one in found]

    def _time(self, way: _Way, beta: float, base: ValueModel) -> dict[str, Any]:
        """Seconds per token that is read, prompts too: guided texts are the shorter ones, and per
        token that is written each bears more of its prompt."""
        prompts = [row["prompt"] for row in read(self.files.prompts("test"))]
        rounds = 20 if self.setting.timed else 1
        return relative_seconds(
            base, PLAIN, way.model, way.at(beta), prompts, rounds, self.setting.max_tokens
        )


def _hash(rows: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _texts_at_kl(nats: float) -> int:
    """The least N of which the best is so far from one text."""
    return next(n for n in itertools.count(1) if choice_kl(n) >= nats)


def _kept(place: Path, said: Mapping[str, Any], make: Callable[[], list[Figures]]) -> list[Figures]:
    """What is on disk where it was made in this way, else made and written."""
    said = json.loads(json.dumps(said))
    if place.exists():
        found = json.loads(place.read_text())
        if found["said"] == said:
            return [Figures(**figures) for figures in found["figures"]]
    figures = make()
    place.parent.mkdir(parents=True, exist_ok=True)
    write_json(place, {"said": said, "figures": [f.as_dict() for f in figures]})
    return figures


def _chosen(
    found: Mapping[str, Sequence[Figures]], base: Figures, direction: str
) -> tuple[str, float]:
    """Method and β of the highest reward among those that write as well as the base."""
    every = [(name, f) for name, several in found.items() for f in several]
    fluent = [
        (name, f)
        for name, f in every
        if f.perplexity <= MAX_PERPLEXITY * base.perplexity
        and f.distinct[1] >= MIN_DISTINCT * base.distinct[1]
    ]
    if not fluent:
        fluent = [min(every, key=lambda e: e[1].perplexity)]
    name, best = max(fluent, key=lambda e: float(np.mean(e[1].towards(direction)["reward"])))
    return name, best.strength


def _strength_at(found: Sequence[Figures], kl: float) -> float:
    """The strength at which a method's KL is `kl`: between those tried, linear in both logs.

    One of the ends where none of them goes so far.
    """
    line = sorted((f.kl, f.strength) for f in found)
    kls, strengths = (np.log(np.maximum(x, 1e-6)) for x in zip(*line, strict=True))
    return round(float(np.exp(np.interp(np.log(kl), kls, strengths))), 3)


if __name__ == "__main__":
    main()
