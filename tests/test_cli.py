"""`python -m zoo`: quick, lazy, and clear about what it can do; the records that measurements are kept in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from zoo.benchmarks.records import Records, markdown, mean_sd, put_section
from zoo.cli import BENCHMARKS, main


def test_listing_imports_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    heavy = "{'torch', 'sklearn', 'numpy'}"
    code = f"import sys; from zoo.cli import main; main(['benchmark']); assert not {heavy} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    for family, entries in BENCHMARKS.items():
        for name in entries:
            assert f"{family} {name}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"), [(["grbff"], "did you mean grbf"), (["grbf", "sped"], "did you mean speed")]
)
def test_mistakes_are_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", *arguments])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_every_measurement_exists() -> None:
    import importlib

    for entries in BENCHMARKS.values():
        for _, module, function in entries.values():
            assert callable(getattr(importlib.import_module(module), function))


def test_records_go_on_where_they_stopped(tmp_path: Path) -> None:
    records = Records(tmp_path / "x.csv", ("table", "fold"), ("score",))
    records.add({"table": "iris", "fold": 0, "score": 0.5})
    again = Records(tmp_path / "x.csv", ("table", "fold"), ("score",))
    assert {"table": "iris", "fold": 0} in again
    assert {"table": "iris", "fold": 1} not in again
    assert again.numbers("score", table="iris") == [0.5]
    with pytest.raises(ValueError, match="other columns"):
        Records(tmp_path / "x.csv", ("table",), ("score",))


def test_sections_replace_themselves_only(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    put_section(path, "a", "first")
    put_section(path, "b", markdown(["x"], [[mean_sd([1.0, 2.0])]]))
    put_section(path, "a", "second")
    text = path.read_text()
    assert "first" not in text
    assert text.index("second") < text.index("1.500 (0.707)")


def test_interleaved_medians() -> None:
    from zoo.benchmarks.timing import interleaved

    found = interleaved({"none": lambda: None, "some": lambda: sum(range(20_000))}, rounds=3)
    assert 0 <= found["none"] < found["some"]


def test_steps_of_the_speed_benchmark_are_the_same_step() -> None:
    """What is timed must compute the same thing: one step of Adam from one start moves each loss alike."""
    from zoo.benchmarks.grbf import STEPS

    for make in STEPS.values():
        make(32, 4, 3)()
