"""Checkpoints for engines that know nothing of this package: the projection, or an adapter, in the weights."""

from spd.export.adapter import export_adapter, export_merged
from spd.export.folded import export_folded

__all__ = ["export_adapter", "export_folded", "export_merged"]
