"""What is printed for pasting comes back as it was, through a shell and Hydra's grammar, or through Python."""

from __future__ import annotations

import ast
import itertools
import shlex
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from zoo.support.quoting import command, override, path_word, python_text

NASTY = [
    *(
        "a b",
        "a=b",
        "a,b",
        "it's",
        'say "hi"',
        "both ' and \" ",
        "[x]",
        "{a: 1}",
        "(x)",
        "$HOME",
        "${seed}",
        "a${seed}b",
    ),
    *(
        "\\${x}",
        "\\\\${x}",
        "tail\\",
        "tail\\\\",
        '\\"',
        "'\\",
        "ünïcode 日本",
        "-dash",
        "--flag",
        "1e3",
        "007",
        "null",
    ),
    *("True", "~home", "a:b", "a#b", "a;b", "a&b|c", "*?", "`x`", "new\nline", "tab\t", "", "  ends ", "!x", "%d", "$"),
]


def test_every_text_comes_back_from_a_pasted_command() -> None:
    parser = OverridesParser.create()
    pairs = (first + second for first, second in itertools.product(NASTY, NASTY[:20]))
    for text in itertools.chain(NASTY, pairs):
        words = shlex.split(command("python train.py", resume=text, seed=3))
        assert words[:2] == ["python", "train.py"]
        read: Any = {one.key_or_group: one.value() for one in parser.parse_overrides(words[2:])}
        assert OmegaConf.to_container(OmegaConf.create(read), resolve=True) == {"resume": text, "seed": 3}
        assert ast.literal_eval(python_text(text)) == text


def test_a_value_that_is_given_again_takes_the_place_of_the_earlier_one() -> None:
    started = "python 'my train.py' trainer.max_epochs=1 'name=a b' ++trainer.max_epochs=2 +more.key=1"
    assert command(started, resume="run", **{"trainer.max_epochs": 4}) == (
        "python 'my train.py' 'name=a b' +more.key=1 resume=run ++trainer.max_epochs=4"
    )
    assert command(started, resume="run", **{"more.key": 2}).endswith(" ++trainer.max_epochs=2 resume=run +more.key=2")
    assert command(started, resume="run") == f"{started} resume=run"


def test_plain_names_stay_plain() -> None:
    assert command("python train.py", resume=Path("outputs/a_b/2026-11-24.x")) == (
        "python train.py resume=outputs/a_b/2026-11-24.x"
    )
    assert python_text("run/model") == '"run/model"'
    assert override("a.b", None) == "a.b=null"
    assert path_word("-x y") == "'./-x y'"
