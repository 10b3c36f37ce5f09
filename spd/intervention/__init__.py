"""Projecting K and V of a model, and taking the projection out again."""

from spd.intervention.attach import Attachment, attach, refuse_if_attached
from spd.intervention.latent_cache import cache_bytes
from spd.intervention.nearest_centroid import NearestCentroid
from spd.intervention.router import Decision, Router

__all__ = ["Attachment", "Decision", "NearestCentroid", "Router", "attach", "cache_bytes", "refuse_if_attached"]
