"""Probes: found because they are written down, the same from the command, its older form and Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from zoo.analysis.plots import plot_curves
from zoo.analysis.probes import Finding, ProbeError, Subject, draw, look, probe
from zoo.cli import main
from zoo.support.register import Register, UnknownNameError


def test_every_probe_of_the_room_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    known = {
        "receptive-field",
        "kernels",
        "hyper-kernels",
        "context-kernels",
        "importances",
        "losses",
        "spectrum",
        "loadings",
        "ntk",
    }
    assert known <= set(probe.entries())
    assert main(["probe"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed and entry.shows in listed for name, entry in probe.entries().items())


def test_a_probe_is_added_by_writing_it(tmp_path: Path) -> None:
    @probe("own", "the number of parameters")
    def own(subject: Subject, *, factor: int = 1) -> Finding:
        count = factor * sum(p.numel() for p in subject.model.parameters())
        return Finding(f"{count} parameters", {"count": count}, lambda: plot_curves({"count": ([0, 1], [1, count])}))

    try:
        assert (
            look("own", Subject("test_grbf")).values["count"] * 3
            == look("own", Subject("test_grbf"), factor=3).values["count"]
        )
        assert "parameters; the weights are untrained" in draw("own", "test_grbf", tmp_path / "own.png")
        with pytest.raises(ProbeError, match="factor = 'x'"):
            look("own", Subject("test_grbf"), factor="x")
        with pytest.raises(ProbeError, match="faktor is unknown; did you mean factor"):
            look("own", Subject("test_grbf"), faktor=1)
    finally:
        probe._entries.pop("own")


def test_importances_of_a_shipped_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "wine.png"
    assert main(["probe", "importances", "grbf.wine", "top=5", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert out.is_file()
    assert np.isclose(sum(found["importances"].values()), 1)
    assert "proline" in found["importances"]
    with pytest.raises(ProbeError, match="UniRepLKNet has no feature importances"):
        look("importances", Subject("test_unireplknet"))


def test_the_older_form_draws_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, old = tmp_path / "new.png", tmp_path / "old.png"
    assert main(["probe", "kernels", "unireplknet_z.digits", "count=4", "--out", str(new)]) == 0
    assert (
        main(
            ["figure", "kernels", "--model", "unireplknet_z.digits", "--pretrained", "--count", "4", "--out", str(old)]
        )
        == 0
    )
    told = capsys.readouterr()
    assert "untrained" not in told.out
    assert "probe KIND MODEL" in told.err
    assert new.read_bytes() == old.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["kernel", "test_unireplknet"], "there is no probe 'kernel'; did you mean kernels"),
        (["kernels", "test_unireplknet", "layer"], "layer is not an option: write NAME=VALUE"),
        (["kernels", "test_unireplknet", "count=0"], "count = 0: input should be greater than 0"),
        (["kernels", "no/such/place"], "no/such/place is not there"),
        (["losses", "test_unireplknet"], "give its folder"),
    ],
)
def test_mistakes_are_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", *arguments]) == 1
    assert told in capsys.readouterr().err


def test_a_register_has_one_thing_of_a_name() -> None:
    things: Register = Register("thing", "zoo.analysis.probes")
    things("a", "first")(test_mistakes_are_told)
    with pytest.raises(ValueError, match="there is already a thing 'a'"):
        things("a")(test_every_probe_of_the_room_is_found)
    with pytest.raises(UnknownNameError, match="there is no thing 'b'"):
        things.get("b")
    assert list(things.entries()) == ["a"]
