"""`benchmarks` is no installed package: it is found from the root of the repository, whatever started pytest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
