"""A run goes on with the classes and inputs that it had, or is refused and stays as it was."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import train_here

TINY = ("logger=csv", "hydra.run.dir=run", "data.num_workers=0")


def contents(run: Path) -> dict[str, bytes]:
    kept = ("model/*", "checkpoints/*", "summary.json")
    return {str(path.relative_to(run)): path.read_bytes() for kind in kept for path in sorted(run.glob(kind))}


def refused(folder: Path, told: str, *words: str) -> None:
    before = contents(folder / "run")
    assert before
    ended = train_here(folder, "resume=run", *words, check=False)
    assert ended.returncode == 1
    assert re.search(told, ended.stderr), ended.stderr
    assert "Traceback" not in ended.stderr
    assert contents(folder / "run") == before


def test_pictures_of_other_classes(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name in ("fox", "hare"):
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "d" / name / f"{i}.png")
    data = ("model=test_unireplknet", "data=imagefolder", "data.path=d", "data.image_size=16", "data.batch_size=4")
    train_here(tmp_path, *data, *TINY, "trainer.max_epochs=1")
    shutil.move(tmp_path / "d" / "fox", tmp_path / "d" / "zfox")
    for words in ((), ("trainer.max_epochs=2",)):
        refused(tmp_path, "other classes than the run had: output 0 was 'fox', and is 'hare' now", *words)
    shutil.move(tmp_path / "d" / "zfox", tmp_path / "d" / "fox")
    train_here(tmp_path, "resume=run", "trainer.max_epochs=2")


def test_tasks_in_another_order(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for folder in ("a/fox", "a/hare", "b/elk", "b/owl"):
        (tmp_path / "d" / folder).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "d" / folder / f"{i}.png")
    train_here(tmp_path, "experiment=own_tasks", "data.path=d", *TINY[:2], "trainer.max_epochs=1")
    shutil.move(tmp_path / "d" / "a", tmp_path / "d" / "c")
    for words in ((), ("trainer.max_epochs=2",)):
        refused(tmp_path, "other classes than the run had: output 0 was 'fox', and is 'elk' now", *words)


def test_tables_of_other_rows(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(60, 2)).round(3)
    rows[0, 0] = np.nan

    def write(scale: float, yes: str) -> None:
        lines = [f"{'' if np.isnan(a) else scale * a},{b},{yes if b > 0 else 'no'}" for a, b in rows.tolist()]
        (tmp_path / "t.csv").write_text("\n".join(["a,b,y", *lines]) + "\n")

    write(1, "yes")
    data = ("model=grbf_diag", "data=tabular", "data.path=t.csv", "data.target=y")
    train_here(tmp_path, *data, *TINY, "trainer.max_epochs=2")
    write(1000, "yes")
    refused(tmp_path, "not the one that the run had: its columns or training rows make other inputs")
    write(1, "aye")
    refused(tmp_path, "output 1 was 'yes', and is 'no' now|output 0 was 'no', and is 'aye' now", "trainer.max_epochs=4")
    write(1, "yes")
    train_here(tmp_path, "resume=run", "trainer.max_epochs=4")
