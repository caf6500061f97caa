"""Reports: one self-contained HTML page, and Markdown with its figures in files."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image, ImageChops

from atc_diffusion.commands import write_atomically
from atc_diffusion.tuning_page import data_uri, svg

CAPTION = 28  # characters on a line
GAIN = 20  # of differences


@dataclass(frozen=True)
class Shown:
    """An image with the words below it; only the best are in Markdown."""

    caption: str
    image: Image.Image
    is_best: bool = True


@dataclass(frozen=True)
class Section:
    """Part of a report, in this order; cells of the table are text."""

    title: str
    text: str = ""
    table: pd.DataFrame | None = None
    figure: Figure | None = None
    images: Sequence[Shown] = ()

    @property
    def slug(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    conditions: Mapping[str, str]  # that the figures hold under, by name
    commands: Sequence[str]  # that made them
    sections: Sequence[Section]

    @property
    def html(self) -> str:
        """The page, which loads nothing else."""
        return _environment(escape=True).get_template("report.html.jinja").render(page=self)

    def write(self, folder: Path) -> None:
        """Write `report.html`, `report.md`, and the figures and images of the latter."""
        for section in self.sections:
            if section.figure is not None:
                write_atomically(folder / f"{section.slug}.svg", svg(section.figure).encode())
            if section.images:
                write_atomically(folder / f"{section.slug}.png", contact_sheet(section.images))
        markdown = _environment(escape=False).get_template("report.md.jinja").render(page=self)
        write_atomically(folder / "report.md", markdown.encode())
        write_atomically(folder / "report.html", self.html.encode())


def contact_sheet(images: Sequence[Shown], most: int = 4) -> bytes:
    """The first image, and `most` of the best others above their difference from it, as a PNG."""
    first, best = images[0], [each for each in images[1:] if each.is_best][:most]
    figure = Figure(figsize=(2 * (1 + len(best)), 4.5), layout="constrained", dpi=110)
    for (above, below), shown in zip(figure.subplots(2, 1 + len(best), squeeze=False).T, [first, *best], strict=True):
        above.imshow(shown.image, interpolation="nearest")
        above.set_title(fill(shown.caption, CAPTION), fontsize=8)
        if shown is not first:
            difference = ImageChops.difference(first.image, shown.image).point(lambda value: GAIN * value)
            below.imshow(difference, interpolation="nearest")
            below.set_title(f"difference x {GAIN}", fontsize=8)
        above.set_axis_off()
        below.set_axis_off()
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _environment(escape: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"svg": svg, "data_uri": data_uri}
    return environment
