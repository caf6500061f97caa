"""Second derivatives and `torch.func` through merging and clustering, against averaging with a matrix."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from atc_diffusion import MergeMap, agglomerate, bipartite_labels
from atc_diffusion.clustering.baselines import dpc_knn_labels, kmedoids_labels
from atc_diffusion.clustering.windows import cluster_windows
from tests.helpers.labels import assert_valid

Function = Callable[[Tensor], Tensor]

LABELS = torch.tensor([[0, 1, 0, 3, 1, 0], [3, 0, 1, 3, 3, 0]])  # and a cluster without tokens
NUM_CLUSTERS = 4

CLUSTERINGS: dict[str, Any] = {
    "atc": lambda x: agglomerate(x, 3),
    "atc by torch": lambda x: agglomerate(x, 3, "complete", backend="torch"),
    "single": lambda x: agglomerate(x, 3, "single"),
    "ward": lambda x: agglomerate(x, 3, "ward"),
    "windows": lambda x: cluster_windows(x, 3, (2, 3), window=2).cut(3),
    "bipartite": lambda x: bipartite_labels(x, 3, torch.tensor([0, 4])),
    "kmedoids": lambda x: kmedoids_labels(x, 3),
    "dpc_knn": lambda x: dpc_knn_labels(x, 3),
}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def merged(x: Tensor, labels: Tensor = LABELS, num_clusters: int = NUM_CLUSTERS) -> Tensor:
    """Nonlinear between and after merging, so that no derivative vanishes."""
    merge_map = MergeMap(labels, num_clusters)
    return merge_map.unmerge(merge_map.merge(x.sin()).exp()) * x


def averaged(x: Tensor, labels: Tensor = LABELS, num_clusters: int = NUM_CLUSTERS) -> Tensor:
    """`merged`, with the matrix `[B, N, K]` that says which cluster each token belongs to."""
    members = (labels[:, :, None] == torch.arange(num_clusters)).to(x.dtype)
    means = members.mT @ x.sin() / members.sum(dim=1)[:, :, None].clamp(min=1)
    return members @ means.exp() * x


def test_derivatives_of_both_orders_and_directions():
    x = draw(2, 6, 2).requires_grad_()
    assert torch.autograd.gradcheck(merged, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(merged, x, check_batched_grad=True)


@pytest.mark.parametrize("function", [lambda f, x: f(x).square().sum(), lambda f, x: f(x).sum()])
def test_a_gradient_penalty(function):
    x = draw(2, 6, 2).requires_grad_()
    gradients = []
    for form in (merged, averaged):
        (first,) = torch.autograd.grad(function(form, x), x, create_graph=True)
        gradients.append(torch.autograd.grad((first.norm() - 1).square(), x)[0])
    torch.testing.assert_close(*gradients)


def energy(f: Function) -> Function:
    return lambda x: f(x).square().sum()


TRANSFORMS: dict[str, Callable[[Function, Tensor], Any]] = {
    "grad": lambda f, x: grad(energy(f))(x),
    "grad of grad": lambda f, x: grad(energy(grad(energy(f))))(x),
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),)),
    "grad of jvp": lambda f, x: grad(energy(lambda y: jvp(f, (y,), (y.cos(),))[1]))(x),
    "jvp of grad": lambda f, x: jvp(grad(energy(f)), (x,), (x.cos(),)),
    "vjp": lambda f, x: vjp(f, x)[1](x.cos()),
    "jacrev": lambda f, x: jacrev(f)(x),
    "vmap": lambda f, x: vmap(f)(torch.stack([x, x.cos()])),
    "vmap of columns": lambda f, x: vmap(f, in_dims=2, out_dims=1)(torch.stack([x, x.cos()], dim=2)),
    "vmap of grad": lambda f, x: vmap(grad(energy(f)))(torch.stack([x, x.cos()])),
    "vmap of vmap": lambda f, x: vmap(vmap(f))(torch.stack([x, x.cos()]).expand(2, 2, 2, 6, 2)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_merging(transform):
    x = draw(2, 6, 2)
    torch.testing.assert_close(transform(merged, x), transform(averaged, x))


def test_forward_differentiation_without_a_transform():
    x, tangent = draw(2, 6, 2), draw(2, 6, 2)
    with forward_ad.dual_level():
        duals = [form(forward_ad.make_dual(x, tangent)) for form in (merged, averaged)]
        torch.testing.assert_close(*(forward_ad.unpack_dual(dual).tangent for dual in duals))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("cluster", CLUSTERINGS.values(), ids=CLUSTERINGS)
def test_transforms_of_clustering_and_merging(cluster, transform):
    """Clusters are constants: they are those of the values, whatever is computed of these."""
    x = draw(2, 6, 2)
    forms = [lambda x, form=form: form(x, cluster(x), 3) for form in (merged, averaged)]
    torch.testing.assert_close(*(transform(form, x) for form in forms))


@pytest.mark.parametrize("cluster", CLUSTERINGS.values(), ids=CLUSTERINGS)
def test_mapped_items_get_the_labels_that_they_get_alone(cluster):
    x = draw(4, 2, 6, 2)
    labels = vmap(cluster)(x)
    assert torch.equal(labels, torch.stack([cluster(item) for item in x]))
    assert_valid(labels.flatten(0, 1), 3)
    with forward_ad.dual_level():
        assert torch.equal(cluster(forward_ad.make_dual(x[0], x[0].cos())), labels[0])


class Merging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).tanh()
        merge_map = MergeMap(agglomerate(x, 3), 3)
        return self.after(merge_map.unmerge(merge_map.merge(x).exp()))


def test_gradients_of_every_sample():
    network, images = Merging(), torch.randn(5, 6, 2)
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(network, parameters, image[None]).square().sum()

    of_samples = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    for i, image in enumerate(images):
        expected = torch.autograd.grad(network(image[None]).square().sum(), list(network.parameters()))
        torch.testing.assert_close([of_samples[name][i] for name in parameters], list(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_kept(dtype):
    x = draw(2, 6, 2).to(dtype)
    for output in (vmap(merged)(x[None]), grad(lambda x: merged(x).sum())(x), *jvp(merged, (x,), (x,))):
        assert output.dtype == dtype
