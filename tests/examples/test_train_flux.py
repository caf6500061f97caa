"""Training of the small Flux-type transformer: it sees what diffusers' pipeline shows it, and what it learns draws."""

from dataclasses import replace

import torch
import train_flux
from diffusers import FluxPipeline
from train_flux import FINEST, make_pipeline, pack, positions, prompt

from atc_diffusion import ATCConfig, apply_patch, summary


def test_tokens_and_positions_are_those_of_the_pipeline():
    latents = torch.randn(2, 4, 8, 8)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 4, 8, 8))
    theirs = FluxPipeline._prepare_latent_image_ids(1, FINEST, FINEST, torch.device("cpu"), torch.float32)
    assert torch.equal(positions(FINEST), theirs)


def test_a_trained_transformer_draws_merged(tmp_path, monkeypatch):
    for name in ("COARSE", "FINE"):
        monkeypatch.setattr(train_flux, name, replace(getattr(train_flux, name), batch=1, steps=1))
    transformer = train_flux.train(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"flux-coarse.pt", "flux-fine.pt"}
    pipe = apply_patch(make_pipeline(transformer), ATCConfig.fast())
    assert pipe(**prompt(pipe, train_flux.THINGS[0]), num_inference_steps=1).images[0].size == (256, 256)
    assert {layer.clusterings for layer in summary(pipe).layers} == {2}  # with the caption, and with the empty one
