"""The patch of one network: follows the network's calls and holds the hooks of its layers."""

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from atc_diffusion.adapters import Args, Demands, Family, Kwargs, Layer
from atc_diffusion.adapters.obstacles import Limit
from atc_diffusion.call import Call, present
from atc_diffusion.config import MergeConfig
from atc_diffusion.forecast import Visit
from atc_diffusion.inputs import Inputs
from atc_diffusion.layer_hooks import LayerHooks
from atc_diffusion.moment import Moment, progress_by_value
from atc_diffusion.report import ForecastSummary, LayerSummary, RecordedMerge
from atc_diffusion.schedule import Clusters, Run, Schedule
from atc_diffusion.skipping import SkippingForward
from atc_diffusion.tracing import refuse_tracing


class NetworkPatch:
    """Merging in one network. The hooks are PyTorch's own, so a deep copy of the network has its own patch.

    Args:
        name: the network's name in reports.
        network: a module of the family.
        family: its adapter.
        layers: the self-attentions to be merged.
        config: how they are merged.
        denoiser: the schedule of the network that a ControlNet serves.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        family: Family,
        layers: list[Layer],
        config: MergeConfig,
        denoiser: Schedule | None = None,
    ) -> None:
        self.name = name
        self.config = config
        self._network = network
        self._family = family
        self._layers = layers
        self._parameters = _parameters(type(network))
        self.schedule = Schedule()
        self._denoiser = denoiser
        self._last_run = Run()
        self._handles: list[RemovableHandle] = []
        self._skipping = SkippingForward(network, self._forecast) if config.forecast_tolerance else None
        self._warned: set[str] = set()
        self._check((64, 64), self._kept((64, 64), progress=0.0))

    def attach(self) -> None:
        hooks = [LayerHooks(layer, self._family, self.config) for layer in self._layers]
        self._handles = [
            self._network.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._network.register_forward_hook(self._end, always_call=True),
            *(handle for layer in hooks for handle in layer.attach()),
        ]
        if self._skipping:
            self._skipping.attach()

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            self._family.detach(layer.attention)
        if self._skipping:
            self._skipping.detach()

    def __str__(self) -> str:
        """How many attentions merge, and to how many queries and keys in images of 512 x 512 pixels."""
        kept, numbers = self._kept((64, 64), progress=0.0), Counter(layer.level for layer in self._layers)
        grids = {layer.level: layer.grid((64, 64)) for layer in self._layers}
        levels = [
            f"{numbers[level]} attention{'s' * (numbers[level] > 1)} at level {level}, {math.prod(grids[level])} tokens"
            f" -> {queries} queries, {keys} keys"
            for level, (queries, keys) in kept.items()
        ]
        return f"{self.name or type(self._network).__name__}: {'; '.join(levels)} (latents of 64 x 64)"

    def summaries(self) -> list[LayerSummary]:
        """The last run, layer by layer."""
        logs = self._last_run.log
        projects_all = self._family.projects_all
        return [logs.layer(x.name).summary(self.name, x.name, x.level, x.channels, projects_all) for x in self._layers]

    def forecasts(self) -> ForecastSummary | None:
        """The forecast steps of the last run; None if the configuration forecasts none."""
        return self._last_run.log.forecasts() if self._skipping else None

    def merges(self) -> list[RecordedMerge]:
        """The clusters of the last run."""
        if not self.config.record:
            raise ValueError("the clusters of the last run were not recorded; patch with record=True")
        return self._last_run.log.merges

    @torch.compiler.disable
    def _begin(self, network: nn.Module, args: Args, kwargs: Kwargs) -> None:
        refuse_tracing()
        image = self._family.image(dict(zip(self._parameters, args, strict=False)) | kwargs)
        timestep, size = image.timestep, image.size
        moment = Moment.of(timestep)
        kept = self._kept(size, progress_by_value(timestep) if moment is None else moment.progress())
        limits = self._prepare(network, size, kept)
        inputs, run = Inputs.of(image.latents, image.others), self.schedule.run(moment, timestep)
        visit = self._visit(run, inputs, timestep, moment)
        clusters = self._clusters(run, inputs) if visit.output is None else Clusters()
        clusters.keep_maps({count for counts in kept.values() for count in counts})
        self._last_run = run
        present.call = Call(
            owner=self,
            kept=kept,
            fewest=self._fewest(size, moment, kept),
            timestep=torch.as_tensor(timestep, device=image.latents.device).float().max(),
            log=run.log,
            size=size,
            after=image.after,
            items=_items(image.latents),
            step=run.step(run.time, moment).index,
            clusters=clusters,
            limits=limits,
            outer=present.call,
            visit=visit,
        )

    def _clusters(self, run: Run, inputs: Inputs) -> Clusters:
        return run.clusters(inputs, self.config.recluster_threshold, self.config.share_across_guidance)

    def _visit(self, run: Run, inputs: Inputs, timestep: Tensor, moment: Moment | None) -> Visit:
        if self._skipping is None:
            return Visit()
        if not self._skipping.trusted:
            return Visit(reason="the network's forward was replaced, as by a cache")
        if self._denoiser is not None:
            return run.follow(self._denoiser.present(moment, run.time), inputs, moment)
        return run.visit(inputs, timestep, moment, self.config.forecast_tolerance)

    @torch.compiler.disable
    def _forecast(self) -> Any:
        """The output of the present call, if the network need not run; else None."""
        call = present.call
        return call.visit.output if call is not None and call.owner is self else None

    @torch.compiler.disable
    def _end(self, network: nn.Module, args: Args, output: Any) -> None:
        """Log the call; one that an exception ended has no output and is forgotten."""
        call = present.call
        if call is None or call.owner is not self:
            return
        present.call = call.outer
        call.running = False
        if output is None:
            return
        call.visit.end(output)
        if self._skipping:
            call.log.reasons[call.step] = call.visit.reason
        for name, merge in call.merges.items():
            call.log.layer(name).add(call.step, merge.num_tokens, merge.kept, name in call.clustered)
        for name, limit in call.limits.items():
            call.log.layer(name).limit = limit.reason
        if self.config.record:
            call.log.merges += self._recorded(call)

    def _recorded(self, call: Call) -> Iterator[RecordedMerge]:
        for layer in self._layers:
            if merge := call.merges.get(layer.name):
                grid = layer.grid(call.size)
                yield RecordedMerge(self.name, layer.name, call.step, grid, merge.queries, merge.keys)

    def _kept(self, size: tuple[int, int], progress: float | None) -> dict[int, tuple[int, int]]:
        """How many queries and how many keys are kept of latents of a `size`, by level."""
        grids = {layer.level: layer.grid(size) for layer in self._layers}
        return {level: self.config.num_kept(math.prod(grid), level, progress) for level, grid in grids.items()}

    def _fewest(self, size: tuple[int, int], moment: Moment | None, now: dict[int, tuple[int, int]]) -> dict[int, int]:
        """The smallest number of clusters, by level, that a clustering made now may be cut down to."""
        if not self.config.scheduled:
            return {level: min(kept) for level, kept in now.items()}
        if moment is None:
            return dict.fromkeys(now, 1)
        later = [self._kept(size, moment.progress(steps)) for steps in range(moment.count - moment.index)]
        return {level: min(min(kept[level]) for kept in later) for level in now}

    def _check(self, size: tuple[int, int], kept: dict[int, tuple[int, int]]) -> None:
        for layer in self._layers:
            if obstacle := self._family.obstacle(layer, self._demands(layer, size, kept)):
                raise ValueError(f"{layer.name} {obstacle}")

    def _prepare(self, network: nn.Module, size: tuple[int, int], kept: dict[int, tuple[int, int]]) -> dict[str, Limit]:
        """Give the layers of `network` what merging needs besides hooks; returns those that merge less, and why."""
        limits = {}
        for layer in self._layers_of(network):
            limit = self._family.limit(layer, self._demands(layer, size, kept))
            if limit is not None:
                limits[layer.name] = limit
            if limit is None or limit.keys_merge:
                self._family.attach(layer.attention, self.config.widen_heads)
        self._warn(limits)
        return limits

    def _layers_of(self, network: nn.Module) -> list[Layer]:
        """The layers of the network, or of a replica of it that `nn.DataParallel` has made."""
        if network is self._network:
            return self._layers
        levels = {layer.level for layer in self._layers}
        return [layer for layer in self._family.layers(network) if layer.level in levels]

    def _demands(self, layer: Layer, size: tuple[int, int], kept: dict[int, tuple[int, int]]) -> Demands:
        queries, keys = kept[layer.level]
        return Demands(queries < math.prod(layer.grid(size)), queries != keys, self.config.widen_heads)

    def _warn(self, limits: dict[str, Limit]) -> None:
        """Say once what keeps layers from merging, unless hooks do, which `summary` reports."""
        obstacles = {name: limit.reason for name, limit in limits.items() if not limit.by_hooks}
        for reason in set(obstacles.values()) - self._warned:
            self._warned.add(reason)
            names = [name for name, obstacle in obstacles.items() if obstacle == reason]
            one = f"{names[0]} stays unmerged: it"
            several = f"{len(names)} attentions, the first {names[0]}, stay unmerged: each"
            warnings.warn(f"{several if names[1:] else one} {reason}", stacklevel=2)


def _items(latents: Tensor) -> int:
    """How many images there are in latents `[B, C, H, W]`, `[B, C, F, H, W]` or their patches `[B, N, C]`."""
    return len(latents) * (latents.shape[2] if latents.ndim == 5 else 1)


def _parameters(kind: type) -> list[str]:
    """Names of the forward's parameters, of the nearest base class that does not take *args."""
    for base in kind.__mro__:
        if "forward" in vars(base):
            parameters = inspect.signature(vars(base)["forward"]).parameters.values()
            if all(parameter.kind != parameter.VAR_POSITIONAL for parameter in parameters):
                return [parameter.name for parameter in parameters][1:]
    raise ValueError(f"{kind.__name__}.forward takes *args, and so does that of its base classes; name its parameters")
