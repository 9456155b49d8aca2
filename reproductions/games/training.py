"""How a game's methods are trained: trunks from scratch, or values alone on a frozen one."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from games import ABLATION, METHODS, TOP, Setting, Task
from jaxtyping import Bool, Float, Int
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qvgpt.data.rows import Row, row_to_trajectories
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.envs.games import row_return
from qvgpt.loop import fit
from qvgpt.models.backbone import Backbone, as_module
from qvgpt.models.causal_lm import CausalLM
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import parse_objectives
from qvgpt.run import write_json
from qvgpt.trajectory import Trajectory, scaled

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EVERY = METHODS | ABLATION
States = dict[tuple[int, ...], Float[Tensor, "time embed"]]


def train(
    task: Task, setting: Setting, method: str, seed: int, work: Path
) -> tuple[ValueModel, float]:
    """A model that learned from the logs by a method, and the seconds it took.

    What was trained before is read back, and goes on if it was not finished.
    """
    method = EVERY[method].shares or method
    how, options, spent = EVERY[method], setting.fit, 0.0
    directory = work / method / str(seed)
    if (done := directory / "seconds.json").exists():
        return ValueModel.from_pretrained(directory).to(DEVICE), json.loads(done.read_text())
    tokenizer, texts = encoded(setting, seed)
    if how.goes_on:
        trunk, spent = trunk_of("BC", setting, seed, work)
        options = setting.further_fit
    elif on := frozen(setting, method):
        trunk, spent = trunk_of(on, setting, seed, work)
        options = setting.heads_fit or options
        freeze(trunk, known_states(setting, on, seed, work))
    else:
        trunk = new_trunk(task, setting, seed)
        if setting.begins_as is not None:
            easier, its_setting = setting.begins_as
            before, spent = trunk_of("MonteCarlo", its_setting, seed, work.parent / easier)
            as_module(trunk).load_state_dict(as_module(before).state_dict())
    torch.manual_seed(seed)
    heads = None if how.is_text else heads_of(setting, method, texts)
    model = ValueModel(trunk, heads, tokenizer)
    found = fit(
        model,
        texts,
        parse_objectives(objectives_of(setting, method, task.rows)),
        replace(options, seed=seed),
        output=directory,
        resume=True,
        console=Console(file=io.StringIO()),
    )
    write_json(done, seconds := spent + found["seconds"])
    return model, seconds


def frozen(setting: Setting, method: str) -> str | None:
    """The method on whose trunk it learns values alone; None: its trunk learns too."""
    how = EVERY[method]
    if how.on or setting.heads_fit is None or how.joint or method == "BC":
        return how.on
    return "MonteCarlo"


@lru_cache(maxsize=1)
def drawn(task: Callable[[int, int], Task], seed: int, episodes: int) -> Task:
    """The game and its logs, which all methods of a seed share."""
    return task(seed, episodes)


@lru_cache(maxsize=1)
def _encoded(
    task: Callable[[int, int], Task], seed: int, episodes: int, scale: float
) -> tuple[Tokenizer, list[Trajectory]]:
    game = drawn(task, seed, episodes)
    tokenizer = game.tokenizer
    texts = [
        text
        for i, row in enumerate(game.rows, 1)
        for text in row_to_trajectories(Row(f"episode {i}", row), tokenizer)
    ]
    return tokenizer, scaled(texts, 1 / scale)


def encoded(setting: Setting, seed: int) -> tuple[Tokenizer, list[Trajectory]]:
    """The tokenizer and the logs as it says them, rewards divided by the game's scale."""
    return _encoded(setting.task, seed, setting.episodes, setting.scale)


def new_trunk(task: Task, setting: Setting, seed: int) -> Backbone:
    """Fresh weights of the game's size."""
    torch.manual_seed(seed)
    tokenizer, _ = encoded(setting, seed)
    vocab_size, seq_len = tokenizer.vocab_size, task.context(tokenizer)
    if setting.trunk == "gpt":
        return GPT(
            vocab_size,
            embed_dim=setting.embed_dim,
            num_heads=4,
            num_layers=setting.num_layers,
            seq_len=seq_len,
        )
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=setting.embed_dim,
        intermediate_size=3 * setting.embed_dim,
        num_hidden_layers=setting.num_layers,
        num_attention_heads=4,
        max_position_embeddings=seq_len,
        tie_word_embeddings=True,
    )
    return CausalLM(LlamaForCausalLM(config))


def heads_of(setting: Setting, method: str, texts: Sequence[Trajectory]) -> HeadsConfig:
    """The game's heads, or those of a distribution over all returns that the logs may hold."""
    if EVERY[method].learns != "ReturnDistribution":
        return EVERY[method].heads or HeadsConfig(kind=setting.heads)
    returns = {text.total_reward * setting.scale for text in texts}
    low, high = min(0.0, *returns), max(0.0, *returns)
    bins = round(high - low) + 1 if all(r.is_integer() for r in returns) else 51
    low, high = low / setting.scale, high / setting.scale
    return HeadsConfig("categorical", setting.embed_dim // 2, bins=bins, low=low, high=high)


def trunk_of(method: str, setting: Setting, seed: int, work: Path) -> tuple[Backbone, float]:
    """A method's trunk, and the seconds it took."""
    task = drawn(setting.task, seed, setting.episodes)
    model, seconds = train(task, setting, method, seed, work)
    return model.trunk, seconds


_states: dict[tuple[Path, str, int], States] = {}


def known_states(setting: Setting, method: str, seed: int, work: Path) -> States:
    """What a method's trunk makes of the logs; that of the last one asked for is kept."""
    key = (work, method, seed)
    if key not in _states:
        _states.clear()
        trunk, _ = trunk_of(method, setting, seed, work)
        _states[key] = states(trunk, encoded(setting, seed)[1])
    return _states[key]


def objectives_of(
    setting: Setting, method: str, rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The method's objectives with the game's options; `TOP` as a number, where there are rows.

    Values that learn together with their trunk learn beside the language model.
    """
    how = EVERY[method]
    beside = how.has_q and frozen(setting, method) is None
    returns = sorted(map(row_return, rows))
    top = returns[len(rows) * 4 // 5] / setting.scale if rows else TOP
    ((kind, own),) = ({how.learns: {}} if isinstance(how.learns, str) else how.learns).items()
    options = {**setting.options.get(kind, {}), **own}
    if kind == "PathConsistency":
        options["eta"] = setting.eta
    found = [{kind: {o: top if v == TOP else v for o, v in options.items()}}]
    return [{"LM": {}}, *found] if beside else found


@torch.no_grad()
def states(trunk: Backbone, texts: Sequence[Trajectory], batch: int = 32) -> States:
    """The hidden states of each different text."""
    different = sorted({tuple(text.tokens) for text in texts}, key=len)
    found: States = {}
    for start in range(0, len(different), batch):
        part = different[start : start + batch]
        tokens = torch.zeros(len(part), len(part[-1]), dtype=torch.long, device=DEVICE)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        for row, text in enumerate(part):
            tokens[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = True
        for text, hidden in zip(part, trunk.hidden(tokens, mask), strict=True):
            found[text] = hidden[: len(text)].clone()
    return found


def freeze(trunk: Backbone, known: States) -> None:
    """Let the trunk learn no more, and look up the rows of whole texts that packing makes."""
    compute = trunk.hidden

    def hidden(
        tokens: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "batch time"] | None = None,
        cache: object = None,
        **embedded: Tensor,
    ) -> Float[Tensor, "batch time embed"]:
        if positions is None or cache is not None:
            return compute(tokens, mask, positions, cache, **embedded)
        rows = zip(tokens.tolist(), positions.tolist(), strict=True)
        return torch.stack([_row(known, *row) for row in rows])

    as_module(trunk).requires_grad_(False)
    trunk.hidden = hidden  # type: ignore[method-assign]


def _row(known: States, tokens: list[int], positions: list[int]) -> Float[Tensor, "time embed"]:
    """The states of texts side by side; zeros for the padding, each token a text by itself."""
    starts = [i for i, position in enumerate(positions) if position == 0]
    texts = zip(starts, [*starts[1:], len(tokens)], strict=True)
    parts = [tuple(tokens[start:end]) for start, end in texts]
    nothing = torch.zeros_like(next(iter(known.values()))[:1])
    return torch.cat([nothing if len(part) == 1 else known[part] for part in parts])
