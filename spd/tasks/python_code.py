"""Python in a completion: cut out of the prose around it, and tried on the parser without being run."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings

MAX_LENGTH = 100_000
"""Longer texts are not parsed. CPython 3.11 and later refuse deeper nesting than fits here, and do not crash on it."""

MAX_LINES = 300
"""Of code whose end is looked for."""

_BLOCK = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_TOP_LEVEL = re.compile(r"^(?:def|async def|class|import|from|@\w)", re.MULTILINE)


def extract_code(completion: str) -> str:
    """The first fenced block, or else the text from its first top-level `def`, `class` or `import`.

    A fence that only closes code which began without one is no block. Text that parses as it is stays whole.
    """
    before, fence, _ = completion.partition("```")
    block = _BLOCK.search(completion)
    if block and not (_TOP_LEVEL.search(before) and parses(_aligned(before))):
        return _aligned(block[1])
    code = _aligned(before if fence else completion)
    start = _TOP_LEVEL.search(code)
    return code[start.start() :] if start and not parses(code) else code


def runnable_code(completion: str) -> str:
    """The code without prose that follows it unfenced: lines at its end are dropped until it parses.

    Where none of it does, it stays as it is.
    """
    code = extract_code(completion)
    lines = code.splitlines()
    if parses(code) or len(lines) > MAX_LINES:
        return code
    for end in range(len(lines) - 1, 0, -1):
        rest = "\n".join(lines[:end])
        if parses(rest):
            return rest
    return code


def parses(code: str) -> bool:
    """Whether this is Python with at least one statement."""
    if len(code) > MAX_LENGTH:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the escapes in its strings
        try:
            return bool(ast.parse(code).body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False


def _aligned(code: str) -> str:
    return textwrap.dedent(code).strip()
