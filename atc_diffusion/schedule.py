"""Decides which clusters a call of a network reuses. Knows nothing of tokens or models.

Clusters are reused by content: by calls whose inputs continue those that the clusters were made from. A scheduler's
timesteps serve only to tell runs apart and to measure progress.
"""

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atc_diffusion.clustering.tree import Cuttable
from atc_diffusion.extrapolation import ORDER
from atc_diffusion.following import Following
from atc_diffusion.forecast import Forecasts, Visit, why_never
from atc_diffusion.inputs import Inputs, Sharing, changes
from atc_diffusion.merge_map import MergeMap
from atc_diffusion.moment import Moment, Step, rising_time
from atc_diffusion.report import RunLog

PATIENCE = ORDER + 1  # moments for which clusters wait to serve again: forecasting may skip `ORDER`, guidance one
MAX_SOURCES = 256  # a loop that never leaves its moment forgets its oldest clusters here


@dataclass(frozen=True)
class Clusters:
    """The clusters made from the tokens of one call.

    Attributes:
        sharing: which items of the batch share clusters; None: each has its own.
        trees: by the name of what they cluster.
        maps: cuts of these trees, by that name and the number of clusters.
    """

    sharing: Sharing | None = None
    trees: dict[object, Cuttable] = field(default_factory=dict)
    maps: dict[tuple[object, int], MergeMap] = field(default_factory=dict)

    def keep_maps(self, counts: set[int]) -> None:
        """Forget the cuts of other `counts`, so that a schedule of shares does not pile them up."""
        for key in [key for key in self.maps if key[1] not in counts]:
            del self.maps[key]


@dataclass
class Source:
    """The inputs that clusters were made from, and the last moment at which they served."""

    inputs: Inputs
    clusters: Clusters
    served: int


class Run:
    """Calls whose timesteps never go back, and a log of what happened in them."""

    def __init__(self) -> None:
        self.log = RunLog()
        self.following = Following()
        self.forecasts: Forecasts | None = None
        self.start = self.time = -torch.inf
        self.moments = 0
        self._sources: list[Source] = []
        self._pace = torch.inf

    def step(self, time: float, moment: Moment | None) -> Step:
        """The step of a call at `time`, which is the present or the next one.

        Where the number of steps is unknown, a step may be the last if two more like it would go beyond the end.
        """
        if moment is not None:
            return Step(moment.index, moment.index == moment.count - 1, 1 / moment.count)
        pace = time - self.time if time > self.time else self._pace
        share = pace / -self.start if -torch.inf < self.start < 0 else 0.0
        return Step(self.moments - (time == self.time), time + 2 * pace >= 0, share)

    def visit(self, inputs: Inputs, timestep: Tensor, moment: Moment | None, tolerance: float) -> Visit:
        """A call, forecast if that is expected to change the latents by at most the step's share of `tolerance`."""
        step = self.step(self.time, moment)
        if self.forecasts is None:
            self.forecasts = Forecasts(step.index, tolerance, why_never(timestep, moment))
        return self.forecasts.visit(inputs, step)

    def follow(self, denoiser: "Run | None", inputs: Inputs, moment: Moment | None) -> Visit:
        """A call of a ControlNet, skipped where the coming one of its `denoiser` will be forecast."""
        step = (denoiser or self).step(self.time, moment)
        return self.following.visit(denoiser.forecasts if denoiser else None, inputs, step)

    def advance(self, time: float) -> None:
        """Come to a call at `time`, which rises from noise to picture."""
        if not self.moments:
            self.start = time
        if time > self.time:
            self.time, self.moments, self._pace = time, self.moments + 1, time - self.time
            self._sources = [each for each in self._sources if self.moments - each.served <= PATIENCE]

    def clusters(self, inputs: Inputs, threshold: float, share_across_guidance: bool) -> Clusters:
        """Clusters for a call: those whose inputs have since changed by at most `threshold`, or new ones."""
        if not inputs.readable:
            return Clusters()
        source = self._continued(inputs, threshold)
        if source is not None:
            source.served = self.moments
            return source.clusters
        # Parts of guidance have equal latents; but at the first moment, so have different prompts of one seed.
        clusters = Clusters(Sharing.of(inputs.latents) if share_across_guidance and self.moments > 1 else None)
        if threshold:
            self._sources = [*self._sources[1 - MAX_SOURCES :], Source(inputs.clone(), clusters, self.moments)]
        return clusters

    def _continued(self, inputs: Inputs, threshold: float) -> Source | None:
        """The source nearest to `inputs`, if it is near enough."""
        candidates = [source for source in self._sources if source.inputs.kind == inputs.kind]
        if not candidates:
            return None
        distances = changes(inputs, [source.inputs for source in candidates])
        nearest = min(distances)
        return candidates[distances.index(nearest)] if nearest <= threshold else None


class Schedule(threading.local):
    """The runs that one network is in: one for each thread and tensor of timesteps, and forgotten with that.

    Timesteps that are no entries of a longer tensor make one run for each thread.
    """

    def __init__(self) -> None:
        self._placed: weakref.WeakKeyDictionary[torch.UntypedStorage, Run] = weakref.WeakKeyDictionary()
        self._unplaced = Run()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, and what is read from a file, begin afresh."""
        return Schedule, ()

    def run(self, moment: Moment | None, timestep: object) -> Run:
        """The run that a call belongs to: a new one if its timestep goes back."""
        time = rising_time(timestep) if moment is None else moment.index
        run = self.present(moment, time) or Run()
        if moment is None:
            self._unplaced = run
        else:
            self._placed[moment.timesteps] = run
        run.advance(time)
        return run

    def present(self, moment: Moment | None, time: float) -> Run | None:
        """The run that a call at `time` would continue."""
        run = self._unplaced if moment is None else self._placed.get(moment.timesteps)
        return run if run is not None and run.time <= time else None
