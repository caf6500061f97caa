"""Fractions that change during denoising."""

import pytest
import torch

from atc_diffusion import apply_patch, remove_patch, summary
from tests.helpers.loops import LAYERS, MOVES, drift, embedding, labels, sample, timesteps


@pytest.mark.parametrize("config", [{"r": 1.0, "r_keys": lambda p: 0.25 + 0.5 * p}, {"r": lambda p: 0.75 - 0.5 * p}])
def test_the_fraction_asked_for_at_a_step_is_the_fraction_kept(unet, config):
    """Between clusterings too: the tree is cut again at every step."""
    apply_patch(unet, recluster_threshold=0.09, **config)
    drift(unet, MOVES[:5], timesteps(900, 890, 880, 870, 860), sample(), embedding())
    rising = (16, 24, 32, 40, 48)
    layer = summary(unet).layers[0]
    assert layer.kept_keys == (rising if "r_keys" in config else rising[::-1])
    assert layer.clusterings == 2
    assert f"{layer.kept_keys[0]}..{layer.kept_keys[-1]}" in str(summary(unet))


def test_cutting_a_cached_tree_again_is_reclustering_the_same_features(unet):
    """In the first layer, whose features do not depend on what is merged."""
    runs = []
    for threshold in (0, 0.3):
        apply_patch(unet, r=lambda p: 0.25 + 0.5 * p, recluster_threshold=threshold, record=True)
        for t in timesteps(900, 900, 900):
            unet(sample(), t, embedding())
        runs.append(labels(unet)[::LAYERS])
    assert all(torch.equal(again, cached) for again, cached in zip(*runs, strict=True))


def test_progress_without_a_schedule_is_by_the_timestep(unet):
    apply_patch(unet, r={1: lambda progress: 0.25 + 0.5 * progress, 2: 0.5})
    for timestep, kept in ((1000, 16), (500, 32), (0, 48)):
        unet(sample(), timestep, embedding())
        assert {(layer.level, layer.kept[-1]) for layer in summary(unet).layers} == {(1, kept), (2, 8)}


def test_a_fraction_of_one_merges_nothing_at_that_moment(unet):
    apply_patch(unet, r=lambda progress: 1.0 if progress < 0.5 else 0.5)
    early, merged = (unet(sample(), t, embedding()).sample for t in (900, 400))
    remove_patch(unet)
    assert torch.equal(early, unet(sample(), 900, embedding()).sample)
    assert not torch.equal(merged, unet(sample(), 400, embedding()).sample)
