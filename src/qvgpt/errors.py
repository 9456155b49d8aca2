"""The one exception a user is meant to read: the command line prints it and exits with 2."""

import difflib
from collections.abc import Iterable


class QvgptError(ValueError):
    """Bad input. The message says where, what was expected and what to do, in one line."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ` (did you mean 'reward'?)`, or nothing where no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
