"""The pictures to draw, with prompts and seeds as in the paper's experiment."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arguments import checks
from arguments.options import option

# WordNet's lemma lists, line i for class i, as in the ATC authors' public code (github.com/JoakimHaurum/ATC).
IMAGENET_NAMES = Path(__file__).with_name("imagenet_class_names.txt")


@dataclass(frozen=True)
class Picture:
    """One picture; class and image index determine its prompt and seed."""

    class_index: int
    image_index: int
    prompt: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.class_index:04d}_{self.image_index}.png"


@dataclass(frozen=True)
class Prompts:
    """pictures"""

    classes: str = option("'all', a count (100: the first hundred) or a list of indices (3,7,12)", "all")
    images_per_class: int = option("pictures of each class", 2, checks.whole(1))
    class_names: tuple[str, ...] = option(
        "a file with the names of the classes (default: the 1000 of ImageNet)",
        str(IMAGENET_NAMES),
        checks.lines,
        nargs=None,
    )
    prompt: str = option("with {} for the class name", "A high quality photograph of a {}.", checks.template)
    seed: int = option("added to every picture's own seed", 0, int)
    show: tuple[int, ...] = option("classes to show pictures of (default: the first)", (), int)

    def __post_init__(self) -> None:
        count = len(self.plan())
        if count < checks.FEWEST_PICTURES:
            raise ValueError(f"{count} pictures are too few to score; at least {checks.FEWEST_PICTURES} are needed")
        self.shown()

    def plan(self) -> list[Picture]:
        classes = select_classes(self.classes, len(self.class_names))
        return plan(self.class_names, classes, self.images_per_class, self.prompt, self.seed)

    def shown(self) -> list[Picture]:
        """The first picture of each class to show."""
        firsts = {picture.class_index: picture for picture in self.plan() if picture.image_index == 0}
        missing = [index for index in self.show if index not in firsts]
        if missing:
            raise ValueError(f"--show {missing[0]}, but there are no pictures of that class; see --list")
        return [firsts[index] for index in self.show or list(firsts)[:1]]

    def print_list(self) -> None:
        print("class", "image", "seed", "file", "prompt", sep="\t")
        for picture in self.plan():
            print(picture.class_index, picture.image_index, picture.seed, picture.file, picture.prompt, sep="\t")


def plan(names: Sequence[str], classes: Sequence[int], per_class: int, template: str, seed: int) -> list[Picture]:
    """The pictures of `classes`, with prompts and seeds as in the authors' code.

    The seed is the class index followed by the image index, plus `seed`; `template` has `{}` for the class name.
    """
    return [
        Picture(index, image, template.replace("{}", names[index]), seed + int(f"{index}{image}"))
        for index in classes
        for image in range(per_class)
    ]


def select_classes(text: str, count: int) -> list[int]:
    """Class indices in `text`: "all", a number ("10": the first ten) or a list ("3,7" or "3,").

    Raises:
        ValueError: if `text` is none of these, or names a class that is not there.
    """
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
