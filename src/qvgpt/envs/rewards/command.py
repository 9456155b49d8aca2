"""A program of the user's own as the judge: unit tests, a compiler, a proof checker.

It runs with all the rights of who started qvgpt, on text that a model wrote. What that text may do
is for the program to bound (a container, a user without rights): nothing here is a sandbox.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress

from qvgpt.envs.rewards.metric import Metric, Row
from qvgpt.errors import QvgptError

_SECONDS = 10.0


def command(line: str) -> Metric:
    """Run `line` once a text: its exit status says whether the text is right.

    Standard input is one line of JSON: the row, with the text judged as its `completion` (and what
    the row said there as `reference`). Status 0 gives 1, or the number that is the last line of the
    standard output; any other status, or more than 10 s (`timeout=2.5` before the program says
    otherwise), gives 0. No shell reads the line. Raises `QvgptError` where the program is not
    found.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise QvgptError(f"command:{line}: {error}") from None
    seconds = _SECONDS
    if words and words[0].startswith("timeout="):
        seconds = _positive(line, words.pop(0).removeprefix("timeout="))
    if not words or shutil.which(words[0]) is None:
        raise QvgptError(f"command:{line}: no program {words[0] if words else ''!r} is found")
    return Metric(f"command:{line}", lambda text, row: _judged(words, seconds, text, row))


def _judged(words: Sequence[str], seconds: float, text: str, row: Row) -> float:
    said = dict(row) | {"completion": text}
    if "completion" in row:
        said["reference"] = row["completion"]
    with tempfile.TemporaryFile() as out:  # no pipe: what it started may keep that open
        with subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that what it started can be ended with it
        ) as process:
            try:
                line = json.dumps(said, default=str) + "\n"
                process.communicate(line.encode(), timeout=seconds)
            except subprocess.TimeoutExpired:
                return 0.0
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            return 0.0
        out.seek(0)
        lines = out.read().decode(errors="replace").split("\n")
    last = next((found for found in reversed(lines) if found.strip()), "1")
    try:
        return float(last)
    except ValueError:
        return 1.0


def _positive(line: str, said: str) -> float:
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise QvgptError(f"command:{line}: timeout={said}: seconds above 0 were expected")
    return seconds
