"""The notebooks in examples/: kept as Jupyter writes them, without outputs; and each runs from top to bottom.

What their text and code refer to is checked with the pages, in `test_docs.py`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
#: What the outputs say at least; texts needs a pretrained encoder.
TOLD = {
    "continual": "noise: ",
    "images": "max_difference",
    "series": "reproduced: True",
    "sounds": "reproduced: True",
    "tables": "the same answers: True",
    "texts": "reproduced: True",
}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
PLACE = re.compile(r"(?<![\w.])(?:/(?:home|root|Users|tmp|mnt|work|opt)/|[A-Z]:\\\\)")


def test_there_is_a_notebook_for_each_kind_of_data() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(TOLD)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_clean(path: Path) -> None:
    text = path.read_text()
    notebook = json.loads(text)
    plain = json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False)
    assert text == f"{plain}\n"  # as Jupyter writes it: a change is a few lines
    assert notebook["metadata"] == METADATA
    assert notebook["nbformat"] == 4
    assert notebook["nbformat_minor"] == 5
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z-]{2,64}", name) for name in names)
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert "".join(cell["source"]).strip(), f"cell {cell['id']} is empty"
        if cell["cell_type"] != "markdown":
            assert cell["cell_type"] == "code"
            assert (cell["outputs"], cell["execution_count"]) == ([], None), "clear the outputs"
    assert not PLACE.findall(text), "a path of one machine"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_first_what_one_learns_and_what_it_needs(path: Path) -> None:
    first = json.loads(path.read_text())["cells"][0]
    assert first["cell_type"] == "markdown"
    assert re.fullmatch(r"# .+\n\nYou will .+?\n\nIt needs .+", "".join(first["source"]), re.DOTALL)


@pytest.mark.parametrize("jupyter", [True, False])
def test_a_progress_bar_that_a_notebook_cannot_show_is_left_out(jupyter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.training.callbacks import ProgressBar

    monkeypatch.setattr("rich.console._is_jupyter", lambda: jupyter)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # as if it were not installed
    assert ProgressBar().is_enabled is not jupyter


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    if path.stem == "texts":
        pytest.importorskip("tokenizers")
    for name, value in {"PYTHONPATH": ROOT, "WANDB_MODE": "offline", "IPYTHONDIR": tmp_path / "ipython"}.items():
        monkeypatch.setenv(name, str(value))
    notebook: Any = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}  # the folder it runs in
    done = nbclient.NotebookClient(notebook, timeout=540, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    shown = [output.get("data", {}) for output in outputs]
    told = "".join(output.get("text", "") for output in outputs) + "".join(d.get("text/plain", "") for d in shown)
    assert TOLD[path.stem] in told
    assert "Warning" not in told
    assert sum("image/png" in data for data in shown) >= 2
