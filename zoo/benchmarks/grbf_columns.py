"""GRBF on tables as they are: categories, missing cells, and intervals that hold what they say, with nothing tuned."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zoo.benchmarks import measurement
from zoo.data.tabular import load_table
from zoo.results.records import Provenance, Records, markdown, put_section

__all__ = ["run"]

#: Columns that hold categories, by table.
CATEGORIES: dict[str, list[int]] = {
    "tae": [0, 1, 2, 3],
    "hayes-roth": [0, 1, 2, 3],
    "titanic": [0],
    "heart": [2, 6, 10, 12],
    "mammographic": [2, 3],
    "contraceptive": [1, 2, 6, 7],
    "autompg": [0, 6],
}
#: Tables with cells deleted at random.
GAPS = ("diabetes", "autompg", "boston", "heart", "saheart", "bupa", "wisconsin", "haberman")
#: Regressions for the coverage of intervals.
REGRESSIONS = ("diabetes", "autompg", "boston", "P3")
COVERAGES = (0.5, 0.8, 0.9, 0.95)
FOLDS, ROWS, SPLITS = 4, 600, 20
HOW = {
    "categories": ("as numbers", "as categories"),
    "5 % missing": ("filled", "as they are"),
    "30 % missing": ("filled", "as they are"),
}
MEASURES = ("zoo/learners/agop.py", "zoo/kernels/exponential_power.py", "zoo/estimators")


def _estimator(regression: bool, **options: Any) -> Any:
    from zoo.estimators.grbf import GRBFClassifier, GRBFRegressor

    return (GRBFRegressor if regression else GRBFClassifier)(**options)


def compare(name: str, what: str, how: str, fold: int) -> dict[str, Any]:
    """Accuracy (or R²) and log-loss on one fold of at most `ROWS` rows of a table."""
    from sklearn.impute import SimpleImputer
    from sklearn.metrics import log_loss
    from sklearn.model_selection import KFold, StratifiedKFold
    from sklearn.pipeline import make_pipeline

    table = load_table(name)
    chosen = np.random.RandomState(0).permutation(len(table.y))[:ROWS]
    X, y = table.X[chosen].copy(), table.y[chosen]
    regression = not table.class_names
    if what != "categories":
        X[np.random.RandomState(0).random(X.shape) < float(what.split()[0]) / 100] = np.nan
    folds = (KFold if regression else StratifiedKFold)(FOLDS, shuffle=True, random_state=0)
    train, test = list(folds.split(X, y))[fold]
    model = _estimator(regression, categorical_features=CATEGORIES[name] if how == "as categories" else None)
    if how == "filled":
        model = make_pipeline(SimpleImputer(strategy="median"), model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant columns
        model.fit(X[train], y[train])
        loss = "" if regression else float(log_loss(y[test], model.predict_proba(X[test]), labels=np.unique(y)))
        return {"score": float(model.score(X[test], y[test])), "log_loss": loss}


def covered(name: str, split: int) -> dict[str, float]:
    """Share of the targets of a quarter of the rows that lie in their intervals, by the coverage that is asked for."""
    table = load_table(name, rows=ROWS)
    order = np.random.RandomState(split).permutation(len(table.y))
    X, y = table.X[order], table.y[order]
    train = 3 * len(y) // 4
    model = _estimator(True).fit(X[:train], y[:train])
    found = {}
    for coverage in COVERAGES:
        low, high = model.predict_interval(X[train:], coverage).T
        found[f"at_{coverage}"] = float(((low <= y[train:]) & (y[train:] <= high)).mean())
    return found


@measurement("grbf", "columns", "categories, missing cells, and the coverage of intervals")
def run(folder: Path) -> Iterator[str]:
    """Measure missing rows, table by table, then write the section of RESULTS.md."""
    columns = Records(folder / "grbf_columns.csv", ("table", "what", "how", "fold"), ("score", "log_loss"))
    for what, hows in HOW.items():
        for name in CATEGORIES if what == "categories" else GAPS:
            for how in hows:
                for fold in range(FOLDS):
                    key = {"table": name, "what": what, "how": how, "fold": fold}
                    if key not in columns:
                        columns.add(key | compare(name, what, how, fold))
                score = np.mean(columns.numbers("score", table=name, what=what, how=how))
                yield f"{name:14} {what:12} {how:14} {score:.3f}"
    intervals = Records(folder / "grbf_intervals.csv", ("table", "split"), tuple(f"at_{c}" for c in COVERAGES))
    for name in REGRESSIONS:
        for split in range(SPLITS):
            if {"table": name, "split": split} not in intervals:
                intervals.add({"table": name, "split": split} | covered(name, split))
        yield f"{name:14} 0.9: {np.mean(intervals.numbers('at_0.9', table=name)):.3f}"
    yield _report(columns, intervals, folder)


def _report(columns: Records, intervals: Records, folder: Path) -> str:
    source = Provenance([*columns.rows, *intervals.rows], MEASURES)
    parts = []
    for what, hows in HOW.items():
        names = list(CATEGORIES if what == "categories" else GAPS)
        rows = [[name, *_cells(columns, name, what, hows)] for name in names]
        head = [f"{how}, {kind}" for how in hows for kind in ("score", "log-loss")]
        parts.append(markdown([what, *head], rows))
    rows = []
    for name in REGRESSIONS:
        found = [np.array(intervals.numbers(f"at_{c}", table=name)) for c in COVERAGES]
        rows.append([name, *(f"{one.mean():.3f} ± {one.std() / len(one) ** 0.5:.3f}" for one in found)])
    parts.append(markdown(["asked for", *map(str, COVERAGES)], rows))
    text = (
        "## GRBF on tables as they are\n\n`python -m zoo benchmark grbf columns`\n\n"
        f"The closed form with its defaults. Accuracy, or R² of a regression, and log-loss, mean over {FOLDS} folds of "
        f"at most {ROWS} rows: columns of categories as the numbers that they are coded by, or as categories; cells "
        "deleted at random, filled with medians beforehand, or left to the estimator, which then knows where they are. "
        f"Share of new rows inside their intervals, mean and standard error over {SPLITS} random splits. {source}\n\n"
        + "\n\n".join(parts)
    )
    put_section(folder.parent / "RESULTS.md", "grbf columns", text)
    return text


def _cells(columns: Records, name: str, what: str, hows: tuple[str, ...]) -> list[str]:
    found = []
    for how in hows:
        key = {"table": name, "what": what, "how": how}
        losses = [row["log_loss"] for row in columns.select(**key)]
        found += [f"{np.mean(columns.numbers('score', **key)):.3f}"]
        found += [f"{np.mean(columns.numbers('log_loss', **key)):.3f}" if all(losses) else ""]
    return found
