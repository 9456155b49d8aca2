"""The games of the table: how each is drawn, how large its model is, how it learns."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

from qvgpt.categorical import Functional
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.policy import Guidance
from qvgpt.envs.games import Game
from qvgpt.envs.maze import Maze, MazeEnv
from qvgpt.envs.random_walk import RandomWalks, WalkEnv
from qvgpt.envs.star_graph import StarEnv, StarGraphs
from qvgpt.envs.wordle import ADVERSARIAL, ALPHABET, MIXED, Player, Wordle, WordleEnv
from qvgpt.envs.wordle_search import optimal_return
from qvgpt.fit_options import FitOptions
from qvgpt.models.heads_config import HeadsConfig

TOP = "top"
"""Stands for the return that the best fifth of the logs reach."""


@dataclass(frozen=True)
class Method:
    """A row of the table; options of objectives are the game's (`Setting.options`)."""

    learns: str | Mapping[str, Any]
    """The objective: `LM`, or one of values."""
    joint: bool = False
    """Trunk and values learn together, also where the other methods' trunk is frozen."""
    functional: Functional = "mean"
    """What is read of a distribution of returns."""
    shares: str | None = None
    """The method whose training this is another reading of."""

    heads: HeadsConfig | None = None
    """None: the game's."""
    goes_on: bool = False
    """It goes on with BC's trunk, and learns all of it further."""
    on: str | None = None
    """The method on whose frozen trunk it learns; None: as the game has it."""
    searches: bool = False
    """Of the ways that the game's beam search ends with, the one of the highest Q is gone."""

    @property
    def has_q(self) -> bool:
        """Whether values guide it; else it is the policy that its trunk learned."""
        return not self.is_policy and not self.is_text

    @property
    def is_policy(self) -> bool:
        """Whether log π/π₀ is the advantage that it learned."""
        return self.learns == "PathConsistency"

    @property
    def is_text(self) -> bool:
        """Whether it learns from texts alone."""
        return self.learns == "LM" or isinstance(self.learns, Mapping)


METHODS = {
    "BC": Method("LM"),
    "filtered_BC": Method({"LM": {"min_return": TOP}}, goes_on=True),
    "MonteCarlo": Method("MonteCarlo", joint=True),
    "MC_categorical": Method("ReturnDistribution"),
    "Qsharp": Method("ReturnDistribution", functional="soft", shares="MC_categorical"),
    "SARSA": Method("SARSA"),
    "ILQL": Method("ILQL"),
    "CQL": Method("DoubleQ"),
    "soft_Q": Method("PathConsistency", goes_on=True),
    "ILQL_joint": Method("ILQL", joint=True),
    "MonteCarlo_search": Method("MonteCarlo", joint=True, shares="MonteCarlo", searches=True),
}
ABLATION = {
    f"{method}_{kind}": Method(method, heads=heads)
    for method in ("MonteCarlo", "ILQL")
    for kind, heads in {
        "linear": HeadsConfig("linear"),
        "rank4": HeadsConfig("low_rank", 4),
        "rank16": HeadsConfig("low_rank", 16),
        "rank32": HeadsConfig("low_rank", 32),
        "bilinear": HeadsConfig("bilinear"),
        "mlp": HeadsConfig("mlp"),
        "one_q": HeadsConfig("mlp", num_q=1),
    }.items()
} | {
    f"{method}_{name}": Method(method, joint=joint, on=on, heads=HeadsConfig("mlp"))
    for method in ("MonteCarlo", "ILQL")
    for name, joint, on in (("own_trunk", True, None), ("cloned_trunk", False, "BC"))
}
"""What kind of heads to take, and on which trunk: one that learns along, or a clone's, frozen."""
WORDS = (
    "crane", "slate", "light", "night", "might", "sight", "eerie", "mamma", "babes", "abbey",
)  # fmt: skip
"""For the quick form, which needs no files."""


@dataclass(frozen=True)
class Task:
    """A game as one seed draws it."""

    rows: list[dict[str, Any]]
    """The logs."""
    new: Callable[[], Game]
    optimum: float
    """Mean return of the best policy."""
    alphabet: str | None = None
    """The characters of the game, each a token; None: words are (bytes, merged)."""
    max_turns: int = 1
    max_tokens: int = 6
    """Of an action."""

    @property
    def dialogue(self) -> bool:
        """Whether logs are dialogues, of turns."""
        return "messages" in self.rows[0]

    @property
    def tokenizer(self) -> Tokenizer:
        """Of characters, or of the words in the logs."""
        if self.alphabet is not None:
            return Tokenizer.train(self.alphabet, "char")
        texts = [
            m["content"] if m["role"] == "assistant" else f"user: {m['content']}"  # as encoded
            for row in self.rows
            for m in row["messages"]
        ]
        return Tokenizer.train(texts, vocab_size=400)

    def context(self, tokenizer: Tokenizer) -> int:
        """Tokens that the longest game may have, of whatever actions."""
        if not self.dialogue:
            longest = max(len(tokenizer.encode_prompt(row["prompt"])) for row in self.rows)
            return longest + self.max_tokens
        seen = {m["content"] for row in self.rows for m in row["messages"] if m["role"] == "user"}
        longest = max(len(tokenizer.encode(f"user: {text}")) for text in seen) + 1
        return 1 + self.max_turns * (longest + self.max_tokens)


@dataclass(frozen=True)
class Setting:
    """What a game takes. One setting for all its methods."""

    task: Callable[[int, int], Task]
    """Seed and number of logged episodes → the game."""
    episodes: int
    fit: FitOptions
    """How a trunk learns, alone or together with values."""
    heads_fit: FitOptions | None = None
    """How values learn on the frozen trunk of `MonteCarlo`; None: all methods are `joint`."""
    guidance: Guidance = field(default_factory=lambda: Guidance(beta=64.0, min_p=0.1))
    """Methods without values take the same candidates, at β = 0."""
    eta: float = 0.1
    """Of the soft methods: what a nat away from the logs' policy costs, in units of `scale`."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By objective."""
    reads: Literal["q", "prefix"] = "q"
    """What guides: Q(s, a), or V(s + a) read after each candidate."""
    scale: float = 1.0
    """Rewards are divided by it before training, so that values are of order 1; β counts in it."""
    trunk: Literal["gpt", "llama"] = "gpt"
    """GPT-2's architecture, or Llama's: its rotary positions learn "the one before" once for all
    places of a long text."""
    embed_dim: int = 64
    num_layers: int = 2
    heads: Literal["linear", "low_rank", "mlp"] = "mlp"
    begins_as: "tuple[str, Setting] | None" = None
    """An easier game of the same characters, with whose MonteCarlo's trunk it begins."""
    evaluations: int = 1000
    """Episodes that judge a policy."""
    beams: int = 5
    """Of a method that searches."""
    methods: tuple[str, ...] | None = None
    """The rows of the table, in its order; None: all of them but those that search."""

    @property
    def rows(self) -> list[str]:
        """The methods of the game's table."""
        if self.methods is not None:
            return list(self.methods)
        # where nothing is frozen, ILQL is joint anyway
        return [
            m for m in METHODS if not METHODS[m].searches and (self.heads_fit or m != "ILQL_joint")
        ]

    @property
    def further_fit(self) -> FitOptions:
        """How methods go on with BC's trunk: half as long, at a quarter of the rate."""
        steps = self.fit.max_steps
        steps = steps and max(1, steps // 2)
        return replace(self.fit, max_steps=steps, lr=self.fit.lr / 4, value_lr=self.fit.lr)


def random_walk(seed: int, episodes: int) -> Task:
    walks = RandomWalks.draw(seed)
    rows = walks.logged_walks(episodes, seed)
    optimum = walks.optimal_return()
    return Task(rows, lambda: WalkEnv(walks), optimum, walks.letters, max_tokens=11)


def star_graph(seed: int, episodes: int, graphs: StarGraphs) -> Task:
    rows = graphs.logged_paths(episodes, seed)
    optimum = graphs.optimal_return()
    tokens = graphs.length
    return Task(rows, lambda: StarEnv(graphs), optimum, graphs.alphabet, max_tokens=tokens)


def maze(seed: int, episodes: int, full: bool, **size: int) -> Task:
    drawn = Maze.draw(seed, full=full, **size)
    rows = drawn.logged_games(episodes, seed)
    return Task(rows, lambda: MazeEnv(drawn), drawn.optimal_return(), max_turns=drawn.max_moves)


def wordle(seed: int, episodes: int, game: Wordle, players: Iterable[Player]) -> Task:
    rows = game.logged_games(episodes, seed, tuple(players))
    optimum, turns = best_wordle(game), game.max_turns
    return Task(rows, lambda: WordleEnv(game), optimum, ALPHABET, turns, max_tokens=7)


best_wordle = cache(optimal_return)


def settings(words: Wordle | None) -> dict[str, Setting]:
    """The games of the table; those that need words only where there are some."""
    fit = FitOptions(epochs=1000.0, max_steps=400, batch_size=100, lr=2e-3, tau=0.1)
    whole = {"gamma": 1.0}
    best = {
        "ILQL": {**whole, "expectile": 0.95, "cql_weight": 0.0},
        "DoubleQ": whole,
        "PathConsistency": {"lambda_": 0.9},  # of whole paths it diverges in mazes
    }
    by_turns = {**best, "ILQL": {**best["ILQL"], "expectile": 0.9, "bootstrap": "turn"}}
    graphs = StarGraphs(degree=2, length=3, num_labels=12)
    # a game's length is its return here: batches of similar lengths would be batches of one return
    turns = replace(fit, max_steps=1200, batch_size=16, packed=True)
    heads_alone = replace(turns, max_steps=2000)
    games = {
        "random_walk": Setting(
            random_walk,
            1000,
            replace(fit, max_steps=800, dropout=0.1),  # 80 passes: learned by heart without
            guidance=Guidance(beta=1000.0, min_p=0.2),
            # cross-entropies of whole weight spoil the trunk that learns along
            options={**best, "ReturnDistribution": {"weight": 0.1}},
        ),
        "star_graph": Setting(
            lambda seed, episodes: star_graph(seed, episodes, graphs),
            200_000,
            replace(fit, max_steps=3000, batch_size=128),
            replace(fit, max_steps=2000, batch_size=128, packed=True),
            options=best,
            reads="prefix",
            trunk="llama",
            num_layers=3,
        ),
    }
    for name, degree, beams in (("star_graph_2_5", 2, 2), ("star_graph_5_5", 5, 10)):
        long = StarGraphs(degree=degree, length=5, num_labels=26)
        games[name] = replace(
            games["star_graph"],
            task=lambda seed, episodes, long=long: star_graph(seed, episodes, long),
            fit=replace(games["star_graph"].fit, max_steps=4000),
            beams=beams,
            methods=("MonteCarlo", "MonteCarlo_search"),
        )
    # of 20 edges it does not learn to copy the right one, of 8 it does, and goes on from there
    games["star_graph_5_5"] = begun_as(games, "star_graph_5_5", "star_graph_2_5")
    for name, full in (("maze_full", True), ("maze_partial", False)):
        games[name] = Setting(
            lambda seed, episodes, full=full: maze(seed, episodes, full, max_moves=30),
            1000 if full else 8000,
            turns if full else replace(turns, max_steps=3000),
            heads_alone,
            options=by_turns,
            scale=10.0,
            trunk="llama",
            evaluations=120,
        )
    if words is not None:
        for name, players in (("wordle", MIXED), ("wordle_adversarial", ADVERSARIAL)):
            games[name] = Setting(
                lambda seed, episodes, players=players: wordle(seed, episodes, words, players),
                20_000,
                replace(turns, max_steps=2500, batch_size=64, bf16=True),
                replace(heads_alone, batch_size=64),
                options=by_turns,
                scale=4.0,
                trunk="llama",
                embed_dim=128,
                num_layers=3,
                evaluations=2 * len(words.answers),
            )
    return games


def begun_as(games: Mapping[str, Setting], name: str, easier: str) -> Setting:
    """A game that begins with what an easier one has learned."""
    return replace(games[name], begins_as=(easier, games[easier]))


def quick_settings() -> dict[str, Setting]:
    """The same games, as small as they can be played; two of them long enough for their methods'
    order to show."""
    games = settings(Wordle(WORDS))
    del games["wordle_adversarial"]
    steps, rates = {"random_walk": 100, "star_graph": 200}, {"star_graph": 5e-3}
    long = StarGraphs(degree=2, length=2, num_labels=6)
    short = replace(long, num_labels=3)  # both arms' ends are told apart in seconds
    other = {"task": lambda seed, episodes: star_graph(seed, episodes, long)}
    small: dict[str, dict[str, Any]] = {
        "random_walk": {
            "episodes": 400,
            "evaluations": 100,
            "methods": ("BC", "MonteCarlo", "ILQL"),
        },
        "star_graph": {
            "task": lambda seed, episodes: star_graph(seed, episodes, short),
            "episodes": 500,
            "evaluations": 50,
            "trunk": "gpt",
            "embed_dim": 64,
            "num_layers": 1,
            "methods": ("BC", "MonteCarlo", "MC_categorical", "Qsharp", "SARSA", "ILQL", "CQL"),
        },
        "star_graph_2_5": other,
        "star_graph_5_5": other,
    }
    for name, full in (("maze_full", True), ("maze_partial", False)):
        size = {"num_cells": 5, "side": 3, "max_moves": 6}
        small[name] = {"task": lambda s, e, full=full, size=size: maze(s, e, full, **size)}
    quick = {
        name: replace(
            setting,
            **{"episodes": 100, "evaluations": 10, "embed_dim": 32} | small.get(name, {}),
            fit=replace(
                setting.fit,
                max_steps=steps.get(name, 4),
                batch_size=min(32, setting.fit.batch_size),
                lr=rates.get(name, 3e-3),
            ),
            heads_fit=setting.heads_fit and replace(setting.heads_fit, max_steps=4),
        )
        for name, setting in games.items()
    }
    quick["star_graph_5_5"] = begun_as(quick, "star_graph_5_5", "star_graph_2_5")
    return quick
