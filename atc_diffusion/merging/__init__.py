"""The patch of one network: follows the network's calls and holds the hooks of its layers."""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from atc_diffusion.adapters import Args, Family, ImageInput, Kwargs
from atc_diffusion.adapters.layer import Layer
from atc_diffusion.calls.inputs import Inputs
from atc_diffusion.calls.position import Position, time_of
from atc_diffusion.calls.reference import Reference
from atc_diffusion.calls.stack import refuse_tracing
from atc_diffusion.calls.state import NetworkState
from atc_diffusion.config import MergeConfig
from atc_diffusion.forecasting import Decision
from atc_diffusion.forecasting.deferred import is_deferred, realized
from atc_diffusion.merging.call import Call, present, present_call
from atc_diffusion.merging.checkpoints import Memory, is_in_backward, is_recomputed_by_torch, keep_with_graph
from atc_diffusion.merging.hooks import LayerHooks
from atc_diffusion.merging.layers import PatchedLayers
from atc_diffusion.merging.reuse import CachedClusters
from atc_diffusion.merging.runs import Run, Runs, locate
from atc_diffusion.merging.skipping import Skipping
from atc_diffusion.report import ForecastSummary, LayerSummary, RecordedMerge


class NetworkPatch:
    """Merging and forecasting in one network. A deep copy of the network has its own patch.

    Args:
        name: the network's name in reports.
        network: a module of the family.
        family: its adapter.
        layers: the self-attentions to be merged.
        config: how they are merged.
        pipeline: refers to the network's pipeline, whose scheduler may be exchanged, or to nothing.
        denoiser: refers to the patch of the network that a ControlNet serves, or to nothing.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        family: Family,
        layers: list[Layer],
        config: MergeConfig,
        pipeline: Reference,
        denoiser: Reference,
    ) -> None:
        self.name = name
        self.config = config
        self.runs = Runs()
        self._network = network
        self._family = family
        self._layers = layers
        self._patched = PatchedLayers(network, family, layers, config)
        self._parameters = _parameters(type(network))
        self._state = NetworkState(network)
        self._memory = Memory()
        self._last_run = Run()
        self._hooks = [LayerHooks(self, layer, family, config) for layer in layers]
        self._handles: list[RemovableHandle] = []
        self.skipping: Skipping | None = None
        if tolerance := config.forecast_tolerance:
            is_controlnet = "controlnet_cond" in self._parameters
            self.skipping = Skipping(
                network,
                self,
                family,
                tolerance,
                self._state,
                self._sees_last_arguments,
                pipeline,
                denoiser,
                is_controlnet,
            )

    def attach(self) -> None:
        self._handles = [
            self._network.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._network.register_forward_hook(self._end, always_call=True),
            *(handle for hooks in self._hooks for handle in hooks.attach()),
        ]
        if self.skipping is not None:
            self.skipping.forward.attach()

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._patched.detach()
        if self.skipping is not None:
            self.skipping.forward.detach()

    def __str__(self) -> str:
        return f"{self.name or type(self._network).__name__}: {self._patched} (latents of 64 x 64)"

    def summaries(self) -> list[LayerSummary]:
        """The last run, layer by layer."""
        logs, projects_all = self._last_run.log.layers, self._family.projects_all
        return [logs[x.name].summary(self.name, x.name, x.level, x.channels, projects_all) for x in self._layers]

    def forecasts(self) -> ForecastSummary | None:
        """The forecast steps of the last run; None if the configuration forecasts none."""
        return self._last_run.log.forecasts() if self.skipping is not None else None

    def merges(self) -> list[RecordedMerge]:
        """The clusters of the last run."""
        if not self.config.record:
            raise ValueError("the clusters of the last run were not recorded; patch with record=True")
        return self._last_run.log.merges

    @torch.compiler.disable
    def _begin(self, network: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        refuse_tracing()
        for hooks in self._hooks:
            hooks.come_nearest()
        image = self._family.image(dict(zip(self._parameters, args, strict=False)) | kwargs)
        repeated = self._repeated(network, image) if is_in_backward() else None
        call = repeated or self._new(network, image, args, kwargs)
        present.call = self.runs.call = call
        return None if call.decision.output is not None or not is_deferred((args, kwargs)) else realized((args, kwargs))

    def _new(self, network: nn.Module, image: ImageInput, args: Args, kwargs: Kwargs) -> Call:
        entry, time = locate(image.timestep)
        run = self.runs.at(entry, time)
        position = run.advance(entry, time)
        kept = self._patched.kept(image.size, position.progress)
        limits = self._patched.prepare(network, image.size, kept)
        inputs = self._inputs(image, run, position)
        decision = Decision()
        if self.skipping is not None:
            call = partial(network, *args, **kwargs)
            decision = self.skipping.decide(run, position, inputs, image.timestep, call)
        clusters = CachedClusters() if decision.output is not None else self._clusters(run, position, image, inputs)
        clusters.keep_maps({count for counts in kept.values() for count in counts})
        self._last_run = run
        made = Call(
            owner=self,
            network=network,
            kept=kept,
            fewest=self._patched.fewest(image.size, position, kept),
            timestep=torch.as_tensor(image.timestep, device=image.latents.device).detach().float().max(),
            log=run.log,
            size=image.size,
            after=image.after,
            items=image.items,
            step=position.index,
            clusters=clusters,
            limits=limits,
            outer=present.call,
            decision=decision,
        )
        self._memory.add(made, image, time)
        return made

    def _repeated(self, network: nn.Module, image: ImageInput) -> Call | None:
        """A call that a gradient checkpoint makes again, with what it merged the first time; None: it is a new one."""
        first = self._memory.find(image, time_of(image.timestep))
        if first is None:
            if not is_recomputed_by_torch():
                return None
            raise ValueError(
                "a gradient checkpoint repeats a call of a patched network, and gives it other latents than the first"
                " time; pass the latents to the checkpoint as they are, use_reentrant=False, or remove_patch"
            )
        self._patched.prepare(network, image.size, first.kept)
        return first.repeated(network, present.call)

    def _inputs(self, image: ImageInput, run: Run, position: Position) -> Inputs:
        """What can be compared of the arguments and of the network's state."""
        state = self._state.fingerprint(in_place=self.skipping is not None)
        inputs = Inputs.of(image.latents, image.residuals, image.others, state)
        return run.clock.without_time(inputs, position.passed)

    def _clusters(self, run: Run, position: Position, image: ImageInput, inputs: Inputs) -> CachedClusters:
        if not self._sees_last_arguments():
            return CachedClusters()
        if is_deferred(image.residuals):
            inputs = replace(inputs, moving=Inputs.of(image.latents, realized(image.residuals), {}).moving)
        threshold, share = self.config.recluster_threshold, self.config.share_guidance
        return run.clusters.find(inputs, position, threshold, share)

    def _sees_last_arguments(self) -> bool:
        """Whether no hook that was registered later can change the arguments; from the next call on, none can."""
        hooks, own = self._network._forward_pre_hooks, self._handles[0].id
        return next(reversed(hooks)) == own

    @torch.compiler.disable
    def skipped(self) -> Any:
        call = present_call(self)
        if call is None or call.entered:
            raise ValueError(
                f"{self.name or 'the network'} was called outside its network's call; call the network itself, not its"
                " forward method, or remove_patch"
            )
        call.entered = True
        return call.decision.output

    @torch.compiler.disable
    def forward(self, inner: Any) -> Any:
        call = present_call(self)
        is_replica = call is not None and call.network is not self._network  # as `nn.DataParallel` makes
        return partial(type(call.network).forward, call.network) if call is not None and is_replica else inner

    @torch.compiler.disable
    def finished(self, returned: Any) -> Any:
        call = present_call(self)
        return returned if call is None else call.decision.end(returned)

    @torch.compiler.disable
    def abandoned(self) -> None:
        if (call := present_call(self)) is not None:
            present.call, call.running = call.outer, False

    @torch.compiler.disable
    def _end(self, network: nn.Module, args: Args, output: Any) -> None:
        """Log the call; one that an exception ended has no output and is forgotten."""
        call = present_call(self)
        if call is None:
            return
        hooks: Any = self._network._forward_pre_hooks
        hooks.move_to_end(self._handles[0].id)  # to see the last word on the arguments
        self.abandoned()
        if output is None or call.is_repeated:
            return
        if torch.is_grad_enabled():
            keep_with_graph(call, output)
        if self.skipping is not None:
            call.log.add_call(call.step, call.decision.reason)
        for name, merge in call.merges.items():
            call.log.layers[name].add(call.step, merge.image.num_tokens, merge.kept, name in call.clustered)
        for name, limit in call.limits.items():
            call.log.layers[name].limit = limit.reason
        if self.config.record:
            call.log.merges += self._recorded(call)

    def _recorded(self, call: Call) -> Iterator[RecordedMerge]:
        for layer in self._layers:
            if merge := call.merges.get(layer.name):
                grid = layer.grid(call.size)
                yield RecordedMerge(self.name, layer.name, call.step, grid, merge.queries, merge.keys)


def _parameters(kind: type) -> list[str]:
    """Names of the forward's parameters, of the nearest base class that does not take *args."""
    for base in kind.__mro__:
        if "forward" in vars(base):
            parameters = inspect.signature(vars(base)["forward"]).parameters.values()
            if all(parameter.kind != parameter.VAR_POSITIONAL for parameter in parameters):
                return [parameter.name for parameter in parameters][1:]
    raise ValueError(f"{kind.__name__}.forward takes *args, and so does that of its base classes; name its parameters")
