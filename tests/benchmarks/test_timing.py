"""How times become figures: percentiles, errors, targets, shares of the bound, tables."""

from __future__ import annotations

import math
import time
from dataclasses import asdict

import pytest
import torch

from benchmarks import kernels
from benchmarks.case import OURS, Case, Draw, Target, to_float64
from benchmarks.gpu.correctness import tally
from benchmarks.gpu.measure import MOST_COPIES, Truth, copies_needed, count_nodes, relative_error, rotating, time_limit
from benchmarks.gpu.report import is_wrong, microseconds, table, unquotable
from benchmarks.gpu.targets import judge
from benchmarks.gpu.tune import conclusion
from benchmarks.operations import cpu_cases, gpu_cases, latent_attention, tiny_cases
from benchmarks.timing import FEWEST_ROUNDS, Timing, compare
from spd_kernels.roofline import H200, Machine, Work

MACHINE = Machine("a machine", 1e12, {torch.bfloat16: 1e14})


def test_percentiles() -> None:
    timing = Timing.of([float(n) for n in range(101)])
    assert (timing.p10, timing.median, timing.p90) == (10.0, 50.0, 90.0)
    assert Timing.of([3.0]) == Timing(3.0, 3.0, 3.0)
    assert Timing.of([4.0, 1.0]).median == 2.5
    assert timing * 0.5 == Timing(25.0, 5.0, 45.0)


def test_contenders_take_turns() -> None:
    """Round by round, in alternating order, with the ratio taken within a round."""
    order: list[str] = []
    drift = iter(range(1, 1000))

    def clock(call: object, repeats: int) -> float:
        call()  # type: ignore[operator]
        return next(drift) * (2.0 if order[-1] == "b" else 1.0)

    contenders = {name: lambda name=name: order.append(name) for name in "ab"}
    found = compare(contenders, rounds=4, warmup=0, clock=clock)
    assert order[2:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert found.timings["a"].median == 6.5 and found.ratios["a"] == Timing(1.0, 1.0, 1.0)
    assert 1.5 < found.ratios["b"].median < 2.8
    assert found.relative("b", "a") == found.ratios["b"] and found.relative("a", "b").median < 0.7


def test_rounds_end_with_the_time_allowed() -> None:
    calls: list[int] = []
    found = compare({"a": lambda: calls.append(1)}, rounds=1000, at_least=0.0, at_most=0.0, warmup=0)
    assert len(calls) == 1 + FEWEST_ROUNDS and found.timings["a"].median >= 0


def test_input_sets_exceed_the_cache() -> None:
    assert copies_needed(1e6, 50e6) == 125
    assert copies_needed(1e9, 50e6) == 2
    assert copies_needed(1.0, 50e6) == MOST_COPIES
    seen: list[int] = []
    call = rotating(seen.append, [(1,), (2,), (3,)])
    for _ in range(4):
        call()
    assert seen == [1, 2, 3, 1]


def test_errors_are_relative_and_nan_never_passes() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)
    assert relative_error([exact, exact * 1.1], [exact, exact]) == pytest.approx(0.1)
    assert math.isnan(relative_error([exact, torch.tensor([math.nan, 0.0])], [exact, exact]))
    row = {"error": math.nan, "allowed_error": 1.0}
    assert is_wrong(row) and not is_wrong({"error": 0.5, "allowed_error": 1.0}) and not is_wrong({})


@pytest.mark.parametrize("case", tiny_cases(), ids=lambda case: case.name)
def test_a_wrong_contender_is_found(case: Case) -> None:
    """The check passes the plain formula, and fails one that has left something out."""
    inputs = case.inputs(Draw(torch.device("cpu"), case.dtype, seed=3))
    plain = case.exact or case.contenders[case.baseline]
    state = case.operation.startswith("GradientCovariance")  # whose result begins with the number of rows

    def result(factor: float) -> object:
        found = plain(*inputs)
        scaled = found * factor if isinstance(found, torch.Tensor) else tuple(t * factor for t in found)
        return (torch.zeros(()), *scaled) if state else scaled  # type: ignore[misc]

    truth = Truth(case, inputs)
    assert truth.error(lambda *_: result(1.0)) <= truth.allowed
    assert truth.error(lambda *_: result(0.95)) > truth.allowed
    floating = [t for t in to_float64(inputs) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    assert floating and all(t.dtype is torch.float64 for t in floating)


def test_inputs_differ_by_seed_and_bases_are_orthonormal() -> None:
    bases: dict[tuple[int, int], torch.Tensor] = {}
    first, second = (Draw(torch.device("cpu"), torch.float32, seed, bases) for seed in (0, 1))
    assert not torch.equal(first.normal(8), second.normal(8))
    u, other = first.orthonormal(12, 5), second.orthonormal(12, 5)
    assert not torch.equal(u, other)
    for basis in (u, other):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(5))


def timed(**seconds: float) -> dict[str, dict[str, float]]:
    return {name: asdict(Timing(value, value, value)) for name, value in seconds.items()}


ROW = {
    "bytes": 8e8,
    "flops": 1e9,
    "seconds": {"calls": timed(eager=3e-3, unrouted=0.99e-3) | timed(**{OURS: 1e-3}), "graph": timed(**{OURS: 1e-3})},
    "launches": {OURS: 1},
}


@pytest.mark.parametrize(
    ("target", "value", "verdict"),
    [
        (Target("faster", 2.0, "eager"), 3.0, "met"),
        (Target("faster", 3.5, "eager"), 3.0, "MISSED"),
        (Target("time", 0.5, "eager"), 1 / 3, "met"),
        (Target("time", 1.02, "unrouted"), 1 / 0.99, "met"),
        (Target("time", 1.0, "unrouted"), 1 / 0.99, "MISSED"),
        (Target("bandwidth", 0.8), 0.8, "met"),
        (Target("bandwidth", 0.85), 0.8, "MISSED"),
        (Target("launches", 1), 1.0, "met"),
        (Target("faster", 2.0, "compiled"), None, "not measured"),
        (Target("faster", 2.0, "eager", "graph"), None, "not measured"),
    ],
    ids=lambda value: value.text if isinstance(value, Target) else str(value),
)
def test_targets(target: Target, value: float | None, verdict: str) -> None:
    found = judge(target, ROW, MACHINE)
    assert found.value == (None if value is None else pytest.approx(value)) and found.text == verdict


def test_a_target_without_what_it_needs_is_not_measured() -> None:
    assert judge(Target("bandwidth", 0.5), ROW, None).text == "not measured"
    assert judge(Target("launches", 1), ROW | {"launches": {OURS: None}}, MACHINE).text == "not measured"
    assert judge(Target("faster", 2.0, "eager"), ROW | {"seconds": {}}, MACHINE).text == "not measured"


def test_shares_of_the_bound() -> None:
    memory, arithmetic = Work(1e9, 1e10), Work(1e9, 1e12)
    assert MACHINE.seconds(memory, torch.bfloat16) == 1e-3 and MACHINE.limit(memory, torch.bfloat16) == "memory"
    assert MACHINE.seconds(arithmetic, torch.bfloat16) == 1e-2
    assert MACHINE.limit(arithmetic, torch.bfloat16) == "arithmetic"
    assert MACHINE.share(memory, torch.bfloat16, 4e-3) == 0.25


def test_the_issue_s_cases_are_there() -> None:
    """Arithmetic of design notes, to within what rounding of the rates leaves: 125 us for N = 65536, d = 1024."""
    cases = {case.name: case for case in gpu_cases()}
    assert len(cases) == len(gpu_cases())
    for rank in (64, 128):
        case = cases[f"project_kv: N = 65536, d = 1024, r = {rank}"]
        assert 1e6 * H200.seconds(case.work, case.dtype) == pytest.approx(125, rel=0.02)
        assert {(t.kind, t.limit) for t in case.targets} == {("bandwidth", 0.85), ("faster", 1.5), ("faster", 1.2)}
    case = cases["GradientCovariance.update: N = 65536, d = 1024"]
    assert 1e6 * H200.seconds(case.work, case.dtype) == pytest.approx(87, rel=0.02)
    assert {case.operation for case in tiny_cases()} == {case.operation for case in gpu_cases()}
    for case in cases.values():
        assert OURS in case.contenders and case.baseline != OURS and case.checked in case.contenders
        assert all(t.against in ("", "compiled") or t.against in case.contenders for t in case.targets)


def test_both_ways_of_dense_attention_are_the_same() -> None:
    case = latent_attention.step(2, 37, 8, 2, 16, None, 8, dtype=torch.float64)
    inputs = case.inputs(Draw(torch.device("cpu"), case.dtype, seed=0))
    dense, grouped = (case.contenders[name](*inputs) for name in ("dense sdpa", "dense grouped"))
    torch.testing.assert_close(grouped, dense)


def test_cpu_table_has_every_contender_and_the_fastest_other(monkeypatch: pytest.MonkeyPatch) -> None:
    case = latent_attention.step(1, 64, 4, 2, 16, None, 8, dtype=torch.float32)
    monkeypatch.setattr(kernels, "cpu_cases", lambda *, only: [case] if only == case.operation else [])
    machine = Machine("a machine", 1e10, {torch.float32: 1e11})
    (shown,), (row,) = kernels.run(machine, 3, quick=True, operation="latent_attention")
    headers = [column.header for column in shown.columns]
    assert headers == ["case", "bound", "dense sdpa", "dense grouped", OURS, "to the fastest other", "of the bound"]
    others = {name: timing["median"] for name, timing in row["seconds"].items() if name != OURS}
    assert row["fastest_other"] == min(others, key=lambda name: others[name])
    assert list(shown.columns[5].cells) == [f"{row['relative_to_fastest_other']['median']:.2f}"]
    assert {each.operation for each in cpu_cases(only="latent_attention")} == {"latent_attention"}


def test_tables() -> None:
    assert list(table(("a", "b"), [("x|y", "1")])) == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 |"]
    assert [microseconds(s) for s in (1.234e-6, 12.34e-6, 123.4e-6)] == ["1.23", "12.3", "123"]


def test_no_figure_without_green_tests() -> None:
    tests = {"finished": True, "green": True, "passed": 3, "failed": 0}
    assert unquotable({}) == "Tests not run."
    assert unquotable({"tests": tests | {"finished": False}}) == "Tests not finished."
    assert unquotable({"tests": tests | {"green": False, "failed": 1}}) == "Tests failed: 1 of 4."
    row = ROW | {"operation": "o", "case": "c", "error": 0.05, "allowed_error": 0.1}
    assert unquotable({"tests": tests, "cases": [row]}) == ""
    for change in ({"error": 1.0}, {"error": math.nan}, {"seconds": {}}):
        assert unquotable({"tests": tests, "cases": [row | change]}) == "Wrong or failed: o, c."


def entry(text: str, frozen: bool, median: float | None) -> dict[str, object]:
    timing = {} if median is None else {"seconds": asdict(Timing(median, median * 0.99, median * 1.01))}
    return {"text": text, "frozen": frozen} | timing


def test_a_proposal_needs_a_clear_gain() -> None:
    assert conclusion([entry("f", True, 1.0), entry("c", False, 0.9)])["proposal"] == "c"
    close = conclusion([entry("f", True, 1.0), entry("c", False, 0.98)])
    assert close["proposal"] is None and close["best"] == "c" and close["gain"] == pytest.approx(0.02)
    assert conclusion([entry("f", True, 1.0), entry("c", False, None)])["best"] == "f"
    assert conclusion([entry("f", True, None), entry("c", False, 0.9)])["proposal"] is None


def test_outcomes_are_read_from_pytest_s_log() -> None:
    log = """
tests/spd_kernels/test_project.py::test_values[one row-torch.bfloat16] PASSED [ 10%]
[gw1] [ 20%] PASSED tests/spd_kernels/test_project.py::test_values[odd-torch.float16]
[gw0] [ 30%] FAILED tests/spd_kernels/test_tap.py::test_mask[torch.float32]
tests/spd_kernels/test_tap.py::test_other SKIPPED (no such device) [ 40%]
=========================== short test summary info ============================
FAILED tests/spd_kernels/test_tap.py::test_mask[torch.float32] - AssertionError
"""
    found = tally(log)
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 1, 1)
    assert found["passed_by_type"] == {"bf16": 1, "fp16": 1}
    assert found["passed_by_file"] == {"test_project.py": 2}
    assert found["failures"] == ["tests/spd_kernels/test_tap.py::test_mask[torch.float32]"]


def test_nodes_of_a_graph_are_counted() -> None:
    dot = """digraph dot {
subgraph cluster_1 {
label="graph_1" graph[style="dashed"];
"graph_1_node_0"[style="solid" shape="record" label="{KERNEL}"];
"graph_1_node_1"[style="solid" shape="record" label="{KERNEL}"];
"graph_1_node_0" -> "graph_1_node_1" [headlabel=0];
}
}"""
    assert count_nodes(dot) == 2
    assert count_nodes("something else") is None


def test_a_block_may_take_so_long_and_no_longer() -> None:
    with time_limit(5):
        pass
    with pytest.raises(TimeoutError, match="not done after 0 s"), time_limit(0.05):
        time.sleep(2)
