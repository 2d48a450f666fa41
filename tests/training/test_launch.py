"""The command line: quick, and clear about mistakes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Train, train_here
from zoo.training import launch
from zoo.training.launch import ResumeError, UsageError, find_run, merge_overrides, split_arguments


def test_help_fits_a_screen_and_lists_the_experiments(train: Train) -> None:
    text = train("--help").stdout
    assert len(text.splitlines()) <= 45
    assert max(map(len, text.splitlines())) <= 120
    experiments = " ".join(text.split("  experiment ")[1].split("\n  model ")[0].split())
    families = re.findall(r"(\w+)\{(.*?)\}", experiments)  # grbf_{diabetes, wine}
    told = {prefix + name for prefix, names in families for name in names.split(", ")}
    told |= set(re.sub(r"\w+\{.*?\}", "", experiments).replace(",", " ").split())
    assert told == {path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml")}


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
sys.argv = ["train.py", "--cfg", "job"]
from zoo.training.launch import main
main()
assert not {"torch", "lightning", "timm", "wandb"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60, cwd=ROOT)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["optimizer.lrr=1"], ["optimizer.lrr is not a key", "did you mean optimizer.lr", "+optimizer.lrr="]),
        (["modle=unireplknet_a"], ["modle is not a key", "did you mean model"]),
        (
            ["experiment=mnist5"],
            [
                "experiment=mnist5: there is no such choice",
                "did you mean mnist5k",
                "configs/experiment/mnist5.yaml",
            ],
        ),
        (["model=unireplknet_q"], ["did you mean unireplknet_", "configs/model/unireplknet_q.yaml"]),
        (["trainer.max_epoch=3"], ["trainer.max_epoch is not a key", "did you mean trainer.max_epochs"]),
        (["optimizer.lr=fast"], ["optimizer.lr = 'fast'"]),
        (["model.model_name=unireplknet_aa"], ["unireplknet_aa", "unireplknet_a"]),
        (["optimizer.opt=adamww"], ["adamww", "did you mean adamw"]),
        (["data=imagefolder"], ["data.path"]),
        (["trainer.accelerator=gpuu"], ["trainer", "gpuu"]),
        (["model.num_classes=7"], ["model has 7 classes and the data has 10"]),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_mistakes_are_told_in_words(
    arguments: list[str],
    told: list[str],
    tmp_path: Path,
) -> None:
    done = train_here(tmp_path, *arguments, "hydra.run.dir=run", check=False)
    assert done.returncode == 1
    for part in told:
        assert part in done.stderr


def test_unwritable_output_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "run" / "launch.log").mkdir(parents=True)  # Hydra's own file cannot be opened
    for folder, told in (("file/run", "file"), ("run", "launch.log: Is a directory")):
        done = train_here(tmp_path, f"hydra.run.dir={folder}", check=False)
        assert done.returncode == 1
        assert told in done.stderr
        assert "Traceback" not in done.stderr


def test_malicious_checkpoint_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    import pickle

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/pwned",)

    run = tmp_path / "run"
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "overrides.yaml").write_text("[experiment=digits]\n")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step=00000005.ckpt").write_bytes(pickle.dumps({"state_dict": Payload()}))
    for arguments in (
        ["resume=run"],
        ["experiment=digits", f"model.checkpoint_path='{run}/checkpoints/step=00000005.ckpt'"],
    ):
        done = train_here(tmp_path, *arguments, check=False)
        assert done.returncode == 1
        assert "step=00000005.ckpt" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "pwned").exists()


def test_merged_overrides_name_each_key_once() -> None:
    assert merge_overrides(["a=1", "+b=2"], ["a=3"]) == ["a=3", "+b=2"]
    assert merge_overrides(["++b=1"], ["+b=2"]) == ["+b=2"]


@pytest.mark.parametrize(
    ("given", "flags", "overrides"),
    [
        ("seed=1 -m", ["-m"], ["seed=1"]),
        ("seed=1 --multirun trainer=cpu", ["--multirun"], ["seed=1", "trainer=cpu"]),
        ("seed=1 --cfg job trainer=cpu -p model", ["--cfg", "job", "-p", "model"], ["seed=1", "trainer=cpu"]),
        ("a=1 -cjob b=2", ["-c", "job"], ["a=1", "b=2"]),
        ("a=1 --cfg=job --resolve b=2", ["--cfg=job", "--resolve"], ["a=1", "b=2"]),
        ("--info a=1", ["--info", "all"], ["a=1"]),
        ("a=1 -i defaults b=2", ["-i", "defaults"], ["a=1", "b=2"]),
        ("a=1 --config-dir x=y b=2", ["--config-dir", "x=y"], ["a=1", "b=2"]),
        ("a=1 --config-d x", ["--config-dir", "x"], ["a=1"]),
        ("a=1 -cd x", ["-cd", "x"], ["a=1"]),
        ("-m -- a=1 b=-1", ["-m"], ["a=1", "b=-1"]),
    ],
)
def test_flags_may_stand_anywhere(given: str, flags: list[str], overrides: list[str]) -> None:
    assert split_arguments(given.split()) == (flags, overrides)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--epochs 5", "--epochs is not a flag"),
        ("-x", "-x is not a flag"),
        ("--cfg", "--cfg needs a value: one of job, hydra, all"),
        ("--cfg nonsense", "--cfg needs a value: one of job, hydra, all"),
        ("seed=1 --config-dir", "--config-dir needs a value"),
        ("--multirun=3", "--multirun takes no value"),
    ],
)
def test_a_flag_that_is_none_is_told(given: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        split_arguments(given.split())


def test_flags_after_overrides_do_what_they_do_before_them(tmp_path: Path) -> None:
    usual = train_here(tmp_path, "--cfg", "job", "-p", "trainer", "trainer.max_epochs=3")
    assert "max_epochs: 3" in usual.stdout
    for words in ("trainer.max_epochs=3 --cfg job -p trainer", "-c job trainer.max_epochs=3 -p trainer"):
        assert train_here(tmp_path, *words.split()).stdout == usual.stdout
    own = tmp_path / "own dir" / "model"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("model_name: test_unireplknet\n")
    shown = train_here(tmp_path, "model=mine", "--cfg", "job", "-p", "model", "--config-dir", "own dir")
    assert "test_unireplknet" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["seed"], "'seed' is not understood"),
        (["=3"], "'=3' is not understood"),
        (["seed=${nothing}"], "Interpolation key 'nothing' not found"),
        (["model=3"], "must be a string or a list"),
        (["data.root=/a b=c"], """quote it: 'data.root="/a b=c"'"""),
        (["seed=1", "-p", "model"], "--package belongs to --cfg"),
        (["--experimental-rerun", "job.pickle"], "continue a run with resume="),
        (["-m", "--cfg", "job"], "choose one of --multirun and --cfg"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_hydra_does_not_understand_is_told(arguments: list[str], told: str, tmp_path: Path) -> None:
    done = train_here(tmp_path, *arguments, check=False)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert "Error executing job" not in done.stderr


def test_find_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    assert find_run(checkpoint) == find_run(checkpoint.parent) == find_run(tmp_path / "run") == tmp_path / "run"
    with pytest.raises(ResumeError, match="no such folder"):
        find_run(tmp_path / "other")


def test_a_folder_that_hydra_would_look_up_is_told(tmp_path: Path) -> None:
    (tmp_path / "${seed}" / ".hydra").mkdir(parents=True)
    done = train_here(tmp_path, "resume=${seed}", check=False)
    assert done.returncode == 1
    quoted = train_here(tmp_path, r'resume="\${seed}"', check=False)
    assert "give the folder another name" in quoted.stderr


def test_multirun_joblib(train: Train, tmp_path: Path) -> None:
    quick = (
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=2",
        "trainer.limit_val_batches=1",
        "logger=none",
        "test=false",
    )
    train(
        "-m",
        "experiment=digits",
        "model=test_unireplknet",
        *quick,
        "seed=0,1",
        "hydra/launcher=joblib",
        "hydra.sweep.dir=sweep",
    )
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir() if p.is_dir()) == ["0", "1"]


def test_a_printed_command_names_the_last_of_equal_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_lasting", [])
    monkeypatch.setattr(launch, "_continue_run", lambda run, typed: typed)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    launch._prepare(["trainer.max_epochs=1", "seed=2", "resume=run", "trainer.max_epochs=2"])
    assert launch._command().endswith(" train.py trainer.max_epochs=2 seed=2")
