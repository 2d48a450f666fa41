"""Tables as they are: categories, missing cells, weights, several targets, intervals."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from sklearn.model_selection import cross_validate

import zoo
from zoo.analysis.plots import plot_output, plot_partial_dependence
from zoo.estimators import GRBFClassifier, GRBFRegressor, fit_many
from zoo.estimators.encoding import MOST_LEVELS, Columns, Encoding, check_encoding, fit_encoding
from zoo.estimators.streams import KernelStreamClassifier
from zoo.tools import estimators as saved_estimators
from zoo.tools.errors import ToolError
from zoo.tools.export import export

pd = pytest.importorskip("pandas")
STEPS: dict[str, Any] = {"solver": "adam", "n_centers": 6, "max_iter": 20, "random_state": 0}


def table(n: int = 120, seed: int = 0) -> tuple[Any, np.ndarray]:
    """A frame of numbers with gaps, texts, categories, and nullable types, and a target that depends on all of it."""
    rng = np.random.default_rng(seed)
    x, kind, size = rng.normal(size=n), rng.integers(0, 3, n), rng.integers(1, 4, n)
    y = np.where(np.isnan(gapped := np.where(rng.random(n) < 0.2, np.nan, x)), 2.0, x) + (kind == 1) - (size == 3)
    frame = pd.DataFrame(
        {
            "length": gapped,
            "kind": np.array(["ash", "box", "elm"])[kind],
            "size": pd.Categorical(size),
            "old": pd.array(rng.random(n) < 0.5, dtype="boolean"),
        }
    )
    frame.loc[n - 1, ["kind", "old"]] = None
    return frame, y + 0.1 * rng.normal(size=n)


@pytest.fixture(scope="module")
def fitted() -> tuple[GRBFRegressor, Any, np.ndarray]:
    frame, y = table()
    return GRBFRegressor().fit(frame, y), frame, y


@pytest.mark.parametrize("model", [GRBFRegressor(), zoo.GPRegressor(), KernelStreamClassifier()], ids=repr)
def test_columns_of_times_are_refused_as_in_files(model: Any) -> None:
    frame = pd.DataFrame({"a": np.arange(6.0), "when": pd.date_range("2024-01-01", periods=6)})
    told = "^when holds dates or times, such as '2024-01-01': leave it out, or write what matters of it as numbers$"
    for given in (frame, frame.astype(object), frame.assign(when=frame["when"].dt.tz_localize("UTC"))):
        with pytest.raises(ValueError, match=told.replace("'2024-01-01'", "'2024-01-01.*'")):
            model.fit(given, [0, 1] * 3)
    spans = frame.assign(when=frame["when"].diff())
    with pytest.raises(ValueError, match=r"^when holds dates or times, such as "):
        model.fit(spans, [0, 1] * 3)
    with pytest.raises(ValueError, match=r"^X holds dates or times"):
        model.fit(frame[["when"]].to_numpy(), [0, 1] * 3)


def test_times_may_be_categories() -> None:
    frame = pd.DataFrame({"a": np.arange(6.0), "when": pd.to_datetime(["2024-01-01", "2024-01-02"] * 3)})
    model = GRBFRegressor(categorical_features=["when"]).fit(frame, [0.0, 1.0] * 3)
    assert model.input_names_ == ["a", "when=2024-01-01", "when=2024-01-02"]
    assert model.predict(frame).shape == (6,)


# ---- categories --------------------------------------------------------------------------------------------


def test_a_frame_is_taken_as_it_is(fitted: tuple[Any, Any, np.ndarray]) -> None:
    model, frame, _ = fitted
    assert model.input_names_ == [
        *("length", "length=(missing)", "kind=ash", "kind=box", "kind=elm", "kind=(missing)"),
        *("size=1", "size=2", "size=3", "old", "old=(missing)"),
    ]
    assert model.n_features_in_ == 4
    assert list(model.feature_names_in_) == list(frame.columns)
    assert model.score(*table(seed=1)) > 0.9
    for importance in (model.feature_importances_, *map(model.feature_importance, ("official", "trace", "gradient"))):
        assert importance.shape == (4,)
        assert importance.sum() == pytest.approx(1)
    assert model.feature_importances_.argmin() == 3, "the target does not depend on it"
    assert list(model.feature_importance(groups={"kind": "wood"})) == ["length", "wood", "size", "old"]
    assert model.transform(frame).shape == (120, 11)
    with pytest.raises(ValueError, match="of_inputs"):
        model.inverse_transform(model.transform(frame))
    inner = model.of_inputs()
    rows = model.inputs(frame)
    np.testing.assert_array_equal(inner.predict(rows), model.predict(frame))
    np.testing.assert_allclose(inner.inverse_transform(inner.transform(rows)), rows, atol=1e-9)
    assert inner.feature_importances_.shape == (11,)
    assert inner.of_inputs() is inner


@pytest.mark.parametrize("given", [["kind", "size"], [1, 2], [False, True, True, False]])
def test_categories_are_named_in_every_way(given: Any, fitted: tuple[Any, Any, np.ndarray]) -> None:
    model, frame, y = fitted
    again = GRBFRegressor(categorical_features=given).fit(frame, y)
    np.testing.assert_array_equal(again.predict(frame), model.predict(frame))
    if isinstance(given[0], str):
        return
    cells = frame.astype(object).where(frame.notna(), None).to_numpy()
    rows = GRBFRegressor(categorical_features=given).fit(cells, y)
    np.testing.assert_array_equal(rows.predict(cells), model.predict(frame))


def test_categories_of_numbers_are_what_a_file_calls_them() -> None:
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.integers(0, 3, 60), rng.normal(size=60)])
    model = GRBFRegressor(categorical_features=[0]).fit(X, (X[:, 0] == 1) + X[:, 1])
    assert model.input_names_ == ["x0=0", "x0=1", "x0=2", "x1"]
    texts = [[str(int(a)), b] for a, b in X.tolist()]
    np.testing.assert_array_equal(model.predict(texts), model.predict(X))
    odd = [[7, 0.0], [np.nan, 0.0], [None, 0.0]]
    found = model.predict(odd)
    np.testing.assert_array_equal(found[1:], found[:1].repeat(2))
    assert not model.inputs(odd)[:, :3].any()


def test_truths_and_dates_of_a_frame_are_those_of_its_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vip, day = rng.random(60) < 0.5, rng.integers(0, 3, 60)
    frame = pd.DataFrame({"vip": vip, "x": rng.normal(size=60)})
    dated = frame.assign(
        vip=pd.Categorical(vip), day=pd.Categorical(pd.to_datetime(["2020-01-01", "2020-01-02", "2020-01-03"])[day])
    )
    y = 3 * vip + day
    for number, table in enumerate((frame, dated)):
        model = GRBFRegressor().fit(table, y)
        path = tmp_path / f"{number}.csv"
        table.assign(y=y).to_csv(path, index=False)
        zoo.save_pretrained(model, tmp_path / str(number))
        wanted = model.predict(table)
        for given in (model, tmp_path / str(number)):
            for rows in (path, table):
                found = [row["value"] for row in zoo.predict(given, str(path) if rows is path else rows)]
                np.testing.assert_allclose(found, wanted, rtol=1e-6)
        told = saved_estimators.score(tmp_path / str(number), path, "y")
        assert told["rmse"] == pytest.approx(np.sqrt(np.square(wanted - y).mean()))
    (tmp_path / "odd.csv").write_text("vip,x\nTrue,1\n3,1\n")
    with pytest.raises(ToolError, match="line 2: vip is 'True' beside numbers"):
        zoo.predict(tmp_path / "0", str(tmp_path / "odd.csv"))


def test_two_categories_are_one_number_of_two_values() -> None:
    """Inputs of a category share a scale; each with its own, a rare one would be far from everything."""
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.random(80) < 0.1, rng.normal(size=80)]).astype(float)
    y = X[:, 0] + np.sin(X[:, 1])
    options: dict[str, Any] = {"precision": "isotropic"}
    as_number = GRBFRegressor(**options).fit(X, y)
    as_category = GRBFRegressor(categorical_features=[0], **options).fit(X, y)
    np.testing.assert_allclose(as_category.predict(X), as_number.predict(X), rtol=1e-9)


def test_rare_categories_are_none() -> None:
    words = np.array([f"w{i:03}" for i in range(MOST_LEVELS + 20) for _ in range(1 + (i >= 20))], dtype=object)
    encoding = fit_encoding(Columns(np.full((len(words), 1), np.nan), {0: words}), np.ones(len(words)))
    assert encoding.levels[0] == [f"w{i:03}" for i in range(20, MOST_LEVELS + 20)]
    found = encoding.inputs(Columns(np.full((2, 1), np.nan), {0: np.array(["w005", "w030"], dtype=object)}))
    assert found.sum(1).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([0.5], "must be an array-like of bool, int or str, got: float"),
        ([1, "kind"], "got: int, str"),
        ([4], r"integer indices must be in \[0, n_features - 1\]"),
        ([-1], "integer indices must be in"),
        ([True], r"boolean mask must have shape \(n_features,\), got: \(1,\)"),
        (["colour"], "'colour' which is not a valid feature name"),
        ("kind", "The 'categorical_features' parameter of GRBFRegressor must be"),
        (None, "could not convert string to float"),
    ],
)
def test_categories_that_are_not_there_are_told(given: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        GRBFRegressor(categorical_features=given).fit(*table(20))


def test_what_is_wrong_beside_categories_is_told(fitted: tuple[Any, Any, np.ndarray]) -> None:
    model, frame, y = fitted
    with pytest.raises(ValueError, match="without feature names"):
        GRBFRegressor(categorical_features=["a"]).fit(np.zeros((5, 2)), np.arange(5))
    with pytest.raises(ValueError, match="Input X contains infinity"):
        GRBFRegressor().fit(frame.assign(length=np.inf), y)
    with pytest.raises(ValueError, match="Input y contains NaN"):
        GRBFRegressor().fit(frame, np.where(y > 0, y, np.nan))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        GRBFRegressor().fit(frame, y[:5])
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(frame[["kind", "length", "size", "old"]])
    with pytest.raises(ValueError, match="3 features, but GRBFRegressor is expecting 4"):
        model.predict(frame.to_numpy()[:, :3])
    before = copy.deepcopy(model.encoding_)
    with pytest.raises(ValueError, match="Input y contains NaN"):
        model.fit(frame[:50], np.full(50, np.nan))
    assert model.encoding_.levels == before.levels
    assert model.score(frame, y) > 0.9


# ---- missing cells -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GRBFClassifier, GRBFRegressor])
@pytest.mark.parametrize("options", [{}, {**STEPS, "max_iter": 150, "learning_rate": 0.1}])
def test_missing_numbers_are_values(kind: Any, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(150, 3))
    y = np.where(rng.random(150) < 0.3, 1, 0)
    X[y == 1, 1] = np.nan  # being missing is what says it
    model = kind(**options).fit(X[:100], y[:100])
    assert model.score(X[100:], y[100:]) > 0.8
    assert model.encoding_.indicator.tolist() == [False, True, False]
    assert model.feature_importances_.argmax() == 1
    middle = X[:100].copy()
    middle[:, 0] = np.sort(X[:100, 0])[49]  # the lower median
    without = middle.copy()
    without[:, 0] = np.nan  # no row of training lacked it
    np.testing.assert_array_equal(model.predict(without), model.predict(middle))
    assert np.isfinite(model.transform(without)).all()
    with pytest.raises(ValueError, match="Input X contains infinity"):
        model.predict(np.full((1, 3), np.inf))


def test_numbers_without_gaps_are_taken_as_before() -> None:
    X = np.random.default_rng(0).normal(size=(30, 2))
    columns = Columns(X, {})
    encoding = fit_encoding(columns, np.ones(30))
    assert encoding.is_plain
    assert encoding.inputs(columns) is X
    assert encoding.blocks is None


def test_a_column_of_gaps_is_constant() -> None:
    X = np.column_stack([np.full(30, np.nan), np.arange(30.0)])
    with pytest.warns(UserWarning, match=r"Features \[0\] are constant"):
        model = GRBFRegressor().fit(X, np.arange(30.0))
    assert model.score(X, np.arange(30.0)) > 0.9
    assert np.isfinite(model.predict([[3.0, 4.0]])).all()


def test_older_fits_still_refuse_gaps() -> None:
    X = np.random.default_rng(0).normal(size=(30, 2))
    model = GRBFRegressor().fit(X, X[:, 0])
    state = model.__getstate__()
    del state["encoding_"], state["left_out_residuals_"], state["left_out_weights_"]
    older = GRBFRegressor()
    older.__setstate__(state)
    np.testing.assert_array_equal(older.predict(X), model.predict(X))
    assert older.of_inputs() is older
    with pytest.raises(ValueError, match="Input X contains NaN"):
        older.predict([[np.nan, 0.0]])
    with pytest.raises(ValueError, match='fit with solver="agop"'):
        older.predict_interval(X)


# ---- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, STEPS])
def test_weights_are_copies_and_zero_is_absence_with_categories(options: dict[str, Any]) -> None:
    frame, y = table(90)
    copies = np.random.default_rng(1).integers(0, 3, 90)
    spoilt = frame.copy()
    spoilt.loc[copies == 0, "kind"] = "unheard of"
    spoilt.loc[copies == 0, "length"] = 1e9
    there = np.flatnonzero(copies).repeat(copies[copies > 0])
    weighted = GRBFRegressor(**options).fit(spoilt, y, copies)
    absent = GRBFRegressor(**options).fit(frame[copies > 0], y[copies > 0], copies[copies > 0])
    repeated = GRBFRegressor(**options).fit(frame.iloc[there], y[there])
    assert weighted.input_names_ == repeated.input_names_
    np.testing.assert_array_equal(weighted.encoding_.fill, repeated.encoding_.fill)
    np.testing.assert_array_equal(weighted.predict(frame), absent.predict(frame))
    np.testing.assert_allclose(weighted.predict(frame), repeated.predict(frame), rtol=0, atol=1e-8)
    turned = GRBFRegressor(**options).fit(spoilt[::-1], y[::-1], copies[::-1])
    np.testing.assert_array_equal(weighted.predict(frame), turned.predict(frame))


def test_fits_together_have_columns_of_their_own() -> None:
    frame, y = table(60)
    weights = np.ones((2, 60))
    weights[0, frame["kind"] == "elm"] = 0
    found = fit_many(GRBFRegressor(), frame, y, [{}, {}], sample_weight=weights)
    assert "kind=elm" not in found[0].input_names_
    for one, weight in zip(found, weights, strict=True):
        alone = GRBFRegressor().fit(frame, y, weight)
        np.testing.assert_array_equal(one.predict(frame), alone.predict(frame))
    refits = found[1].bootstrap(frame, y, n_samples=3)
    assert refits.importances["gradient"].shape == (3, 4)
    assert refits.feature_names == list(frame.columns)


def test_warm_starts_keep_the_columns() -> None:
    frame, y = table(60)
    model = GRBFRegressor(**STEPS, warm_start=True).fit(frame, y)
    names = model.input_names_
    assert model.fit(frame[:20], y[:20]).input_names_ == names


def test_weights_are_routed_to_fits_of_tables() -> None:
    import sklearn

    frame, y = table(90)
    labels = np.where(y > 0.5, "up", "down")
    with sklearn.config_context(enable_metadata_routing=True):
        model = GRBFClassifier().set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        weight = np.where(labels == "up", 1.0, 1e-9)
        found = cross_validate(model, frame, labels, cv=2, params={"sample_weight": weight}, return_estimator=True)
    assert all((one.predict(frame) == "up").mean() > 0.95 for one in found["estimator"])


# ---- targets -----------------------------------------------------------------------------------------------


def test_several_targets_share_a_metric() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(120, 4))
    Y = np.column_stack([np.sin(X[:, 0]), 1e6 * X[:, 1] + 3e6, np.full(120, 2.0)])
    model = GRBFRegressor().fit(X[:80], Y[:80])
    found = model.predict(X[80:])
    assert found.shape == (40, 3)
    assert model.n_outputs_ == 3
    assert model.score(X[80:], Y[80:]) > 0.8
    np.testing.assert_allclose(found[:, 2], 2)
    units = GRBFRegressor().fit(X[:80], Y[:80] * [1, 1e-6, 1])  # each in units of its own
    np.testing.assert_allclose(units.predict(X[80:]) * [1, 1e6, 1], found, rtol=1e-9)
    twice = np.r_[np.arange(80), np.arange(20)]
    weight = np.ones(80)
    weight[:20] = 2
    np.testing.assert_allclose(
        GRBFRegressor().fit(X[twice], Y[twice]).predict(X),
        GRBFRegressor().fit(X[:80], Y[:80], weight).predict(X),
        rtol=1e-7,
    )
    assert model.predict_interval(X).shape == (120, 3, 2)
    assert model.to_pipeline()(torch.from_numpy(X)).shape == (120, 3)
    with pytest.raises(ValueError, match="y should be a 1d array"):
        GRBFRegressor(**STEPS).fit(X, np.column_stack([X[:, 0]] * 2))


def test_many_classes() -> None:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(60, 5)) * 3
    y = np.arange(300) % 60
    X = centers[y] + 0.3 * rng.normal(size=(300, 5))
    model = GRBFClassifier().fit(X[:240], y[:240])
    assert model.score(X[240:], y[240:]) > 0.9
    np.testing.assert_allclose(model.predict_proba(X).sum(1), 1)


def test_ordered_classes_are_ranks() -> None:
    """A regression of ranks, rounded, is as right as a classifier, and less far off where it is wrong."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 4))
    y = np.digitize(X[:, 0] + X[:, 1] + 0.7 * rng.normal(size=400), [-1.5, -0.5, 0.5, 1.5])
    ranks = GRBFRegressor().fit(X[:200], y[:200]).predict(X[200:]).round().clip(0, 4)
    classes = GRBFClassifier().fit(X[:200], y[:200]).predict(X[200:])
    assert np.abs(ranks - y[200:]).mean() <= np.abs(classes - y[200:]).mean()
    assert accuracy_score(y[200:], ranks) > 0.4


# ---- intervals ---------------------------------------------------------------------------------------------


def test_intervals_hold_what_they_say() -> None:
    rng = np.random.default_rng(0)
    held = {0.5: [], 0.9: []}
    for _ in range(4):
        X = rng.normal(size=(400, 3))
        y = np.sin(X[:, 0]) + rng.standard_t(3, size=400)
        model = GRBFRegressor().fit(X[:200], y[:200])
        for coverage, shares in held.items():
            low, high = model.predict_interval(X[200:], coverage=coverage).T
            shares.append(((low <= y[200:]) & (y[200:] <= high)).mean())
    for coverage, shares in held.items():
        assert np.mean(shares) == pytest.approx(coverage, abs=0.05)


def test_intervals_are_quantiles_of_residuals_left_out() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(19, 2)), rng.normal(size=19)
    model = GRBFRegressor().fit(X, y)
    half = np.sort(np.abs(model.left_out_residuals_[:, 0]))
    for coverage, place in ((0.9, 18), (0.5, 10), (0.95, 19), (0.01, 1)):  # of n + 1 = 20
        low, high = model.predict_interval(X, coverage=coverage).T
        np.testing.assert_allclose(high - low, 2 * half[place - 1])
    np.testing.assert_allclose((low + high) / 2, model.predict(X))
    with pytest.raises(ValueError, match="needs more than the 19 different rows"):
        model.predict_interval(X, coverage=0.96)
    for coverage in (0, 1, 90, "wide"):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            model.predict_interval(X, coverage=coverage)
    with pytest.raises(ValueError, match='fit with solver="agop"'):
        GRBFRegressor(**STEPS).fit(X, y).predict_interval(X)


def test_residuals_left_out_are_those_of_refits_of_weighted_tables() -> None:
    """The encoding, the centring and the settings are fixed: they stay as they are without the row."""
    frame, y = table(40)
    weight = np.random.default_rng(1).uniform(0.5, 2, 40)
    model = GRBFRegressor().fit(frame, y, weight)
    machine, scale = model.network_, weight.mean()
    K = machine.kernel(machine.centers).numpy()
    order = np.array([np.abs(model.centers_ - row).sum(1).argmin() for row in standardised(model, frame)])
    target = np.empty(40)
    target[order] = y - model.intercept_
    ridge = np.empty(40)
    ridge[order] = machine.setting.ridge * scale / weight
    found = []
    for i in range(40):
        kept = np.arange(40) != i
        A = np.linalg.solve(K[np.ix_(kept, kept)] + np.diag(ridge[kept]), target[kept])
        found.append(target[i] - K[i, kept] @ A)
    np.testing.assert_allclose(np.sort(model.left_out_residuals_[:, 0]), np.sort(found), rtol=0, atol=1e-9)


def standardised(model: Any, frame: Any) -> np.ndarray:
    return (model.inputs(frame) - model.network_.input_mean.numpy()) / model.network_.input_scale.numpy()


# ---- pictures ----------------------------------------------------------------------------------------------


def test_partial_dependence_is_drawn(fitted: tuple[Any, Any, np.ndarray]) -> None:
    model, frame, y = fitted
    labels = np.digitize(y, [0, 1])
    several = GRBFRegressor().fit(frame, np.column_stack([y, -y]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes = [
            plot_partial_dependence(model, frame),
            plot_partial_dependence(several, frame, resolution=5),
            plot_partial_dependence(GRBFClassifier().fit(frame, labels), frame, component=1),
            plot_partial_dependence(GRBFClassifier().fit(frame, labels == 0), frame, rows=10),
            plot_output(model, frame, y, resolution=8),
        ]
        for ax in axes:
            ax.figure.canvas.draw()
    with pytest.raises(ValueError, match="component=11 must be from 0 to 10"):
        plot_partial_dependence(model, frame, component=11)


def test_partial_dependence_is_the_mean_over_rows() -> None:
    X = np.random.default_rng(0).normal(size=(50, 2))
    model = GRBFRegressor().fit(X, 3 * X[:, 0])
    curve = plot_partial_dependence(model, X, resolution=3).lines[-2]
    place, value = curve.get_data()
    direction = model.components_[0]
    moved = X + (place[1] - model.transform(X)[:, :1]) * direction * X.std(0)
    assert value[1] == pytest.approx(model.predict(moved).mean())


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, STEPS])
def test_a_saved_table_is_kept(options: dict[str, Any], tmp_path: Path) -> None:
    frame, y = table()
    labels = np.where(y > 0.5, "up", "down")
    model = GRBFClassifier(categorical_features=["kind", "size"], **options).fit(frame, labels)
    folder = zoo.save_pretrained(model, tmp_path / "saved")
    again = zoo.load_estimator(folder)
    np.testing.assert_array_equal(again.predict_proba(frame), model.predict_proba(frame))
    np.testing.assert_array_equal(again.feature_importances_, model.feature_importances_)
    assert again.input_names_ == model.input_names_
    record = json.loads((folder / "config.json").read_text())["input"]
    assert record["columns"] == model.input_names_
    assert [one["name"] for one in record["variables"]] == list(frame.columns)
    file = tmp_path / "rows.csv"
    shuffled = frame[["old", "kind", "size", "length"]].assign(answer=labels)
    shuffled["old"] = shuffled["old"].astype("Int64")
    shuffled.to_csv(file, index=False)
    right = [{"class": label} for label in model.predict(frame)]
    for given in (folder, model):
        for rows in (str(file), frame):
            found = zoo.predict(given, rows)
            assert [{"class": one["predictions"][0]["class"]} for one in found] == right
    assert zoo.predict(folder, model.inputs(frame))[0]["predictions"] == zoo.predict(folder, frame)[0]["predictions"]
    score = saved_estimators.score(str(folder), file, "answer")
    assert score["accuracy"] == pytest.approx(model.score(frame, labels))
    saved = saved_estimators.open_estimator(str(folder))
    assert saved is not None
    assert saved_estimators.describe(saved)["columns"] == list(frame.columns)
    told = export(str(folder), tmp_path / "out", formats=["program"])
    assert told["input"] == ["batch", 11]
    assert told["program"]["max_difference"] <= 1e-5


def test_columns_without_names_are_saved_in_order(tmp_path: Path) -> None:
    rows = [["ash", 1.0], ["elm", np.nan], ["ash", 3.0], ["elm", 4.0], [None, 5.0]] * 4
    y = np.arange(20.0)
    folder = zoo.save_pretrained(GRBFRegressor(categorical_features=[0]).fit(rows, y), tmp_path / "saved")
    (tmp_path / "rows.csv").write_text("elm,2\n,4\n")
    found = zoo.predict(folder, tmp_path / "rows.csv", header=False)
    right = zoo.load_estimator(folder).predict([["elm", 2.0], [None, 4.0]])
    np.testing.assert_allclose([one["value"] for one in found], right)


def test_several_targets_are_saved(tmp_path: Path) -> None:
    X = np.random.default_rng(0).normal(size=(40, 2))
    model = GRBFRegressor().fit(X, X * 2)
    folder = zoo.save_pretrained(model, tmp_path / "saved")
    assert json.loads((folder / "config.json").read_text())["num_classes"] == 2
    np.testing.assert_array_equal(zoo.load_estimator(folder).predict_interval(X), model.predict_interval(X))
    assert zoo.predict(folder, X)[0]["values"] == pytest.approx(model.predict(X)[0])


@pytest.mark.parametrize("word", ["\x1b[2J", "two\nlines"])
def test_a_category_that_cannot_be_printed_is_not_saved(word: str, tmp_path: Path) -> None:
    frame, y = table(30)
    frame["kind"] = word
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GRBFRegressor().fit(frame, y)
    with pytest.raises(ValueError, match="characters that cannot be printed") as caught:
        zoo.save_pretrained(model, tmp_path / "saved")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"fill": np.zeros(2)}, "one value for each column"),
        ({"fill": np.array([0.0, np.nan, 0.0])}, "NaN or infinity"),
        ({"fill": [0.0, 0.0, 0.0]}, "one value for each column"),
        ({"indicator": np.zeros(3)}, "one value for each column"),
        ({"indicator": np.ones(3, dtype=bool)}, "has categories of the column 1"),
        ({"levels": [["a"]]}, "no mapping"),
        ({"levels": {3: ["a"]}}, "the column 3"),
        ({"levels": {"1": ["a"]}}, "the column '1'"),
        ({"levels": {1: []}}, "no list of different categories"),
        ({"levels": {1: ["a", "a"]}}, "no list of different categories"),
        ({"levels": {1: ["a", 2]}}, "no list of different categories"),
        ({"levels": {1: ["a"] * 10**6}}, "no list of different categories"),
    ],
)
def test_encodings_that_no_fit_gives_are_refused(changed: dict[str, Any], told: str) -> None:
    right: dict[str, Any] = {"fill": np.zeros(3), "indicator": np.zeros(3, dtype=bool), "levels": {1: ["a", "b"]}}
    check_encoding(Encoding(**right), 3)
    with pytest.raises(ValueError, match=told):
        check_encoding(Encoding(**{**right, **changed}), 3)
    with pytest.raises(ValueError, match="is a list"):
        check_encoding([], 3)
