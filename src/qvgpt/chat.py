"""`qvgpt chat`: talk with a model, guided or not; what is written streams, and can be taken back.

Texts go to stdout, all else to stderr. Where no terminal listens each line of stdin gets one text,
without any escape codes.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text as Coloured

from qvgpt.decode.budget import MOST_UNDER_BUDGET
from qvgpt.decode.engine import Engine, Request, TokenReport, row_seed
from qvgpt.decode.guide import Guide
from qvgpt.decode.sources import ValueSource
from qvgpt.errors import QvgptError, Terminated, nearest
from qvgpt.guidance_options import GuidanceOptions
from qvgpt.models.disk import writing
from qvgpt.models.value_model import ValueModel
from qvgpt.run import Interruption
from qvgpt.terminal import TextStream, shade, worth

_TOP_K = 40  # under a budget of KL where none is said
_CONTROLS = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}


@dataclass(frozen=True)
class ChatConfig(GuidanceOptions):
    """Talk with a model in a terminal, or through a pipe: a line in, a text out."""

    model: str
    """Directory of the model."""
    turns: Literal["auto", "one", "many"] = "auto"
    """many: a dialogue. one: each line is a prompt of its own. auto: many where the tokenizer has a
    chat template, or the model was trained on dialogues (rows of `messages`)."""
    system: str | None = None
    """The dialogue's first message, where the template knows of such."""
    max_tokens: int | None = None
    """Longest text; none: what the context holds, at most 256. The oldest turns are dropped where
    they leave less (none: less than a quarter of the context)."""
    seed: int = 0
    """The same seed and lines give the same texts."""
    values: bool = False
    """Colour tokens by advantage, and say what the text is worth."""


def chat(config: ChatConfig) -> dict[str, Any]:
    """Read lines and answer them, until /quit or the end of the input."""
    model, values = config.load(config.model)
    session = Session(config, model, values)
    session.greet()
    session.run()
    return {"turns": len(session.turns), "texts": session.written}


@dataclass(frozen=True)
class Turn:
    """What was said, and what was written to it."""

    user: str
    assistant: str
    cut: bool
    """No end token came."""


class Session:
    """A conversation: what was said, how texts are guided, and the engine that writes them."""

    def __init__(self, config: ChatConfig, model: ValueModel, values: ValueSource | None):
        if config.max_tokens is not None and config.max_tokens < 1:
            raise QvgptError(f"max_tokens: must be at least 1, not {config.max_tokens}")
        assert model.tokenizer is not None
        self.model, self.values, self.tokenizer = model, values, model.tokenizer
        self.many = self.tokenizer.chat_template is not None or model.info.dialogues
        if config.turns != "auto":
            self.many = config.turns == "many"
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.console = Console(highlight=False)
        self.turns: list[Turn] = []
        self.left_out = 0
        """Turns at the beginning that the context holds no more."""
        self.written = 0
        """Texts so far: each has a seed of its own."""
        self.most = 0.0
        """The greatest advantage so far, which has full colour."""
        self.system: str | None = None
        self.saved: set[Path] = set()
        self.guide = Guide.of(model, values)
        self._use(config)
        self.engine = Engine(model, 1, False, values)
        if config.values:
            self._values("")
        if config.system is not None:
            self._system(config.system)

    def _use(self, config: ChatConfig) -> None:
        """Take other options, if they make a guidance that can be served."""
        guidance = config.guidance(self.model, config.model, self.values)
        self.guide.refuse([0], 1, guidance)
        self.config, self.guidance = config, guidance

    # ── the loop ─────────────────────────────────────────────────────────────────────────────

    def greet(self) -> None:
        """Which guidance, and what a line is."""
        self.say(self._in_words())
        if self.many:
            self.say("a dialogue: every line goes on with it")
        else:
            self.say(
                "one turn: nothing says that this model knows dialogues, so each line is a new "
                "prompt (--turns many: a dialogue all the same)"
                if self.config.turns == "auto"
                else "one turn: each line is a new prompt"
            )
        if self.interactive:
            self.say("/help lists what else can be said; Ctrl-C stops a text, Ctrl-D leaves")

    def run(self) -> None:
        """Until the input ends."""
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  input() then knows arrows and a history
        if isinstance(sys.stdin, io.TextIOWrapper):  # broken UTF-8 is a faulty line, not the end
            sys.stdin.reconfigure(errors="surrogateescape")
        while (line := self._read()) is not None:
            commands = line.startswith("/") and not line.startswith("//")
            try:
                if commands:
                    if self.command(line):
                        return
                elif line or not self.interactive:
                    self.answer(line.removeprefix("/"))
            except Terminated:
                raise
            except KeyboardInterrupt:  # a second one, in the middle of a step
                if not self.interactive:
                    raise
                self.engine = Engine(self.model, 1, self.engine.report, self.values)
                print()
            except QvgptError as error:
                self.say(" ".join(str(error).partition(", not as in")[0].split()))
                if not self.interactive and not commands:
                    print(flush=True)  # a text for each line, be it an empty one

    def _read(self) -> str | None:
        """A line; None at the end."""
        if not self.interactive:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        while True:
            try:
                return input("> ").strip()
            except EOFError:
                print()
                return None
            except Terminated:
                raise
            except KeyboardInterrupt:
                print()
                self.say("Ctrl-D or /quit leaves")

    def say(self, text: str) -> None:
        """A line to the person, not a part of any text."""
        console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        console.print(text, style="dim")

    # ── what is written ──────────────────────────────────────────────────────────────────────

    def answer(self, line: str) -> None:
        """Write a text to the line, and keep both."""
        stream, finished, reports = self._write(self._prompt(line))
        end = stream.tokens[-1:] if finished == "end" else []
        text = self.tokenizer.decode_completion(stream.tokens)
        if self.interactive or stream.tokens:
            print(flush=True)
        if not stream.tokens:
            self.say("stopped before the first token: nothing is kept")
            return
        self.turns.append(Turn(line, text, not end))
        if reports:
            self.say(worth(reports))
        if finished is None:
            self.say("stopped: what stands is kept; /undo takes it back, /retry writes another")
        elif finished == "length":
            self.say(f"cut after {len(stream.tokens)} tokens")

    def _write(self, tokens: list[int]) -> tuple[TextStream, str | None, list[TokenReport]]:
        """Stream a text; how it ended (None: by Ctrl-C); the reports, if values are shown."""
        room = self.guide.context - len(tokens)
        most = min(self.config.max_tokens or 256, room)
        seed = row_seed(self.config.seed, self.written)
        request = self.engine.submit(Request(tokens, most, self.guidance, seed))
        self.written += 1
        stream, finished, reports = TextStream(self.tokenizer), None, []
        with Interruption() as interruption:
            while self.engine.busy:
                for event in self.engine.step():
                    finished = event.finished
                    if event.report is not None:
                        reports.append(event.report)
                    self._show(stream.add(event.token), event.report)
                if interruption.asked and finished is None:
                    self.engine.cancel(request)
        self._show(stream.rest(), None)
        if interruption.asked and (interruption.asked is Terminated or not self.interactive):
            raise interruption.asked
        return stream, finished, reports

    def _show(self, piece: str, report: TokenReport | None) -> None:
        """A piece of a text; on a terminal it may not steer it."""
        if not self.interactive or not piece:
            print(piece, end="", flush=True)
            return
        style, advantage = "", report.advantage if report is not None else None
        if advantage is not None:
            self.most = max(self.most, abs(advantage))
            style = shade(advantage, self.most)
        self.console.print(Coloured(piece.translate(_CONTROLS), style), end="", soft_wrap=True)

    def _prompt(self, line: str) -> list[int]:
        """The tokens before the text; drops the oldest turns where the context is full."""
        context, left_out = self.guide.context, self.left_out
        if not self.many:
            tokens = self.tokenizer.encode_prompt(line)
        else:
            room = self.config.max_tokens or min(256, context // 4)
            tokens = self.tokenizer.encode_history(self._messages(line, left_out))
            while len(tokens) + room > context and left_out < len(self.turns):
                left_out += 1
                tokens = self.tokenizer.encode_history(self._messages(line, left_out))
        if len(tokens) >= context:
            raise QvgptError(
                f"a prompt of {len(tokens)} tokens leaves no room in the context of "
                f"{context}: say less"
            )
        if left_out > self.left_out:
            self.left_out = left_out
            self.say(
                f"the context of {context} tokens is full: the oldest "
                f"{left_out} of {len(self.turns)} turns are left out"
            )
        return tokens

    def _messages(self, line: str, first: int = 0) -> list[dict[str, Any]]:
        """The dialogue from a turn on, the line its last message."""
        said = [] if self.system is None else [("system", self.system)]
        for turn in self.turns[first:]:
            said += [("user", turn.user), ("assistant", turn.assistant)]
        return [{"role": role, "content": text} for role, text in [*said, ("user", line)]]

    # ── commands ─────────────────────────────────────────────────────────────────────────────

    def command(self, line: str) -> bool:
        """Do what a line that begins with / says; True where it ends the session."""
        name, _, argument = line[1:].partition(" ")
        if name not in COMMANDS:
            known = [f"/{other}" for other in COMMANDS]
            raise QvgptError(f"unknown command /{name}{nearest('/' + name, known)}; see /help")
        return bool(COMMANDS[name].run(self, argument.strip()))

    def _in_words(self) -> str:
        words = self.config.in_words(self.model, self.guidance, self.values)
        return words.replace("--beta", "/beta").replace("; the model has values: try --best_of", "")

    def _change(self, **options: Any) -> None:
        self._use(replace(self.config, **options))
        self.say(self._in_words())

    def _beta(self, argument: str) -> None:
        self._change(beta=_number("/beta", argument), kl_budget=None)

    def _kl(self, argument: str) -> None:
        budget, top_k = _number("/kl", argument), self.guidance.top_k
        if not top_k or top_k > MOST_UNDER_BUDGET:
            self.say(f"top_k {_TOP_K}: a budget is spent among at most {MOST_UNDER_BUDGET} tokens")
            top_k = _TOP_K
        schedule = {"beta_end": None, "beta_tokens": None}
        self._change(beta=None, kl_budget=budget, top_k=top_k, candidates="base", **schedule)

    def _temperature(self, argument: str) -> None:
        self._change(temperature=_number("/temperature", argument))

    def _top_k(self, argument: str) -> None:
        self._change(top_k=_number("/top_k", argument, int))

    def _values(self, argument: str) -> None:
        if self.guide.source is None:
            raise QvgptError(f"/values: {self.config.model} has no values to show")
        shown = not self.engine.report
        self.engine = Engine(self.model, 1, shown, self.values)
        self.say(f"values are {'shown' if shown else 'not shown any more'}")

    def _system(self, argument: str) -> None:
        if not self.many:
            raise QvgptError("/system: one turn has no such message")
        before, self.system = self.system, None
        without = self.tokenizer.encode_history(self._messages(""))
        self.system = argument or None
        try:
            knows = not argument or self.tokenizer.encode_history(self._messages("")) != without
        except QvgptError as error:
            self.system = before
            raise QvgptError(f"/system: {error}") from None
        if not knows:
            self.system = before
            raise QvgptError("/system: the model's chat template leaves such a message out")
        self.left_out = 0

    def _undo(self, argument: str) -> None:
        self._take_back("/undo")
        self.say(f"the last turn is taken back; {len(self.turns)} left")

    def _retry(self, argument: str) -> None:
        last, count = self._take_back("/retry"), len(self.turns)
        try:
            self.answer(last.user)
        finally:
            if len(self.turns) == count:  # nothing took its place
                self.turns.append(last)

    def _take_back(self, command: str) -> Turn:
        if not self.turns:
            raise QvgptError(f"{command}: nothing was written yet")
        self.left_out = 0
        return self.turns.pop()

    def _reset(self, argument: str) -> None:
        self.turns, self.left_out = [], 0
        self.say("all turns are forgotten; guidance and system message stay")

    def _save(self, argument: str) -> None:
        if not argument or not self.turns:
            raise QvgptError(
                "/save: expected a file" if self.turns else "/save: nothing to save yet"
            )
        path = Path(argument).expanduser()
        if path.exists() and path not in self.saved:
            raise QvgptError(f"/save: {path} is there already; name another file")
        rows: list[dict[str, Any]] = [
            {"prompt": t.user, "completion": t.assistant, "truncated": t.cut} for t in self.turns
        ]
        if self.many:
            *before, last = self.turns
            messages = self._messages("")[:-1]
            rows = [{"messages": messages, "truncated": last.cut}]
            if cut := sum(turn.cut for turn in before):
                self.say(f"{cut} texts before the last were cut: a row cannot say so")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with writing(path):
            path.write_text(lines, "utf-8")
        self.saved.add(path)
        self.say(f"{len(rows)} {'row' if len(rows) == 1 else 'rows'} in {path}")

    def _quit(self, argument: str) -> bool:
        return True

    def _help(self, argument: str) -> None:
        width = max(len(f"/{name} {c.takes}") for name, c in COMMANDS.items())
        for name, entry in COMMANDS.items():
            self.say(f"{f'/{name} {entry.takes}':<{width}}  {entry.help}")
        self.say(f"{'//text':<{width}}  a line that begins with /")


@dataclass(frozen=True)
class Command:
    """What can be said beside text."""

    run: Callable[[Session, str], bool | None]
    takes: str
    help: str


COMMANDS = {
    "beta": Command(Session._beta, "X", "strength of guidance; 0: none"),
    "kl": Command(Session._kl, "X", "in its place: the KL to the base, in nats, of each token"),
    "temperature": Command(Session._temperature, "X", "0 is greedy"),
    "top_k": Command(Session._top_k, "K", "keep the K likeliest tokens; 0: all"),
    "values": Command(Session._values, "", "colour tokens by advantage, say what a text is worth"),
    "system": Command(Session._system, "TEXT", "the dialogue's first message; none: no such"),
    "undo": Command(Session._undo, "", "take the last turn back"),
    "retry": Command(Session._retry, "", "write another text to the last line"),
    "reset": Command(Session._reset, "", "forget all turns"),
    "save": Command(Session._save, "FILE", "write what was said as rows to train on (JSONL)"),
    "help": Command(Session._help, "", "this list"),
    "quit": Command(Session._quit, "", "leave, as Ctrl-D does"),
}


def _number(command: str, argument: str, kind: Callable[[str], Any] = float) -> Any:
    try:
        return kind(argument)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        found = repr(argument) if argument else "nothing"
        raise QvgptError(f"{command}: expected {wanted}, found {found}") from None
