"""Clusters as the plain torch form keeps them, and the distances between them."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from atc_diffusion.devices import is_traced

LARGEST_ENTRY = 1e14  # a sum of such squares over all channels and tokens stays finite in float32


def prepare(tokens: Tensor, metric: str) -> Tensor:
    """Make all distances finite, and tokens unit vectors for cosine or centred for Euclidean distance."""
    if metric == "precomputed":
        return tokens.nan_to_num(LARGEST_ENTRY, LARGEST_ENTRY, LARGEST_ENTRY).clamp(max=LARGEST_ENTRY)
    tokens = finite(tokens)
    return F.normalize(tokens, dim=2) if metric == "cosine" else tokens - tokens.mean(dim=1, keepdim=True)


def finite(tokens: Tensor) -> Tensor:
    """Tokens with 0 for entries that are not finite, and no entry so large that a distance would not be."""
    if tokens.device.type == "cpu" and tokens.numel() and not is_traced(tokens):
        low, high = (x.numpy() for x in tokens.aminmax())  # a pass that writes nothing; NaN if there is one
        if low >= -LARGEST_ENTRY and high <= LARGEST_ENTRY:
            return tokens
    return tokens.nan_to_num(0, 0, 0).clamp(-LARGEST_ENTRY, LARGEST_ENTRY)


def pairwise_distances(tokens: Tensor, metric: str) -> Tensor:
    """Distances `[B, N, N]` of prepared tokens."""
    if metric == "precomputed":
        return tokens
    return cosine_distances(tokens, tokens) if metric == "cosine" else torch.cdist(tokens, tokens)


def cosine_distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances `[B, N, M]` between unit vectors `[B, N, C]` and `[B, M, C]`."""
    return torch.baddbmm(a.new_ones(1), a, b.mT, alpha=-1)  # 1 - a b, in one pass


class Clusters(Protocol):
    """The active clusters, in slots `[B, M]`."""

    sizes: Tensor

    def distances(self, rows: Tensor, start: int = 0) -> Tensor:
        """Distances `[B, Q, M - start]`, or a monotone function of them, from `rows` `[B, Q]` to slots >= `start`."""

    def heights(self, merged: Tensor) -> Tensor:
        """Distances from values that `distances` returned."""

    def merge(self, keep: Tensor, partners: Tensor, d: Tensor) -> None:
        """Keep the slots `keep` `[B, M']`, each joined with its slot in `partners` (or itself) at distance `d`."""


def make_clusters(tokens: Tensor, linkage: str, metric: str) -> Clusters:
    """Every token of prepared `tokens` as a cluster of its own."""
    if means := MATRIX_FREE.get((linkage, metric)):
        return means(tokens)
    return _Matrix(pairwise_distances(tokens, metric), linkage)


class _Means:
    """Clusters as the means of their tokens: memory `O(N C)`, no matrix of distances."""

    def __init__(self, tokens: Tensor) -> None:
        self.means = tokens
        self.sizes = tokens.new_ones(tokens.shape[:2])

    def merge(self, keep: Tensor, partners: Tensor, d: Tensor) -> None:
        sizes, added = self.sizes.gather(1, keep), self.sizes.gather(1, partners)
        added = added.masked_fill(partners == keep, 0)
        # A step towards the partner, not a sum: the mean of identical tokens stays exactly that token.
        self.sizes = sizes + added
        self.means = torch.lerp(_rows(self.means, keep), _rows(self.means, partners), (added / self.sizes)[..., None])


class _CosineMeans(_Means):
    """Average linkage over cosine distance: the mean of all cosines is the product of the mean unit vectors."""

    def distances(self, rows: Tensor, start: int = 0) -> Tensor:
        return torch.bmm(_rows(self.means, rows).neg_(), self.means[:, start:].mT)

    def heights(self, merged: Tensor) -> Tensor:
        return (1 + merged).clamp_(min=0)


class _WardMeans(_Means):
    """Ward's linkage, squared and halved: n_i n_j / (n_i + n_j) times the squared distance of the means."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__(tokens)
        self.norms = self.means.square().sum(dim=2)

    def merge(self, keep: Tensor, partners: Tensor, d: Tensor) -> None:
        super().merge(keep, partners, d)
        self.norms = self.means.square().sum(dim=2)

    def distances(self, rows: Tensor, start: int = 0) -> Tensor:
        means, norms, sizes = (x[:, start:] for x in (self.means, self.norms, self.sizes))
        squared = torch.baddbmm(norms[:, None, :], _rows(self.means, rows), means.mT, alpha=-2)
        squared.add_(self.norms.gather(1, rows)[:, :, None])
        return squared.div_(1 / self.sizes.gather(1, rows)[:, :, None] + 1 / sizes[:, None, :])

    def heights(self, merged: Tensor) -> Tensor:
        return (2 * merged).clamp_(min=0).sqrt_()


# Functions of means and sizes alone, so that these need no N x N matrix.
MATRIX_FREE: dict[tuple[str, str], Callable[[Tensor], Clusters]] = {
    ("average", "cosine"): _CosineMeans,
    ("ward", "euclidean"): _WardMeans,
}


def _average(d_ki: Tensor, d_kj: Tensor, d_ij: Tensor, n_i: Tensor, n_j: Tensor, n_k: Tensor) -> Tensor:
    return torch.lerp(d_ki, d_kj, n_j / (n_i + n_j))


def _ward(d_ki: Tensor, d_kj: Tensor, d_ij: Tensor, n_i: Tensor, n_j: Tensor, n_k: Tensor) -> Tensor:
    squared = (n_i + n_k) * d_ki**2 + (n_j + n_k) * d_kj**2 - n_k * d_ij**2
    return (squared / (n_i + n_j + n_k)).clamp(min=0).sqrt()


# Distance of a cluster k from the union of i and j (Lance & Williams 1967), given the distances `d` and sizes `n` of
# the three, which broadcast. ATC's Eqs. 1 to 3, and Ward's as SciPy defines it.
_UPDATES: dict[str, Callable[..., Tensor]] = {
    "single": lambda d_ki, d_kj, *_: torch.minimum(d_ki, d_kj),
    "complete": lambda d_ki, d_kj, *_: torch.maximum(d_ki, d_kj),
    "average": _average,
    "ward": _ward,
}


class _Matrix:
    """Any linkage, on the matrix `[B, M, M]` of distances."""

    def __init__(self, matrix: Tensor, linkage: str) -> None:
        self.matrix = matrix
        self.sizes = matrix.new_ones(matrix.shape[:2])
        self._update = _UPDATES[linkage]

    def distances(self, rows: Tensor, start: int = 0) -> Tensor:
        return _rows(self.matrix, rows)[:, :, start:]

    def heights(self, merged: Tensor) -> Tensor:
        return merged

    def merge(self, keep: Tensor, partners: Tensor, d: Tensor) -> None:
        """Compute the rows of the unions from the rows of both parts; then, within these, their columns likewise."""
        unions = where_first(partners != keep)
        d, first, second = (x.gather(1, unions) for x in (d, keep, partners))
        alone = first == second  # pads the items that have fewer unions than others, and changes nothing
        n_first, n_second = self.sizes.gather(1, first), self.sizes.gather(1, second).masked_fill(alone, 0)
        parts = (alone, d, n_first, n_second)
        rows = self._joined(_rows(self.matrix, first), _rows(self.matrix, second), parts, self.sizes, dim=2)
        self.sizes = self.sizes.gather(1, keep).scatter_add_(1, unions, n_second)
        n_unions = self.sizes.gather(1, unions)
        # Distances between two unions, for which the sizes of the rows are the new ones.
        between = self._joined(_columns(rows, first), _columns(rows, second), parts, n_unions, dim=1)
        rows = _columns(rows, keep).scatter_(2, unions[:, None, :].expand_as(between), between)
        self.matrix = _columns(_rows(self.matrix, keep), keep)
        self.matrix.scatter_(1, unions[:, :, None].expand_as(rows), rows)
        self.matrix.scatter_(2, unions[:, None, :].expand_as(rows.mT), rows.mT)  # symmetric to the bit

    def _joined(
        self, d_ki: Tensor, d_kj: Tensor, parts: tuple[Tensor, Tensor, Tensor, Tensor], n_k: Tensor, dim: int
    ) -> Tensor:
        """Distances to the unions of `parts`, which lie across dimension `dim` of the distances to these parts."""
        alone, *parts_across = (x.unsqueeze(dim) for x in parts)
        return torch.where(alone, d_ki, self._update(d_ki, d_kj, *parts_across, n_k.unsqueeze(3 - dim)))


def where_first(mask: Tensor) -> Tensor:
    """Slots `[B, Q]` where `mask` `[B, M]` is nonzero, largest first; shorter items are padded with others."""
    longest = int(mask.count_nonzero(dim=1).max())
    return mask.sort(dim=1, descending=True, stable=True).indices[:, :longest]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `[B, Q, ...]` of `x` `[B, M, ...]` at `index` `[B, Q]`."""
    offsets = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + offsets).flatten()).unflatten(0, index.shape)


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """Columns `[B, R, Q]` of `x` `[B, R, M]` at `index` `[B, Q]`."""
    return x.gather(2, index[:, None, :].expand(-1, x.shape[1], -1))
