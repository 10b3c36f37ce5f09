"""Where code that a model wrote is executed: every program in a process of its own that has given up what it can.

    host        `run_tests`: a folder, a bare environment, a supervisor            (run.py)
    supervisor  a fresh interpreter that keeps time, the output and the verdict    (supervisor.py)
    program     its confined fork: the program, then the tests                     (inside.py)

`enforcement()` says what the confinement holds on this machine, `describe()` says it aloud. Accidents and clumsy
malice stay inside; against an attacker the boundary is a container or a virtual machine around all of this.
"""

from spd.sandbox.measures import Measure, describe, enforcement
from spd.sandbox.run import Verdict, run_many, run_tests

__all__ = ["Measure", "Verdict", "describe", "enforcement", "run_many", "run_tests"]
