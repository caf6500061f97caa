"""The guide's recipes, run as they stand but for the substitutions below: tiny models, few steps, on the CPU."""

import re
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor
from diffusers.models.embeddings import ImageProjection
from diffusers.utils import convert_state_dict_to_diffusers
from fastapi.testclient import TestClient
from packaging.version import Version
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from atc_diffusion import summary
from tests.helpers import tiny_pipelines

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "examples" / "guide"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted(GUIDE.glob("*.md"))}
(COMMON_LINES,) = re.findall(r"```python\n(.*?)```", PAGES["README.md"], re.DOTALL)


class Recipe(NamedTuple):
    needs: str
    own: str

    @property
    def code(self) -> str:
        return COMMON_LINES + self.own if "the common lines" in self.needs else self.own


_RECIPE = r"^#+ ([^\n]+)\n+(?:[^#`*\n][^\n]*\n+)*\*Needs (.+?)\*\n+```python\n(.*?)```"
RECIPES = {
    heading: Recipe(needs, code)
    for page in PAGES.values()
    for heading, needs, code in re.findall(_RECIPE, page, re.M | re.S)
}

MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/sd-turbo": "sd15",
    "examples/emoji_diffusion": "sd15",
    "lllyasviel/control_v11p_sd15_canny": "controlnet",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "pixart",
    "black-forest-labs/FLUX.1-dev": "flux",
    "latent-consistency/lcm-lora-sdv1-5": "lcm",
    "ByteDance/SDXL-Lightning": "lightning",
    "h94/IP-Adapter": "ip_adapter",
}
SUBSTITUTIONS = {
    r"torch\.b?float16": "torch.float32",
    r'"cuda"|"mps"': '"cpu"',
    r"model_cpu_offload\(\)": 'model_cpu_offload(device="cpu")',
    r"steps=(\d\d)": r"steps=\1 // 5",
    r"(height|width)=(\d+)": r"\1=\2 // 8",
    r"range\(500\)": "range(2)",
    r"fullgraph=True": 'fullgraph=True, backend="eager"',
    r"pretrained=True": "pretrained=False",
}
if Version(diffusers.__version__) < Version("0.40"):
    SUBSTITUTIONS[r"\bdtype="] = "torch_dtype="  # as the guide tells users of these versions
NEEDS = {
    "the common lines": r"\A(?!(?s:.*)from atc_diffusion import)",
    "an NVIDIA GPU": r'"cuda"|enable_model_cpu_offload',
    "a Mac": '"mps"',
    "download": "|".join([*(name for name in MODELS if not name.startswith("examples/")), "pretrained=True"]),
    "`sketch.png`": "sketch.png",
    "`edges.png`": "edges.png",
    "`style.png`": "style.png",
    "`photos`": r"\bphotos\b",
    "checkout": "examples/emoji_diffusion",
    "DeepCache`": "import DeepCache",
    "peft`": "from peft",
    "fastapi": "from fastapi",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tiny models under the names in `MODELS`, and the images that recipes open."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "photos").mkdir()
    for name in ("sketch.png", "edges.png", "style.png", "photos/dog.png"):
        Image.linear_gradient("L").resize((128, 128)).convert("RGB").save(folder / name)
    for name in ("sd15", "sdxl", "sd3", "pixart", "flux", "controlnet"):
        getattr(tiny_pipelines, name)().save_pretrained(folder / name)
    save_lora(tiny_pipelines.sd15(), folder / "lcm")
    save_lora(tiny_pipelines.sdxl(), folder / "lightning", weight_name="sdxl_lightning_4step_lora.safetensors")
    save_ip_adapter(tiny_pipelines.sd15().unet, folder / "ip_adapter/models")
    return folder


def save_lora(pipe: Any, folder: Path, **options: str) -> None:
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(folder, unet_lora_layers=layers, **options)


def save_ip_adapter(unet: Any, folder: Path) -> None:
    """Random weights as in h94/IP-Adapter: an image encoder, a projection, and keys and values in every `attn2`."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=12, image_size=32, patch_size=8))
    encoder.save_pretrained(folder / "image_encoder")
    text = unet.config.cross_attention_dim
    weights = {
        f"image_proj.{name.replace('image_embeds', 'proj')}": w
        for name, w in ImageProjection(12, text, 4).state_dict().items()
    }
    crosses = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    for i, cross in enumerate(crosses):
        keys_and_values = IPAdapterAttnProcessor(unet.get_submodule(cross).query_dim, text).state_dict()
        weights |= {f"ip_adapter.{2 * i + 1}.to_{x}_ip.weight": keys_and_values[f"to_{x}_ip.0.weight"] for x in "kv"}
    save_file(weights, folder / "ip-adapter_sd15.safetensors")


@pytest.fixture
def run(folder, monkeypatch) -> Iterator[Any]:
    """Runs the recipe under a heading and gives its variables."""
    monkeypatch.chdir(folder)

    def run(heading: str) -> dict[str, Any]:
        variables: dict[str, Any] = {"__name__": "recipe"}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", module=r"atc_diffusion|recipe")
            exec(compile(shrink(RECIPES[heading].code), heading, "exec"), variables)
        return variables

    yield run
    torch.compiler.reset()


def shrink(code: str) -> str:
    for model, name in MODELS.items():
        code = code.replace(f'"{model}"', f'"./{name}"')
    for pattern, small in SUBSTITUTIONS.items():
        code = re.sub(pattern, small, code)
    return code


SPECIAL = {
    "A fair comparison with fewer steps",
    "A FastAPI endpoint",
    "Choosing a setting",
    "Clustering by itself",
    "Flux, Qwen-Image and Z-Image",
    "LoRA training",
    "Vision transformers",
    "What was merged",
}


@pytest.mark.parametrize(
    "heading",
    [
        pytest.param(heading, marks=[pytest.mark.slow] * (heading == "torch.compile"))
        for heading in RECIPES
        if heading not in SPECIAL
    ],
)
def test_the_recipe_draws_a_merged_image(run, heading):
    variables = run(heading)
    images = variables.get("images") or [variables["image"]]
    assert all(isinstance(image, Image.Image) for image in images)
    assert summary(variables["pipe"]).work_saved > 0


def test_the_recipe_for_flux_forecasts_alone(run):
    found = summary(run("Flux, Qwen-Image and Z-Image")["pipe"])
    assert found.work_saved == 0
    assert found.forecasts is not None
    assert found.forecasts.steps


def test_every_recipe_is_found():
    assert len(RECIPES) + 1 == sum(page.count("```python") for page in PAGES.values())
    assert RECIPES.keys() >= SPECIAL


@pytest.mark.parametrize("heading", RECIPES)
def test_a_recipe_says_what_it_needs(heading):
    needs, own = RECIPES[heading]
    assert {need for need in NEEDS if need in needs} == {need for need, use in NEEDS.items() if re.search(use, own)}


TEXTS = sorted([ROOT / "README.md", *GUIDE.glob("*.md"), ROOT / "eval/results/README.md"])


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: str(text.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(text):
    for name, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)]+))?\)", text.read_text(encoding="utf-8")):
        target = (text.parent / name).resolve() if name else text
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), f"{name}#{anchor}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_both_networks_of_a_controlnet_pipeline_are_merged(run):
    assert {layer.network for layer in summary(run("ControlNet")["pipe"]).layers} == {"unet", "controlnet"}


def test_hires_fix_merges_both_sizes_with_one_patch(run):
    variables = run("Hires fix")
    assert variables["image"].size == (2 * variables["draft"].width, 2 * variables["draft"].height)
    assert variables["refine"].unet is variables["pipe"].unet
    assert summary(variables["refine"]).layers[0].tokens == 4 * 64


def test_a_batch_has_four_images_of_the_size_asked_for(run):
    assert [image.size for image in run("Non-square sizes and batches")["images"]] == 4 * [(96, 64)]


def test_the_fraction_changes_during_denoising(run):
    kept = summary(run("A fraction that changes during denoising")["pipe"]).layers[0].kept_keys
    assert list(kept) == sorted(set(kept))
    assert (kept[0], kept[-1]) == (13, 51)  # of 256 tokens: 5 % and 20 %


def test_the_lora_is_trained_and_saved_and_the_patch_removed(run, folder):
    variables = run("LoRA training")
    assert variables["loss"].isfinite()
    assert all(weight.abs().sum() > 0 for name, weight in variables["layers"].items() if name.endswith("lora_B.weight"))
    assert isinstance(variables["image"], Image.Image)
    tiny_pipelines.sd15().load_lora_weights(folder / "my_lora")
    with pytest.raises(ValueError, match="is not patched"):
        summary(variables["pipe"])


def test_tuning_leaves_a_patch_and_prints_every_setting(run, capsys):
    tuning = run("Choosing a setting")["tuning"]
    assert capsys.readouterr().out.count(" dB\n") == len(tuning.rows)


def test_steps_that_are_forecast_are_reported(run, capsys):
    assert isinstance(run("Skipping steps")["image"], Image.Image)
    assert "steps forecast" in capsys.readouterr().out


def test_the_endpoint_answers_with_an_image(run):
    variables = run("A FastAPI endpoint")
    answer = TestClient(variables["app"]).get("/image", params={"prompt": "a lighthouse"})
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(BytesIO(answer.content)).size == (128, 128)
    assert summary(variables["pipe"]).work_saved > 0


def test_the_comparison_has_a_row_for_each_candidate(run, capsys):
    results = run("A fair comparison with fewer steps")["results"]
    assert capsys.readouterr().out.count("of the time") == len(results) == 3


def test_what_was_merged_can_be_looked_at(run, capsys):
    variables = run("What was merged")
    assert "saved, clustering not counted" in capsys.readouterr().out
    assert variables["clusters"].shape == (16, 16)
    assert variables["clusters"].unique().numel() == 26
    with pytest.raises(ValueError, match="is not patched"):
        summary(variables["pipe"])


def test_the_clustering_works_by_itself(run):
    variables = run("Clustering by itself")
    assert variables["merged"].shape == (2, 256, 64)
    assert variables["labels"].max() == 99


def test_a_vision_transformer_is_merged(run, capsys):
    assert run("Vision transformers")["logits"].shape == (1, 1000)
    assert "24" in capsys.readouterr().out  # an eighth of 196 patches
