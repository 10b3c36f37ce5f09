"""The command line. Thin: every command is one function of the package, its result printed.

Heavy imports stand inside the commands, so that help is there at once.
"""

from spd.cli import method, ship, show, study
from spd.cli.app import app, main

__all__ = ["app", "main", "method", "ship", "show", "study"]
