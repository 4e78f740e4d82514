"""The one exception a user of the package is meant to read."""

from __future__ import annotations


class M3ELError(ValueError):
    """Something the caller can mend; the message is one line that says what is wrong and what to do.

    The command line prints the message alone, without a traceback.
    """
