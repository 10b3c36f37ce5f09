"""One command that tests, tunes and times the kernels on a GPU: `python -m benchmarks.gpu --help`."""
