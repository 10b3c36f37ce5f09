"""One folder of long-context measurements: cell by cell, resumed where it stopped, with figures and a report.

OUT/
  results.json                    settings, machines, ranks' energies, every cell
  subspaces/LAYERS/               what was calibrated
  report.md, cache.png, retrieval.png, perplexity.png
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spd.calibration import calibrate
from spd.errors import InputError
from spd.files import read_object, write_json
from spd.intervention import attach
from spd.lock import INSIDE, locked
from spd.long_context import decoding, quality, shapes
from spd.long_context.haystack import Texts, windows_of
from spd.long_context.report import write_report
from spd.long_context.settings import RECALL, Settings
from spd.models import load_model
from spd.progress import bar
from spd.provenance import versions
from spd.proving_ground import recall_checkpoint
from spd.sites import choose_layers, depth, find_sites
from spd.subspace import MANIFEST, Basis, Subspace

RESULTS, SUBSPACES = "results.json", "subspaces"
CALIBRATION_TOKENS = 256


@dataclass(frozen=True)
class Cell:
    """What is measured in one go."""

    part: str
    context: int
    projection: str = "none"  # or "calibrated", "random"
    layers: str = ""
    rank: int = 0

    @property
    def key(self) -> str:
        what = f"{self.projection} {self.layers} {self.rank}" if self.rank else self.projection
        return f"{self.part}/{self.context}" + ("" if self.part == "decode" else f"/{what}")


def run(
    settings: Settings,
    out: str | Path,
    *,
    again: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Measure what is not in the folder yet, and write its report.

    Args:
        settings: what to measure.
        out: the folder; a new one, or one of the same settings.
        again: measure anew what is there.
        progress: show a progress bar.
        say: receives a line for every stage that begins.

    Returns:
        The report's path.

    Raises:
        InputError: a setting cannot be met by the model, or the folder belongs to other settings or another run.
    """
    out = Path(out)
    with _owned(out):
        if again:
            shutil.rmtree(out / SUBSPACES, ignore_errors=True)
        stored = {} if again else _stored(out, settings)
        _Run(settings, out, stored, progress, say).carry_out()
        return write_report(out)


def resumes(settings: Settings, out: str | Path) -> bool:
    """Whether the folder holds a run of these settings that has not come to its end."""
    path = Path(out) / RESULTS
    if not path.is_file():
        return False
    stored = read_object(path)
    return stored.get("settings") == settings.to_dict() and not stored.get("finished")


def cells(settings: Settings) -> list[Cell]:
    """Everything to measure, in order."""
    found = [Cell("decode", context) for context in settings.contexts if "decode" in settings.parts]
    projections = [("none", "", 0)]
    for layers in settings.layers if settings.subspace is None else ("given",):
        projections += [(kind, layers, rank) for rank in settings.ranks for kind in ("calibrated", "random")]
    for part in ("retrieval", "perplexity"):
        if part in settings.parts:
            found += [Cell(part, context, *each) for each in projections for context in settings.contexts]
    return found


@dataclass
class _Run:
    settings: Settings
    out: Path
    results: dict[str, Any]
    progress: bool
    say: Callable[[str], None]
    _subspaces: dict[tuple[str, str], Subspace] = field(default_factory=dict)

    def carry_out(self) -> None:
        settings = self.settings
        wanted = cells(settings)
        self.results.setdefault("settings", settings.to_dict())
        self.results.setdefault("environments", [])
        done: dict[str, Any] = self.results.setdefault("cells", {})
        left = [cell for cell in wanted if cell.key not in done]
        if not left:
            return
        self.say(f"load: {settings.model or settings.shape}")
        model = self.model
        self._check(model)
        if (here := _environment(model)) not in self.results["environments"]:
            self.results["environments"].append(here)
        write_json(self.out / RESULTS, self.results)
        steps = sum(self._steps(cell) for cell in wanted)
        shown = bar(
            total=steps,
            done=steps - sum(map(self._steps, left)),
            label="long-context",
            unit="steps",
            show=self.progress,
        )
        part = ""
        with shown:
            for cell in left:
                if cell.part != part:
                    part = cell.part
                    self.say(f"measure: {part}")
                done[cell.key] = self._measure(cell, shown.update)
                self.results["finished"] = len(done) == len(wanted)
                write_json(self.out / RESULTS, self.results)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        settings = self.settings
        if settings.shape is not None:
            context = max(settings.contexts)
            chosen = {"device": settings.device, "dtype": settings.dtype}
            return shapes.make_model(settings.shape, context=context, batch=settings.batch, **chosen), None
        assert settings.model is not None
        name: Any = recall_checkpoint() if settings.model == RECALL else settings.model
        return load_model(name, dtype=settings.dtype, device=settings.device)

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @cached_property
    def texts(self) -> Texts:
        return Texts(self._loaded[1], self.settings.seed)

    def _check(self, model: nn.Module) -> None:
        """Refuse now what would only come up after hours."""
        settings = self.settings
        for context in settings.contexts:
            decoding.check_context(model, context, least=max(64, decoding.least_context(settings.tokens)))
        widths = {site.width for site in find_sites(model).values()}
        largest = max(settings.ranks) if set(settings.parts) - {"decode"} else 0
        if "decode" in settings.parts:
            largest = max(largest, settings.decode_rank)
        if largest > min(widths):
            raise InputError(f"ranks, decode_rank: expected at most d = {min(widths)}, got {largest}")
        if settings.subspace is not None:
            given = Subspace.from_pretrained(settings.subspace, model)
            least = min(basis.rank for side in (given.k, given.v) for basis in side.values())
            if largest > least:
                whose = f"the rank of {settings.subspace}"
                raise InputError(f"ranks, decode_rank: expected at most {least}, {whose}, got {largest}")
        else:
            for layers in settings.layers:
                self._layers(layers)
        if "retrieval" in settings.parts:
            self.texts.haystack(0, min(settings.contexts), settings.needles)
        if "perplexity" in settings.parts:
            next(self._windows(max(settings.contexts)))

    def _steps(self, cell: Cell) -> int:
        if cell.part == "decode":
            return len(self.settings.modes) * self.settings.rounds
        return self.settings.haystacks if cell.part == "retrieval" else self.settings.windows

    def _measure(self, cell: Cell, step: Callable[[int], object]) -> dict[str, Any]:
        settings, model = self.settings, self.model
        if cell.part == "decode":
            measured = decoding.measure(
                model,
                self._decoded_onto(),
                cell.context,
                modes=settings.modes,
                rounds=settings.rounds,
                tokens=settings.tokens,
                batch=settings.batch,
                step=lambda mode: step(1),
            )
            return {"context": cell.context, "modes": measured}
        subspace = self._subspace(cell)
        with nullcontext() if subspace is None else attach(model, subspace):
            if cell.part == "retrieval":
                haystacks = (self.texts.haystack(n, cell.context, settings.needles) for n in range(settings.haystacks))
                found = quality.retrieval(model, _stepping(haystacks, step))
            else:
                found = quality.perplexity(model, _stepping(self._windows(cell.context), step))
        return {
            "context": cell.context,
            "projection": cell.projection,
            "layers": cell.layers,
            "rank": cell.rank,
        } | found

    def _decoded_onto(self) -> Subspace:
        settings = self.settings
        if settings.subspace is None:
            return shapes.random_subspace(self.model, settings.decode_rank, seed=settings.seed)
        return truncated(Subspace.from_pretrained(settings.subspace, self.model), settings.decode_rank)

    def _windows(self, context: int) -> Iterator[list[int]]:
        if self.settings.text is None:
            return (self.texts.window(number, context) for number in range(self.settings.windows))
        try:
            text = Path(self.settings.text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"text: {self.settings.text} cannot be read as text ({error})") from None
        return windows_of(self._loaded[1](text)["input_ids"], context, self.settings.windows)

    def _subspace(self, cell: Cell) -> Subspace | None:
        """The cell's, None for the unprojected model."""
        if cell.projection == "none":
            return None
        whole = self._subspaces.get((cell.projection, cell.layers))
        if whole is None:
            calibrated = self._calibrated(cell.layers)
            if cell.projection == "random":
                rank = max(self.settings.ranks)
                whole = shapes.random_subspace(self.model, rank, calibrated.layers, seed=self.settings.seed)
            else:
                whole = calibrated
            self._subspaces[cell.projection, cell.layers] = whole
        return truncated(whole, cell.rank)

    def _calibrated(self, layers: str) -> Subspace:
        settings = self.settings
        if settings.subspace is not None:
            return Subspace.from_pretrained(settings.subspace, self.model)
        folder = self.out / SUBSPACES / layers.replace(",", "-")
        if not (folder / MANIFEST).is_file():
            self._calibrate(layers, folder)
        return Subspace.from_pretrained(folder, self.model)

    def _calibrate(self, layers: str, folder: Path) -> None:
        settings = self.settings
        self.say(f"calibrate: layers {layers}")
        examples = self.texts.examples(settings.examples, CALIBRATION_TOKENS)
        subspace = calibrate(
            self.model,
            self._loaded[1],
            examples,
            layers=self._layers(layers),
            rank=max(settings.ranks),
            max_length=2 * CALIBRATION_TOKENS,
            progress=False,
        )
        subspace.save_pretrained(folder)
        self.results.setdefault("energies", {})[layers] = {
            str(rank): min(basis.energy(rank) for side in (subspace.k, subspace.v) for basis in side.values())
            for rank in settings.ranks
        }
        write_json(self.out / RESULTS, self.results)

    def _layers(self, layers: str) -> list[int]:
        chosen: str | list[int] = layers
        if layers not in ("paper", "all"):
            try:
                chosen = [int(part) for part in layers.split(",")]
            except ValueError:
                raise InputError(f'layers: expected "paper", "all" or indices such as 1,2, got {layers!r}') from None
        return choose_layers(find_sites(self.model), chosen, depth(self.model))


def truncated(subspace: Subspace, rank: int) -> Subspace:
    """The first `rank` directions of every basis."""

    def cut(basis: Basis) -> Basis:
        return Basis(basis.basis[:, :rank].contiguous(), basis.singular_values)

    k, v = ({layer: cut(basis) for layer, basis in side.items()} for side in (subspace.k, subspace.v))
    return Subspace(k, v, subspace.provenance)


def _stepping(values: Iterator[Any], step: Callable[[int], object]) -> Iterator[Any]:
    for value in values:
        yield value
        step(1)


def _stored(out: Path, settings: Settings) -> dict[str, Any]:
    path = out / RESULTS
    if not path.is_file():
        return {}
    stored: dict[str, Any] = read_object(path)
    asked = settings.to_dict()
    changed = sorted(name for name in asked if stored.get("settings", {}).get(name) != asked[name])
    if changed:
        raise InputError(f"out: {out} belongs to a run of other settings (different: {', '.join(changed)})")
    return stored


def _environment(model: nn.Module) -> dict[str, Any]:
    parameter = next(model.parameters())
    device = parameter.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": f"{name}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "parameters": sum(each.numel() for each in model.parameters()),
        "attention": getattr(model.config, "_attn_implementation", ""),
        "versions": versions(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@contextmanager
def _owned(out: Path) -> Iterator[None]:
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is not a folder")
    if out.is_dir() and not (out / RESULTS).exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise InputError(f"out: {out} is not empty and holds no run")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / INSIDE, "out"):
        for leftover in out.glob(".*.tmp"):  # of a run that was killed while it wrote
            leftover.unlink()
        yield
