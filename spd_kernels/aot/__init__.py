"""Ahead-of-time compilation: what every shipped configuration of every kernel becomes on each architecture, without a
GPU. Every operation's `cases.py` lists what its launcher can launch; see `python -m spd_kernels.aot --help`."""
