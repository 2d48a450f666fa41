"""Commands for shipped weights: ship, cards, push."""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.cli.common import command, json_option, told
from zoo.support.quoting import python_text
from zoo.support.values import check_output


@command("ship", "weights, record and card from run folders")
def add_ship(parser: argparse.ArgumentParser) -> None:
    """Ship the best run of an experiment with several seeds, by its validation metric: copy the weights, and write
    their record, card and table row.
    """
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs that differ in the seed")
    parser.add_argument("--tag", help="what follows the dot of the name (the experiment's name)")
    parser.add_argument("--license", default="apache-2.0", help="of the weights (apache-2.0)")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"), help="where they go (checkpoints)")
    json_option(parser)
    parser.set_defaults(run=_ship)


def _ship(options: argparse.Namespace) -> int:
    check_output(options.folder)
    from zoo.tools.cards import write
    from zoo.tools.release import ship

    path, record = ship(options.runs, options.tag, options.folder, options.license)
    if options.folder == Path("checkpoints"):
        write(Path())
    metric = record["metric"]
    line = f"{path}: {metric['name']} {metric['value']:.4f}, seed {metric['seed']} of {metric['n']}"
    return told(options, record, [line])


@command("cards", "write the cards and tables of the shipped weights, or check them")
def add_cards(parser: argparse.ArgumentParser) -> None:
    """Write the model cards of the shipped weights, and the tables of RESULTS.md and README.md, from the records."""
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if anything disagrees")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (here)")
    json_option(parser)
    parser.set_defaults(run=_cards)


def _cards(options: argparse.Namespace) -> int:
    from zoo.tools.cards import check, write

    if not options.check:
        written = list(map(str, write(options.root)))
        return told(options, written, written)
    problems = check(options.root)
    told(options, problems, problems or ["pages, cards and records agree"])
    return 1 if problems else 0


@command("push", "publish weights with their card in the standard hub layout")
def add_push(parser: argparse.ArgumentParser) -> None:
    """Write config.json, model.safetensors and README.md to a hub repository or a folder."""
    parser.add_argument("model", help="shipped weight, or the folder of a run or of a saved estimator")
    parser.add_argument("target", help="hf-hub:ORGANISATION/NAME or local-dir:FOLDER")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.set_defaults(run=_push)


def _push(options: argparse.Namespace) -> int:
    from zoo.tools.hub import push
    from zoo.tools.pretrained import holds_estimator

    place = push(options.model, options.target, private=options.private)
    estimator = holds_estimator(options.model)
    print(f"zoo.load_estimator({python_text(place)})" if estimator
          else f"zoo.create_model({python_text(place)}, pretrained=True)")  # fmt: skip
    return 0
