"""Subspaces on the hub: a folder with a model card goes up, JSON and safetensors alone come down."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from spd.errors import InputError
from spd.files import write_text
from spd.record import without_hash_lists
from spd.shown import markdown
from spd.spectrum import site_rows
from spd.subspace import MANIFEST, Subspace

if TYPE_CHECKING:
    from spd.explorer.numbers import Transfer

FETCHED = (MANIFEST, "subspace-*.safetensors")
"""All that is ever downloaded: nothing in it can be executed."""
PICTURE = "spectra.png"
PUSHED = (*FETCHED, "README.md", PICTURE)
TAGS = ["spd", "self-policy-distillation", "subspace", "arxiv:2605.22675"]
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_NAME = re.compile(f"{_PART}/{_PART}")
_PATH = re.compile(r"/|~|\.\.?[/\\]|[A-Za-z]:[/\\]")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


def push_to_hub(
    subspace: Subspace,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    metrics: Transfer | None = None,
    commit_message: str = "Subspace",
) -> str:
    """Upload a subspace and a model card made from its provenance; an earlier one in the repository is replaced.

    Args:
        subspace: the subspace. If its provenance names its model by a folder, only that folder's name is published.
        repo_id: "user/name"; made if it is not there.
        private: make it a private one.
        token: of the hub; None takes the one that is logged in.
        base_model: the model's name on the hub, "user/name", where the provenance has a folder.
        license: an identifier of the hub, such as "apache-2.0"; None states none.
        metrics: the measured effect, of `spd.explorer.read_metrics`.
        commit_message: of the upload.

    Returns:
        The repository's address.

    Raises:
        InputError: an unusable name, or the hub refuses.
    """
    check_repo_id("repo_id", repo_id)
    published = published_copy(subspace, base_model)
    from huggingface_hub import HfApi

    from spd.plots import spectra_figure

    with tempfile.TemporaryDirectory(prefix="spd-push-") as name:
        folder = Path(name)
        published.save_pretrained(folder)
        if published.derived is None:
            spectra_figure(published).savefig(folder / PICTURE, format="png", dpi=130, bbox_inches="tight")
        write_text(folder / "README.md", model_card(published, repo_id, license=license, metrics=metrics))
        try:
            api = HfApi(token=token)
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                allow_patterns=list(PUSHED),
                delete_patterns=[FETCHED[1], PICTURE],
            )
        except Exception as error:  # of HTTP, of the hub and of validation: they share no base class
            raise InputError(f"repo_id: {repo_id} could not be pushed to the hub ({_reason(error)})") from error
    return str(url)


def fetch(repo_id: str, revision: str | None = None, *, token: str | None = None) -> Path:
    """The folder, in the hub's cache, of a subspace's manifest and tensors; no other file is downloaded.

    Args:
        repo_id: "user/name".
        revision: branch, tag or commit.
        token: of the hub; None takes the one that is logged in.

    Raises:
        InputError: an unusable name, no such repository, or it holds no subspace.
    """
    check_repo_id("repo_id", repo_id)
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InputError(f"revision: expected a branch, tag or commit, got {revision!r:.80}")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(repo_id, revision=revision, token=token, allow_patterns=list(FETCHED), library_name="spd")
        )
    except Exception as error:
        raise InputError(f"{repo_id}: could not be fetched from the hub ({_reason(error)})") from error
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{repo_id}: no subspace, the repository has no {MANIFEST}")
    return folder


def is_repo_id(name: object) -> bool:
    """Whether `name` can be a repository's: "user/name", with letters, digits, "-", "_" and "." only."""
    if not isinstance(name, str) or len(name) > 96 or not _NAME.fullmatch(name):
        return False
    return ".." not in name and "--" not in name and not name.endswith(".git")


def check_repo_id(argument: str, name: object) -> None:
    if not is_repo_id(name):
        raise InputError(f'{argument}: expected "user/name" of letters, digits, "-", "_" and ".", got {name!r:.120}')


def published_copy(subspace: Subspace, base_model: str | None = None) -> Subspace:
    """The subspace with its model named as others know it: of a path of this machine only the last part leaves it."""
    if base_model is not None:
        check_repo_id("base_model", base_model)
    recorded = subspace.provenance.get("model")

    def published(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: published(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [published(item) for item in value]
        if base_model is not None and isinstance(value, str) and value == recorded:
            return base_model
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if isinstance(value, str) and _PATH.match(value) else value

    return Subspace(subspace.k, subspace.v, published(subspace.provenance))


def model_card(subspace: Subspace, repo_id: str, *, license: str | None = None, metrics: Transfer | None = None) -> str:
    """README.md of the repository: a YAML header for the hub, then what the subspace is and where it came from."""
    from huggingface_hub import ModelCardData

    recorded = str(subspace.provenance.get("model", ""))
    model = recorded if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", recorded) else None  # it goes into code too
    header = ModelCardData(
        base_model=model if is_repo_id(model) else None, library_name="spd", license=license, tags=TAGS
    )
    environment = Environment(
        loader=PackageLoader("spd", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = markdown
    return environment.get_template("model_card.md").render(
        header=header.to_yaml().strip(),
        name=repo_id.partition("/")[2],
        repo_id=repo_id,
        model=model,
        origin=subspace.provenance,
        derived=subspace.derived,
        settings=subspace.provenance.get("settings", {}),
        layers=subspace.layers,
        sites=site_rows(subspace),
        license=license,
        scores=_scores(metrics) if metrics else [],
        provenance=json.dumps(without_hash_lists(subspace.provenance), indent=2, ensure_ascii=False),
    )


def _scores(metrics: Transfer) -> list[dict[str, Any]]:
    rows = []
    for (arm, capability), by_test in metrics.scores.items():
        for test, score in by_test.items():
            form = "{:.3f}" if score.metric == "nll" else "{:.1f}"
            low, high = (form.format(end) for end in score.interval)
            value = f"{form.format(score.value)} [{low}, {high}]"
            against = "" if score.difference is None else f"{score.difference:+.3g}"
            row: dict[str, Any] = {
                "arm": arm,
                "trained_for": capability or "",
                "test": test,
                "value": value,
                "n": score.n,
            }
            rows.append(row | {"metric": score.metric, "difference": against, "p": score.p})
    return rows


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
