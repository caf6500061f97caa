"""What a configuration accepts, and how it says no."""

import copy
import json
import pickle
import pydoc
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from atc_diffusion import (
    ATCConfig,
    ATCOptions,
    DPCKNNConfig,
    KMedoidsConfig,
    MergeConfig,
    ToMeConfig,
    ViTConfig,
    agglomerate,
    apply_patch,
    merge_maps,
    patched,
    summary,
)
from atc_diffusion.clustering.tree import Cuttable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 60}, r"r is the fraction of tokens kept, in \(0, 1\], got 60; did you mean 0.6\?"),
        ({"r": 1.5}, "got 1.5$"),
        ({"r": 0}, "got 0$"),
        ({"r": -0.5}, "got -0.5$"),
        ({"r": float("nan")}, "got nan$"),
        ({"r": "0.6"}, "got '0.6'$"),
        ({"r": None}, "got None$"),
        ({"r": lambda progress: 1.5 - progress}, r"r\(0.0\) is the fraction of tokens kept, in \(0, 1\], got 1.5"),
        ({"r_keys": 10}, r"r_keys is the fraction of tokens kept, in \(0, 1\], got 10; did you mean 0.1\?"),
        ({"r_keys": {1: None}}, r"r_keys is the fraction of tokens kept, in \(0, 1\], got None"),
        ({"r_keys": {1: 0}}, r"r_keys is the fraction of tokens kept, in \(0, 1\], got 0"),
        ({"r": {1: 0.5}, "r_keys": {2: 0.5}}, "name different levels; name the same in both"),
        ({"r": {1: 0.5, 2: 40}}, r"got 40; did you mean 0.4\?"),
        ({"r": {}}, "r by level needs downsampling factors as keys, such as .*, got {}"),
        ({"r": {0.5: 1}}, "r by level needs downsampling factors as keys"),
        ({"r": {1: 0.5}, "levels": "all"}, "names the levels; leave out levels='all'"),
        ({"window_size": 1}, "window_size must be None or a side of at least 2 tokens, got 1"),
        ({"linkage": "centroid"}, "linkage must be one of 'average', 'complete', 'single', 'ward', got 'centroid'"),
        ({"features": "queries"}, "features must be one of 'keys', 'values', .*, got 'queries'"),
        ({"recluster_threshold": -1}, "recluster_threshold must be a number from 0 up, got -1"),
        (
            {"levels": 0},
            r"levels must be 'finest', 'costly', 'all' or downsampling factors such as 1 or \(1, 2\), got 0",
        ),
        ({"levels": "1"}, "levels must be 'finest', 'costly', 'all' or .*, got '1'"),
        ({"levels": []}, r"levels must be .*, got \[\]"),
        ({"levels": (1, 0.5)}, r"levels must be .*, got \(1, 0.5\)"),
        ({"levels": True}, "levels must be .*, got True"),
        ({"levels": np.array([1, 2])}, r"levels must be .*, got array\(\[1, 2\]\)"),
        ({"r": {1: 0.5}, "levels": np.array([1, 2])}, r"levels must be .*, got array\(\[1, 2\]\)"),
        ({"features": np.array(["keys", "values"])}, "features must be one of .*, got array"),
        ({"r": lambda: 0.5}, "r is called with the progress of denoising, .*; <function .*> must take just that"),
        ({"backend": "cuda"}, "backend must be one of 'torch', .*, got 'cuda'"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ATCConfig(**options)


def test_numbers_of_numpy_print_and_are_written_as_those_of_python():
    numbers: Any = {"r": np.float64(0.5), "r_keys": np.float32(0.25), "recluster_threshold": np.float32(0)}
    config = ATCConfig(**numbers)
    assert str(config) == "ATCConfig(r=0.5, r_keys=0.25, recluster_threshold=0.0)"
    assert json.loads(json.dumps(asdict(config)))["r_keys"] == 0.25


@pytest.mark.parametrize(("kind", "name"), [(ATCConfig, "share_guidance"), (ViTConfig, "proportional_attention")])
@pytest.mark.parametrize("value", ["no", None, 1])
def test_flags_are_true_or_false(kind, name, value):
    with pytest.raises(ValueError, match=f"^{name} must be True or False, got {value!r}$"):
        kind(**{"r": 0.5, name: value})


def test_configurations_are_values():
    assert ATCConfig(r=0.5) == ATCConfig(r=0.5)
    assert len({ATCConfig(r=0.5), ATCConfig(r=0.5), ATCConfig(r=0.4)}) == 2
    with pytest.raises(AttributeError):
        ATCConfig().r = 0.5  # type: ignore[misc]


def test_the_fractions_may_depend_on_level_and_progress():
    config = ATCConfig(r={1: lambda progress: 0.25 + 0.5 * progress, 2: 0.8}, r_keys=0.1)
    assert config.num_kept(100, 1, 0.5) == (50, 10)
    assert config.num_kept(100, 2, None) == (80, 10)
    with pytest.raises(
        ValueError, match=r"progress of this call is unknown; pass `t` from `for t in scheduler\.timesteps`"
    ):
        config.num_kept(100, 1, None)


@pytest.mark.parametrize(
    ("r", "num_tokens", "kept"),
    [
        (1, 10, 10),
        (1, 100, 100),
        (0.001, 10, 1),
        (0.25, 15, 4),
        (0.6, 105, 63),
        (0.6, 108, 64),  # of 64.8: from 64 up a multiple of 8
        (0.6, 4096, 2456),
        (0.1, 4096, 408),
        (0.99, 100, 96),
        (0.999, 101, 101),  # no more than there are
    ],
)
def test_the_fraction_is_of_tokens_kept(r, num_tokens, kept):
    assert ATCConfig(r=r).num_kept(num_tokens, 1, None) == (kept, kept)


def test_a_function_is_checked_whenever_it_is_asked():
    config = ATCConfig(r=lambda progress: 0.5 if progress in (0, 0.5, 1) else 2.0)
    with pytest.raises(ValueError, match=r"r\(0.25\) is the fraction of tokens kept, in \(0, 1\], got 2.0"):
        config.num_kept(100, 1, 0.25)


def test_the_base_class_says_which_to_use():
    with pytest.raises(ValueError, match="MergeConfig does not say how to cluster; use ATCConfig or ToMeConfig"):
        MergeConfig()


def test_the_papers_setting_clusters_hidden_states_into_plain_means_every_time():
    exact: dict[str, Any] = {"window_size": None, "share_guidance": False, "recluster_threshold": 0.0}
    plain: dict[str, Any] = {"features": "hidden_states", "proportional_attention": False}
    assert ATCConfig.paper(0.4, linkage="single") == ATCConfig(r=0.4, linkage="single", **plain, **exact)


@pytest.mark.parametrize("linkage", ["average", "ward"])
def test_atc_clusters_by_its_linkage(linkage):
    features = torch.randn(2, 20, 4)
    tree = ATCConfig(linkage=linkage).cluster(features, (4, 5), torch.tensor(0), num_clusters=10)
    assert torch.equal(tree.cut(10), agglomerate(features, 10, linkage))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0.2}, "ToMe with stride 2 keeps at least 0.25 of the tokens, got r=0.2; use a larger r or stride"),
        ({"r": {1: 0.2}}, "keeps at least 0.25 of the tokens, got r=0.2"),
        ({"r_keys": 0.1}, "keeps at least 0.25 of the tokens, got r_keys=0.1; use a larger r_keys or stride"),
        ({"r": lambda progress: 0.2}, "keeps at least 0.25 of the tokens, got r=0.2"),
        ({"r": 0.1, "stride": 3}, "stride 3 keeps at least 0.1111"),
        ({"stride": 0}, "stride must be a whole number from 1 up, got 0"),
    ],
)
def test_tome_names_what_it_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        ToMeConfig(**options)


def test_it_prints_as_the_code_that_makes_it():
    assert str(ATCConfig()) == "ATCConfig(r=0.6)"
    assert str(ATCConfig.fast()) == "ATCConfig(r=1.0, r_keys=0.125, levels='costly', linkage='ward')"
    for config in (ATCConfig.faster({1: 0.5}), ATCConfig.paper(0.4), ToMeConfig(r=0.5)):
        assert eval(str(config)) == config


PRESETS: list[Callable[..., ATCConfig]] = [ATCConfig.fast, ATCConfig.faster, ATCConfig.forecast, ATCConfig.paper]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", [each.name for each in fields(ATCConfig)])
def test_presets_take_every_field_by_keyword(preset, name):
    values: dict[str, object] = {"linkage": "complete", "features": "values", "levels": "all", "backend": "torch"}
    values |= {each.name: not each.default for each in fields(ATCConfig) if isinstance(each.default, bool)}
    value = values.get(name, 0.5 if name.startswith("r") else 4)
    config = preset(**{"r": 1.0} | {name: value})
    assert getattr(config, name) == value
    others = {each.name for each in fields(config)} - {name, "r", "levels"}
    assert all(getattr(config, other) == getattr(preset(r=1.0), other) for other in others)


def test_forecasting_alone_merges_nothing():
    config = ATCConfig.forecast()
    assert config.num_kept(4096, 1, None) == (4096, 4096)
    assert config.forecast_tolerance == ATCConfig.faster().forecast_tolerance > 0
    assert str(config) == f"ATCConfig(r=1.0, forecast_tolerance={config.forecast_tolerance})"


@pytest.mark.parametrize("mapping", [{"r": {1: 0.5}}, {"r_keys": {1: 0.5}}, {"r": {1: 0.5}, "r_keys": {1: 0.1}}])
def test_a_mapping_names_the_levels_of_a_preset(mapping):
    assert ATCConfig.faster(**mapping).named_levels == frozenset([1])
    with pytest.raises(ValueError, match="names the levels; leave out levels='all'"):
        ATCConfig.fast(**mapping, levels="all")


@pytest.mark.parametrize("levels", [(2,), [2], 2])
def test_levels_are_one_factor_or_several(levels):
    config = ATCConfig(levels=levels)
    assert config == ATCConfig(levels=(2,))
    assert hash(config) == hash(ATCConfig(levels=(2,)))
    assert config.named_levels == frozenset([2])
    assert ATCConfig(levels=[1, 2]) == ATCConfig(levels=(1, 2))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ratio": 0.4}, "tomesd's ratio is the fraction of tokens removed, r the fraction kept: ratio=0.4 is r=0.6"),
        ({"ratio": 0.35}, "ratio=0.35 is r=0.65$"),
        ({"ratio": 50}, "ratio=0.4 is r=0.6$"),
        ({"max_downsample": 1}, r"max_downsample=1 is levels=\(1,\)"),
        ({"max_downsample": 4}, r"max_downsample=4 is levels=\(1, 2, 4\)"),
        ({"max_downsample": None}, "max_downsample=None is levels='finest'"),
        ({"max_downsample": "auto"}, "max_downsample='auto' is levels='costly'"),
        ({"merge": "keys_values"}, "merge='keys_values' is r=1 with r_keys"),
        ({"merge_mlp": True}, "only self-attention is merged"),
        ({"sx": 2}, "sx is an option of tomesd; use ToMeConfig with stride and seed"),
        ({"refresh_every": 3}, "recluster_threshold; 0 is refresh_every=1"),
        ({"window": 32}, "window=32 is window_size=32"),
        ({"share_layers": 2}, "every layer has clusters of its own"),
        ({"linkge": "ward"}, r"did you mean 'linkage'\?"),
        ({"colour": "red"}, "it has r, r_keys, features"),
    ],
)
def test_unknown_options_are_translated(options, sentence, unet):
    message = f"ATCConfig has no option '{next(iter(options))}'; .*{sentence}"
    for make in (ATCConfig, ATCConfig.fast, lambda **options: apply_patch(unet, **options)):
        with pytest.raises(ValueError, match=message):
            make(**options)


@pytest.mark.parametrize("kind", [ToMeConfig, KMedoidsConfig, ViTConfig])
@pytest.mark.parametrize("name", ["window", "max_downsample", "refresh_every", "linkge"])
def test_advice_names_options_that_are_there(kind, name):
    with pytest.raises(ValueError, match=f"{kind.__name__} has no option '{name}'") as error:
        kind(**{name: 1})
    advised = set(re.findall(r"\b(window_size|levels|recluster_threshold|linkage)\b", str(error.value)))
    assert advised <= {each.name for each in fields(kind)}


@pytest.mark.parametrize(("value", "meant"), [(0.6, "r=0.6"), (60, "r=0.6"), (1, "r=1")])
@pytest.mark.parametrize("kind", [ATCConfig, ToMeConfig, ViTConfig])
def test_a_fraction_without_its_name_is_understood(kind, value, meant):
    with pytest.raises(ValueError, match=rf"such as r=0.6, got {value}; did you mean {meant}\?"):
        kind(value)


def test_numbers_of_numpy_are_numbers():
    options: Any = {
        "r": np.float32(0.5),
        "r_keys": np.float64(0.25),
        "levels": [np.int64(1)],
        "window_size": np.int32(8),
    }
    config = ATCConfig(**options)
    assert config.num_kept(4096, 1, None) == (2048, 1024)


def test_type_checkers_know_the_options(unet):
    with pytest.raises(ValueError, match="no option 'colour'"):
        apply_patch(unet, colour="red")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"got 1\.5"):
        ATCConfig.fast(levels=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'wards'"):
        ATCConfig.faster(linkage="wards")  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [apply_patch, patched, summary, ATCConfig.fast, ATCConfig.forecast, ATCConfig])
def test_annotations_can_be_read_when_running(function):
    assert get_type_hints(function)


def test_the_typed_options_are_the_fields():
    assert get_type_hints(ATCOptions) == {each.name: each.type for each in fields(ATCConfig)}


@pytest.mark.parametrize("kind", [ATCConfig, ToMeConfig, KMedoidsConfig, DPCKNNConfig, ViTConfig])
def test_help_explains_every_field_with_its_default(kind):
    page = pydoc.plain(pydoc.render_doc(kind))
    for each in fields(kind):
        assert page.count(f" {each.name} (default: {each.default!r}):\n") == 1
    assert kind.__doc__.count("Attributes:") == kind.__doc__.count("Raises:") == 1
    assert max(map(len, kind.__doc__.splitlines())) <= 120


@pytest.mark.parametrize("config", [ATCConfig.fast(0.3, levels=[1, 2]), ToMeConfig(seed=3), ViTConfig(t=5)])
def test_copies_and_pickles_are_equal(config):
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


@dataclass(frozen=True, kw_only=True)
class RowsConfig(MergeConfig):
    """A method of a user's own: a cluster for each row of the grid.

    Attributes:
        upwards: whether rows are counted from below.
    """

    upwards: bool = False

    def cluster(self, features: Tensor, grid: tuple[int, int], timestep: Tensor, num_clusters: int) -> Cuttable:
        height, width = grid
        rows = torch.arange(height).repeat_interleave(width).expand(len(features), -1)
        return Rows(rows, height)


@dataclass
class Rows:
    rows: Tensor
    num_clusters: int

    def cut(self, num_clusters: int) -> Tensor:
        assert num_clusters == self.num_clusters
        return self.rows


def test_a_method_of_ones_own_is_a_class_with_cluster(unet):
    apply_patch(unet, RowsConfig(r=0.125, record=True))
    unet(torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 5, 12))
    keys = merge_maps(unet)[0].keys
    assert keys is not None
    assert keys.labels.tolist() == [[row for row in range(8) for _ in range(8)]]
    assert "upwards (default: False)" in str(RowsConfig.__doc__)
    assert "r (default: 0.6)" in str(RowsConfig.__doc__)
