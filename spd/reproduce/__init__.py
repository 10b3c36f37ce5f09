"""Remaking the tables of arXiv 2605.22675 on any checkpoint, and the comparisons that the paper lacks."""

from spd.reproduce.experiment import reproduce
from spd.reproduce.settings import MINIATURE, ReproduceSettings, load_settings
from spd.reproduce.tables import DEFAULT_TABLES, TABLES

__all__ = ["DEFAULT_TABLES", "MINIATURE", "TABLES", "ReproduceSettings", "load_settings", "reproduce"]
