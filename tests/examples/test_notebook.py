"""The notebook runs from its first cell to its last, offline, as it is in the repository."""

from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "atc_diffusion.ipynb"


def texts(notebook: Any) -> str:
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.mark.slow
def test_the_notebook_runs_and_was_run(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for output in (texts(notebook), texts(run(notebook))):
        assert "PSNR" in output
        assert "of the arithmetic of these attentions saved" in output


def run(notebook: Any) -> Any:
    """The notebook with new outputs, of small images, so that it is quick."""
    for cell in notebook.cells:
        cell.source = cell.source.replace('"fox", ', '"fox", height=64, width=64, ')
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    return nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
