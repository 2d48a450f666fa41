"""How threads wait is bounded, unless the environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from zoo.support.environment import SPINS, bound_waiting, wait_policy


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ({}, f"spin {SPINS}"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "active"),
        ({"GOMP_SPINCOUNT": "7"}, "spin 7"),
    ],
)
def test_what_the_environment_says_stays(given: dict[str, str], policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = {name: os.environ.get(name) for name in given}
    if not given:
        monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that it is taken away again afterwards
        del os.environ["GOMP_SPINCOUNT"]
    bound_waiting()
    assert wait_policy() == policy
    assert {name: os.environ.get(name) for name in given} == before


@pytest.mark.parametrize("module", ["zoo.training.launch", "zoo.cli"])
def test_commands_bound_it_before_torch_is_there(module: str) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    call = "" if module == "zoo.training.launch" else "m.main(['build', '--help'])"
    code = f"""
import contextlib, io, os, sys
import {module} as m
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    {call or "pass"}
assert "torch" not in sys.modules
sys.stdout.write(os.environ.get("GOMP_SPINCOUNT", "nothing"))
"""
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == str(SPINS)
