"""Fused kernels of Self-Policy Distillation, each with a plain PyTorch reference beside it.

Importing this package imports PyTorch alone; Triton is imported when a kernel first runs.
"""

from __future__ import annotations

from spd_kernels.covariance.api import GradientCovariance, update_many
from spd_kernels.latent_attention.api import latent_attention
from spd_kernels.project.api import project, project_, project_kv, project_kv_
from spd_kernels.rope.api import project_rope
from spd_kernels.routed.api import project_routed, stack_subspaces
from spd_kernels.tap.api import tap

__all__ = [
    "GradientCovariance",
    "latent_attention",
    "project",
    "project_",
    "project_kv",
    "project_kv_",
    "project_rope",
    "project_routed",
    "stack_subspaces",
    "tap",
    "update_many",
]
