"""Where a run's data was: remembered for its own user, and never read because a stranger's folder says so."""

from __future__ import annotations

import json
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import train_here
from zoo.support import places
from zoo.tools import evaluation
from zoo.tools.comparison import compare
from zoo.tools.errors import ToolError
from zoo.tools.report import write_report

QUICK = ("model=grbf", "data=tabular", "data.target=stays", "model.model_name=test_grbf", "trainer.max_epochs=1")
QUICK += ("logger=csv", "callbacks.explanations=null", "hydra.run.dir=run")
UNKNOWN = "and is not known to be made by you on this machine: "


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    rows = [f"{i},{i % 5},{'yes' if i % 7 > 3 else 'no'}" for i in range(60)]
    for name in ("mine.csv", "theirs.csv"):
        (folder / name).write_text("\n".join(["age,income,stays", *rows]) + "\n")
    train_here(folder, *QUICK, "data.path=mine.csv")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the run, at a place of its own, where its table is another one: `made` has the one it names."""
    shutil.copytree(made / "run", tmp_path / "run", symlinks=True)
    monkeypatch.chdir(made)  # the run recorded a relative path
    return tmp_path / "run"


def point(run: Path, place: Path) -> None:
    """Let a run folder name another table."""
    for name in ("overrides.yaml", "config.yaml"):
        path = run / ".hydra" / name
        path.write_text(path.read_text().replace("mine.csv", str(place)))


def resume(made: Path, run: Path, *words: str) -> str:
    done = train_here(made, f"resume={run}", "trainer.max_epochs=2", *words, check=False)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def doors(run: Path) -> list[Callable[[], object]]:
    return [
        lambda: evaluation.validate(str(run)),
        lambda: write_report(run.parent / "page.html", str(run)),
        lambda: compare(str(run), str(run)),
    ]


def test_a_moved_run_of_ones_own_knows_its_data(made: Path, here: Path) -> None:
    assert evaluation.validate(str(here))["reproduced"]
    assert resume(made, here) == ""
    assert evaluation.validate(str(here))["reproduced"]


def test_relative_data_is_found_from_any_folder(
    made: Path, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert evaluation.validate(str(here))["reproduced"]
    done = train_here(elsewhere, f"resume={here}", "trainer.max_epochs=2")
    assert "data.path" not in done.stderr, "the same data is no change"
    hydra = here / ".hydra" / "hydra.yaml"  # a stranger's folder may name any start
    hydra.write_text(hydra.read_text().replace(f"cwd: {made}", f"cwd: {tmp_path}"))
    (tmp_path / "mine.csv").write_bytes((made / "theirs.csv").read_bytes())
    with pytest.raises(ToolError, match=UNKNOWN):
        evaluation.validate(str(here))
    assert UNKNOWN in resume(elsewhere, here)


def test_a_place_that_the_folder_alone_names_is_not_read(made: Path, here: Path) -> None:
    point(here, made / "theirs.csv")
    told = resume(made, here)
    assert told.endswith(
        f"resume={here}: the run names data at {made / 'theirs.csv'}, {UNKNOWN}name the data with data.path=..."
    )
    for door in doors(here):
        with pytest.raises(ToolError, match=f"{made / 'theirs.csv'}, {UNKNOWN}name the data with --path"):
            door()
    assert resume(made, here, "data.path=mine.csv") == ""
    assert evaluation.validate(str(here), root={"path": "mine.csv"})["rows"]
    with pytest.raises(ToolError, match=UNKNOWN):  # the folder still names the other
        evaluation.validate(str(here))


def test_who_names_the_data_of_an_older_run_signs_it(made: Path, here: Path) -> None:
    (here / places.SIGNATURE).unlink()
    assert UNKNOWN in resume(made, here)
    with pytest.raises(ToolError, match=UNKNOWN):
        evaluation.validate(str(here))
    assert resume(made, here, "data.path=mine.csv") == ""
    assert evaluation.validate(str(here))["reproduced"]


def test_other_places_of_the_data_section_count_too(made: Path, here: Path) -> None:
    for key in ("test_path", "cache"):
        shutil.rmtree(here)
        shutil.copytree(made / "run", here)
        for name, sign in (("overrides.yaml", "- data.{}={}\n"), ("config.yaml", "")):
            path = here / ".hydra" / name
            text = path.read_text().replace(f"  {key}: null", f"  {key}: {made / 'theirs.csv'}")
            path.write_text(text + sign.format(key, made / "theirs.csv"))
        told = resume(made, here)
        assert UNKNOWN in told
        assert set(told.rpartition("name the data with ")[2].split()) == {"data.path=...", f"data.{key}=..."}
        with pytest.raises(ToolError, match=UNKNOWN):
            evaluation.validate(str(here))


def test_without_a_home_nothing_is_signed(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    monkeypatch.chdir(made)
    run = tmp_path / "run"
    train_here(made, *QUICK[:-1], f"hydra.run.dir={run}", "data.path=mine.csv")
    assert not (run / places.SIGNATURE).exists()
    assert UNKNOWN in resume(made, run)
    assert resume(made, run, "data.path=mine.csv") == ""


def test_the_secret_is_one_and_private(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    start, found = threading.Barrier(8), []

    def create() -> None:
        start.wait()
        found.append(places.sign({"path": "/data"}))

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert found[0] is not None
    (secret,) = (tmp_path / "kernel-zoo").iterdir()
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    (run := tmp_path / "run" / ".hydra").mkdir(parents=True)
    (run / "places.sig").write_text(f"{found[0]}\n")
    assert places.vouched({"path": "/data"}, run.parent) == {"path": "/data"}
    assert places.vouched({"path": "/data2"}, run.parent) == {}
    secret.chmod(0o644)  # others could have signed
    assert places.vouched({"path": "/data"}, run.parent) == {}
    assert places.sign({"path": "/data"}) is None


def test_the_secret_is_in_no_record(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = places._secret()
    assert secret is not None
    for path in (made / "run").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert secret not in content
        assert secret.hex().encode() not in content


def test_no_place_no_signature(tmp_path: Path) -> None:
    section = {"_target_": "zoo.data.Digits", "name": "wine", "cache": None, "file_column": "file", "separator": "/"}
    assert places.places_in(section, tmp_path) == {}
    section |= {"name": "a.csv", "deep": {"x": ["../b"]}, "test_path": str(tmp_path / "in" / "c.csv")}
    found = places.places_in(section, tmp_path)
    assert list(found) == ["path", "deep.x.0"]
    assert json.loads(json.dumps(found))["path"] == str(Path("a.csv").resolve())


@pytest.mark.parametrize("word", ["resume=", "resume=''", "data.path=", "model.checkpoint_path=", "data.cache=''"])
def test_an_empty_place_is_refused(tmp_path: Path, word: str) -> None:
    done = train_here(tmp_path, "experiment=digits", word, check=False)
    assert done.returncode == 1
    key = word.partition("=")[0]
    assert done.stderr.strip() == (
        f"error: {key}= is empty, as from an unset variable: name the path, or give {key}=null for none"
    )
    assert list(tmp_path.iterdir()) == []
