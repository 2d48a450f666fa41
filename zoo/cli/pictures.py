"""Commands that draw: probe, and figure, its older form."""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.cli.common import command, positive
from zoo.support.quoting import shown
from zoo.support.values import PICTURES, check_output


@command("figure", "a picture of what a model looks at, as PNG")
def add_figure(parser: argparse.ArgumentParser) -> None:
    """Draw the effective receptive field of a model, the merged kernels of one of its layers, the hyper-kernels of a
    Terminator, as they are or for one image, or the losses of a run.
    """
    kinds = ("receptive-field", "kernels", "hyper-kernels", "context-kernels", "losses")
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--model", required=True, help="name of the zoo or of timm, or local-dir:FOLDER")
    parser.add_argument("--checkpoint", type=Path, help="a file with the weights of a model given by name")
    parser.add_argument("--pretrained", action="store_true", help="fetch the released weights")
    parser.add_argument("--data", type=Path, help="folder of images to use instead of noise; losses: the run")
    parser.add_argument("--count", type=positive, help="images to average over (16), or kernels to show (32)")
    parser.add_argument("--stage", type=int, default=-1, help="receptive-field: which feature map (-1, the last)")
    parser.add_argument("--layer", help="kernels: name of the layer (the first large one)")
    parser.add_argument("--out", type=Path, help="the picture: .png, .svg or .pdf (MODEL-KIND.png)")
    parser.set_defaults(run=_figure)


def _figure(options: argparse.Namespace) -> int:
    out = options.out or Path(f"{options.model.rpartition('/')[2].replace(':', '-')}-{options.kind}.png")
    check_output(out, PICTURES)
    from zoo.analysis.gallery import draw

    print(shown(draw(options.kind, options.model, out, **{k: v for k, v in vars(options).items() if k in _DRAWN})))
    return 0


_DRAWN = ("checkpoint", "pretrained", "data", "count", "stage", "layer")
