"""Reports as one self-contained HTML page, and as Markdown with its figures beside it."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import matplotlib
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from files import write_atomically

CAPTION = 36  # characters on a line


@dataclass(frozen=True)
class Shown:
    """A picture with the words below it."""

    caption: str
    image: Image.Image


@dataclass(frozen=True)
class Section:
    """Part of a report: text, then code, a table (cells as text), a figure, and pictures."""

    title: str
    text: str = ""
    code: str = ""
    table: pd.DataFrame | None = None
    figure: Figure | None = None
    pictures: Sequence[Shown] = ()

    @property
    def slug(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: the headline.
        conditions: name and value of what the figures hold under.
        commands: command lines that made them.
        sections: the parts, in order.
    """

    title: str
    conditions: Mapping[str, str]
    commands: Sequence[str]
    sections: Sequence[Section]

    @property
    def html(self) -> str:
        """The page, with nothing to fetch."""
        return _environment(escape=True).get_template("report.html.jinja").render(page=self)

    @property
    def markdown(self) -> str:
        """The page as Markdown; figures and pictures lie beside it, as `write` puts them."""
        return _environment(escape=False).get_template("report.md.jinja").render(page=self)

    def write(self, folder: Path, name: str = "report") -> None:
        """Write `name`.html, `name`.md and what the latter shows."""
        folder.mkdir(parents=True, exist_ok=True)
        for section in self.sections:
            if section.figure is not None:
                write_atomically(folder / f"{section.slug}.svg", svg(section.figure).encode())
            if section.pictures:
                write_atomically(folder / f"{section.slug}.png", _png(contact_sheet(section.pictures)))
        write_atomically(folder / f"{name}.md", self.markdown.encode())
        write_atomically(folder / f"{name}.html", self.html.encode())


def svg(figure: Figure) -> str:
    """`figure` as an SVG element, with text as text."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "atc_diffusion"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def data_uri(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(_png(image)).decode()


def contact_sheet(pictures: Sequence[Shown], columns: int = 6) -> Image.Image:
    """All `pictures` with their captions."""
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.2 * rows), layout="constrained", dpi=110)
    for axes in (grid := figure.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
    for axes, shown in zip(grid.base.flat, pictures, strict=False):
        axes.imshow(shown.image, interpolation="nearest")
        axes.set_title(fill(shown.caption, CAPTION), fontsize=6)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return Image.open(file)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
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
