"""Whether a folder is what its manifests say: `spd.verify` recomputes every hash that they name.

It reads JSON and safetensors, and runs nothing. A hash tells an accident or a careless change; whoever can write the
folder can write new hashes too, so a record that must hold against that keeps the manifests' own hashes elsewhere
(`Report.manifests`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from spd import distillation, generation
from spd.arms import parse_arm
from spd.errors import InputError
from spd.example import Example
from spd.files import read_json, read_jsonl, sha256, sha256_of_file
from spd.provenance import config_hash, weights_fingerprint
from spd.record import example_hashes, examples_hash
from spd.shown import visible
from spd.subspace import MANIFEST, Subspace, provenance_hash

Verdict = Literal["agrees", "differs", "unchecked"]

_LOADED_AS_CODE = {".py", ".pyc", ".so", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".sh", ".exe"}
_SCORED = ".scored.jsonl"
_METRICS = "metrics.json"
_SHOWN = {"agrees": "agrees", "differs": "DIFFERS", "unchecked": "not checked"}


@dataclass(frozen=True)
class Check:
    """One thing that a file says, and whether it is so.

    Args:
        file: the file that says it, from the folder that was verified.
        what: what it is about, such as "tensors".
        verdict: "agrees", "differs", or "unchecked": it could not be told.
        detail: what was found, or why it could not be told.
    """

    file: str
    what: str
    verdict: Verdict
    detail: str = ""


@dataclass
class Report:
    """What `verify` found, file by file.

    Args:
        folder: what was verified.
        checks: everything that was or could not be checked.
        manifests: hash of every manifest itself, by file. Nothing in the folder vouches for these.
    """

    folder: str
    checks: list[Check] = field(default_factory=list)
    manifests: dict[str, str] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether nothing differs."""
        return not self.having("differs")

    def having(self, verdict: Verdict) -> list[Check]:
        return [check for check in self.checks if check.verdict == verdict]

    def to_dict(self) -> dict[str, Any]:
        return {"agrees": self.agrees, **asdict(self)}

    def text(self, *, whole: bool = True) -> str:
        """For reading: a paragraph a file, a line a difference, and how many of each there are.

        Args:
            whole: with what agrees and what could not be checked; else differences alone.
        """
        lines = []
        for file in dict.fromkeys(check.file for check in self.checks):
            mine = [check for check in self.checks if check.file == file]
            said = [_line("differs", f"{each.what}: {each.detail}") for each in mine if each.verdict == "differs"]
            if whole:
                agreeing = [each.what for each in mine if each.verdict == "agrees"]
                said += [_line("agrees", ", ".join(agreeing))] if agreeing else []
                for why in dict.fromkeys(each.detail for each in mine if each.verdict == "unchecked"):
                    what = ", ".join(each.what for each in mine if (each.verdict, each.detail) == ("unchecked", why))
                    said.append(_line("unchecked", f"{what}: {why}"))
            lines += [visible(line).replace("\n", " ") for line in (file, *said)] if said else []
        counts = (len(self.having(verdict)) for verdict in ("agrees", "differs", "unchecked"))
        return "\n".join([*lines, "{} agree, {} differ, {} could not be checked".format(*counts)])


def verify(path: str | Path, *, model: nn.Module | None = None, examples: Sequence[Example] | None = None) -> Report:
    """Recompute every hash that a folder names, and say what agrees, what differs and what could not be told.

    Of a subspace: its tensors, its provenance, whether the bases are such. Of an adapter: its weights, its recipe, the
    completions it was trained on. Of completions: their prompts, the scored answers beside them, the subspace or
    adapter they were written with. Of a run: all of these below it, and the counts in `metrics.json`.

    Args:
        path: a folder of a subspace, an adapter or a run, or a file of completions.
        model: if given, is compared with the hashes of its configuration and of its weights, wherever they are named.
            The latter depend on the dtype it is loaded in.
        examples: if given, those that the subspace was calibrated on; they are told apart one by one.

    Raises:
        InputError: there is nothing at `path` that names a hash, or there are examples and more than one subspace.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise InputError(f"path: there is no file or folder {path}")
    return _Verifier(path, model, examples).report()


class _Verifier:
    def __init__(self, path: Path, model: nn.Module | None, examples: Sequence[Example] | None) -> None:
        self.root = path if path.is_dir() else path.parent
        self.model, self.examples = model, examples
        self.found = Report(str(path))
        self.config = config_hash(model) if model is not None else None
        self.weights = weights_fingerprint(model) if model is not None else None
        if path.is_dir():
            self.subspaces = self._below(MANIFEST)
            self.adapters = self._below(distillation.MANIFEST)
            self.completions = self._below(f"*{generation.SETTINGS}")
        else:
            beside = path.with_suffix(generation.SETTINGS)
            self.subspaces, self.adapters = [], []
            self.completions = [beside] if beside.is_file() and path.suffix == ".jsonl" else []
        if not self.subspaces + self.adapters + self.completions:
            raise InputError(f"path: {path} names no hash: it is no subspace, adapter, run or file of completions")
        if examples is not None and len(self.subspaces) != 1:
            raise InputError(f"examples: expected the folder of one subspace beside them, got {len(self.subspaces)}")
        origins = [*self.subspaces]  # by the hashes of these, completions name what they were written with
        for each in (*self.subspaces, *self.adapters):
            origins += each.parent.glob("*.safetensors")
        self.origins = {sha256_of_file(each) for each in origins}
        self.data: dict[str, str] = {}  # file of completions by the hash that an adapter knows them by

    def report(self) -> Report:
        for manifest in self.completions:
            self._completions(manifest)
        for manifest in self.adapters:
            self._adapter(manifest)
        for manifest in self.subspaces:
            self._subspace(manifest)
        for orphan in self._below("subspace-*.safetensors"):
            if orphan.with_name(MANIFEST) not in self.subspaces:
                self._say(orphan, "tensors", "differs", f"no {MANIFEST} beside it")
        for metrics in self._below(_METRICS):
            self._metrics(metrics)
        self.found.checks.sort(key=lambda check: check.file)
        return self.found

    def _subspace(self, path: Path) -> None:
        manifest = self._manifest(path)
        if manifest is None:
            return
        tensors = path.parent / Path(str(manifest.get("tensors"))).name
        provenance = manifest.get("provenance")
        if not os.path.isfile(tensors):
            self._say(path, "tensors", "differs", f"{manifest.get('tensors')} is missing")
        else:
            self._compare(path, "tensors", manifest.get("tensors_sha256"), sha256_of_file(tensors))
        if not isinstance(provenance, dict):
            return self._say(path, "provenance", "differs", "there is none")
        if "provenance_sha256" in manifest:
            self._compare(path, "provenance", manifest["provenance_sha256"], provenance_hash(provenance))
        else:
            self._say(path, "provenance", "unchecked", "the manifest names no hash of it")
        try:
            Subspace.from_pretrained(path.parent)
            self._say(path, "bases", "agrees", "orthonormal and finite")
        except InputError as error:
            self._say(path, "bases", "differs", str(error))
        self._model(path, provenance)
        self._examples(path, provenance)
        self._others(path, {MANIFEST, tensors.name})

    def _adapter(self, path: Path) -> None:
        manifest = self._manifest(path)
        if manifest is None:
            return
        weights, config = path.parent / distillation.WEIGHTS, path.parent / "adapter_config.json"
        if not weights.is_file():
            self._say(path, "weights", "differs", f"{weights.name} is missing")
        else:
            self._compare(path, "weights", manifest.get("weights_sha256"), sha256_of_file(weights))
        recipe = manifest.get("recipe")
        held, files = _object(config), manifest.get("files_sha256")
        wanted: dict[str, Any] = {"peft_type": "LORA"}
        if isinstance(recipe, dict):
            wanted |= {"r": recipe.get("lora_rank"), "lora_alpha": recipe.get("lora_alpha")}
        if held is None:
            self._say(path, config.name, "differs", "missing, or no JSON object")
        elif isinstance(files, dict) and files.get(config.name) != sha256_of_file(config):
            self._compare(path, config.name, files.get(config.name), sha256_of_file(config))
        else:
            self._compare(path, config.name, wanted, {name: held.get(name) for name in wanted})
        self._trained_on(path, manifest.get("data_sha256"))
        self._model(path, manifest)
        self._others(path, {path.name, weights.name, config.name})

    def _trained_on(self, path: Path, digest: object) -> None:
        """Completions that are below the folder at all must be those; elsewhere they cannot be told from others."""
        name = "completions trained on"
        capability = path.parent.parent.parent
        if str(digest) in self.data:
            return self._say(path, name, "agrees", self.data[str(digest)])
        kept_together = path.parent.parent.name == "adapters" and any(
            each.is_relative_to(capability / "generations") for each in self.completions
        )
        if kept_together:
            return self._say(
                path, name, "differs", f"no file in {self._name(capability / 'generations')} has their hash"
            )
        self._say(path, name, "unchecked", "no completions with their hash in this folder")

    def _completions(self, path: Path) -> None:
        settings = self._manifest(path)
        if settings is None:
            return
        file = path.with_name(path.name.removesuffix(generation.SETTINGS) + ".jsonl")
        try:
            held = generation.read_generations(file)
        except InputError as error:
            return self._say(path, "completions", "differs", str(error))
        self._compare(
            path, "prompts", settings.get("prompts_sha256"), sha256(json.dumps([each.prompt for each in held]))
        )
        data = [[each.prompt, each.completion, each.tokens, each.finished] for each in held]
        self.data[sha256(json.dumps(data))] = self._name(file)
        scored = file.with_suffix(_SCORED)
        if scored.is_file():
            self._scored(path, scored, [(each.prompt, each.completion) for each in held])
        tag = re.match(r"(?:(subspace|adapter) )?([0-9a-f]{64})", str(settings.get("tag")))
        if tag:
            known, whole = tag[2] in self.origins, (self.root / "config.json").is_file()
            verdict: Verdict = "agrees" if known else "differs" if whole else "unchecked"
            detail = "" if known else "nothing in this folder has the hash it names"
            self._say(path, tag[1] or "subspace or adapter", verdict, detail)
        self._model(path, settings, changed=bool(settings.get("tag")))

    def _scored(self, path: Path, scored: Path, held: list[tuple[str, str]]) -> None:
        try:
            answers = [(each.get("prompt"), each.get("completion")) for each in read_jsonl(scored)]
        except InputError as error:
            return self._say(path, scored.name, "differs", str(error))
        others = sum(one != other for one, other in zip(answers, held, strict=False)) + abs(len(answers) - len(held))
        detail = f"{others} of {len(held)} answers are not the completions" if others else f"{len(held)} answers"
        self._say(path, scored.name, "differs" if others else "agrees", detail)

    def _metrics(self, path: Path) -> None:
        """Whether the counts of right answers are those of the scored answers."""
        try:
            rows = read_json(path)
            arms = [(row["capability"], parse_arm(row["arm"]), row["task"], row["n"], row["correct"]) for row in rows]
        except (InputError, AttributeError, KeyError, TypeError) as error:
            return self._say(path, "scores", "differs", f"not the scores of a run ({error})")
        for capability, arm, task, n, correct in arms:
            folder = path.parent / "base" if capability is None else path.parent / str(capability)
            evaluations = folder / "evaluations" if capability is None else folder / "evaluations" / arm.slug
            file, name = evaluations / f"{task}{_SCORED}", f"{capability or 'base'}, {arm.name}, {task}"
            if not os.path.isfile(file) or not file.resolve().is_relative_to(path.parent.resolve()):
                self._say(path, name, "unchecked", f"there is no {self._name(file)}")
                continue
            try:
                verdicts = [each.get("correct") for each in read_jsonl(file)]
            except InputError as error:
                self._say(path, name, "differs", str(error))
                continue
            judged = [each for each in verdicts if each is not None]
            self._compare(path, name, f"{correct} of {n}", f"{sum(map(bool, judged))} of {len(judged)}")

    def _model(self, path: Path, record: dict[str, Any], changed: bool = False) -> None:
        """The model's configuration, and its weights if they were those of the model as it comes."""
        changed = changed or any(".round-" in part or ".after-" in part for part in path.parts[len(self.root.parts) :])
        for what, key, now in (
            ("model configuration", "config_sha256", self.config),
            ("model weights", "weights", self.weights),
        ):
            if key not in record:
                continue
            if now is None:
                self._say(path, what, "unchecked", "no model given")
            elif what == "model weights" and changed:
                self._say(path, what, "unchecked", "they were projected or trained then")
            else:
                self._compare(path, what, record[key], now)

    def _examples(self, path: Path, provenance: dict[str, Any]) -> None:
        for name, each in _calibrations("examples", provenance):
            if self.examples is None:
                self._say(path, name, "unchecked", "no examples given")
                continue
            if each["examples_sha256"] == examples_hash(self.examples):
                self._say(path, name, "agrees", f"all {len(self.examples)}")
                continue
            hashes = each.get("example_sha256")
            if not isinstance(hashes, list):
                detail = "their hash is another; the manifest names none for each"
            else:
                here = example_hashes(self.examples)
                used = {str(digest) for digest in hashes}
                others = [index for index, digest in enumerate(here) if digest not in used]
                missing = sum(digest not in set(here) for digest in hashes)
                detail = f"{_some(others)} were not used, {missing} of {len(hashes)} that were are not here"
                if not others and not missing:
                    detail = "the same, in another order or number"
            # Of several calibrations the examples can be those of one alone.
            self._say(path, name, "differs" if name == "examples" else "unchecked", detail)

    def _others(self, manifest: Path, own: set[str]) -> None:
        """Files beside a manifest that it knows nothing of; what loading could execute is no part of a result."""
        for other in sorted(manifest.parent.iterdir()):
            if other.name in own or other.name.startswith(".") or not other.is_file():
                continue
            if other.suffix.lower() in _LOADED_AS_CODE:
                self._say(other, "foreign", "differs", "a kind of file that can execute code; spd writes none")
            elif not self._is_another_manifest(other):
                self._say(other, "content", "unchecked", "no hash covers it")

    def _is_another_manifest(self, path: Path) -> bool:
        return path in self.subspaces or path in self.adapters or path in self.completions

    def _manifest(self, path: Path) -> dict[str, Any] | None:
        self.found.manifests[self._name(path)] = sha256_of_file(path)
        manifest = _object(path)
        if manifest is None:
            self._say(path, "manifest", "differs", "no JSON object")
        return manifest

    def _compare(self, path: Path, what: str, recorded: object, found: object) -> None:
        if recorded == found:
            return self._say(path, what, "agrees", _short(found))
        self._say(path, what, "differs", f"says {_short(recorded)}, found {_short(found)}")

    def _say(self, path: Path, what: str, verdict: Verdict, detail: str = "") -> None:
        self.found.checks.append(Check(self._name(path), what, verdict, detail))

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def _below(self, pattern: str) -> list[Path]:
        """Files by name, without those that are hidden, unfinished, or belong to a training in progress."""
        if not self.root.is_dir():
            return []
        return sorted(
            path
            for path in self.root.rglob(pattern)
            if path.is_file()
            and not any(
                part.startswith(".") or part.endswith(".checkpoints") for part in path.relative_to(self.root).parts
            )
        )


def _calibrations(name: str, provenance: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The provenances with examples in them: a subspace's own, or those that it was derived from."""
    found = [(name, provenance)] if "examples_sha256" in provenance else []
    derived = provenance.get("derived")
    parents = derived.get("parents") if isinstance(derived, dict) else None
    for index, parent in enumerate(parents if isinstance(parents, list) else [], start=1):
        if isinstance(parent, dict) and isinstance(parent.get("provenance"), dict):
            found += _calibrations(f"{name} of parent {index}", parent["provenance"])
    return found


def _object(path: Path) -> dict[str, Any] | None:
    try:
        value = read_json(path) if path.is_file() else None
    except InputError:
        return None
    return value if isinstance(value, dict) else None


def _line(verdict: Verdict, text: str) -> str:
    return f"  {_SHOWN[verdict]:<12} {text}"


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{64}", text) else f"{text:.80}"


def _some(indexes: list[int]) -> str:
    shown = ", ".join(map(str, indexes[:10])) + (", ..." if len(indexes) > 10 else "")
    return f"examples {shown}" if indexes else "none"
