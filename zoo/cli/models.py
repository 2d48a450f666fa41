"""Commands about models: list, info."""

from __future__ import annotations

import argparse
import fnmatch
import inspect
import pkgutil
import sys
from typing import Any

from zoo.cli.common import columns, command, json_option, positive, told


@command("list", "models and weights")
def add_list(parser: argparse.ArgumentParser) -> None:
    """List the zoo's models or weights."""
    parser.add_argument("filter", nargs="?", default="", help="with wildcards: 'unireplknet_*'")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--pretrained", action="store_true", help="weights instead of architectures")
    instead.add_argument("--of", choices=list(_REGISTERS), help="what else is registered by name, instead of models")
    json_option(parser)
    parser.set_defaults(run=_list)


#: What is registered beside models, and where.
_REGISTERS = {
    "estimators": "zoo.estimators.named:register_estimator",
    "kernels": "zoo.kernels.kernel:KERNELS",
    "learners": "zoo.learners.heads:register_learner",
}


def _registered(of: str, wanted: str) -> list[dict[str, Any]]:
    """Names and what they are, in a line."""
    entries = pkgutil.resolve_name(_REGISTERS[of]).entries().values()
    what = {entry.name: entry.shows or (inspect.getdoc(entry.made) or "").partition("\n")[0] for entry in entries}
    return [{"name": name, "what": line} for name, line in what.items() if fnmatch.fnmatch(name, wanted or "*")]


def _list(options: argparse.Namespace) -> int:
    from zoo.tools.listing import listing

    of, wanted = options.of, options.filter
    rows = _registered(of, wanted) if of else listing(wanted, options.pretrained)
    if not rows:
        print(f"nothing matches {options.filter!r}", file=sys.stderr)
        return 1
    if of:
        return told(options, rows, columns([list(row.values()) for row in rows]))
    if not options.pretrained:
        return told(options, rows, [row["name"] for row in rows])
    shown = [["name", "figure", "data", "weights"]]
    for row in rows:
        figure = f"published top-1 {row['published_top1']:.2f} %" if "published_top1" in row else ""
        if "value" in row:
            figure = f"{row['metric']} {row['value']:.4f} ({row['n']} seeds: {row['mean']:.4f})"
        shown.append([row["name"], figure, row.get("data", ""), row["weights"]])
    return told(options, rows, columns(shown))


@command("info", "parameters, multiply-adds, memory, receptive field, card")
def add_info(parser: argparse.ArgumentParser) -> None:
    """Print facts about a model: parameters, multiply-adds, memory, receptive field, weights."""
    parser.add_argument("model", help="name of the zoo or of timm, with or without a tag, or FOLDER of a run or model")
    parser.add_argument("--size", type=positive, help="side of the images in pixels (the record's own)")
    parser.add_argument("--card", action="store_true", help="print the card of shipped weights instead")
    json_option(parser)
    parser.set_defaults(run=_info)


def _estimator_rows(facts: dict[str, Any]) -> list[list[str]]:
    names = f": {', '.join(facts['columns'])}" if facts["columns"] else ""
    classes = f"{facts['num_classes']} classes: {', '.join(facts['classes'])}"
    rows = [
        ["estimator", f"{facts['name']} ({facts['class']})"],
        ["input", f"{facts['input'][0]} columns{names}"],
        ["outputs", classes if facts["classes"] else "a value"],
        ["fitted", f"{facts['numbers']:,} numbers"],
        ["weights", facts["weights"]],
    ]
    return [*rows, *([key, value] for key, value in facts["settings"].items())]


def _info(options: argparse.Namespace) -> int:
    if options.card:
        from zoo.registry import bundled_weights
        from zoo.tools.cards import card

        record = bundled_weights.record(options.model)
        return told(options, record, [card(record)])
    from zoo.tools.info import describe

    facts = describe(options.model, options.size)
    if "settings" in facts:
        return told(options, facts, columns(_estimator_rows(facts)))
    field = facts["receptive_field"]
    rows = [
        ["model", f"{facts['name']} ({facts['class']})"],
        ["input", " x ".join(map(str, facts["input"]))],
        ["outputs", f"{facts['num_classes']}, from {facts['num_features']} features"],
        ["parameters", f"{facts['parameters']:,}; {facts['parameters_deploy']:,} in deploy form"],
        ["multiply-adds", f"{facts['macs']:,} an input, deploy form"],
        ["memory", f"weights {facts['weights_mib']} MiB, largest layer {facts['largest_layer_mib']} MiB an input"],
        ["effective field", ", ".join(f"{k} within {v} px" for k, v in field.items()) if field else "no maps"],
        ["weights", facts["weights"] or "fresh"],
    ]
    rows += [["published", f"top-1 {facts['published_top1']:.2f} %"]] if "published_top1" in facts else []
    rows += [[key, str(facts[key])] for key in ("license", "paper_ids", "origin_url") if key in facts]
    if "target" in facts:
        named = [f"{name} ({what})" for name, what in facts["columns"].items()]
        rows += [["target", facts["target"]], ["columns", ", ".join(named)]]
    if "record" in facts:
        from zoo.tools.cards import score

        record = facts["record"]
        metric = record["metric"]
        rows += [["trained on", record["data"]["title"]], ["trained by", record["command"]]]
        rows += [["figure", f"{metric['name']} {score(metric)}"]]
    return told(options, facts, columns(rows))
