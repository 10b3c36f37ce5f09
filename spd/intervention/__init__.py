"""Projecting K and V of a model, and taking the projection out again."""

from spd.intervention.attach import Attachment, attach, refuse_if_attached

__all__ = ["Attachment", "attach", "refuse_if_attached"]
