"""Runs that are killed, starved of disk, damaged and interrupted: `make torture`, or `python -m tests.torture --help`.

Each trial does one kind of harm to a run of the command `spd run`, starts it again until it ends, and looks at what it
left. Either that is what an undisturbed run leaves, byte for byte (resumed), or the command refused in one line that
names a file (refused). Everything else is lost, and there must be none.

  interpose.c       counts what a process does to files, from below every library, and strikes at the n-th
  faults.py         the faults, and how they are armed in a process
  sittings.py       one start of the command in a forked process, and how it ended
  results.py        what a run must leave, and which of its files are only informative
  trials.py         one piece of harm to one run, what must come of it, and what did
  kinds.py          the kinds of harm, as lists of trials
  soak.py           ten thousand prompts through the whole method, memory watched
  fuzzers.py        the property tests of hostile input, with many examples
  __main__.py       all of it, two at a time, and the table
  test_torture.py   a few of each kind, for `make test`
"""
