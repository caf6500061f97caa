"""How images are sampled."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atc_eval.draw.sampling import EMOJI_DIFFUSION, SCHEDULERS, Sampling, load_pipeline


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws_and_is_reproducible(model: Path, name: str) -> None:
    pipe = load_pipeline(Sampling(str(model), scheduler=name, device="cpu"), torch.device("cpu"))
    assert type(pipe.scheduler).__name__ == SCHEDULERS[name][0]
    assert pipe.scheduler.config.get("use_karras_sigmas", False) == name.endswith("karras")

    def draw() -> np.ndarray[Any, Any]:
        generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        return pipe(["ant", "bee"], num_inference_steps=2, generator=generator, output_type="np").images

    assert np.array_equal(draw(), draw())


def test_a_lora_is_loaded_and_is_part_of_what_an_image_is() -> None:
    cpu, plain = torch.device("cpu"), Sampling(str(EMOJI_DIFFUSION), device="cpu")
    sampling = replace(plain, lora=str(EMOJI_DIFFUSION / "four_steps"))
    assert load_pipeline(sampling, cpu).get_active_adapters()
    assert sampling.json(cpu)["weights"] != plain.json(cpu)["weights"]
    assert sampling.name == "emoji_diffusion with the LoRA four_steps"
