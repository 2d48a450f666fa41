"""Learn one class after another, forget a row exactly, and learn tasks of pictures: under a minute on two cores."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import zoo
from zoo.estimators import KernelStreamClassifier


def write_tasks(folder: Path) -> None:
    """`TASK/CLASS/*.png`: a task of the digits 0 and 1, then one of 2 and 3."""
    digits = load_digits(n_class=4)
    for i, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / f"task{digit // 2}" / str(digit)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).save(place / f"{i}.png")


def main() -> None:
    """A stream of rows with an estimator, then folders as tasks from the command line's door."""
    X, y = load_digits(return_X_y=True)
    test = np.arange(len(y)) % 5 == 0
    model = KernelStreamClassifier(standardize=False, lengthscale=30, random_state=0)  # not from the first class alone
    for digit in range(10):  # a class at a time
        rows = ~test & (y == digit)
        model.partial_fit(X[rows], y[rows])
    before = model.score(X[test], y[test])
    rows = np.flatnonzero(~test)[:50]
    model.forget(X[rows], y[rows])  # as if they had never been seen
    print(f"accuracy {before:.3f}, without 50 of the rows {model.score(X[test], y[test]):.3f}")

    with TemporaryDirectory() as place:
        write_tasks(Path(place, "tasks"))
        run = zoo.train(
            {
                "experiment": "own_tasks",
                "data.path": Path(place, "tasks"),
                "data.image_size": 8,
                "data.channels": 1,
                "name": "example_continual",
            }
        )
        print({name: round(value, 3) for name, value in run.metrics.items() if "acc" in name})


if __name__ == "__main__":
    main()
