"""Fused kernels of Self-Policy Distillation, each with a plain PyTorch reference beside it.

Importing this package imports PyTorch alone; Triton is imported when a kernel first runs.
"""

from __future__ import annotations

from spd_kernels.covariance.api import GradientCovariance
from spd_kernels.project.api import project, project_kv
from spd_kernels.tap.api import tap

__all__ = ["GradientCovariance", "project", "project_kv", "tap"]
