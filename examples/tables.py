"""Learn from a table with categories and missing cells, by command and by estimator: under a minute on two cores."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import zoo


def write_table(path: Path, rows: int, seed: int) -> None:
    """Customers who stay or leave: mostly a matter of age and plan; the number is noise."""
    draw = np.random.default_rng(seed)
    lines = ["number,age,plan,monthly,stays"]
    for i in range(rows):
        age, plan, monthly = draw.integers(18, 80), draw.choice(["basic", "plus", "family"]), draw.normal(40, 9)
        stays = 0.25 * (age - 45) + 4 * (plan == "family") - 1 + draw.logistic() > 0
        lines.append(f"{i},{'' if draw.random() < 0.05 else age},{plan},{monthly:.2f},{'yes' if stays else 'no'}")
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """A network from the command line's door, then the closed form as an estimator."""
    with TemporaryDirectory() as place:
        table, new = Path(place, "customers.csv"), Path(place, "new.csv")
        write_table(table, 400, 0)
        write_table(new, 5, 1)
        run = zoo.train(
            {
                "model": "grbf",
                "data": "tabular",
                "data.path": table,
                "data.target": "stays",
                "data.drop": ["number"],
                "trainer.max_epochs": 30,
                "name": "example_tables",
            }
        )
        print(f"test accuracy {run.metrics['test/acc']:.3f}")
        for answer in zoo.predict(run.output_dir, new):
            print(answer["row"], answer["predictions"][0])

        rows = np.genfromtxt(table, delimiter=",", skip_header=1, usecols=(1, 3))
        stays = np.genfromtxt(table, delimiter=",", skip_header=1, usecols=4, dtype=str)
        known = ~np.isnan(rows).any(axis=1)
        estimator = zoo.GRBFClassifier().fit(rows[known], stays[known])
        print(dict(zip(("age", "monthly"), estimator.feature_importance().round(2).tolist(), strict=True)))
        zoo.save_pretrained(estimator, Path(place, "estimator"))
        print(zoo.load_estimator(Path(place, "estimator")).predict(rows[known][:5]).tolist(), stays[known][:5].tolist())


if __name__ == "__main__":
    main()
