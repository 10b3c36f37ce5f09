"""The one exception type that means "what you passed in is wrong"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from spd.shown import one_line


class InputError(ValueError):
    """Bad input from the user: the message names the argument, what was expected and what came.

    The command line prints it as one line and exits with status 2; everything else that is raised is a bug of ours
    and keeps its traceback. As text it is one line whatever names and values it quotes: without controls, and of
    bounded length.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class InUse(InputError):
    """Another process holds what was asked for; it may be free later."""


def near(name: str, known: Iterable[str]) -> str:
    """What was probably meant, for the end of an error's message: "; did you mean ...?", or nothing."""
    full = {each.partition(":")[0].lower(): each for each in known}
    found = difflib.get_close_matches(name.lower(), full, n=1)
    return f"; did you mean {full[found[0]]!r}?" if found else ""
