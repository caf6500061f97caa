"""Which parts of a batch share clusters."""

import pytest
import torch

from atc_diffusion import apply_patch
from tests.helpers.loops import LAYERS, embedding, labels, run, sample, timesteps


@pytest.mark.parametrize(("parts", "pictures"), [(2, 1), (2, 3), (3, 1), (3, 2)])
def test_guidance_parts_share_from_the_second_step(unet, parts, pictures):
    """Also where all pictures begin with the same latents."""
    prompt, steps = 30 * embedding(parts * pictures), timesteps(900, 700)
    apply_patch(unet, share_guidance=True, recluster_threshold=0, record=True)
    run(unet, steps[:1], prompt, sample().repeat(parts * pictures, 1, 1, 1))
    run(unet, steps[1:], prompt, sample(pictures).repeat(parts, 1, 1, 1))
    first, last = (labels(unet)[i] for i in (LAYERS - 1, 2 * LAYERS - 1))
    assert not torch.equal(first[:pictures], first[-pictures:])
    assert all(torch.equal(part, last[:pictures]) for part in last.split(pictures))


def test_shared_clusters_are_those_of_the_last_part(unet):
    prompt, latents, steps = 30 * embedding(2), sample().repeat(2, 1, 1, 1), timesteps(900, 700)
    runs = []
    for share in (True, False):
        apply_patch(unet, share_guidance=share, recluster_threshold=0)
        runs.append([run(unet, steps[i : i + 1], prompt, latents + i) for i in range(2)])
    shared, exact = runs
    assert torch.equal(shared[0], exact[0])
    assert torch.allclose(shared[1][1], exact[1][1], atol=1e-5)
    assert not torch.allclose(shared[1][0], exact[1][0], atol=1e-5)


@pytest.mark.parametrize("seeds", [[1, 1], [1, 2]])
def test_prompts_without_guidance_never_share(unet, seeds):
    """Two prompts of one seed have equal latents at the first step, and part there."""
    prompt, steps = embedding(2), timesteps(900, 700, 500)
    latents = torch.cat([sample() * seed for seed in seeds])
    apply_patch(unet, share_guidance=True, recluster_threshold=0)
    shared = run(unet, steps, prompt, latents)
    apply_patch(unet, share_guidance=False, recluster_threshold=0)
    assert torch.equal(shared, run(unet, steps, prompt, latents))
