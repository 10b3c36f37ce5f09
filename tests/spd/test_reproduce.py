"""Tables of the paper on a small scale: what they hold, what is compared, and that a killed reproduction goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from oracles import mcnemar

import spd
from spd.arms import parse_arm
from spd.evaluation import Answer, Evaluation
from spd.reproduce import DEFAULT_TABLES, MINIATURE, TABLES, load_settings, reproduce
from spd.reproduce.diagnose import neutral_passages
from spd.reproduce.experiment import _seed_jobs, _shared_jobs, _without_subspace, cells_of, layout_of, shared_subspace
from spd.reproduce.settings import parse_settings
from spd.reproduce.summary import Outcomes, paired_p, summarise
from spd.reproduce.tables import PAPER, PROVING_GROUND, PUBLISHED, Cell, Layout
from spd.stats import wilson_interval

SIZES = {"mbpp": 50, "gsm8k": 50, "mmlu": 500}
PAPER_LAYOUT = Layout(PAPER, SIZES, {"mbpp": 464, "gsm8k": 7473, "mmlu": 2000}, 1e-5)
SMALL = {
    "suite": "proving-ground",
    "domains": ["math"],
    "seeds": [1, 2],
    "generation": {"prompts": 8, "max_new_tokens": 16, "batch_size": 8},
    "training": {"epochs": 1, "learning_rate": 1e-3, "batch_size": 8},
    "evaluation": {"questions": 12, "batch_size": 12, "max_new_tokens": 16},
    "diagnostics": {"completions": 4, "texts": 4},
}


def test_every_arm_of_every_table_is_one():
    for name, table in TABLES.items():
        domains = PROVING_GROUND if "steering" in table.roles else PAPER
        layout = Layout(domains, {d.capability: 50 for d in domains}, {d.capability: 500 for d in domains})
        labels = [row.label for row in layout.rows(table)]
        assert len(set(labels)) == len(labels)
        assert table.against in labels
        assert {label for pair in table.contrasts for label in pair} <= set(labels), name
        assert all(parse_arm(cell.arm) for cell in cells_of([table], layout))


def test_the_published_numbers_stand_where_they_belong():
    found = {}
    for name in DEFAULT_TABLES:
        table = TABLES[name]
        for row in PAPER_LAYOUT.rows(table):
            for column in PAPER_LAYOUT.columns(table):
                number = PAPER_LAYOUT.published(row, column)
                if number is not None:
                    found.setdefault(name, {})[row.label, column.test] = number
    assert found["1"]["spd", "gsm8k"] == 22
    assert found["1"]["ssd", "mbpp"] == 18.3
    assert found["2"]["self-training", "svamp"] == 19
    assert found["2"]["spd", "codealpaca"] == 0.679
    assert found["3"]["projected", "bbh"] == 35.3
    assert found["4"]["spd:loss=full", "mbpp"] == 11.9
    assert found["5"]["spd, calibrated on choice", "gsm8k"] == 26
    assert found["5"]["spd, calibrated on math", "gsm8k"] == 22, "calibrated on itself is SPD"
    assert ("spd, calibrated on math", "mbpp") not in found["5"]
    everywhere = {number for numbers in found.values() for number in numbers.values()}
    assert everywhere == {number for arms in PUBLISHED.values() for number in arms.values()}


def test_cells_that_are_the_same_are_one():
    (fifty,) = [row for row in PAPER_LAYOUT.rows(TABLES["calibration-size"]) if row.label == "50"]
    by_test = {c.test: PAPER_LAYOUT.cell(fifty, c) for c in PAPER_LAYOUT.columns(TABLES["calibration-size"])}
    assert by_test["gsm8k"] == Cell("gsm8k", "spd", "gsm8k")
    assert by_test["mmlu"] == Cell("mmlu", "spd:examples=50", "mmlu")
    scarce = Layout(PAPER, SIZES, {"mbpp": 464, "gsm8k": 30, "mmlu": 2000})
    assert scarce.cell(fifty, scarce.columns(TABLES["1"])[1]) is None, "there are not so many examples"
    cells = cells_of([TABLES[name] for name in DEFAULT_TABLES], PAPER_LAYOUT)
    assert len(set(cells)) == len(cells)


def test_the_sweep_of_the_learning_rate_needs_questions_of_its_own():
    with pytest.raises(spd.InputError, match="only the proving ground has such"):
        PAPER_LAYOUT.columns(TABLES["learning-rate"])


def outcomes(*seeds, metric="accuracy"):
    if metric == "nll":
        return Outcomes(metric, [[None] * len(each) for each in seeds], [list(each) for each in seeds], 0.0, 0)
    return Outcomes(metric, [[mark == "1" for mark in each] for each in seeds], [[] for _ in seeds], 0.0, 0)


def test_one_seed_is_mcnemar_and_seeds_share_their_questions():
    base, arm = outcomes("1100110000"), outcomes("1111111000")
    assert paired_p(arm, base) == pytest.approx(mcnemar(0, 3))
    assert arm.value == 70
    assert arm.interval == pytest.approx([100 * end for end in wilson_interval(7, 10)])
    three = outcomes(*["1111111000"] * 3)
    assert paired_p(three, base) == pytest.approx(mcnemar(0, 3)), "the same answers thrice are no more evidence"
    assert (three.n, three.interval) == (10, pytest.approx(arm.interval))


def test_lower_is_better_for_likelihoods():
    table, layout = TABLES["2"], Layout(PAPER[:1], SIZES, SIZES)
    base = [0.70 + 0.01 * (i % 7) for i in range(40)]
    better, worse = [x - 0.05 - 0.001 * (i % 3) for i, x in enumerate(base)], [x + 0.05 for x in base]
    found = {
        Cell(None, "base", "codealpaca"): outcomes(base, metric="nll"),
        Cell("mbpp", "self-training", "codealpaca"): outcomes(worse, worse, metric="nll"),
        Cell("mbpp", "ssd", "codealpaca"): outcomes(base, base, metric="nll"),
        Cell("mbpp", "spd", "codealpaca"): outcomes(better, better, metric="nll"),
    }
    summary = summarise(table, layout, found)
    verdicts = {row.label: line[0].verdict for row, line in zip(summary.rows, summary.entries, strict=True)}
    assert verdicts == {"base": "", "self-training": "worse", "ssd": "", "spd": "better"}
    assert summary.contrasts[0].difference > 0


def test_chance_is_not_a_verdict():
    """One of twenty comparisons at p = 0.04 is what chance gives."""
    table, layout = TABLES["controls"], layout_of(load_settings(MINIATURE, {}, 1))
    cells = cells_of([table], layout)
    base = "10" * 50
    found = {cell: outcomes(base) for cell in cells}
    arm = Cell("words", "spd:sides=k", "words")
    found[arm] = outcomes("1" * 12 + base[12:])
    summary = summarise(table, layout, found)
    entry = next(e for line in summary.entries for e in line if e and e.cell == arm)
    assert entry.p == pytest.approx(mcnemar(0, 6)) and entry.p < 0.05
    assert entry.adjusted > 0.05
    assert entry.verdict == ""


@pytest.fixture(scope="module")
def small(checkpoint):
    return SMALL | {"model": str(checkpoint)}


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("reproduce") / "out"
    reproduce(parse_settings(small), ["1", "rounds"], out, workers=2, command="spd reproduce", progress=False)
    return out


def test_everything_is_there_and_agrees(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["tables"] == ["1", "rounds"]
    cells = {(c["capability"], c["arm"], c["test"]): c["outcomes"] for c in results["cells"]}
    assert len(cells[None, "base", "words"]) == 1, "the base does not depend on the seed"
    assert len(cells["words", "spd", "words"]) == 2
    for seed, outcome in zip((1, 2), cells["words", "spd:rounds=2", "words"], strict=True):
        path = finished / f"seed-{seed}/words/evaluations/spd-rounds=2/words.scored.jsonl"
        scored = [json.loads(line) for line in path.read_text().splitlines()]
        assert outcome["correct"] == "".join(str(int(answer["correct"])) for answer in scored)
    diagnostics = results["diagnostics"]["words"]
    assert set(diagnostics["shift"]) == {"spd"}
    assert {"base", "self-training", "ssd", "spd", "spd:rounds=3"} <= set(diagnostics["perplexity"])
    assert [each["round"] for each in diagnostics["drift"]["spd:rounds=3"]] == [2, 3]
    assert all(0 < each["by_chance"] < 1 for each in diagnostics["drift"]["spd:rounds=3"])
    for name in ("tables.md", "tables.json", "report.html"):
        assert (finished / name).stat().st_size > 200
    assert not list(finished.rglob("*.tmp"))


def test_seeds_differ_and_share_the_calibration(finished):
    written = [(finished / f"seed-{seed}/words/generations/plain.jsonl").read_text() for seed in (1, 2)]
    assert written[0] != written[1]
    assert (finished / "shared/words/subspace/subspace.json").is_file()
    assert not (finished / "seed-1/words/subspace").exists()


def test_a_finished_one_loads_no_model_and_writes_the_same(finished, small, monkeypatch):
    before = (finished / "tables.md").read_text()
    monkeypatch.setattr("spd.reproduce.experiment.load_model", None)
    reproduce(parse_settings(small), ["1", "rounds"], finished, command="spd reproduce", progress=False)
    assert (finished / "tables.md").read_text() == before


def test_other_settings_and_unknown_tables_are_refused(finished, small):
    with pytest.raises(spd.InputError, match=r"different: training\.learning_rate"):
        reproduce(parse_settings(small | {"training": {"epochs": 1, "batch_size": 8}}), ["1"], finished)
    with pytest.raises(spd.InputError, match="no '6', only 1, 2"):
        reproduce(parse_settings(small), ["6"], finished)
    with pytest.raises(spd.InputError, match="workers: expected at least 1"):
        reproduce(parse_settings(small), ["1"], finished, workers=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"seeds": []}, "seeds"),
        ({"domains": ["maths"]}, "domains"),
        ({"sed": [1]}, "did you mean 'seeds'"),
        ({"generation": {"promts": 3}}, "did you mean 'prompts'"),
        ({"training": {"epochs": -1}}, "epochs"),
        ({"training": {"learning_rat": 1}}, r"'training\.learning_rat'; did you mean 'learning_rate'"),
        ({"seeds": [-1]}, r"seeds\.0: .* got -1"),
        ({"diagnostics": {"texts": 1}}, "at least 2"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(spd.InputError, match=message):
        parse_settings(SMALL | {"model": "m"} | changes)


def test_seeds_by_number():
    assert load_settings(None, {"model": "m"}).seeds == [42, 43, 44]
    assert load_settings(None, {"model": "m", "seeds": [7, 3]}).seeds == [7, 3]
    assert load_settings(None, {"model": "m", "seeds": [7, 3]}, 3).seeds == [7, 3, 8]
    assert load_settings(MINIATURE, {}, 2).seeds == [42, 43]
    assert load_settings(MINIATURE, {}, 5).seeds == [42, 43, 44, 45, 46]
    assert load_settings(None, {"model": "m", "generation.prompts": 7}, 1).generation.prompts == 7


def test_mbpp_asks_for_consent_before_anything_is_loaded(made_records, tmp_path):
    settings = parse_settings({"model": "nowhere", "data": str(made_records), "domains": ["code"]})
    with pytest.raises(spd.InputError, match=r"mbpp is judged by running the code .* --run-generated-code"):
        reproduce(settings, ["1"], tmp_path / "out")


def test_only_the_tests_of_the_tables_ask_for_consent(made_records, tmp_path):
    settings = parse_settings({"model": "nowhere", "data": str(made_records), "domains": ["code"]})
    with pytest.raises(spd.InputError, match=r"mbpp.train\.jsonl is missing"):  # what it is calibrated on comes next
        reproduce(settings, ["2"], tmp_path / "out", progress=False)


def test_what_the_harness_lacks_is_refused_before_any_work(made_records, tmp_path):
    values = {"model": "nowhere", "data": str(made_records), "domains": ["math"], "prompts": "harness"}
    with pytest.raises(spd.InputError, match="does not have svamp"):
        reproduce(parse_settings(values), ["1", "2"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_neutral_text(small, tmp_path):
    file = tmp_path / "neutral.txt"
    settings = parse_settings(small | {"neutral": str(file), "diagnostics": {"texts": 2}})
    with pytest.raises(spd.InputError, match="neutral: there is no file"):
        reproduce(settings, ["1"], tmp_path / "out")
    file.write_text("one passage\nof two lines\n\n\n")
    with pytest.raises(spd.InputError, match=r"neutral: expected at least two passages .* got 1"):
        reproduce(settings, ["1"], tmp_path / "out")
    file.write_text("one\ntwo\n\n\n three \n\nfour")
    assert neutral_passages(settings) == ["one\ntwo", "three"]


def test_the_smallest_trial_ends(small, tmp_path):
    file = tmp_path / "neutral.txt"
    file.write_text("A passage.\n\nAnother one.\n\n" + "too long " * 2000)
    sizes = {"generation": small["generation"] | {"prompts": 1}, "evaluation": {"questions": 1, "max_new_tokens": 8}}
    settings = parse_settings(small | sizes | {"seeds": [1], "neutral": str(file)})
    reproduce(settings, ["1"], tmp_path / "out", progress=False)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = results["diagnostics"]["words"]
    assert (found["shift"], found["neutral"]) == ({}, {"left_out": 1})
    assert len(found["perplexity"]["spd"]["texts"]) == 2
    assert results["prompts"]["words"] == {"prompts": 1, "too_long": []}


def test_a_folder_of_other_weights_or_records_is_refused(finished, small, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "seed-1/words/outcomes/spd/words.json").unlink()
    known = json.loads((out / "identity.json").read_text())
    assert set(known) == {
        "weights", "dtype", "device", "calibration of words", "training prompts of words", "questions of words"
    }  # fmt: skip
    (out / "identity.json").write_text(json.dumps(known | {"weights": "x", "questions of words": "y"}))
    with pytest.raises(spd.InputError, match="begun with other weights, questions of words; expected"):
        reproduce(parse_settings(small), ["1", "rounds"], out, progress=False)
    (out / "identity.json").write_text(json.dumps(known))
    reproduce(parse_settings(small), ["1", "rounds"], out, progress=False)
    assert json.loads((out / "results.json").read_text())["cells"] == read_cells(finished)


def read_cells(folder):
    return json.loads((folder / "results.json").read_text())["cells"]


def test_every_shared_subspace_is_made_once_and_before_the_seeds(finished):
    settings = parse_settings(SMALL | {"model": "m", "domains": ["code", "math", "choice"]})
    cells = cells_of([TABLES[name] for name in ("5", "controls", "rank", "layers")], layout_of(settings))

    def folders(job, arms):
        projections = [parse_arm(arm).projection for arm in arms]
        shared = [projection for projection in projections if projection and not projection.drawn]
        return {shared_subspace(Path(), job.capability, projection) for projection in shared}

    by_job = [folders(job, job.subspaces) for job in _shared_jobs(settings, cells)]
    assert len(set.union(*by_job)) == sum(map(len, by_job)), "no two processes write one folder"
    needed = [folders(job, [cell.arm for cell in job.cells]) for job in _seed_jobs(settings, cells)]
    assert set.union(*needed) == set.union(*by_job)
    assert Path("choice/subspace") in by_job[2] and Path("choice/subspace") not in by_job[0]
    kept = shared_subspace(finished / "shared", "words", parse_arm("spd:sides=k").projection)
    assert (kept / "subspace.json").is_file()
    (job,) = _shared_jobs(parse_settings(SMALL | {"model": "m"}), [Cell("words", "spd", "words")])
    assert _without_subspace(job, finished) == []
    assert _without_subspace(job, finished / "elsewhere") == [parse_arm("spd").projection]


def test_a_row_names_what_the_settings_do_not_have_anyway():
    other = Layout(PAPER, SIZES, SIZES, rank=16, layers=[0, 1])
    for layout, name, arms in (
        (PAPER_LAYOUT, "rank", ["spd:rank=4", "spd:rank=16", "spd"]),
        (other, "rank", ["spd:rank=4", "spd", "spd:rank=half"]),
        (PAPER_LAYOUT, "layers", ["spd", "spd:layers=middle"]),
        (other, "layers", ["spd:layers=paper", "spd:layers=middle"]),
    ):
        assert [row.arm for row in layout.rows(TABLES[name])][: len(arms)] == arms


def test_killed_and_started_again_it_ends_as_if_undisturbed(finished, small, tmp_path):
    out = tmp_path / "out"
    program = (
        "import json, sys\n"
        "from spd.reproduce import reproduce\n"
        "from spd.reproduce.settings import parse_settings\n"
        "reproduce(parse_settings(json.loads(sys.argv[1])), ['1', 'rounds'], sys.argv[2], command='spd reproduce',"
        " progress=False)\n"
    )
    command = [sys.executable, "-c", program, json.dumps(small), str(out)]
    environment = os.environ | {"PYTHONPATH": str(Path(spd.__file__).parents[1])}
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 120
    while not list(out.glob("seed-1/words/outcomes/*/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "results.json").exists()
    reproduce(parse_settings(small), ["1", "rounds"], out, command="spd reproduce", progress=False)
    mine, theirs = (json.loads((folder / "results.json").read_text()) for folder in (out, finished))
    assert mine["cells"] == theirs["cells"]
    assert mine["diagnostics"] == theirs["diagnostics"]


def test_an_evaluation_says_what_it_left_out():
    answers = [Answer("p", "r", "c", True), Answer("q", "r", "c", None, nll=1.0), Answer("q", "r", "c", False, nll=2.0)]
    found = Evaluation("t", answers, [3], "nll")
    assert (found.n, found.correct, found.value) == (2, 1, 1.5)
    assert found.to_dict()["too_long"] == [3]
    assert found.to_dict()["nll_n"] == 2
