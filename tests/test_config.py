"""What a configuration accepts, and how it says no."""

from typing import Any

import pytest
import torch

from atc_diffusion import ATCConfig, MergeConfig, ToMeConfig, agglomerate
from atc_diffusion.clusterer import build_tree


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 60}, r"share of tokens kept, in \(0, 1\], got 60; did you mean 0.6\?"),
        ({"r": 0}, "got 0$"),
        ({"r": -0.5}, "got -0.5$"),
        ({"r": float("nan")}, "got nan$"),
        ({"r": "0.6"}, "got '0.6'$"),
        ({"r": None}, "got None$"),
        ({"r": lambda progress: 1.5 - progress}, r"r must return a share of tokens, in \(0, 1\], but r\(0.0\) is 1.5"),
        ({"r_keys": 10}, r"r_keys is the share of tokens kept, in \(0, 1\], got 10; did you mean 0.1\?"),
        ({"r_keys": {1: 0}}, r"r_keys is the share of tokens kept, in \(0, 1\], got 0"),
        ({"r": {1: 0.5}, "r_keys": {2: 0.5}}, "name different levels; name the same in both"),
        ({"r": {1: 0.5, 2: 40}}, r"got 40; did you mean 0.4\?"),
        ({"r": {}}, "r by level needs downsampling factors as keys, such as .*, got {}"),
        ({"r": {0.5: 1}}, "r by level needs downsampling factors as keys"),
        ({"r": {1: 0.5}, "levels": "all"}, "names the levels; leave out levels='all'"),
        ({"window_size": 1}, "window_size must be None or a side of at least 2 tokens, got 1"),
        ({"linkage": "centroid"}, "linkage must be one of 'average', 'complete', 'single', 'ward', got 'centroid'"),
        ({"features": "queries"}, "features must be one of 'keys', 'values', .*, got 'queries'"),
        ({"share_layers": True}, "share_layers must be a number of layers from 1 up, got True"),
        ({"recluster_threshold": -1}, "recluster_threshold must be a number from 0 up, got -1"),
        ({"levels": 0}, "levels must be 'finest', 'costly', 'all' or a tuple .*, got 0"),
        ({"levels": "1"}, "levels must be 'finest', 'costly', 'all' or a tuple .*, got '1'"),
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


def test_the_shares_may_depend_on_level_and_progress():
    config = ATCConfig(r={1: lambda progress: 0.25 + 0.5 * progress, 2: 0.8}, r_keys=0.1)
    assert config.num_kept(100, 1, 0.5) == (50, 10)
    assert config.num_kept(100, 2, None) == (80, 10)
    with pytest.raises(ValueError, match=r"call the network with an entry of scheduler\.timesteps"):
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
def test_the_share_is_of_tokens_kept(r, num_tokens, kept):
    assert ATCConfig(r=r).num_kept(num_tokens, 1, None) == (kept, kept)


def test_a_function_is_checked_whenever_it_is_asked():
    config = ATCConfig(r=lambda progress: 0.5 if progress in (0, 0.5, 1) else 2.0)
    with pytest.raises(ValueError, match=r"but r\(0.25\) is 2.0"):
        config.num_kept(100, 1, 0.25)


def test_the_base_class_says_which_to_use():
    with pytest.raises(ValueError, match="MergeConfig does not say how to cluster; use ATCConfig or ToMeConfig"):
        MergeConfig()


def test_the_papers_setting_clusters_hidden_states_into_plain_means_every_time():
    exact: dict[str, Any] = {"window_size": None, "share_guidance": False, "recluster_threshold": 0.0}
    plain: dict[str, Any] = {"features": "hidden_states", "proportional_attention": False}
    assert ATCConfig.paper(0.4, "single") == ATCConfig(r=0.4, linkage="single", **plain, **exact)


@pytest.mark.parametrize("linkage", ["average", "ward"])
def test_atc_clusters_by_its_linkage(linkage):
    features = torch.randn(2, 20, 4)
    tree = build_tree(ATCConfig(linkage=linkage), features, (4, 5), torch.tensor(0), num_clusters=10)
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
