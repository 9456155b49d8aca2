"""The exceptions a user is meant to read: the command line prints them and exits with a code."""

import difflib
from collections.abc import Iterable


class QvgptError(ValueError):
    """Bad input. The message says where, what was expected and what to do, in one line."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came: as Ctrl-C, but the command line exits with 143, not 130."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ` (did you mean 'reward'?)`, or nothing where no known name is near."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""
