"""The clean image that a network sees: its output and the latents it was given, each turned into the other.

The latents that a network is given are `x = alpha * x0 + sigma * noise`; samplers that work on another scale bring them
to this one first (`scale_model_input`). So each output says what clean image the network sees. That image moves slowly
along a run, also where a sampler adds noise, because the noise is in the latents.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

TRAINED = 1000  # timesteps of all schedules, from noise to 0
Prediction = Literal["epsilon", "v_prediction", "sample", "flow", "reversed_flow"]


@dataclass(frozen=True)
class Noise:
    """How much of the latents is image and how much is noise.

    Attributes:
        alpha: the factor of the image.
        sigma: the factor of the noise.
        prediction: what the network's output is.
    """

    alpha: float
    sigma: float
    prediction: Prediction

    def clean(self, latents: Tensor, output: Tensor) -> Tensor:
        """The clean image, float32, like both."""
        a, b = self._factors
        return (output.float() - a * latents.float()) / b

    def output(self, latents: Tensor, clean: Tensor) -> Tensor:
        """The output that says what `clean` does; float32."""
        a, b = self._factors
        return a * latents.float() + b * clean

    @property
    def clean_factor(self) -> float:
        """Of the clean image in the output."""
        return self._factors[1]

    @property
    def log_ratio(self) -> float:
        """log(alpha / sigma), which rises from noise to image; the integration variable of DPM-Solver."""
        return math.log(max(self.alpha, 1e-6) / max(self.sigma, 1e-6))

    @property
    def _factors(self) -> tuple[float, float]:
        """`a` and `b` of `output = a * latents + b * clean`."""
        sigma = max(self.sigma, 1e-6)  # as at a timestep of zero, where nothing is left to predict
        match self.prediction:
            case "epsilon":
                return 1 / sigma, -self.alpha / sigma if self.alpha else -1e-6
            case "v_prediction":
                return self.alpha / sigma, -1 / sigma
            case "flow":
                return 1 / sigma, -1 / sigma
            case "reversed_flow":
                return -1 / sigma, 1 / sigma
            case "sample":
                return 0.0, 1.0


NoiseSchedule = Callable[[float], Noise]


def flow(prediction: Prediction) -> NoiseSchedule:
    """Rectified flow, `x = (1 - t) * x0 + t * noise`, of SD3, Flux, Qwen-Image and Z-Image."""
    return lambda time: Noise(1 - time / TRAINED, time / TRAINED, prediction)


def diffusion(scheduler: Any) -> NoiseSchedule:
    """The noise that a diffusers scheduler was made for; without a scheduler, that of Stable Diffusion 1.

    A wrong one makes forecasts worse, which shows in their errors: these are measured with it too.
    """
    config = getattr(scheduler, "config", {})
    products = getattr(scheduler, "alphas_cumprod", None)
    ratios = _stable_diffusion() if not isinstance(products, Tensor) else _log_ratios(products)
    prediction: Any = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        return flow("flow")

    def noise(time: float) -> Noise:
        ratio = float(np.interp(time, np.arange(len(ratios)), ratios))
        return Noise(math.sqrt(1 / (1 + math.exp(-2 * ratio))), math.sqrt(1 / (1 + math.exp(2 * ratio))), prediction)

    return noise


def bearable_roughness(scheduler: Any) -> float:
    """How much more than others a solver may weigh errors that alternate, if forecasts are to do no harm.

    DPM-Solver++ 2M weighs them twice as much, UniPC of second order up to 3.54 times, which is the most that is borne,
    and Adams-Bashforth of fourth order, as in PLMS, 6.7 times. An unknown scheduler may be of third order, whose
    weights have reached 3 after six steps and grow on. 0 where it is known to weigh more than one earlier step, as
    PNDM, LMS and solvers of third order do.
    """
    order = getattr(scheduler, "config", {}).get("solver_order") or 1
    if order > 2 or hasattr(scheduler, "ets") or hasattr(scheduler, "derivatives"):
        return 0.0
    return 3.6 if type(scheduler).__module__.startswith("diffusers.") else 3.0


@cache
def _stable_diffusion() -> Any:
    return _log_ratios(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, TRAINED) ** 2, dim=0))


def _log_ratios(products: Tensor) -> Any:
    """log(alpha / sigma) by timestep; finite where nothing but noise is left, as with rescaled betas."""
    x = products.detach().double().cpu().clamp(2.0**-24, 1 - 2.0**-24)
    return (0.5 * (x.log() - (1 - x).log())).numpy()
