"""Commands that inspect models: probe, and figure, its older form."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from zoo.cli.common import MODEL, command, json_option, told
from zoo.support.quoting import shown
from zoo.support.signatures import ConfigError
from zoo.support.values import PICTURES, check_output


@command("probe", "look into a model: receptive field, kernels, importances, losses ...")
def add_probe(parser: argparse.ArgumentParser) -> None:
    """Inspect a model with a probe: print its result and plot it. Without a name, list the probes."""
    parser.add_argument("name", nargs="?", help="of the probe")
    parser.add_argument("model", nargs="?", help=f"{MODEL}; losses: the folder of a run")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="of the probe, for example count=8")
    parser.add_argument("--checkpoint", type=Path, help="a file with the weights of a model given by name")
    parser.add_argument("--pretrained", action="store_true", help="fetch the released weights of an untagged name")
    parser.add_argument("--data", type=Path, help="folder of images to use instead of noise")
    parser.add_argument("--out", type=Path, help="the picture: .png, .svg or .pdf (MODEL-NAME.png)")
    json_option(parser)
    parser.set_defaults(run=lambda options: _probe(parser, options))


def _probe(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from zoo.analysis.probes import Subject, look, probe, save

    entry = probe.get(options.name) if options.name else None
    if entry is None or options.model is None:
        rows = [f"{name:16} {found.shows}" for name, found in probe.entries().items()]
        print("\n".join(rows) if entry is None else f"{entry.name}: {entry.shows}; name a model")
        return 0 if entry is None else 2
    out = check_output(options.out or _place(options.model, options.name), PICTURES)
    tagged = re.fullmatch(r"\w+\.\w+", options.model) is not None and not Path(options.model).exists()
    subject = Subject(options.model, options.checkpoint, options.pretrained or tagged, options.data)
    found = look(options.name, subject, **dict(map(_option, options.options)))
    line = save(found, subject, out)
    return told(options, {"probe": options.name, "model": options.model, **found.values, "picture": str(out)}, [line])


def _place(model: str, name: str) -> Path:
    return Path(f"{model.rstrip('/').rpartition('/')[2].replace(':', '-')}-{name}.png")


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text} is not an option: write NAME=VALUE, for example count=8")
    return key, int(value) if re.fullmatch(r"-?\d+", value) else value


@command("figure", "the older form of probe")
def add_figure(parser: argparse.ArgumentParser) -> None:
    """Deprecated form of `probe KIND MODEL`, to be removed in the next release."""
    parser.add_argument("kind")
    parser.add_argument("--model", required=True, help="name of the zoo or of timm, or local-dir:FOLDER")
    for flag in ("--checkpoint", "--data", "--out"):
        parser.add_argument(flag, type=Path)
    parser.add_argument("--pretrained", action="store_true")
    for flag in ("count", "stage", "layer"):
        parser.add_argument(f"--{flag}")
    parser.set_defaults(run=_figure)


def _figure(options: argparse.Namespace) -> int:
    out = options.out or _place(options.model, options.kind)
    check_output(out, PICTURES)
    from zoo.analysis.probes import draw

    own = {k: v for k in ("count", "stage", "layer") if (v := getattr(options, k)) is not None}
    given = dict(_option(f"{k}={v}") for k, v in own.items())
    subject = {k: getattr(options, k) for k in ("checkpoint", "pretrained", "data")}
    print(shown(draw(options.kind, options.model, out, **subject, **given)))
    print("note: `figure KIND --model MODEL` is now `probe KIND MODEL`", file=sys.stderr)
    return 0
