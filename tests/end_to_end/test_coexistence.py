"""Pipelines, wrappers and tools that meet a patched network: it works, or one sentence says what to do."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import tomesd
import torch
from accelerate import cpu_offload
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    DDIMInverseScheduler,
    MotionAdapter,
    MultiControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from atc_diffusion import ATCConfig, apply_patch, remove_patch, summary
from atc_diffusion.testing import UNET
from tests.helpers.drawing import PARTS, draw, text
from tests.helpers.ecosystem import CPU, picture, pipeline
from tests.helpers.unet import run

LAYERS = 3


def share(progress: float) -> float:
    return 0.25 + 0.5 * progress


@pytest.mark.parametrize("features", ["keys", "values", "keys_values"])
def test_weights_that_come_only_with_the_attention_are_never_read_before(unet, features):
    cpu_offload(unet, CPU, preload_module_classes=["Attention"])
    apply_patch(unet, features=features)
    with pytest.raises(
        ValueError, match=r"weights of an Attention are loaded only when it is called.* use features='hidden_states'"
    ):
        run(unet)


@pytest.mark.parametrize(("preload", "features"), [("Attention", "hidden_states"), ("BasicTransformerBlock", "keys")])
def test_other_features_and_larger_preloads_are_exact(unet, preload, features):
    expected = run(apply_patch(copy.deepcopy(unet), features=features))
    cpu_offload(unet, CPU, preload_module_classes=[preload])
    assert torch.equal(run(apply_patch(unet, features=features)), expected)


def test_a_model_that_tomesd_has_patched_is_refused_until_that_is_undone(unet):
    expected = run(apply_patch(unet))
    tomesd.apply_patch(remove_patch(unet))
    with pytest.raises(ValueError, match=r"attn1 is patched by tomesd too; call tomesd.remove_patch, or remove_patch"):
        apply_patch(unet)
    tomesd.remove_patch(unet)
    assert torch.equal(run(apply_patch(unet)), expected)


def test_with_tomesd_on_top_nothing_is_merged_twice(unet):
    alone = run(tomesd.apply_patch(unet, use_rand=False))
    tomesd.remove_patch(unet)
    expected = run(apply_patch(unet))
    tomesd.apply_patch(unet, use_rand=False)
    with pytest.warns(UserWarning, match="3 attentions, the first .*: each is patched by tomesd too; call"):
        assert torch.equal(run(unet), alone)
    tomesd.remove_patch(unet)
    assert torch.equal(run(unet), expected)


@pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated")
def test_t2i_adapter(components):
    adapter = T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter").eval()
    pipe = StableDiffusionAdapterPipeline(**components, **PARTS, adapter=adapter)
    options: dict[str, Any] = {"image": torch.rand(1, 3, 16, 16), "height": 16, "width": 16}
    before = draw(pipe, text(1), **options)
    assert not np.array_equal(draw(apply_patch(pipe, r=0.5), text(1), **options), before)
    assert {layer.kept for layer in summary(pipe).layers} == {(32, 32, 32)}
    assert np.array_equal(draw(remove_patch(pipe), text(1), **options), before)


def test_the_three_parts_of_instruct_pix2pix_share_their_clusters(components):
    unet = UNet2DConditionModel(**UNET | {"in_channels": 8}).eval()
    pipe = StableDiffusionInstructPix2PixPipeline(**components | {"unet": unet}, **PARTS)
    options: dict[str, Any] = {"image": torch.rand(1, 3, 16, 16), "guidance_scale": 5.0, "image_guidance_scale": 1.5}
    shapes: list[int] = []
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    apply_patch(pipe, recluster_threshold=0)
    attention.to_k.register_forward_pre_hook(lambda module, args: shapes.append(len(args[0])))
    draw(pipe, text(1), **options)
    assert shapes == [
        3,
        3,
        2,
        3,
        2,
        3,
    ]  # first to cluster; two parts have equal latents


def test_a_network_that_pipelines_share_is_patched_in_all(components):
    pipe = apply_patch(pipeline(components), r=0.5)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    merged = draw(other, text(1), image=torch.ones(1, 3, 16, 16), strength=0.9)
    assert {layer.kept for layer in summary(other).layers} == {(32, 32)}
    remove_patch(pipe)
    assert not np.array_equal(draw(other, text(1), image=torch.ones(1, 3, 16, 16), strength=0.9), merged)


def test_a_run_after_a_callback_that_raised_is_right(components):
    pipe = apply_patch(pipeline(components), r=0.5)
    expected = picture(pipe)

    def stop(pipe: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 1:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        picture(pipe, callback_on_step_end=stop)
    assert {layer.kept for layer in summary(pipe).layers} == {(32, 32)}
    assert np.array_equal(picture(pipe), expected)
    assert {layer.kept for layer in summary(pipe).layers} == {(32, 32, 32)}


def test_guidance_that_changes_from_step_to_step(components):
    pipe = apply_patch(pipeline(components), r=1)

    def fade(pipe: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._guidance_scale /= 2
        return tensors

    exact = picture(pipe, callback_on_step_end=fade)
    merged = picture(apply_patch(pipe, r=0.5, recluster_threshold=math.inf), callback_on_step_end=fade)
    assert [layer.clusterings for layer in summary(pipe).layers] == [1] * LAYERS
    assert not np.array_equal(merged, exact)
    assert np.array_equal(picture(remove_patch(pipe), callback_on_step_end=fade), exact)


def test_pictures_drawn_together_are_those_drawn_alone(components):
    pipe = apply_patch(pipeline(components), r=0.5)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 3, "height": 16, "width": 16, "output_type": "np"}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    together = pipe(**text(1), num_images_per_prompt=2, generator=generators, **options).images
    alone = [pipe(**text(1), generator=torch.Generator().manual_seed(seed), **options).images[0] for seed in (1, 2)]
    assert np.allclose(together, alone, atol=1e-4)


class Subclass(UNet2DConditionModel):  # type: ignore[misc]  # diffusers is not annotated
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_subclass_whose_forward_takes_any_arguments(unet):
    expected = run(apply_patch(unet))
    unet.__class__ = Subclass
    assert torch.equal(run(apply_patch(unet)), expected)


def test_both_attentions_of_dual_cross_attention_are_found():
    """No more: diffusers itself cannot run such a UNet any longer."""
    unet = UNet2DConditionModel(**UNET | {"dual_cross_attention": True})
    assert len(summary(apply_patch(unet)).layers) == 2 * LAYERS


def test_several_controlnets_alone(unet):
    nets = [ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)).eval() for _ in range(2)]
    multi = MultiControlNetModel(nets)
    assert {layer.network for layer in summary(apply_patch(multi)).layers} == {"nets.0", "nets.1"}
    twice = apply_patch(MultiControlNetModel([nets[0], nets[0]]))
    assert {layer.network for layer in summary(twice).layers} == {"nets.0"}
    assert not any(module._forward_hooks for module in remove_patch(twice).modules())
    remove_patch(multi)
    with pytest.raises(ValueError, match="is not patched"):
        summary(multi)


def test_a_pipeline_that_makes_a_network_of_its_own_is_patched_as_a_pipeline(components):
    adapter = MotionAdapter(block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4)
    unet = apply_patch(components["unet"], r=0.5)
    pipe = AnimateDiffPipeline(**components | {"unet": unet}, motion_adapter=adapter)
    with pytest.raises(ValueError, match="this AnimateDiffPipeline is not patched; call apply_patch first"):
        summary(pipe)
    assert len(summary(apply_patch(pipe, r=0.5)).layers) == len(summary(unet).layers)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
def test_export_and_tracing_are_refused_in_one_sentence(unet):
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor(10), torch.randn(1, 5, 12))
    apply_patch(unet)
    message = "a patched network cannot be exported or traced; call remove_patch first"
    with pytest.raises(ValueError, match=message):
        torch.jit.trace(unet, inputs, strict=False)
    with pytest.raises(Exception, match=message):
        torch.export.export(unet, inputs, strict=False)
    with pytest.raises(ValueError, match=message):
        make_fx(lambda *given: unet(*given).sample)(*inputs)


def test_a_lambda_can_be_copied_but_not_pickled(unet):
    expected = run(apply_patch(unet, r=lambda progress: 0.5))
    assert torch.equal(run(copy.deepcopy(unet)), expected)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(ATCConfig(r=lambda progress: 0.5))
    assert pickle.loads(pickle.dumps(ATCConfig(r=share))) == ATCConfig(r=share)


@torch.no_grad()
def test_summary_follows_an_inverse_scheduler(unet):
    scheduler = DDIMInverseScheduler()
    scheduler.set_timesteps(5)
    apply_patch(unet, r=share, recluster_threshold=0.2)
    for _ in range(2):
        for timestep in scheduler.timesteps:
            unet(torch.randn(1, 4, 8, 8), timestep, torch.randn(1, 5, 12))
        facts = {(layer.kept, layer.clusterings) for layer in summary(unet).layers}
        assert facts == {((16, 24, 32, 40, 48), 5)}
