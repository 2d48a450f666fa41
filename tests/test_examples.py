"""Every script in examples/ runs from its own data to an answer; slow, as they train for some seconds each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
#: What the last lines say at least; texts needs a pretrained encoder.
TOLD = {
    "clouds": "a cube seems to be a {'class': 'cube'",
    "continual": "'test/acc': ",
    "images": "parameters, in ",
    "series": "{'bread': ",
    "sounds": "rising sounds like {'class': 'rising'",
    "tables": "{'age': ",
    "texts": "{'class': 'one'",
}


def test_every_example_is_known() -> None:
    assert [path.stem for path in SCRIPTS] == sorted(TOLD)


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    if path.stem == "texts":
        pytest.importorskip("tokenizers")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert TOLD[path.stem] in done.stdout
