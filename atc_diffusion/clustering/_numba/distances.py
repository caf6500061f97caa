"""Distance matrices, from tokens that are prepared by compiled loops."""

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from atc_diffusion.clustering._numba.compiled import Array, entry, inner
from atc_diffusion.clustering._prepare import FAR, prepare
from atc_diffusion.clustering._torch import pairwise_distances


def distance_matrices(tokens: Tensor, linkage: str, metric: str) -> Tensor:
    """Distances `[B, N, N]`; squared for Ward linkage, whose update is linear in squares."""
    if metric == "precomputed":
        given = prepare(tokens, metric)
        return given.square_() if linkage == "ward" else given
    tokens = tokens.contiguous()
    prepared = torch.empty_like(tokens)
    (_normalize if metric == "cosine" else _centre)(tokens.numpy(), prepared.numpy())
    if linkage != "ward":
        return pairwise_distances(prepared, metric)
    norms = prepared.square().sum(dim=2)
    return torch.baddbmm(norms[:, None, :], prepared, prepared.mT, alpha=-2).add_(norms[:, :, None])


@entry
def _normalize(tokens: Array, prepared: Array) -> None:
    """`prepare` for cosine distance, in one pass."""
    for item in range(len(tokens)):
        for i in range(tokens.shape[1]):
            _clean(tokens[item, i], prepared[item, i])
            scale = 1 / max(math.sqrt(_square_norm(prepared[item, i])), 1e-12)
            for channel in range(tokens.shape[2]):
                prepared[item, i, channel] *= scale


@entry
def _centre(tokens: Array, prepared: Array) -> None:
    """`prepare` for Euclidean distance, in two passes."""
    for item in range(len(tokens)):
        mean = np.zeros(tokens.shape[2])
        for i in range(tokens.shape[1]):
            _clean(tokens[item, i], prepared[item, i])
            mean += prepared[item, i]
        mean /= max(tokens.shape[1], 1)
        for i in range(tokens.shape[1]):
            for channel in range(tokens.shape[2]):
                prepared[item, i, channel] -= mean[channel]


@inner
def _clean(token: Array, finite: Array) -> None:
    far = token.dtype.type(FAR)
    for channel in range(len(token)):
        value = min(max(token[channel], -far), far)
        finite[channel] = value if abs(token[channel]) < np.inf else 0


@njit(nogil=True, fastmath={"reassoc", "contract"})
def _square_norm(token: Array) -> float:
    total = 0.0
    for channel in range(len(token)):
        total += np.float64(token[channel]) ** 2
    return total
