"""Subspaces of R^d, each given by a basis: the angles between two of them, and what they make together.

A basis is (d, r) with orthonormal columns, in any floating-point type. One stored in float32 is orthonormal to some
1e-7 only, so every function orthonormalises anew in float64, and returns float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SAME = 0.01
"""Degrees below which `union` takes two directions for one: bases stored in float32 tell no finer."""


def orthonormal(basis: Tensor) -> Tensor:
    """Another basis of the same space, orthonormal in float64."""
    return torch.linalg.qr(basis.double()).Q


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """The min(r_a, r_b) principal angles in radians, ascending.

    The cosines are the singular values of A^T B, and tell large angles well; the sines are those of (I - P_A) B, and
    tell small ones well. Each angle is taken from the one that does (Bjorck and Golub, Math. Comp. 27, 1973).
    """
    large, small = sorted((orthonormal(a), orthonormal(b)), key=lambda basis: -basis.shape[1])
    inside = large.T @ small
    cosines = torch.linalg.svdvals(inside)
    sines = torch.linalg.svdvals(small - large @ inside).flip(0)
    return torch.where(cosines.square() < 0.5, cosines.clamp(max=1).acos(), sines.clamp(max=1).asin())


def union(a: Tensor, b: Tensor, same: float = SAME) -> Tensor:
    """The span of both: r_a + r_b directions, less those that they share within `same` degrees.

    The first k are the k-dimensional space closest to both, the largest tr U^T (P_A + P_B) U: what they share comes
    first, what sets them apart last.
    """
    u, singular_values, _ = torch.linalg.svd(torch.cat([orthonormal(a), orthonormal(b)], dim=1), full_matrices=False)
    # A pair of principal directions at an angle t has the singular values sqrt(1 + cos t) and sqrt(1 - cos t).
    return u[:, singular_values > math.sqrt(2) * math.sin(math.radians(same) / 2)]


def intersection(a: Tensor, b: Tensor, angle: float) -> Tensor:
    """The directions half-way between principal directions at most `angle` degrees apart, the closest pair first.

    There may be none: (d, 0).
    """
    count = int((principal_angles(a, b).rad2deg() <= angle).sum())
    a, b = orthonormal(a), orthonormal(b)
    y, _, z = torch.linalg.svd(a.T @ b, full_matrices=False)
    return orthonormal(a @ y[:, :count] + b @ z.T[:, :count])


def complement(basis: Tensor) -> Tensor:
    """The d - r directions orthogonal to all of the basis, in no particular order; (d, 0) where r = d."""
    return torch.linalg.qr(basis.double(), mode="complete").Q[:, basis.shape[1] :]
