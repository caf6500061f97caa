"""A check that any machine's owner can run: is merging right here, on every device, and what does it cost?"""

import importlib.util
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
from diffusers.models import attention_processor
from torch import Tensor
from torch.utils._pytree import tree_map

from atc_diffusion.adapters.weights import attend
from atc_diffusion.clustering import LINKAGES, agglomerate
from atc_diffusion.clustering.placement import FEW, HAS_TRITON, disagreement, numba_problem
from atc_diffusion.clustering.windows import cluster_windows
from atc_diffusion.devices import devices_found
from atc_diffusion.loading import quiet
from atc_diffusion.patch import patched, summary
from atc_diffusion.testing import TINY_NETWORKS, TinyNetwork, draw

PACKAGES = ("atc-diffusion", "torch", "diffusers", "transformers", "numba", "triton", "xformers")
FAMILIES = {
    "sd15": "Stable Diffusion 1",
    "sdxl": "Stable Diffusion XL",
    "pixart": "PixArt",
    "sd3": "Stable Diffusion 3",
    "sd35": "Stable Diffusion 3.5",
    "flux": "Flux",
    "qwen_image": "Qwen-Image",
    "z_image": "Z-Image",
}
# Relative errors. Rounded features change which tokens are merged where distances nearly tie.
TOLERANCES = {torch.float32: 0.02, torch.float16: 0.05, torch.bfloat16: 0.1}

# A call of Stable Diffusion 1 at 512 x 512: its finest level, by default in windows, and an eighth of the keys.
SIDE, CHANNELS, HEADS, WINDOW, KEYS = 64, 320, 8, 16, 512
ODD, ODD_CLUSTERS = (2, 601, 17), 200  # tokens and channels that fill no tile of a kernel, so that its masks matter
ROUNDS = 3  # of timing; the median counts


@dataclass(frozen=True)
class Finding:
    """What was tried, what is wrong with it (None: nothing), and what was measured."""

    subject: str
    problem: str | None = None
    note: str = ""

    def __str__(self) -> str:
        said = self.problem or self.note
        return f"{'ok   ' if self.problem is None else 'WRONG'} {self.subject}{': ' if said else ''}{said}"


def run_check() -> int:
    """Print what was found, and a block to paste into an issue; 1 if something is wrong, else 0."""
    devices = devices_found()
    machine, findings = describe_machine(devices), []
    print("\n".join(machine), flush=True)
    with quiet():  # diffusers warns of precisions that are meant
        for finding in (finding for device in devices for check in CHECKS for finding in check(device)):
            print(finding, flush=True)
            findings.append(finding)
    print(f"\n{verdict(findings)}\n\nPaste this into an issue:\n\n```")
    print("\n".join([*machine, *map(str, findings)]) + "\n```")
    return int(any(finding.problem for finding in findings))


def describe_machine(devices: Sequence[torch.device]) -> list[str]:
    """A line each about the system, the packages and the devices."""
    system = f"Python {platform.python_version()}, {platform.platform()}, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    names = (f"{x} ({torch.cuda.get_device_name(x)})" if x.type == "cuda" else str(x) for x in devices)
    return [system, versions, "devices: " + ", ".join(names)]


def verdict(findings: Sequence[Finding]) -> str:
    wrong = [finding.subject for finding in findings if finding.problem is not None]
    if not wrong:
        return f"Merging is right on this machine: {len(findings)} of {len(findings)} checks passed."
    return f"{len(wrong)} of {len(findings)} checks failed: {'; '.join(wrong)}. Please report this."


def find(subject: str, error: Callable[[], float], tolerance: float) -> Finding:
    """Judge a measured error; whatever measuring it raises is a problem, too."""
    try:
        measured = error()
    except Exception as problem:  # whatever a driver, a compiler or a missing operation raises
        return Finding(subject, _in_a_line(problem))
    if measured <= tolerance:  # false for NaN
        return Finding(subject, note=f"error {measured:.1e}")
    return Finding(subject, f"error {measured:.1e}, more than {tolerance:g}")


def check_clusterings(device: torch.device, linkages: Sequence[str] = LINKAGES) -> Iterator[Finding]:
    """Every backend of the device against the reference, for odd sizes and for those of a real call."""
    backends = ["torch"] * (device.type in ("cpu", "cuda")) + ["numba"] * (numba_problem() is None)
    backends += ["triton"] * (HAS_TRITON and device.type == "cuda")
    for linkage in linkages:
        for backend in backends:
            subject = f"{linkage} linkage by {backend} for tokens on {device}"
            yield find(subject, partial(_clustered_otherwise, device, linkage, backend), FEW)


def check_networks(device: torch.device) -> Iterator[Finding]:
    """A tiny network of every family that this diffusers has, merged, against the same on the CPU in float32."""
    for name, family in ((name, family) for name, family in FAMILIES.items() if name in TINY_NETWORKS):
        for dtype, tolerance in TOLERANCES.items():
            subject = f"{family} merged on {device} in {str(dtype).removeprefix('torch.')}"
            yield find(subject, partial(_network_error, name, device, dtype), tolerance)


def check_processors(device: torch.device) -> Iterator[Finding]:
    """Every installed attention processor that works with merged tokens, against PyTorch's attention."""
    processors = {
        "plain attention": attention_processor.AttnProcessor(),
        "PyTorch's attention": attention_processor.AttnProcessor2_0(),
        "sliced attention": attention_processor.SlicedAttnProcessor(slice_size=1),
    }
    if importlib.util.find_spec("xformers") and device.type == "cuda":
        processors["xFormers"] = attention_processor.XFormersAttnProcessor()
    for name, processor in processors.items():
        error = partial(_network_error, "sd15", device, torch.float32, processor)
        yield find(f"{name} on {device}", error, TOLERANCES[torch.float32])


def check_attention(device: torch.device) -> Iterator[Finding]:
    """Attention to the merged keys of a real call, by each way to weigh them, against the explicit softmax."""
    for where, widen in (("a mask", False), ("wider heads", True)):
        error = partial(_attention_error, device, widen)
        yield find(f"weights in {where} on {device}", error, TOLERANCES[_dtype(device)])


def check_speed(device: torch.device) -> Iterator[Finding]:
    """A real call's attention, with merged keys by each way to weigh them, and a clustering."""
    subject = f"speed on {device}, 512 x 512"
    try:
        full, masked, widened, clustering = _medians(device)
    except Exception as problem:  # whatever a driver, a compiler or a missing operation raises
        yield Finding(subject, _in_a_line(problem))
        return
    note = f"attention {full * 1e3:.2f} ms; merged {masked / full:.2f} of it (with widen_heads=True"
    yield Finding(subject, note=f"{note} {widened / full:.2f}), a clustering {clustering / full:.2f} of it")


CHECKS = (check_clusterings, check_networks, check_processors, check_attention, check_speed)


def _clustered_otherwise(device: torch.device, linkage: str, backend: str) -> float:
    """Fraction of the tokens that are clustered otherwise than by the reference, in the worst of three problems."""
    problems = _problems(linkage, _dtype(device))
    return max(
        disagreement(cluster(tokens.to(device), backend=backend).cpu(), expected)
        for cluster, tokens, expected in problems
    )


@cache
def _problems(linkage: str, dtype: torch.dtype) -> list[tuple[Callable[..., Tensor], Tensor, Tensor]]:
    """How to cluster, what, and the labels expected: odd sizes, and a real call as a whole and in windows."""
    odd, call = draw(*ODD), draw(1, SIDE**2, CHANNELS).to(dtype)
    few, whole = (partial(agglomerate, linkage=linkage, num_clusters=count) for count in (ODD_CLUSTERS, KEYS))
    windows = partial(_cluster_windows, linkage=linkage)
    reference = "scipy" if importlib.util.find_spec("scipy") else "torch"
    of_calls = "torch" if linkage == "ward" else reference  # for Ward's linkage, SciPy would take several seconds
    calls = [(cluster, call, cluster(call.double(), backend=of_calls)) for cluster in (whole, windows)]
    return [(few, odd, few(odd, backend=reference)), *calls]


def _cluster_windows(tokens: Tensor, linkage: str, backend: str | None = None) -> Tensor:
    return cluster_windows(tokens, KEYS, (SIDE, SIDE), WINDOW, linkage, backend).cut(KEYS)


def _network_error(name: str, device: torch.device, dtype: torch.dtype, processor: Any = None) -> float:
    """Error of a network on a device, in a precision and with an attention processor other than its own."""
    torch.manual_seed(0)
    network: Any = TINY_NETWORKS[name].make()
    expected = _merged_output(TINY_NETWORKS[name], network)
    network.to(device, dtype)
    if processor:
        network.set_attn_processor(processor)
    return _relative_error(_merged_output(TINY_NETWORKS[name], network), expected)


def _merged_output(tiny: TinyNetwork, network: Any) -> Tensor:
    inputs = tiny.inputs(16, 16) | tiny.timestep(torch.full((2,), 500))
    with patched(network, r=0.75 if tiny.merges_queries else 1.0, r_keys=0.5):
        if (found := len(summary(network).layers)) != tiny.layers:
            raise RuntimeError(f"{found} of {tiny.layers} self-attentions are merged")
        return tiny.run(network, **tree_map(partial(_suited, network), inputs))


def _suited(network: Any, x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.to(network.device, network.dtype if x.is_floating_point() else x.dtype)


def _attention_error(device: torch.device, widen: bool) -> float:
    there = _call(device)
    heads, keys, logs = (x.float().cpu() for x in there)
    logits = torch.einsum("bqhd,bkhd->bhqk", heads, keys) / heads.shape[-1] ** 0.5 + logs[:, None, None]
    expected = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(dim=3), keys)
    heads, keys, logs = there
    return _relative_error(attend(heads, keys, keys, logs, widen), expected)


def _relative_error(output: Tensor, expected: Tensor) -> float:
    return ((output.float().cpu() - expected).norm() / expected.norm()).item()


def _call(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[1, N, H, D]`, merged keys `[1, K, H, D]` and the logarithms of their sizes `[1, K]`, made up."""
    tokens = draw(1, SIDE**2, CHANNELS).to(device, _dtype(device)).unflatten(2, (HEADS, -1))
    return tokens, tokens[:, :KEYS].contiguous(), draw(1, KEYS).abs().to(device)


@torch.no_grad()
def _medians(device: torch.device) -> list[float]:
    """Seconds that an attention, one with merged keys by each way to weigh them, and a clustering take, in turn."""
    heads, keys, logs = _call(device)
    work: list[Callable[[], object]] = [
        partial(attend, heads, heads, heads, None, widen=False),
        partial(attend, heads, keys, keys, logs, widen=False),
        partial(attend, heads, keys, keys, logs, widen=True),
        partial(_cluster_windows, heads.flatten(2), "ward"),
    ]
    for function in work:
        _seconds(function, device)  # compiles
    return [median(times) for times in zip(*([_seconds(f, device) for f in work] for _ in range(ROUNDS)), strict=True)]


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def _dtype(device: torch.device) -> torch.dtype:
    """In which images are drawn there."""
    return torch.float32 if device.type == "cpu" else torch.float16


def _in_a_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0]}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
