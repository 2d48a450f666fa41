"""Train on a folder of point clouds and name a new one: under a minute on two cores."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import zoo


def cloud(shape: str, draw: np.random.Generator, points: int = 200) -> np.ndarray:
    """Points (P, 3) on a ball's surface or on a cube's."""
    x = draw.normal(size=(points, 3))
    if shape == "cube":
        return (x / np.abs(x).max(1, keepdims=True)).astype(np.float32)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def main() -> None:
    """Train and predict."""
    draw = np.random.default_rng(0)
    with TemporaryDirectory() as place:
        for shape in ("ball", "cube"):
            Path(place, "clouds", shape).mkdir(parents=True)
            for i in range(40):
                np.save(Path(place, "clouds", shape, f"{i}.npy"), cloud(shape, draw))
        run = zoo.train(
            {
                "experiment": "pointmnist",
                "data": "pointfolder",
                "data.path": Path(place, "clouds"),
                "data.num_points": 128,
                "data.batch_size": 16,
                "data.num_workers": 0,
                "trainer.max_epochs": 8,
                "name": "example_clouds",
            }
        )
        print(f"test accuracy {run.metrics['test/acc']:.3f}")
        np.savetxt(Path(place, "new.xyz"), cloud("cube", draw))
        (answer,) = zoo.predict(run.output_dir, Path(place, "new.xyz"))
        print("a cube seems to be a", answer["predictions"][0])


if __name__ == "__main__":
    main()
