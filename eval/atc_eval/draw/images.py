"""The images to draw, with prompts and seeds as in the paper's experiment."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from atc_diffusion.commands import SEEDS, check_number
from atc_eval.command_line import counted, read_names, several
from atc_eval.files import FEWEST_IMAGES

# WordNet's lemma lists, line i for class i, as in the ATC authors' public code (github.com/JoakimHaurum/ATC).
IMAGENET_NAMES = Path(__file__).with_name("imagenet_class_names.txt")


@dataclass(frozen=True)
class PlannedImage:
    """An image to draw; class and image index determine its prompt and seed."""

    class_index: int
    image_index: int
    prompt: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.class_index:04d}_{self.image_index}.png"


@dataclass(frozen=True)
class Prompts:
    """Which images are drawn."""

    _argument_group_name = "images"
    classes: str = HfArg(default="all", help="'all', a count (100: the first hundred) or a list of indices (3,7,12)")
    images_per_class: int = HfArg(default=2, help="images of each class")
    class_names: Path = HfArg(default=IMAGENET_NAMES, help="file of class names (default: ImageNet's 1000)")
    prompt: str = HfArg(default="A high quality photograph of a {}.", help="prompt, with {} for the class name")
    seed: int = HfArg(default=0, help="added to every image's own seed")
    show: list[int] = several([], "classes whose images the report shows (default: the first)")

    def __post_init__(self) -> None:
        check_number("--images-per-class", self.images_per_class)
        if "{}" not in self.prompt:
            raise ValueError(f"--prompt needs {{}} for the name of the class, got {self.prompt!r}")
        images = self.plan()
        if (count := len(images)) < FEWEST_IMAGES:
            verb = "is" if count == 1 else "are"
            raise ValueError(f"{counted(count, 'image')} {verb} too few to score; at least {FEWEST_IMAGES} are needed")
        if any(image.seed not in SEEDS for image in images):
            raise ValueError(f"--seed {self.seed} gives seeds beyond 64 bits; give one closer to 0")
        self.shown()

    def plan(self) -> list[PlannedImage]:
        names = read_names("--class-names", self.class_names)
        classes = select_classes(self.classes, len(names))
        return plan(names, classes, self.images_per_class, self.prompt, self.seed)

    def shown(self) -> list[PlannedImage]:
        """The first image of each class to show."""
        firsts = {image.class_index: image for image in self.plan() if image.image_index == 0}
        missing = [index for index in self.show if index not in firsts]
        if missing:
            raise ValueError(f"--show {missing[0]}, but there are no images of that class; see --list")
        return [firsts[index] for index in self.show or list(firsts)[:1]]

    def print_list(self) -> None:
        print("class", "image", "seed", "file", "prompt", sep="\t")
        for image in self.plan():
            print(image.class_index, image.image_index, image.seed, image.file, image.prompt, sep="\t")


def plan(names: Sequence[str], classes: Sequence[int], per_class: int, template: str, seed: int) -> list[PlannedImage]:
    """The images of `classes`, with prompts and seeds as in the authors' code.

    The seed is the class index followed by the image index, plus `seed`; `template` has `{}` for the class name.
    """
    return [
        PlannedImage(index, image, template.replace("{}", names[index]), seed + int(f"{index}{image}"))
        for index in classes
        for image in range(per_class)
    ]


def parse_part(text: str | None) -> slice:
    """The images that one job of an array draws, from text such as "3/8"; all for None."""
    number, _, count = ("1/1" if text is None else text).partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--part is one of the parts into which the images are divided, such as 3/8, got {text!r}")
    return slice(int(number) - 1, None, int(count))


def select_classes(text: str, count: int) -> list[int]:
    """Class indices in `text`: "all", a number ("10": the first ten) or a list ("3,7" or "3,")."""
    if text == "all":
        return list(range(count))
    try:
        numbers = [int(number) for number in text.split(",") if number]
    except ValueError:
        raise ValueError(f"--classes is 'all', a count such as 10, or a list such as 3,7,12, got {text!r}") from None
    classes = numbers if "," in text else list(range(sum(numbers)))
    if not classes or len(set(classes)) < len(classes) or min(classes) < 0 or max(classes) >= count:
        raise ValueError(f"--classes {text!r} does not name different classes of 0..{count - 1}")
    return classes
