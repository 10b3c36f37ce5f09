# Every target makes its own .venv on first use and brings it up to date when the pins change.
PYTHON ?= python3
BIN := .venv/bin
# Two workers of one thread each: more threads than cores make small matrix products many times slower.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo reproduce test test-slow torture lint bench clean

demo: .venv/ready            ## the whole method on the carried model: a table and runs/demo/report.html
	$(BIN)/spd demo

reproduce: .venv/ready       ## every table of the paper in miniature, and the sweep that chose its learning rate
	$(BIN)/spd reproduce --miniature --out runs/reproduce
	$(BIN)/spd reproduce learning-rate --miniature --out runs/reproduce
	mkdir -p benchmarks/results/reproduce
	cd runs/reproduce && cp -r results.json tables.json tables.md report.html figures ../../benchmarks/results/reproduce

test: .venv/ready            ## everything but what is marked slow
	$(PARALLEL)

test-slow: .venv/ready       ## the rest
	$(PARALLEL) -m slow

torture: .venv/ready         ## runs that are killed, starved of disk, damaged, interrupted; hostile input; a long soak: a table
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture --workers 2 --out benchmarks/results/torture.json

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/ready           ## CPU benchmarks: tables on the screen, JSON under benchmarks/results
	$(BIN)/python -m benchmarks

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
