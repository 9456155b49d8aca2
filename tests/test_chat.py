"""`qvgpt chat` as a script and as a person use it: through a pipe, and in a pseudo-terminal."""

import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
from tiny_hf import TOKENIZER as CHARS

from qvgpt.chat import ChatConfig, Session
from qvgpt.cli import main
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.engine import Request, row_seed, write
from qvgpt.decode.policy import Guidance
from qvgpt.errors import QvgptError
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel

CHATML = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}#{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
DEAF = (
    "{% for m in messages if m.role != 'system' %}{{ m.content }}#{% endfor %}"
    "{% if add_generation_prompt %}[{% endif %}"
)


def make(dialogues=True, heads=True, seq_len=96, template=None, tokenizer=CHARS):
    if template is not None:
        tokenizer = Tokenizer.train(["abcdefghijklmnopqrstuvwxyz []#:?"], "char")
        tokenizer.chat_template = template
    torch.manual_seed(0)
    trunk = GPT(tokenizer.vocab_size, 16, 2, 2, seq_len=seq_len)
    model = ValueModel(trunk, HeadsConfig() if heads else None, tokenizer).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.info.dialogues = dialogues
    return model


@pytest.fixture
def chat(tmp_path, capsys, monkeypatch):
    """Lines to `qvgpt chat`; (texts, notices). The model lies in `dir`."""

    def run(*lines, model=None, options=()):
        (model or make()).save(tmp_path / "dir")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        code = main(["chat", "--model", "dir", "--max_tokens", "8", *options])
        out, err = capsys.readouterr()
        assert code == 0, err
        assert "\x1b" not in out + err
        return out.splitlines(), err.splitlines()[2:]

    return run


def written(model, tokens, k, guidance=None, max_tokens=8, seed=0):
    """The text of the engine alone."""
    request = Request(tokens, max_tokens, guidance or Guidance(), row_seed(seed, k))
    return write(model, [request])[0].text


def test_each_line_gets_the_engines_text_and_goes_on_with_the_dialogue(chat):
    model = make()
    encode, messages = model.tokenizer.encode, [model.tokenizer.template.bos]
    texts, notices = chat("hello there", "", "and you?", model=model)
    for k, line in enumerate(["hello there", "", "and you?"]):
        messages += [*encode(f"user: {line}"), model.tokenizer.template.eot]
        assert texts[k] == written(model, messages, k)
        messages += [*encode(texts[k]), model.tokenizer.template.eot]
    assert len(texts) == 3
    assert set(notices) <= {"cut after 8 tokens"}


def test_a_model_of_one_turn_says_so_and_takes_each_line_as_a_prompt(chat, capsys):
    model = make(dialogues=False)
    texts, _ = chat("hello", "hello", model=model)
    prompt = model.tokenizer.encode_prompt("hello")
    assert texts == [written(model, prompt, k) for k in range(2)]
    assert texts[0] != texts[1]
    _, notices = chat("/system be kind", model=model, options=("--turns", "one"))
    assert notices == ["/system: one turn has no such message"]
    session = Session(ChatConfig(model="dir"), model, None)
    capsys.readouterr()
    session.greet()
    assert "nothing says that this model knows dialogues, so each line is a new prompt" in (
        capsys.readouterr().err
    )
    many, _ = chat("hello", model=model, options=("--turns", "many"))
    tokens = model.tokenizer.encode_messages([{"role": "user", "content": "hello"}])[0]
    assert many == [written(model, tokens, 0)]


def test_what_was_trained_on_is_remembered(tmp_path):
    for heads in (True, False):
        for dialogues in (True, False):
            make(dialogues, heads).save(tmp_path / "m")
            assert ValueModel.from_pretrained(tmp_path / "m").info.dialogues is dialogues


def test_train_notes_dialogues_and_keeps_the_note(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "a", "completion": "b", "reward": 1}) + "\n"
    )
    eot = Tokenizer.train("ab", "char").template.eot  # an end that a sampled text may have
    sampled = {"prompt": "a", "completion": "b", "completion_ids": [7, eot], "reward": 1}
    (tmp_path / "s.jsonl").write_text(json.dumps(sampled) + "\n")
    shape = "--gpt.embed_dim 16 --gpt.num_heads 2 --gpt.num_layers 1 --gpt.seq_len 32"
    runs = [
        ("lm", f"--data {tmp_path}/d.jsonl --objectives LM --tokenizer.kind char {shape}", True),
        ("q", f"--data {tmp_path}/p.jsonl --model {tmp_path}/lm --objectives MonteCarlo", True),
        ("back", f"--data {tmp_path}/p.jsonl --model {tmp_path}/q --objectives LM", True),
        ("one", f"--data {tmp_path}/p.jsonl --objectives LM --tokenizer.kind char {shape}", False),
        ("own", f"--data {tmp_path}/s.jsonl --model {tmp_path}/one --objectives MonteCarlo", False),
    ]
    for name, words, expected in runs:
        words += f" --fit.max_steps 1 --output {tmp_path}/{name}"
        assert main(["train", *words.split()]) == 0
        assert ValueModel.from_pretrained(tmp_path / name).info.dialogues is expected, name


def test_a_chat_template_is_followed(chat):
    model = make(dialogues=False, template=CHATML)
    texts, _ = chat("/system short", "ab", "cd", model=model)
    first = "[system]short#[user]ab#[assistant]"
    # one character a token, so that the template's text is what is encoded
    assert texts[0] == written(model, model.tokenizer.encode(first), 0)
    second = f"{first}{texts[0]}#[user]cd#[assistant]"
    assert texts[1] == written(model, model.tokenizer.encode(second), 1)
    for template, said in ((NO_SYSTEM + CHATML, "no system"), (DEAF, "leaves such a message out")):
        model = make(template=template)
        _, notices = chat("/system short", model=model)
        assert notices[0].startswith("/system: ")
        assert said in notices[0]
        assert len(notices) == 1


def test_commands_change_how_texts_are_guided(chat):
    model = make()
    template = model.tokenizer.template
    tokens = [template.bos, *model.tokenizer.encode("user: a"), template.eot]
    guidances = [
        (["/beta 3"], Guidance(beta=3.0)),
        (["/temperature 0", "/beta 2"], Guidance(beta=2.0, temperature=0.0)),
        (["/top_k 3", "/beta 0"], Guidance(top_k=3)),
        (["/kl 0.5"], Guidance(kl_budget=0.5, top_k=40)),
        (["/top_k 90", "/kl 0.5"], Guidance(kl_budget=0.5, top_k=40)),
        (["/top_k 5", "/kl 0.5"], Guidance(kl_budget=0.5, top_k=5)),
        (["/kl 0.5", "/beta 3", "/top_k 0"], Guidance(beta=3.0)),
    ]
    for commands, guidance in guidances:
        texts, notices = chat(*commands, "a", model=model)
        assert texts == [written(model, tokens, 0, guidance)]
        assert sum(notice.startswith("guidance: ") for notice in notices) == len(commands)
    assert "top_k 40: a budget is spent among at most 64 tokens" in chat("/kl 0.5")[1]
    assert chat("/kl 0.5")[1][-1] == "guidance: temperature 1, top_k 40, kl_budget 0.5"


FAULTS = {
    "/bta 3": "unknown command /bta (did you mean '/beta'?); see /help",
    "/": "unknown command /; see /help",
    "/beta": "/beta: expected a number, found nothing",
    "/beta much": "/beta: expected a number, found 'much'",
    "/beta inf": "guidance: beta must be finite, and 1e20 at most",
    "/kl 0": "guidance: kl_budget must be above 0",
    "/top_k 2.5": "/top_k: expected a whole number, found '2.5'",
    "/top_k -1": "guidance: top_k must be at least 1",
    "/temperature -1": "guidance: temperature must be finite, and 0 (greedy) or at least 1e-6",
    "/undo": "/undo: nothing was written yet",
    "/retry": "/retry: nothing was written yet",
    "/save x.jsonl": "/save: nothing to save yet",
}


def test_faulty_commands_are_one_line_and_change_nothing(chat):
    texts, notices = chat(*FAULTS, "hello")
    assert texts == chat("hello")[0]
    notices = [n for n in notices if not n.startswith(("top_k 40", "cut after"))]
    assert notices == list(FAULTS.values())
    _, notices = chat("/beta 1", "/values", model=make(heads=False))
    assert notices[0] == "this model has no value heads: it can only be run with beta 0"
    assert notices[1] == "/values: dir has no values to show"


def test_undo_retry_and_reset(chat):
    first, second = chat("a", "b")[0]
    assert chat("a", "/retry")[0][0] == first
    assert chat("a", "/retry")[0][1] != first
    # the line is said anew: what was taken back is not there any more
    again, _ = chat("a", "x", "/undo", "b")
    assert again[0] == first
    model = make()
    tokenizer = model.tokenizer
    eot = tokenizer.template.eot
    dialogue = [tokenizer.template.bos, *tokenizer.encode("user: a"), eot]
    dialogue += [*tokenizer.encode(first), eot, *tokenizer.encode("user: b"), eot]
    assert again[2] == written(model, dialogue, 2)
    fresh = [tokenizer.template.bos, *tokenizer.encode("user: b"), eot]
    assert chat("a", "/reset", "b")[0][1] == written(model, fresh, 1)
    assert second == written(model, dialogue, 1)


def test_a_full_context_drops_the_oldest_turns_and_says_so(chat):
    model = make(seq_len=64)
    tokenizer = model.tokenizer
    lines = ["abcdefghij" + str(k) for k in range(4)]
    texts, notices = chat("/system s", *lines, model=model)
    said = [n for n in notices if "context" in n]
    assert said[0] == ("the context of 64 tokens is full: the oldest 1 of 2 turns are left out")
    # the system message stays, and as many turns as fit
    kept = [{"role": "system", "content": "s"}]
    kept += [{"role": "user", "content": lines[1]}, {"role": "assistant", "content": texts[1]}]
    kept += [{"role": "user", "content": lines[2]}]
    tokens = tokenizer.encode_messages(kept)[0]
    assert len(tokens) <= 64 - 8
    assert texts[2] == written(model, tokens, 2)
    texts, notices = chat("a" * 90, "//" + "a" * 89, "b", model=model)
    assert texts[:2] == ["", ""]
    assert len(texts) == 3
    assert notices[0] == ("a prompt of 98 tokens leaves no room in the context of 64: say less")
    # a line that is refused leaves no turn out
    session = Session(ChatConfig(model="dir", max_tokens=8), model, None)
    session.answer("a")
    with pytest.raises(QvgptError, match="say less"):
        session.answer("a" * 90)
    assert session.left_out == 0


def test_what_is_saved_can_be_trained_on(chat, tmp_path, capsys):
    texts, notices = chat("/system s", "a", "b", "/save x.jsonl", "/save x.jsonl", "/save dir")
    (row,) = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [m["role"] for m in row["messages"]] == ["system", *["user", "assistant"] * 2]
    assert [m["content"] for m in row["messages"][2::2]] == texts
    assert notices[-1] == "/save: dir is there already; name another file"
    assert main(["check", str(tmp_path / "x.jsonl"), "--tokenizer", str(tmp_path / "dir")]) == 0
    # cut texts are marked as such: they never said that they end
    long, _ = chat("a", "/save y.jsonl", model=make(), options=("--max_tokens", "2"))
    assert json.loads((tmp_path / "y.jsonl").read_text())["truncated"] is True
    chat("a", "b", "/save z.jsonl", options=("--turns", "one"))
    rows = [json.loads(line) for line in (tmp_path / "z.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in rows] == ["a", "b"]
    assert main(["check", str(tmp_path / "z.jsonl"), "--tokenizer", str(tmp_path / "dir")]) == 0
    assert long
    (tmp_path / "x.jsonl").unlink()
    assert chat("a", "/save no/x.jsonl")[1][-1].startswith("no/x.jsonl: cannot be written")


def test_values_are_told(chat):
    model = make()
    _, notices = chat("/values", "a", "/values", "b", model=model)
    shown = [n for n in notices if n.startswith("V ")]
    assert len(shown) == 1
    tokens = model.tokenizer.encode_messages([{"role": "user", "content": "a"}])[0]
    request = Request(tokens, 8, Guidance(), row_seed(0, 0))
    reports = write(model, [request], report=True)[0].reports
    total, kl = sum(r.advantage for r in reports), sum(r.kl for r in reports)
    assert shown[0] == (
        f"V {reports[0].v:+.3f} at first, {reports[-1].q:+.3f} at the end, Σ A {total:+.3f}, "
        f"KL {kl:.2f} nats"
    )


def test_a_slash_can_be_said_and_help_lists_all(chat):
    slash, _ = chat("//a")
    assert slash == [
        written(make(), make().tokenizer.encode_messages([{"role": "user", "content": "/a"}])[0], 0)
    ]
    texts, notices = chat("/help", "/quit", "a")
    assert texts == []
    assert len(notices) == 13
    assert any(n.startswith("/kl X") for n in notices)


def _as_in_a_terminal():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests begun in the background ignore it


class Terminal:
    """`qvgpt chat` in a pseudo-terminal of its own, as a person sees it."""

    def __init__(self, *options):
        self.fd, there = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qvgpt", "chat", *options],
            stdin=there, stdout=there, stderr=there, start_new_session=True,
            preexec_fn=_as_in_a_terminal,
            env={**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"},
        )  # fmt: skip
        os.close(there)
        self.seen = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)

    def until(self, wanted, seconds=60, again=""):
        """What was shown up to the wanted text, that included; `again` is typed each second."""
        end = time.monotonic() + seconds
        while wanted not in self.seen:
            assert time.monotonic() < end, f"no {wanted!r} in {self.seen!r}"
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 4096).decode("utf-8", "replace")
            else:
                self.type(again)
        before, _, self.seen = self.seen.partition(wanted)
        return before + wanted

    def type(self, text):
        os.write(self.fd, text.encode())


def test_a_person_reads_stops_and_leaves(tmp_path):
    model = make(seq_len=4096)
    tokens = model.tokenizer.encode_messages([{"role": "user", "content": "hello"}])[0]
    greedy = written(model, tokens, 0, Guidance(temperature=0.0), max_tokens=300)
    assert len(greedy) > 280  # it never ends, so that it can be stopped
    model.save(tmp_path / "dir")
    options = (str(tmp_path / "dir"), "--temperature", "0", "--max_tokens", "4000")
    with Terminal(*options) as terminal:
        terminal.until("Ctrl-D leaves")
        terminal.until("> ")
        terminal.type("hello\n")
        terminal.until(greedy[:30])  # while the text is being written
        terminal.type("\x03")
        terminal.until("stopped: what stands is kept")
        terminal.until("> ")
        terminal.type("\x03")
        # readline misses a signal between its showing the prompt and its waiting for keys
        terminal.until("Ctrl-D or /quit leaves", again="\x03")
        terminal.type("/undo\n")
        terminal.until("the last turn is taken back; 0 left")
        terminal.type("/values\n")
        terminal.until("values are shown")
        terminal.until("> ")
        terminal.type("hello\n")
        assert "\x1b[30;48;2;" in terminal.until(greedy[20])  # black on a colour of its own
        terminal.type("\x03")
        terminal.until("at first")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
