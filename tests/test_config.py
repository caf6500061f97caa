"""What a configuration accepts, and how it says no."""

from typing import Any

import pytest
import torch

from atc_diffusion import ATCConfig, ToMeConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 60}, r"share of tokens kept, in \(0, 1\], got 60; did you mean 0.6\?"),
        ({"r": 0}, "got 0$"),
        ({"r": -0.5}, "got -0.5$"),
        ({"r": float("nan")}, "got nan$"),
        ({"r": "0.6"}, "got '0.6'$"),
        ({"r": None}, "got None$"),
        ({"r": lambda progress: 1.5 - progress}, r"in \(0, 1\], got 1.5"),
        ({"r": {1: 0.5, 2: 40}}, r"got 40; did you mean 0.4\?"),
        ({"r": {}}, "r by level needs downsampling factors as keys, such as .*, got {}"),
        ({"r": {0.5: 1}}, "r by level needs downsampling factors as keys"),
        ({"r": {1: 0.5}, "max_downsample": 2}, "names the levels; leave out max_downsample=2"),
        ({"window": 1}, "window must be None or a side of at least 2 tokens, got 1"),
        ({"linkage": "centroid"}, "linkage must be one of 'average', 'complete', 'single', 'ward', got 'centroid'"),
        ({"features": "queries"}, "features must be one of 'keys', 'values', .*, got 'queries'"),
        ({"merge": "values"}, "merge must be one of 'tokens', 'keys_values', got 'values'"),
        ({"modules": ("mlp", "norm")}, "every entry of modules must be one of .*, got 'norm'"),
        ({"modules": "mlp"}, "modules must be a tuple such as .*, got 'mlp'"),
        ({"modules": ()}, r"modules must be a tuple such as .*, got \(\)"),
        ({"max_downsample": 0}, "max_downsample must be None or a factor .*, got 0"),
        ({"max_downsample": "1"}, "max_downsample must be None or a factor .*, got '1'"),
        ({"backend": "cuda"}, "backend must be one of 'torch', .*, got 'cuda'"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ATCConfig(**options)


def test_configurations_are_values():
    assert ATCConfig(r=0.5) == ATCConfig(r=0.5)
    assert len({ATCConfig(r=0.5), ATCConfig(r=0.5), ATCConfig(r=0.4)}) == 2
    with pytest.raises(AttributeError):
        ATCConfig().r = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(("r", "num_tokens", "kept"), [(1, 10, 10), (0.6, 4096, 2458), (0.001, 10, 1), (0.25, 15, 4)])
def test_the_share_is_of_tokens_kept(r, num_tokens, kept):
    assert ATCConfig(r=r).num_clusters(num_tokens) == kept


def test_the_share_may_depend_on_level_and_progress():
    config = ATCConfig(r={1: lambda progress: 0.25 + 0.5 * progress, 2: 0.8}, linkage="ward")
    assert config.at(1, 0.5) == ATCConfig(r=0.5, linkage="ward")
    assert config.at(2, None) == ATCConfig(r=0.8, linkage="ward")
    with pytest.raises(ValueError, match=r"call the UNet with an entry of scheduler\.timesteps or a number"):
        config.at(1, None)


def test_the_papers_setting_clusters_hidden_states_into_plain_means_every_time():
    exact: dict[str, Any] = {"window": None, "share_guidance": False, "refresh_every": 1}
    plain: dict[str, Any] = {"features": "hidden_states", "proportional_attention": False}
    assert ATCConfig.paper(0.4, "single") == ATCConfig(r=0.4, linkage="single", **plain, **exact)


@pytest.mark.parametrize("linkage", ["average", "ward"])
def test_atc_groups_by_its_linkage(linkage):
    from atc_diffusion import agglomerate

    features = torch.randn(2, 20, 4)
    merge_map = ATCConfig(r=0.5, linkage=linkage).merge_map(features, (4, 5), torch.tensor(0))
    assert torch.equal(merge_map.labels, agglomerate(features, 10, linkage))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0.2}, "ToMe with stride 2 keeps at least 0.25 of the tokens, got r=0.2"),
        ({"r": 0.1, "stride": 3}, "stride 3 keeps at least 0.1111"),
        ({"stride": 0}, "stride must be a whole number from 1 up, got 0"),
    ],
)
def test_tome_names_what_it_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        ToMeConfig(**options)
