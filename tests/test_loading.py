"""Loading a pipeline for a command."""

from pathlib import Path

import diffusers
import pytest
import torch
import transformers

from atc_diffusion import load_pipeline
from atc_diffusion.loading import load_lora, make_scheduler
from tests.helpers.tiny_pipelines import EMOJI


def settings() -> list[tuple[int, bool]]:
    loggings = (diffusers.utils.logging, transformers.utils.logging)
    return [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in loggings]


@pytest.mark.parametrize("verbosity", [diffusers.logging.INFO, diffusers.logging.CRITICAL])
@pytest.mark.parametrize("model", [str(EMOJI), "nowhere", str(EMOJI / "unet")])
def test_loading_is_silent_and_leaves_the_messages_of_libraries_as_they_were(monkeypatch, capsys, verbosity, model):
    before = settings()
    diffusers.utils.logging.set_verbosity(verbosity)
    try:
        expected = settings()
        if model == str(EMOJI):
            assert load_pipeline(model, torch.float16).unet.dtype == torch.float16
        else:
            with pytest.raises(ValueError, match=r"nowhere|cannot load"):
                load_pipeline(model, torch.float32)
        assert settings() == expected
        assert capsys.readouterr().err == ""
    finally:
        diffusers.utils.logging.set_verbosity(before[0][0])


@pytest.mark.parametrize("dtype", ["float16", None, 16])
def test_a_dtype_is_torchs(dtype):
    with pytest.raises(ValueError, match=r"dtype must be one of torch's, such as torch.float16, got"):
        load_pipeline(str(EMOJI), dtype)


def test_a_path_and_no_name_are_no_hub_ids():
    for model in (Path("no/where"), ""):
        with pytest.raises(ValueError, match="there is no folder"):
            load_pipeline(model, torch.float32)
    assert load_pipeline(EMOJI, torch.float32).unet.dtype == torch.float32


def test_progress_bars_that_were_off_stay_off():
    transformers.utils.logging.disable_progress_bar()
    try:
        load_pipeline(str(EMOJI), torch.float32)
        assert not transformers.utils.logging.is_progress_bar_enabled()
    finally:
        transformers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("nowhere", r"^there is no folder nowhere; give a folder with a LoRA, or a hub id \(owner/name\)$"),
        (str(EMOJI / "unet"), r"^cannot load the LoRA '.*unet': [^\n]+$"),
        ("no/lora", r"^cannot load the LoRA 'no/lora': [^\n]+; .* connect once and run: hf download no/lora$"),
    ],
)
def test_a_lora_that_cannot_be_loaded_is_named_in_one_sentence(monkeypatch, lora, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        load_lora(load_pipeline(str(EMOJI), torch.float32), lora)


def test_a_scheduler_keeps_the_models_noise_and_is_refused_where_it_does_not_fit():
    own = diffusers.DDIMScheduler(beta_end=0.015)
    config = make_scheduler("EulerDiscreteScheduler", own, use_karras_sigmas=True).config
    assert (config.beta_end, config.use_karras_sigmas) == (0.015, True)
    with pytest.raises(
        ValueError, match="the scheduler DDIMScheduler does not fit this model; these do: FlowMatchEuler"
    ):
        make_scheduler("DDIMScheduler", diffusers.FlowMatchEulerDiscreteScheduler())
