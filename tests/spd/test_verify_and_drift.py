"""Every hash a folder names is told apart from an altered file; drift from the noise of calibration itself."""

import json
import shutil
from datetime import UTC, datetime, timedelta, timezone

import pytest
import torch

import spd
from spd.controls import random_subspace
from spd.files import sha256
from spd.manifest import verify
from spd.recalibration import Drift, drift
from spd.record import example_hashes, examples_hash, signed, without_hash_lists
from spd.subspace import provenance_hash


@pytest.fixture(scope="session")
def made(make_model, tokenizer, examples, tmp_path_factory):
    """A model, and the folder of a capability as a run keeps it: subspace, completions, adapter, evaluation."""
    model = make_model("qwen3")
    folder = tmp_path_factory.mktemp("run") / "sums"
    subspace = spd.calibrate(model, tokenizer, examples, progress=False)
    subspace.save_pretrained(folder / "subspace")
    prompts = [example.prompt for example in examples[:5]]
    tag = f"subspace {sha256((folder / 'subspace' / 'subspace.json').read_bytes())}, {{}}"
    with spd.attach(model, subspace):
        written = spd.generate(
            model,
            tokenizer,
            prompts,
            out=folder / "generations" / "projected.jsonl",
            max_new_tokens=6,
            tag=tag,
            progress=False,
        )
    recipe = spd.Recipe(epochs=1, warmup_epochs=0)
    spd.distill(model, tokenizer, written, out=folder / "adapters" / "projected", recipe=recipe, progress=False)
    answers = folder.parent / "base" / "evaluations" / "sums.jsonl"
    generated = spd.generate(model, tokenizer, prompts, out=answers, temperature=0, max_new_tokens=4, progress=False)
    scored = [
        {"prompt": each.prompt, "reference": "", "completion": each.completion, "correct": verdict}
        for each, verdict in zip(generated, (True, False, None, True, False), strict=True)
    ]
    answers.with_suffix(".scored.jsonl").write_text("".join(json.dumps(each) + "\n" for each in scored))
    score = {"capability": None, "arm": "base", "task": "sums", "n": 4, "correct": 2}
    (folder.parent / "metrics.json").write_text(json.dumps([score]))
    (folder.parent / "config.json").write_text("{}")
    return model, folder.parent


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "run")
    return tmp_path / "run"


def differing(report):
    return {(check.file, check.what) for check in report.having("differs")}


def agreeing(report):
    return {(check.file, check.what) for check in report.having("agrees")}


def test_a_whole_run_agrees(made, examples):
    model, run = made
    report = verify(run, model=model, examples=examples)
    assert report.agrees, report.text()
    assert agreeing(report) == {
        ("base/evaluations/sums.settings.json", "model configuration"),
        ("base/evaluations/sums.settings.json", "model weights"),
        ("base/evaluations/sums.settings.json", "prompts"),
        ("base/evaluations/sums.settings.json", "sums.scored.jsonl"),
        ("metrics.json", "base, base, sums"),
        ("sums/adapters/projected/training.json", "adapter_config.json"),
        ("sums/adapters/projected/training.json", "completions trained on"),
        ("sums/adapters/projected/training.json", "model configuration"),
        ("sums/adapters/projected/training.json", "model weights"),
        ("sums/adapters/projected/training.json", "weights"),
        ("sums/generations/projected.settings.json", "model configuration"),
        ("sums/generations/projected.settings.json", "prompts"),
        ("sums/generations/projected.settings.json", "subspace"),
        ("sums/subspace/subspace.json", "bases"),
        ("sums/subspace/subspace.json", "examples"),
        ("sums/subspace/subspace.json", "model configuration"),
        ("sums/subspace/subspace.json", "model weights"),
        ("sums/subspace/subspace.json", "provenance"),
        ("sums/subspace/subspace.json", "tensors"),
    }
    assert {(each.file, each.what) for each in report.having("unchecked")} == {
        ("sums/generations/projected.settings.json", "model weights"),  # they were folded
    }
    assert report.manifests["sums/subspace/subspace.json"] == sha256((run / "sums/subspace/subspace.json").read_bytes())
    assert json.loads(json.dumps(report.to_dict()))["agrees"] is True


def test_parts_of_it_by_themselves(made, examples):
    _, run = made
    for part, unchecked in (
        ("sums/subspace", {"model configuration", "model weights", "examples"}),
        ("sums/adapters/projected", {"completions trained on", "model configuration", "model weights"}),
        ("sums/generations/projected.jsonl", {"subspace", "model configuration", "model weights"}),
    ):
        report = verify(run / part)
        assert report.agrees
        assert report.having("agrees")
        assert {check.what for check in report.having("unchecked")} == unchecked
    assert verify(run / "sums" / "subspace", examples=examples).agrees


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def altered_provenance(run):
    path = run / "sums/subspace/subspace.json"
    edit(path, provenance=json.loads(path.read_text())["provenance"] | {"examples": 1000})


def altered_provenance_and_hash(run):
    altered_provenance(run)
    path = run / "sums/subspace/subspace.json"
    edit(path, provenance_sha256=provenance_hash(json.loads(path.read_text())["provenance"]))


def altered_completion(run):
    path = run / "sums/generations/projected.jsonl"
    lines = path.read_text().splitlines()
    record = json.loads(lines[0])
    path.write_text("\n".join([json.dumps(record | {"completion": "another"}), *lines[1:]]) + "\n")


def altered_answer(run):
    path = run / "base/evaluations/sums.scored.jsonl"
    path.write_text(path.read_text().replace('"correct": false', '"correct": true', 1))


SUBSPACE, ADAPTER = "sums/subspace/subspace.json", "sums/adapters/projected/training.json"
COMPLETIONS, ANSWERS = "sums/generations/projected.settings.json", "base/evaluations/sums.settings.json"
DAMAGE = {
    "tensors": (
        lambda run: flip(next((run / "sums/subspace").glob("*.safetensors"))),
        {(SUBSPACE, "tensors"), (SUBSPACE, "bases")},
    ),
    "tensors gone": (
        lambda run: next((run / "sums/subspace").glob("*.safetensors")).unlink(),
        {(SUBSPACE, "tensors"), (SUBSPACE, "bases")},
    ),
    # The completions name the manifest by its hash, so that it cannot be altered alone.
    "provenance": (
        altered_provenance,
        {(SUBSPACE, "provenance"), (SUBSPACE, "bases"), (COMPLETIONS, "subspace")},
    ),
    "provenance and hash": (altered_provenance_and_hash, {(COMPLETIONS, "subspace")}),
    "manifest": (
        lambda run: (run / SUBSPACE).write_text("[]"),
        {(SUBSPACE, "manifest"), (COMPLETIONS, "subspace")},
    ),
    "weights": (
        lambda run: flip(run / "sums/adapters/projected/adapter_model.safetensors"),
        {(ADAPTER, "weights")},
    ),
    "rank": (
        lambda run: edit(run / "sums/adapters/projected/adapter_config.json", lora_alpha=64),
        {(ADAPTER, "adapter_config.json")},
    ),
    "completion": (altered_completion, {(ADAPTER, "completions trained on"), (COMPLETIONS, "completions")}),
    "prompts": (lambda run: edit(run / COMPLETIONS, prompts_sha256="0" * 64), {(COMPLETIONS, "prompts")}),
    "a torn file": (
        lambda run: (run / "base/evaluations/sums.jsonl").write_text("{"),
        {(ANSWERS, "completions")},
    ),
    "verdict": (altered_answer, {("metrics.json", "base, base, sums")}),
    "a pickle": (
        lambda run: (run / "sums/adapters/projected/adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n."),
        {("sums/adapters/projected/adapter_model.bin", "foreign")},
    ),
    "code": (
        lambda run: (run / "sums/subspace/modeling.py").write_text("raise SystemExit"),
        {("sums/subspace/modeling.py", "foreign")},
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_was_altered_is_named(name, run):
    damage, expected = DAMAGE[name]
    assert not differing(verify(run))
    damage(run)
    report = verify(run)
    assert differing(report) == expected
    assert not report.agrees
    assert report.text().count("DIFFERS") == report.text(whole=False).count("DIFFERS") == len(expected)
    assert "not checked" not in report.text(whole=False)
    assert report.text().splitlines()[-1].split(", ")[1] == f"{len(expected)} differ"


def test_a_manifest_without_tensors_beside_it_or_the_reverse(run):
    shutil.copy(next((run / "sums/subspace").glob("*.safetensors")), run)
    (orphan,) = run.glob("subspace-*.safetensors")
    assert differing(verify(run)) == {(orphan.name, "tensors")}


@pytest.mark.parametrize("content", ["{}", '{"provenance": []}', '{"tensors": 3, "tensors_sha256": [], "layers": {}}'])
@pytest.mark.parametrize("name", ["subspace.json", "training.json", "x.settings.json"])
def test_a_manifest_of_anything_is_reported_and_not_a_crash(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    (tmp_path / "metrics.json").write_text('[{"capability": 3, "arm": [], "task": 1, "n": 1, "correct": 1}]')
    report = verify(tmp_path)
    assert not report.agrees
    assert {check.file for check in report.having("differs")} == {name, "metrics.json"}


def test_a_manifest_does_not_lead_out_of_its_folder(run):
    path = run / SUBSPACE
    (tensors,) = path.parent.glob("*.safetensors")
    tensors.rename(run / "sums" / tensors.name)
    edit(path, tensors=f"../{tensors.name}")
    assert (SUBSPACE, "tensors") in differing(verify(run))


def test_a_manifest_of_an_earlier_version_is_read_and_said_to_be_unchecked(run):
    path = run / SUBSPACE
    manifest = json.loads(path.read_text())
    del manifest["provenance_sha256"]
    path.write_text(json.dumps(manifest))
    assert spd.Subspace.from_pretrained(path.parent).layers == [2, 3]
    report = verify(path.parent)
    assert report.agrees
    assert "provenance" in {check.what for check in report.having("unchecked")}


def test_an_altered_provenance_is_refused_on_loading(run):
    altered_provenance(run)
    with pytest.raises(spd.InputError, match=r"subspace\.json: altered, the hash of its provenance"):
        spd.Subspace.from_pretrained(run / "sums/subspace")
    edit(run / SUBSPACE, provenance="mine")
    with pytest.raises(spd.InputError, match="expected a provenance of names and values, got 'mine'"):
        spd.Subspace.from_pretrained(run / "sums/subspace")


def test_nothing_to_verify_is_bad_input(tmp_path, examples, run):
    with pytest.raises(spd.InputError, match="there is no file or folder"):
        verify(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.jsonl").write_text("{}\n")
    for path in (tmp_path / "empty", tmp_path / "data.jsonl"):
        with pytest.raises(spd.InputError, match="names no hash"):
            verify(path)
    with pytest.raises(spd.InputError, match="expected the folder of one subspace beside them, got 0"):
        verify(run / "sums/adapters", examples=examples)


def test_another_model_differs(made, make_model):
    _, run = made
    other_weights = make_model("qwen3", seed=1)
    assert {what for _, what in differing(verify(run, model=other_weights))} == {"model weights"}
    other_shape = make_model("qwen3", num_hidden_layers=6)
    assert (SUBSPACE, "model configuration") in differing(verify(run, model=other_shape))


def test_examples_are_told_apart_one_by_one(made, examples):
    subspace = made[1] / "sums/subspace"
    stranger = spd.Example("Another?", " Yes", [(8, 12)])

    def said(some):
        report = verify(subspace, examples=some)
        (check,) = [each for each in report.checks if each.what == "examples"]
        assert check.verdict == "differs"
        return check.detail

    assert said([*examples[:-1], stranger]) == "examples 19 were not used, 1 of 20 that were are not here"
    assert said(examples[:3]) == "none were not used, 17 of 20 that were are not here"
    assert said(examples[::-1]) == "the same, in another order or number"


def test_examples_of_what_is_derived(model, tokenizer, examples, tmp_path):
    parents = [spd.calibrate(model, tokenizer, some, progress=False) for some in (examples[:9], examples[9:])]
    parents[0].union(parents[1].truncate(3)).save_pretrained(tmp_path)
    report = verify(tmp_path, model=model, examples=examples[9:])
    assert report.agrees, report.text()
    found = {each.what: each.verdict for each in report.checks if each.what.startswith("examples")}
    assert found == {"examples of parent 1": "unchecked", "examples of parent 2": "agrees"}


def test_a_provenance_to_print_counts_the_hashes(model, tokenizer, examples):
    parents = [spd.calibrate(model, tokenizer, examples[:n], progress=False) for n in (5, 7)]
    shown = without_hash_lists(parents[0].union(parents[1]).provenance)
    found = [each["provenance"]["example_sha256"] for each in shown["derived"]["parents"]]
    assert found == ["5 hashes", "7 hashes"]
    assert without_hash_lists(parents[0].provenance)["settings"] == parents[0].provenance["settings"]


def test_the_hash_of_examples_is_what_calibration_writes(model, subspace_of, examples):
    assert subspace_of(model).provenance["examples_sha256"] == examples_hash(examples)
    assert len(set(example_hashes(examples))) == len(examples)


def test_who_and_when(model, subspace_of, tmp_path):
    when = datetime(2026, 3, 1, 12, 30, 15, 99, tzinfo=timezone(timedelta(hours=2)))
    subspace = signed(subspace_of(model), author="A. Person", created=when)
    assert subspace.provenance["author"] == "A. Person"
    assert subspace.provenance["created"] == "2026-03-01T10:30:15+00:00"
    subspace.save_pretrained(tmp_path / "a")
    signed(subspace_of(model), author="A. Person", created=when.astimezone(UTC)).save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/subspace.json").read_bytes() == (tmp_path / "b/subspace.json").read_bytes()
    assert verify(tmp_path).agrees
    with pytest.raises(spd.InputError, match="created: expected a time with a time zone"):
        signed(subspace, created=datetime(2026, 3, 1))
    with pytest.raises(spd.InputError, match="author: expected a name"):
        signed(subspace, author=" ")


@pytest.fixture(scope="module")
def word_problems():
    """Two halves of one kind: old examples to calibrate on and fresh ones."""
    made = []
    for number in range(1, 65):
        prompt = f"Question: {'very ' * (number % 5)}many apples are {number} and {number % 7}?\nAnswer:"
        completion = f" {number} and {number % 7} are\n#### {number + number % 7}"
        end = len(prompt) + len(completion)
        made.append(spd.Example(prompt, completion, [(end - len(str(number + number % 7)), end)]))
    return made[::2], made[1::2]


@pytest.fixture(scope="module")
def calibrated(make_model, tokenizer, word_problems):
    return spd.calibrate(make_model("qwen3"), tokenizer, word_problems[0], rank=4, progress=False)


def test_the_same_model_has_not_drifted(make_model, tokenizer, calibrated, word_problems):
    found = drift(make_model("qwen3"), tokenizer, calibrated, word_problems[1], progress=False)
    assert found.recalibrate is False
    assert found.kept > 0.8
    assert found.reason.startswith("no need to recalibrate: the subspace catches ")
    assert [(site.comparison.layer, site.comparison.side) for site in found.sites] == [
        (layer, side) for layer in (2, 3) for side in "kv"
    ]
    for site in found.sites:
        assert site.by_chance == 0.25
        assert 0.25 < site.noise < 1
    assert found.examples == 32
    assert json.loads(json.dumps(found.to_dict()))["recalibrate"] is False


def test_another_training_has_drifted(make_model, tokenizer, calibrated, word_problems):
    found = drift(make_model("qwen3", seed=1), tokenizer, calibrated, word_problems[1], progress=False)
    assert found.recalibrate is True
    assert found.kept < 0.5
    assert found.reason.startswith("recalibrate: the subspace catches ")
    assert found.reason.endswith(f"{100 * found.kept:.0f} % kept, threshold 80 %")


def test_drift_is_what_its_parts_say(make_model, tokenizer, calibrated, word_problems):
    """Angles are those of a plain second calibration, energies those of its gradients; halves are halves."""
    model, (old, fresh) = make_model("qwen3"), word_problems

    def asked(some, **arguments):
        return drift(model, tokenizer, calibrated, some, splits=1, progress=False, **arguments)

    same, found = asked(old), asked(fresh)
    assert [site.overlap for site in same.sites] == pytest.approx([1.0] * 4)
    whole = spd.calibrate(model, tokenizer, fresh, rank="full", progress=False)
    expected = calibrated.compare(whole.truncate(4)).sites
    for site, other, basis in zip(found.sites, expected, (whole.k[2], whole.v[2], whole.k[3], whole.v[3]), strict=True):
        assert site.comparison.angles == pytest.approx(other.angles, abs=1e-3)
        rows = (basis.basis * basis.singular_values).T.double()  # as many as d, with the Gram matrix of them all
        u = calibrated.side(other.side)[other.layer].basis.double()
        assert site.energy == pytest.approx(float((rows @ u).square().sum() / rows.square().sum()))
        assert site.kept == pytest.approx((site.energy - 0.25) / (site.repeat - 0.25))
    for own, site in zip(calibrated.energy().sites.values(), same.sites, strict=True):
        assert site.energy == pytest.approx(own)
    assert found == asked(fresh)
    assert found != asked(fresh, seed=1)
    twice = [fresh[0]] * 8  # whose halves are the same
    repeated = asked(twice)
    assert [site.noise for site in repeated.sites] == pytest.approx([1.0] * 4)
    best = spd.calibrate(model, tokenizer, twice, rank=4, progress=False).energy().sites.values()
    assert [site.repeat for site in repeated.sites] == pytest.approx(list(best), rel=1e-4)


def test_examples_that_were_seen_are_counted(make_model, tokenizer, calibrated, word_problems):
    old, fresh = word_problems
    found = drift(make_model("qwen3"), tokenizer, calibrated, [*old[:3], *fresh[:5]], splits=1, progress=False)
    assert (found.seen, found.examples) == (3, 8)
    record = {name: calibrated.provenance[name] for name in ("settings", "config_sha256")}
    unknown = spd.Subspace(calibrated.k, calibrated.v, record)
    assert drift(make_model("qwen3"), tokenizer, unknown, fresh[:5], splits=1, progress=False).seen is None


def test_halves_that_do_not_repeat_tell_nothing():
    from spd.comparison import SiteComparison
    from spd.recalibration import SiteDrift

    site = SiteComparison(3, "k", 64, (16, 16), (60.0,) * 16)
    told = SiteDrift(site, noise=0.4, energy=0.45, repeat=0.65)
    assert told.kept == pytest.approx((0.45 - 0.25) / (0.65 - 0.25))
    silent = SiteDrift(site, noise=0.26, energy=0.26, repeat=0.27)
    assert silent.kept is None
    found = Drift((silent,), 0.8, 10, None)
    assert found.recalibrate is None
    assert found.reason.startswith("cannot be told, more than 10 examples are needed: the subspace catches 0.26")
    assert Drift((silent, told), 0.8, 10, None).kept == pytest.approx(told.kept)
    all_of_d = SiteDrift(SiteComparison(3, "k", 16, (16, 16), (0.0,) * 16), noise=1, energy=1, repeat=1)
    assert all_of_d.kept is None


def test_what_cannot_drift_is_refused(make_model, tokenizer, calibrated, examples):
    model = make_model("qwen3")

    def refused(match, subspace=calibrated, some=examples, model=model, **arguments):
        with pytest.raises(spd.InputError, match=match):
            drift(model, tokenizer, subspace, some, progress=False, **arguments)

    refused("made by complement", calibrated.complement())
    refused("made by random", random_subspace(calibrated, 0))
    refused("does not say how it was calibrated", spd.Subspace(calibrated.k, calibrated.v))
    refused("at least four, for two halves, got 3", some=examples[:3])
    refused("configuration differs", model=make_model("qwen3", num_hidden_layers=6))
    refused("threshold: expected a number above 0", threshold=0)
    refused("splits: expected a positive integer", splits=0)
    whole = {layer: spd.Basis(torch.eye(16), torch.ones(16).double()) for layer in (2, 3)}
    refused("nothing can move", spd.Subspace(whole, whole, calibrated.provenance))
