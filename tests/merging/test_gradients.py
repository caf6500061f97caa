"""Gradients through clusters: checkpoints, and training after inference."""

import copy
import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from atc_diffusion import ATCConfig, ToMeConfig, apply_patch
from atc_diffusion.testing import UNET
from tests.helpers.loops import embedding, sample, timesteps


def gradient(unet: Any, checkpointing: bool, config: ATCConfig | ToMeConfig) -> Tensor:
    """The gradient of two unrolled steps with respect to all parameters."""
    unet = copy.deepcopy(unet).train().requires_grad_(True)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    apply_patch(unet, config)
    latents, loss = sample(2), torch.zeros(())
    for timestep in timesteps(900, 700):
        latents = unet(latents, timestep, embedding(2)).sample
        loss = loss + latents.square().mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "config",
    [
        ATCConfig(r=0.5),
        ATCConfig(r=0.5, recluster_threshold=0, features="hidden_states"),
        ATCConfig(r=lambda progress: 0.25 + 0.5 * progress),
        ToMeConfig(r=0.5),
    ],
)
def test_a_gradient_checkpoint_recomputes_with_the_clusters_it_had(unet, config):
    assert torch.equal(gradient(unet, True, config), gradient(unet, False, config))


def test_an_inference_run_leaves_nothing_that_training_would_trip_over(unet):
    apply_patch(unet.requires_grad_(True), recluster_threshold=0.3)
    steps = timesteps(900, 700)
    with torch.inference_mode():
        unet(sample(), steps[0], embedding())
    unet(sample(), steps[1], embedding()).sample.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("config", [ATCConfig(r=1.0), ATCConfig(r=0.5), ATCConfig(r=0.5, recluster_threshold=10.0)])
def test_a_checkpoint_around_the_call_repeats_it_with_the_clusters_it_had(unet, config, reentrant):
    """As in fine-tuning by a reward; also with the batch made inside, where the checkpoint keeps the graph."""
    gradients = []
    for inside, checkpointed in ((False, False), (False, True), *(((True, True),) if not reentrant else ())):
        net, latents = apply_patch(copy.deepcopy(unet).requires_grad_(True), config), sample().requires_grad_(True)
        for timestep in timesteps(900, 850, 800):
            batch = latents if inside else latents.repeat(2, 1, 1, 1)
            call = Repeated(net, timestep)
            output = checkpoint(call, batch, use_reentrant=reentrant) if checkpointed else call(batch)
            latents = latents - 0.1 * output[:1]
        latents.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


class Repeated:
    """A call with two equal parts of guidance."""

    def __init__(self, net: Any, timestep: Tensor, text: Tensor | None = None) -> None:
        self.net, self.timestep, self.text = net, timestep, embedding(2) if text is None else text

    def __call__(self, batch: Tensor) -> Tensor:
        batch = batch if len(batch) == 2 else batch.repeat(2, 1, 1, 1)
        return self.net(batch, self.timestep, self.text).sample


EDITED = sample()
EDITED[:, 0, 0, 1:3] = 3.0


@pytest.mark.parametrize(
    "calls", [[(sample(), 1), (EDITED, 1)], [(sample(), 1), (sample(), -1)]], ids=["latents", "texts"]
)
def test_calls_that_differ_little_are_recomputed_with_the_clusters_they_had(unet, calls):
    """As for pairs of an edited picture, whose batches are made within the checkpoint."""
    gradients = []
    for checkpointed in (False, True):
        net, loss = apply_patch(copy.deepcopy(unet).requires_grad_(True), r=0.5), torch.zeros(())
        for latents, sign in calls:
            call = Repeated(net, timesteps(900)[0], sign * embedding(2))
            output = checkpoint(call, latents, use_reentrant=False) if checkpointed else call(latents)
            loss = output.square().mean() - 2 * loss
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


def test_one_tensor_of_latents_with_two_texts_is_recomputed_with_the_clusters_of_each(unet):
    """Under checkpoints that compute without gradients first, so that values are not compared."""
    gradients = []
    for checkpointed in (False, True):
        net, latents = apply_patch(copy.deepcopy(unet).requires_grad_(True), r=0.5), sample().requires_grad_(True)
        loss = torch.zeros(())
        for sign in (1, -1):
            call = partial(net, return_dict=False)
            given = latents, timesteps(900)[0], sign * embedding()
            (output,) = checkpoint(call, *given, use_reentrant=True) if checkpointed else call(*given)
            loss = output.square().mean() - 2 * loss
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [Transformer2DModel, BasicTransformerBlock, Attention])
def test_a_checkpoint_around_a_part_is_right(unet, kind):
    config, gradients = ATCConfig(r=0.5), []
    for wrapped in (False, True):
        net = copy.deepcopy(unet).requires_grad_(True)
        if wrapped:
            apply_activation_checkpointing(net, check_fn=lambda module: isinstance(module, kind))
        apply_patch(net, config)
        net(sample(2), timesteps(900, 800)[0], embedding(2)).sample.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("around_call", [True, False])
def test_a_selective_checkpoint_is_right(unet, around_call):
    saved, gradients = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default], []
    contexts = partial(create_selective_checkpoint_contexts, saved)
    selective = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    for checkpointed in (False, True):
        net = apply_patch(copy.deepcopy(unet).train().requires_grad_(True), r=0.5)
        call = Repeated(net, timesteps(900)[0])
        if checkpointed and not around_call:
            net.enable_gradient_checkpointing(selective)
        output = selective(call, sample(2)) if checkpointed and around_call else call(sample(2))
        output.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


def test_a_call_within_a_backward_pass_is_a_call_of_its_own(unet):
    """As in adjoint methods, which calls no checkpoint repeats."""
    first, second = timesteps(900)[0], timesteps(100)[0]
    expected = apply_patch(unet, r=0.5)(sample(), second, embedding()).sample
    latents, outputs = sample().requires_grad_(True), []
    loss = unet(latents, first, embedding()).sample.sum()
    latents.register_hook(lambda _: outputs.append(unet(sample(), second, embedding()).sample))
    loss.backward()
    assert torch.equal(outputs[0], expected)


def test_a_reentrant_checkpoint_that_makes_the_latents_is_refused(unet):
    call = Repeated(apply_patch(unet, r=0.5), timesteps(900)[0])
    output = checkpoint(call, sample().requires_grad_(True), use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        output.sum().backward()


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
def test_gradients_of_tensors_without_values(mode):
    """As in estimates of memory."""
    with mode():
        net = apply_patch(UNet2DConditionModel(**UNET).requires_grad_(True), r=0.5)
        latents, timestep = torch.empty(2, 4, 8, 8, requires_grad=True), torch.tensor(500)
        call = Repeated(net, timestep, torch.empty(2, 5, 12))
        checkpoint(call, latents, use_reentrant=False).sum().backward()
    assert latents.grad is not None


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def fail(*_: Any) -> None:
    raise RuntimeError


@pytest.mark.parametrize("hook", [interrupt, fail])
def test_an_exception_in_an_attention_leaves_no_tokens_behind(unet, hook):
    network = copy.deepcopy(apply_patch(unet, r=0.5, features="hidden_states"))
    block, kept = network.down_blocks[0].attentions[0].transformer_blocks[0], []
    block.register_forward_pre_hook(lambda _, args: kept.append(weakref.ref(args[0].untyped_storage())))
    block.attn1.to_v.register_forward_pre_hook(hook)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        network(sample(), timesteps(900, 800)[0], embedding())
    del network, block
    gc.collect()
    assert kept[0]() is None


def test_an_interruption_leaves_no_call_behind(unet):
    apply_patch(unet, r=0.5)
    expected = unet(sample(), timesteps(900, 800)[0], embedding()).sample
    handle = unet.mid_block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        unet(sample(), timesteps(900, 800)[0], embedding())
    handle.remove()
    with pytest.raises(ValueError, match="was called outside its network's call"):
        unet.forward(sample(), timesteps(900, 800)[0], embedding())
    assert torch.equal(unet(sample(), timesteps(900, 800)[0], embedding()).sample, expected)
