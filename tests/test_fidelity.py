"""Similarity of images."""

import numpy as np
import pytest
import torch
from PIL import Image

from atc_diffusion import psnr, ssim

BLACK = np.zeros((16, 16, 3), np.uint8)


def test_equal_images():
    assert psnr(BLACK, BLACK) == float("inf")
    assert ssim(BLACK, BLACK) == 1


def test_psnr_is_by_the_mean_over_all_pixels_and_has_no_cap():
    assert psnr(BLACK, BLACK + 255) == 0
    barely = BLACK.copy()
    barely[0, 0, 0] = 1
    assert psnr(barely, BLACK) == pytest.approx(10 * np.log10(255**2 * BLACK.size))


@pytest.mark.parametrize("similarity", [psnr, ssim])
def test_images_of_different_shapes_are_refused(similarity):
    with pytest.raises(ValueError, match=r"images must have one shape, got \[16, 16, 3\] and \[1, 16, 3\]"):
        similarity(BLACK, BLACK[:1])


@pytest.mark.parametrize("similarity", [psnr, ssim])
@pytest.mark.parametrize("image", [np.full((16, 16, 3), 0.5), BLACK.astype(int) - 1, np.full((16, 16, 3), np.nan)])
def test_images_without_8_bits_are_refused(similarity, image):
    with pytest.raises(ValueError, match=r"whole numbers from 0 to 255, got .*; .* pass \(image \* 255\).round\(\)"):
        similarity(BLACK, image)


@pytest.mark.parametrize("shape", [(), (16, 16), (3, 16, 16), (16, 16, 4), (0, 16, 3)])
@pytest.mark.parametrize("similarity", [psnr, ssim])
def test_other_shapes_than_images_are_refused(similarity, shape):
    with pytest.raises(ValueError, match=r"images must be \[..., H, W, 3\], got"):
        similarity(np.zeros(shape), np.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 16, 16, 3), (8, 16, 3)])
def test_ssim_compares_two_images_that_hold_its_window(shape):
    with pytest.raises(ValueError, match=r"two images \[H, W, 3\] of at least 11 x 11 pixels, got"):
        ssim(np.zeros(shape), np.zeros(shape))


def test_images_with_a_palette_and_tensors_are_compared_by_their_colours():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).quantize(8)
    inverted = noise.copy()
    inverted.putpalette([255 - value for value in noise.getpalette() or ()])
    assert psnr(noise, inverted) < 20
    pixels = torch.tensor(np.asarray(noise.convert("RGB")), dtype=torch.bfloat16).requires_grad_()
    assert psnr(pixels, noise) == float("inf")


def test_rounded_floats_are_images():
    assert psnr(BLACK.astype(float), (BLACK + 0.2 * 255).round()) == psnr(BLACK, BLACK + 51)
