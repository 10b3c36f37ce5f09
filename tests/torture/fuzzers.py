"""The property tests of hostile input, with many more examples than `make test` gives them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.torture.sittings import end_with_parent
from tests.torture.trials import Tally, scratch

_TESTS = Path(__file__).parents[1] / "spd"


@dataclass(frozen=True)
class Fuzz:
    """One file of them. Its tests write what they tried, a line of JSON each, to the file named in SPD_FUZZ_TALLY.

    What they accept counts as resumed: it was read, and what was read is what was written.
    """

    kind: str
    file: str
    examples: int

    def run(self, bench: object = None) -> Tally:
        tally = Tally(self.kind)
        with scratch() as folder:
            lines = folder / "tally"
            environment = os.environ | {"SPD_FUZZ_EXAMPLES": str(self.examples), "SPD_FUZZ_TALLY": str(lines)}
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(_TESTS / self.file)]
            found = subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=end_with_parent)
            for line in lines.read_text().splitlines() if lines.exists() else []:
                counted = json.loads(line)
                tally.tried += counted["tried"]
                tally.refused += counted["refused"]
                tally.resumed += counted["accepted"]
            if found.returncode:
                tally.tried += 1
                lines_said = found.stdout.splitlines()
                errors = [line for line in lines_said if line.startswith("E  ")][:12]  # what follows shows the example
                tally.lose("\n".join([f"{self.file}:", *errors, *lines_said[-40:]])[:6000])
        return tally


def fuzzers(examples: int) -> list[Fuzz]:
    return [Fuzz("hostile input", path.name, examples) for path in sorted(_TESTS.glob("test_hostile*.py"))]
