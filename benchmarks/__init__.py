"""Speed and memory, always beside what a user would otherwise write. `python -m benchmarks` runs what a CPU can."""
