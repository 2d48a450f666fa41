"""Rows say when, where and on which code they were measured, and tables say it from their rows."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from zoo.benchmarks.tuning import bracketed
from zoo.cli import main
from zoo.results import records as module
from zoo.results.records import STAMP, Provenance, Records, RowsError, has_section, put_section, stamp
from zoo.results.timing import POLICIES, best_policy, policy, under_policies

ROW = {"date": "2026-11-01 10:00:00", "commit": "aaa", "threads": "1", "wait_policy": "passive", "load": "0.5"}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_row_is_stamped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    records = Records(tmp_path / "a" / "x.csv", ("seed",), ("score",))
    records.add({"seed": 0, "score": 0.25})
    records.add({"seed": 1, "score": 0.5, "threads": 7})
    first, second = read(records.path)
    assert list(first) == ["seed", "score", *STAMP]
    assert first["wait_policy"] == "passive"
    assert first["threads"] == str(torch.get_num_threads())
    assert second["threads"] == "7"
    assert f"torch {torch.__version__}" in first["machine"]
    assert first["date"].startswith("20")
    again = Records(records.path, ("seed",), ("score",))
    assert {"seed": 1} in again
    assert again.numbers("score", seed=0) == [0.25]
    again.drop(seed=0)
    assert [row["seed"] for row in read(records.path)] == ["1"]


def test_a_row_is_added_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(tmp_path / "x.csv", ("seed",), ("score",))
    records.add({"seed": 0, "score": 1.0})
    before = records.path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RuntimeError, match="disk is full"):
        records.add({"seed": 1, "score": 1.0})
    assert records.path.read_bytes() == before
    assert {"seed": 1} not in records


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("seed,score\n0,1\n")
    with pytest.raises(ValueError, match="other columns"):
        Records(tmp_path / "x.csv", ("seed",), ("score",))


def test_a_table_says_where_its_rows_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_git", lambda *args: "bbb" if any(a.startswith("aaa..") for a in args) else "")
    rows = [
        ROW | {"machine": "one"},
        ROW
        | {"date": "by 2026-11-09", "commit": "by ccc", "threads": "", "wait_policy": "", "load": "", "machine": ""},
        ROW | {"date": "2026-11-03 09:00:00", "commit": "ddd+", "threads": "2", "load": "2.5", "machine": "one"},
    ]
    told = Provenance(rows, ("zoo/models/x.py",))
    assert str(told) == (
        "Measured 2026-11-01 to 2026-11-09 or earlier, commits aaa, ccc, ddd+, 1 or 2 thread(s), threads wait: "
        "passive, load 0.5 to 2.5; one. † has rows of code before the last change of `zoo/models/x.py`."
    )
    assert [told.mark([row]) for row in rows] == [" †", "", ""]
    only = Provenance(rows[:1], ("zoo/models/x.py",))
    assert "All rows are of code before the last change" in str(only)
    assert only.mark(rows[:1]) == ""


def test_lines_of_older_code_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_git", lambda *args: "bbb" if any(a.startswith("aaa..") for a in args) else "")
    rows = [{**ROW, "machine": "", "name": "a", "m": "1"}, {**ROW, "machine": "", "name": "a", "m": "2", "commit": "c"}]
    found = Provenance(rows, ("zoo",)).marked([["a", 1, "x"], ("a", 2, "y"), ["mean", "", "z"]], "name", "m")
    assert found == [["a", "1 †", "x"], ["a", "2", "y"], ["mean", "", "z"]]


#: Tables of rows that are measured over several commits, written again from the rows of the repository.
GROWING = (
    "grbf tables", "grbf synthetic", "grbf examples", "snnk conversion", "compose heads", "compose continual",
    "modalities floors", "deploy export", "gkcl tuning", "gkcl ablations", "gkcl streams", "gkcl split", "gkcl full",
)  # fmt: skip


def test_where_a_footer_tells_of_marks_the_table_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every table: one row is said to be of older code, the others are not."""
    monkeypatch.setattr(module, "_git", lambda *args: "new" if any(a.startswith("old..") for a in args) else "")
    for path in (ROOT / "results").glob("*.csv"):
        rows = [{**row, "commit": "new"} for row in read(path)]
        rows[-1]["commit"] = "old"
        records = Records(tmp_path / "results" / path.name, (), [c for c in rows[0] if c not in STAMP])
        records.columns = list(rows[0])
        records._write(rows)
    for words in GROWING:
        assert main(["benchmark", *words.split(), "--table", "--out", str(tmp_path / "results")]) == 0
        document = tmp_path / "RESULTS.md"
        lines = [line for line in document.read_text().splitlines() if line.startswith("| ")]
        assert "† has rows of code before the last change" in document.read_text(), words
        assert 0 < sum(" †" in line for line in lines) < len(lines) - 2, words
        document.unlink()


def test_every_file_of_rows_says_when_where_and_on_which_code() -> None:
    for path in (ROOT / "results").glob("*.csv"):
        assert set(STAMP) <= set(read(path)[0]), path
        assert all(row[name] for row in read(path) for name in STAMP), path


def test_the_code_that_a_table_depends_on_is_there() -> None:
    texts = [path.read_text() for path in (ROOT / "zoo" / "benchmarks").glob("*.py")]
    named = {name for text in texts for name in re.findall(r'"(zoo/[\w/.]+)"', text)}
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / name).exists()]


def test_git_knows_which_code_is_older() -> None:
    if not module._git("rev-parse", "HEAD~3"):
        pytest.skip("not a clone with a history")
    row = {**stamp(), "commit": module._git("rev-parse", "HEAD")}
    assert not Provenance([row], ("zoo",)).older
    changed = module._git("log", "-1", "--format=%H", "--", "zoo/kernels/native.c")
    if module._git("rev-parse", f"{changed}~1"):
        assert Provenance([row | {"commit": f"by {module._git('rev-parse', changed + '~1')}"}], ("zoo/kernels",)).older


def test_a_measurement_runs_under_every_policy() -> None:
    lines = list(under_policies(POLICIES, "tests.benchmarks.waiting", "told", word="waits"))
    assert lines == [f"{name}: waits {name}" for name in POLICIES]
    with pytest.raises(RuntimeError, match="'active' failed"):
        list(under_policies(("active",), "tests.benchmarks.waiting", "told", word=""))


@pytest.mark.parametrize("name", ["", "spin", "spin ten", "spin -1", "ACTIVE"])
def test_other_wait_policies_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no wait policy; known: active, passive, 'spin N'"):
        policy(name)


def test_best_is_taken_over_policies() -> None:
    rows = [{"form": "plain", "ms": "9"}, {"form": "plain", "ms": "4"}, {"form": "zoo", "ms": "1"}]
    assert best_policy(rows, "plain")["ms"] == "4"


@pytest.mark.parametrize(
    ("best", "found"),
    [(0.02, 1e-2), (0.9, 1.0), (1e-5, 1e-5), (1e9, 1e3)],
    ids=["inside", "beyond the upper end", "below the lower end", "never bracketed"],
)
def test_a_grid_goes_on_until_it_brackets_the_best(best: float, found: float) -> None:
    asked: list[float] = []

    def score(rate: float) -> float:
        asked.append(rate)
        return -abs(torch.tensor(rate / best).log().item())

    assert bracketed(score, (1e-3, 1e-2, 0.1)) == pytest.approx(found)
    assert len(asked) == len(set(asked)) <= 3 + 4


def test_a_table_that_lacks_rows_says_which(tmp_path: Path) -> None:
    records = Records(tmp_path / "x.csv", ("rate",), ("accuracy",))
    records.add({"rate": "0.1", "accuracy": 0.5})
    assert records.number("accuracy", rate="0.1") == 0.5
    with pytest.raises(RowsError, match=r"x\.csv has no row of rate 0\.3: measure it first, without --table"):
        records.number("accuracy", rate="0.3")


# ---- sections of documents ---------------------------------------------------------------------------------


def test_a_section_is_between_markers_alone_in_their_lines(tmp_path: Path) -> None:
    real, path = tmp_path / "mine.md", tmp_path / "README.md"
    path.symlink_to(real)
    text = "see <!-- begin runs --> marker\r\nimportant\r\n<!-- begin runs -->\r\nold\r\n<!-- end runs -->\r\nafter\r\n"
    real.write_bytes(text.encode())
    real.chmod(0o600)
    put_section(path, "runs", "new\nlines")
    assert real.read_bytes().decode() == text.replace("old", "new\r\nlines")
    assert path.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600
    put_section(path, "other", "more")
    assert real.read_bytes().decode().endswith("after\r\n\r\n<!-- begin other -->\r\nmore\r\n<!-- end other -->\r\n")


@pytest.mark.parametrize(
    "content",
    [
        b"<!-- begin runs -->\nmine",
        b"<!-- end runs -->\nmine\n<!-- begin runs -->\n",
        b"<!-- begin runs -->\n<!-- begin runs -->\n<!-- end runs -->\n",
        b"mine\n<!-- end runs -->\n",
        b"# m\xff\n",
    ],
)
def test_a_document_without_a_clear_place_stays(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(content)
    with pytest.raises(RowsError, match=r"nothing is written|stays as it is"):
        put_section(path, "runs", "new")
    assert path.read_bytes() == content
    assert has_section(tmp_path / "none.md", "runs") is False
