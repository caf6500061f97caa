"""One image on its way from noise: which calls continue it, and what its sampler makes of outputs.

The latents of a step are made of those of the step before, of the clean images that the network saw then (of several
parts of guidance, as a weighted sum), of those of earlier steps if the solver has a memory, and of new noise. A least
squares fit tells these apart. It needs their inner products alone, so a step reads few numbers from the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atc_diffusion.calls.inputs import Inputs, equal_items
from atc_diffusion.calls.position import Position
from atc_diffusion.forecasting.inpainting import precise, where_sampled
from atc_diffusion.forecasting.series import SIGNIFICANT, Parts, Series, norms

PATIENCE = 3  # steps that an image, or one of its conditions, may be away: guidance may skip some
MEMORY = 3  # earlier clean images that solvers of up to fourth order use
LEAST_KEPT = 0.1  # correlation
EDITED = 1.25  # times as much as a sampler's noise may be new in latents that nobody edited
EXPLAINED = 0.05  # of the latents' norm: a remainder so small that they must be of this image
ROUNDED = 1e-5  # of the square of the latents' norm: a remainder that may be rounding in half precision
EXACT = 1e-12  # of that square: a remainder that is rounding in single precision
GUIDED = 2.5  # times the error of one part: that of all together at guidance 3, with which the budget was measured


@dataclass(frozen=True)
class Fit:
    """How latents are made of those of the step before.

    Attributes:
        kept: the correlation of what is left of the noise in both; of the worst image.
        new: the norm of what the step before does not explain, relative to the latents; of the worst image.
        weights: of the clean images of the parts of guidance, which sum to 1; of the image with the most guidance.
        roughness: by how much more the solver weighs errors that alternate than errors that stay; 1 without memory.
        unexplained: what is new, such as a sampler's noise, `[M, C, ...]`, float32.
        sampled: where the sampler made the latents, as `where_sampled` has it; None: everywhere.
    """

    kept: float
    new: float
    weights: tuple[float, ...]
    roughness: float
    unexplained: Tensor
    sampled: Tensor | None


@dataclass
class Trajectory:
    """One image, or several that are drawn together.

    Attributes:
        position: of its last call.
        latents: those of its last call, the denoised channels of each image once, `[M, C, ...]`, float32.
        before: those of the step before, in the first steps.
        is_half: whether the network is called in half precision, whose rounding is noise.
        series: one for each condition.
        past: the clean images of earlier steps, the newest first, each for all parts of guidance, `[M, C, ...]`.
        fit: of the last step; None at the first.
        last_index: of the step before.
        fresh: what `Fit.new` would be at the last step with an ancestral sampler.
        usual: the largest ratio of the two at the steps before that.
        refusal: why no call of the present step is forecast; "" if one may be.
        roughness: the largest `Fit.roughness` of steps shortly before which none was forecast.
        num_computed: how many steps were computed since one was forecast.
        noise: the sum of what was new at each step, on the scale of clean images, `[M, C, ...]`; None at the first.
    """

    position: Position
    latents: Tensor
    is_half: bool
    series: list[Series] = field(default_factory=list)
    past: list[list[Tensor]] = field(default_factory=list)
    fit: Fit | None = None
    last_index: int = -1
    fresh: float = 0.0
    usual: float = math.inf
    refusal: str = ""
    roughness: float = 1.0
    num_computed: float = math.inf
    noise: Tensor | None = None
    before: Tensor | None = None

    @property
    def is_filling(self) -> bool:
        """Whether the solver's memory is not full yet, and so it is not known how far it reaches."""
        return self.roughness > 1 and len(self.past) < MEMORY

    @property
    def num_bytes(self) -> int:
        """Of the tensors that it keeps, all of about one size."""
        past = sum(x.numel() for each in self.past for x in each)
        return (self.latents.numel() * (5 + 8 * sum(len(each.parts) for each in self.series)) + past) * 4

    @property
    def is_surprising(self) -> bool:
        """Whether more of the present latents is new than a sampler like that of the steps before adds: an edit."""
        return self.fit is not None and self.fit.new > EDITED * min(self.usual, 1.0) * self.fresh + 0.02

    def is_at(self, latents: Tensor, position: Position) -> bool:
        """Whether a call with `latents` is of the present step of this image, as for another condition."""
        return position.index == self.position.index and torch.equal(latents, self.latents)

    def fit_to(self, latents: Tensor, position: Position) -> Fit | None:
        """How the `latents` of a later step would be made of this image; None if they are of something else."""
        parts = self._parts()
        if not self.position.index < position.index <= self.position.index + PATIENCE:
            return None
        if not parts or latents.shape != self.latents.shape:
            return None
        past = [each for each in self.past if len(each) == len(parts)]
        sampled = None if self.fit is None else self.fit.sampled
        if sampled is None and self.before is not None and len(self.past) < MEMORY:
            sampled = where_sampled(torch.stack([self.before, self.latents, latents]), self.is_half)
        fit = _fit(self.latents, [parts, *past], latents, sampled, self.is_half)
        enough = max(SIGNIFICANT / math.sqrt(latents[0].numel()), LEAST_KEPT)
        return fit if fit is not None and (fit.kept > enough or fit.new < EXPLAINED) else None

    def advance(self, latents: Tensor, position: Position, fit: Fit, fresh: float, alpha: float) -> None:
        """Come to the latents of a later step, in which a clean image has the factor `alpha`."""
        if self.fit is not None and not self.is_surprising:
            now = self.fit.new / max(self.fresh, 1e-6)
            self.usual = max(now, self.usual if self.usual < math.inf else 0.0)
        if self.fit is not None and fit.sampled is not self.fit.sampled:  # fits without it told nothing
            self.usual, self.roughness = math.inf, 1.0
        self.last_index, self.fresh = self.position.index, fresh
        self._settle_errors(fit.weights)
        self.past = [self._parts(), *self.past][:MEMORY]
        self.noise = fit.unexplained / max(alpha, 1e-6) + (0.0 if self.noise is None else self.noise)
        self.before = self.latents if len(self.past) < MEMORY else None
        self.fit, self.position, self.latents = fit, position, latents
        self.num_computed = self.num_computed + 1 if self.refusal else 0
        if self.num_computed > MEMORY:  # a forecast follows from the images before it, and so could stand for them
            self.roughness = max(self.roughness, fit.roughness)
        self.series = [each for each in self.series if each.index >= position.index - PATIENCE]

    def _settle_errors(self, weights: tuple[float, ...]) -> None:
        """Learn how far off the last forecasts were: each part, and all together, as guidance weighs them."""
        series = [(each, each.off) for each in self.series if each.off is not None]
        parts = [off[items] for each, off in series for items in each.parts]
        if not parts:
            return
        errors = [norms(part).max() for part in parts]
        if len(parts) == len(weights):
            together = torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)]).sum(dim=0)
            errors.append(norms(together).max() / GUIDED)
        error = float(torch.stack(errors).max())
        for each, _ in series:
            each.error, each.off = error, None

    def noise_in(self, parts: Parts) -> Tensor:
        """`noise`, as the items `[B, C, ...]` of a batch have it."""
        noise = torch.zeros_like(self.latents) if self.noise is None else self.noise
        image_of = {item: image for items in parts for image, item in enumerate(items)}
        return noise[[image_of[item] for item in range(len(image_of))]]

    def matching(self, inputs: Inputs, parts: Parts) -> list[Series]:
        """The conditions that no call of this step has had yet and that a call with these inputs may continue."""
        waiting = [each for each in self.series if each.index < self.position.index and each.parts == parts]
        channels = self.latents.shape[1]  # the others are conditions, such as a mask
        return [
            each
            for each in waiting
            if each.inputs.same_conditions(inputs)
            and torch.equal(each.inputs.latents[:, channels:], inputs.latents[:, channels:])
        ]

    def _parts(self) -> list[Tensor]:
        """The clean images that the sampler got at the last step, one for each part of guidance, `[M, C, ...]`."""
        last = [each for each in self.series if each.index == self.position.index]
        return [each.clean[items] for each in last if each.clean is not None for items in each.parts]


def parts_of(latents: Tensor) -> Parts:
    """The parts of guidance in a batch of denoised latents: of each, at which items the images stand."""
    places: dict[int, list[int]] = {}
    for item, row in enumerate(equal_items(latents)):
        places.setdefault(row.index(True) if True in row else item, []).append(item)
    images = list(places.values())
    if len(set(map(len, images))) > 1:  # no parts of guidance, which repeat all images equally often
        images = [[item] for item in range(len(latents))]
    return list(map(list, zip(*images, strict=True)))


def _fit(
    latents: Tensor, steps: Sequence[Sequence[Tensor]], target: Tensor, sampled: Tensor | None, is_half: bool
) -> Fit | None:
    """Least squares of `target` by the latents before it and by clean images of `steps`, the newest first.

    All tensors are `[M, ...]`, and all steps have as many clean images, one for each part of guidance. What is not
    `sampled` does not count.
    """
    columns = [latents, *chain.from_iterable(steps), target]
    flat = precise(torch.stack([column.flatten(1) for column in columns], dim=1))  # [M, K, D]
    if sampled is not None:
        flat = flat * sampled.flatten(1)[:, None]
    products = (flat @ flat.mT).cpu().numpy()
    if not np.isfinite(products).all() or not products[:, -1, -1].all():
        return None
    kept, new, rows = zip(*(_fit_one(each / each[-1, -1], len(steps), is_half) for each in products), strict=True)
    weights = np.stack(rows)
    explained = (torch.tensor(weights).to(flat)[:, None] @ flat[:, :-1])[:, 0]
    images = weights[:, 1:].reshape(len(weights), len(steps), -1)
    of_steps, of_parts = images.sum(axis=2), images.sum(axis=1)
    totals = of_steps.sum(axis=1)
    roughness = np.abs(of_steps).sum(axis=1) / np.maximum(np.abs(totals), 1e-9)
    shares = of_parts / np.where(totals == 0, 1.0, totals)[:, None]
    return Fit(
        min(kept),
        max(new),
        tuple(shares[np.abs(shares).sum(axis=1).argmax()].tolist()),
        max(1.0, float(roughness.max())),
        (flat[:, -1] - explained).reshape(target.shape).float().to(target.device),
        sampled,
    )


def _fit_one(products: NDArray[np.float64], steps: int, is_half: bool) -> tuple[float, float, NDArray[np.float64]]:
    """`kept` and `new` of one image and the weights of all columns, whose inner products are `[K + 1, K + 1]`.

    The last one is what the others are to explain, and the products are relative to its square.
    """
    parts = (len(products) - 2) // steps
    _, without = _solve(products, range(1, 1 + parts))
    weights, new = _solve(products, range(1 + parts))
    kept = math.sqrt(max(without - new, 0) / without) if weights[0] > 0 and without > 0 else 0.0
    # Where the past explains what the present does not, the solver has a memory; rounding may hide most of that.
    for known in range(2, steps + 1):
        longer, rest = _solve(products, range(1 + known * parts))
        if new > EXACT and rest < (0.8 if is_half and new < ROUNDED else 0.1) * new:
            weights, new = longer, rest
    return kept, math.sqrt(new), np.pad(weights, (0, len(products) - 1 - len(weights)))


def _solve(products: NDArray[np.float64], columns: Sequence[int]) -> tuple[NDArray[np.float64], float]:
    """The weights of these columns in the last one, and the square of what they leave, relative to its own."""
    matrix, right = products[np.ix_(columns, columns)], products[columns, -1]
    scale = np.sqrt(np.maximum(np.diag(matrix), 1e-30))
    weights = np.linalg.lstsq(matrix / np.outer(scale, scale), right / scale, rcond=1e-12)[0] / scale
    return weights, max(float(1 - 2 * weights @ right + weights @ matrix @ weights), 0.0)
