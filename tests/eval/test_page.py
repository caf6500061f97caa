"""The page holds all it shows, and Markdown has its figures beside it."""

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from atc_eval.report.page import Page, Section, Shown


@pytest.fixture
def page() -> Page:
    table = pd.DataFrame({"method": ["<ATC> & co", "ToMe"], "ratio": ["0.60", "0.80"]})
    sections = [
        Section("One table", "Some words.", table=table, figure=Figure()),
        Section("Two images", images=[Shown(name, Image.new("RGB", (4, 4))) for name in ("one", "two")]),
    ]
    return Page("A report", {"model": "tiny"}, ["python eval/fid.py"], sections)


def test_the_page_has_all_parts_and_nothing_to_fetch(page: Page) -> None:
    html = page.html
    for part in ("<title>A report</title>", "tiny", "python eval/fid.py", "Some words.", "<svg"):
        assert part in html
    assert "&lt;ATC&gt; &amp; co" in html
    assert html.count('src="data:image/png;base64,') == html.count("<img ") == 2
    for request in ('src="http', 'src="/', "<link", "@import", "url(http"):
        assert request not in html


def test_markdown_shows_files_that_are_there(page: Page, tmp_path: Path) -> None:
    page.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| <ATC> & co | 0.60    |" in text
    for name in ("one-table.svg", "two-images.png"):
        assert f"]({name})" in text
        assert (tmp_path / name).stat().st_size > 0
    assert (tmp_path / "report.html").read_text() == page.html
