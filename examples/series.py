"""Forecast a week of two series that repeat weekly and yearly: under a minute on two cores."""

from __future__ import annotations

import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import zoo


def write_sales(path: Path, days: int = 900) -> None:
    """Bread and milk sold each day."""
    draw, t = np.random.default_rng(0), np.arange(days)
    week = 10 * np.sin(2 * np.pi * t / 7)
    bread = 100 + week + 20 * np.sin(2 * np.pi * t / 365) + draw.normal(0, 3, days)
    milk = 60 - week / 2 + draw.normal(0, 2, days)
    start = datetime.date(2023, 1, 1)
    lines = ["date,bread,milk"]
    lines += [f"{start + datetime.timedelta(int(i))},{bread[i]:.1f},{milk[i]:.1f}" for i in t]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Train, and forecast the days that follow the end of the file."""
    with TemporaryDirectory() as place:
        sales = Path(place, "sales.csv")
        write_sales(sales)
        run = zoo.train(
            {
                "experiment": "chicago",
                "data.path": sales,
                "data.seq_len": 28,
                "data.pred_len": 7,
                "trainer.max_epochs": 3,
                "name": "example_series",
            }
        )
        print({name: round(value, 3) for name, value in run.metrics.items() if name.startswith("test/")})
        (answer,) = zoo.predict(run.output_dir, sales)
        for time, values in zip(answer["times"], answer["forecast"], strict=True):
            print(time, dict(zip(answer["columns"], (round(v, 1) for v in values), strict=True)))


if __name__ == "__main__":
    main()
