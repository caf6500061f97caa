"""Pictures drawn with one configuration after the other, as long as it may still be the one to use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image
from tqdm import tqdm

from draw.configuration import Configuration
from draw.pictures import Picture
from draw.sampler import Sampler
from draw.timing import time_batch, warm_up


@dataclass(frozen=True)
class Trial:
    """One picture, and the seconds it took."""

    configuration: Configuration
    picture: Picture
    image: Image.Image
    seconds: float


Configurations = Sequence[Configuration]
Narrow = Callable[[Sequence[Trial], Configurations], Configurations]


def measure(
    sampler: Sampler, configurations: Configurations, pictures: Sequence[Picture], narrow: Narrow
) -> list[Trial]:
    """Draw every picture with every configuration in turn, until Ctrl-C.

    Args:
        sampler: draws them.
        configurations: what is tried, the unmerged model first.
        pictures: what is drawn.
        narrow: gives the configurations that are worth drawing the next picture with.

    Raises:
        KeyboardInterrupt: if it comes before there is anything to compare.
    """
    trials: list[Trial] = []
    bar = tqdm(total=len(pictures) * len(configurations), unit="picture")
    try:
        configurations = _that_work(sampler, configurations, pictures[:1], bar)
        for number, picture in enumerate(pictures, start=1):
            bar.total = bar.n + len(configurations) * (len(pictures) - number + 1)
            for configuration in configurations:
                bar.set_description(f"{configuration.label} {configuration.setting}"[:40].strip())
                [image], seconds = time_batch(sampler, configuration, [picture])
                trials.append(Trial(configuration, picture, image, seconds))
                bar.update()
            configurations = narrow(trials, configurations)
    except KeyboardInterrupt:
        if len(trials) < 2:
            raise
        bar.write("stopped; what follows is what was measured so far")
    finally:
        bar.close()
    return trials


def _that_work(sampler: Sampler, configurations: Configurations, batch: Sequence[Picture], bar: tqdm) -> Configurations:
    """The configurations that draw on this model and device, all warmed up; the unmerged model must."""
    return [each for each in configurations if _works(sampler, each, batch, bar)]


def _works(sampler: Sampler, configuration: Configuration, batch: Sequence[Picture], bar: tqdm) -> bool:
    try:
        warm_up(sampler, [configuration], batch, bar)
    except (RuntimeError, AttributeError, KeyError, ValueError) as error:
        if configuration.is_unmerged:
            raise
        bar.write(f"left out {configuration.label} ({configuration.setting}), which fails here: {error}")
        return False
    return True
