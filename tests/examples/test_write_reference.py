"""The reference page says what the docstrings say."""

import atc_diffusion
import write_reference


def test_the_page_is_that_of_the_present_docstrings():
    written = write_reference.PAGE.read_text(encoding="utf-8")
    assert written == write_reference.page(), "run python examples/write_reference.py"


def test_the_page_has_every_public_name_with_its_arguments():
    page = write_reference.page()
    assert all(f"\n### {name}\n" in page for name in atc_diffusion.__all__)
    assert "`forecast_tolerance` (default: `0.0`): error budget" in page
    assert " at 0x" not in page
    assert "\n    blocks=(4, 7, 10),\n" in page
