"""`python -m spd` is the command `spd`."""

from spd.cli import main

main()
