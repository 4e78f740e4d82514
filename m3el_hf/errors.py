"""The one exception a user of the package is meant to read."""

from __future__ import annotations


class M3ELError(ValueError):
    """Something the caller can fix; the message is one line that says what is wrong and what to do.

    The command line prints the message alone, without a traceback.
    """


def one_line(message: object) -> str:
    """Returns an error, or any text, without line breaks: libraries' messages have many."""
    return " ".join(str(message).split())
