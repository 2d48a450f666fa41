"""Linear baselines ("floors") of the experiments on sound, video, points, series and hyperspectral images.

`python -m zoo benchmark modalities floors` fits a linear model to the training part of each data set and scores it on
the test part; `python -m zoo results` shows the score beside the runs of the experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.benchmarks import measurement
from zoo.data import Forecast, IndianPines, MovingMnist, PointMnist, Prompts, SpokenDigits
from zoo.models.modalities import LogMel
from zoo.results.records import Provenance, Records, markdown, put_section

__all__ = ["FLOORS", "floors"]

Features = Callable[[Any, str], tuple[np.ndarray, np.ndarray]]

MEASURES = ("zoo/data", "zoo/benchmarks/modalities.py")
KEYS, VALUES = ("experiment", "learner"), ("metric", "score", "train", "test")


# ---- features of the linear models -------------------------------------------------------------------------


def whole_part(data: Any, part: str) -> tuple[Tensor, np.ndarray]:
    """All inputs of a part, without augmentation, and their targets."""
    dataset = data.datasets[part]
    inputs, targets = dataset.batch(range(len(dataset)))
    return inputs, targets.numpy()


def spectrum(data: Any, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over time of the log spectrum of each whole clip, 32 ms windows."""
    clips = data.datasets[part]
    window = torch.hann_window(256)
    rows = []
    for clip in clips.clips:
        frames = torch.stft(clip.float() / 32768, 256, 128, window=window, return_complex=True, pad_mode="constant")
        power = frames.abs().square().add(1e-8).log()
        rows.append(torch.cat([power.mean(1), power.std(1)]))
    return torch.stack(rows).numpy(), clips.targets.numpy()


def spectrogram(data: Any, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Log-mel spectrogram of each clip, 64 bins by 64 frames, as in the network."""
    waves, targets = whole_part(data, part)
    return LogMel(data.sample_rate, 64, 25.0, 14.0, 64).eval()(waves).flatten(1).numpy(), targets


def pixel(data: Any, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Spectrum of the centre pixel."""
    patches, targets = whole_part(data, part)
    middle = data.patch // 2
    return patches[:, :, middle, middle].numpy(), targets


def occupancy(data: Any, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Number of points per cell of a 28 x 28 grid, without augmentation."""
    places = ((data.datasets[part].points[..., :2] + 1) * 13.5).round().long().clamp(0, 27)
    cells = places[..., 0] * 28 + places[..., 1]
    counts = torch.zeros(len(cells), 28 * 28).scatter_add_(1, cells, torch.ones(cells.shape))
    return counts.numpy(), data.datasets[part].targets.numpy()


def frames(data: Any, part: str) -> tuple[np.ndarray, np.ndarray]:
    """All pixels of all frames."""
    clips, targets = whole_part(data, part)
    return clips.flatten(1).numpy(), targets


# ---- measuring ---------------------------------------------------------------------------------------------


def classify(data: Any, features: Features) -> float:
    """Test accuracy of logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    learner = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, tol=1e-3))
    return float(learner.fit(*features(data, "train")).score(*features(data, "test")))


def forecast(data: Any) -> float:
    """Test MSE of a ridge regression of the next steps on the last ones, shared by all variables."""
    from sklearn.linear_model import Ridge

    def rows(x: Tensor) -> np.ndarray:
        return x.transpose(1, 2).flatten(0, 1).double().numpy()

    learner = Ridge(alpha=1.0).fit(*map(rows, data.training_windows()))
    (windows, _), targets = data.datasets["test"].batch(range(len(data.datasets["test"])))
    return float(np.square(learner.predict(rows(windows)) - rows(targets)).mean())


LOGISTIC = "logistic regression"
#: Experiment, with overrides of its data -> data module, features of the linear model, and its name.
FLOORS: dict[str, tuple[Callable[[], Any], Features | None, str]] = {
    "prompts": (Prompts, spectrum, f"{LOGISTIC}, mean and deviation of the log spectrum"),
    "spoken_digits": (SpokenDigits, spectrogram, f"{LOGISTIC}, log-mel spectrogram"),
    "chicago": (lambda: Forecast("chicago", seq_len=28, pred_len=7), None, "shared ridge"),
    "jfk_weather": (lambda: Forecast("jfk_weather", seq_len=96, pred_len=24), None, "shared ridge"),
    "victoria_electricity": (lambda: Forecast("victoria_electricity", seq_len=96, pred_len=48), None, "shared ridge"),
    "indian_pines": (IndianPines, pixel, f"{LOGISTIC}, one pixel"),
    "indian_pines data.split=blocks": (lambda: IndianPines(split="blocks"), pixel, f"{LOGISTIC}, one pixel"),
    "pointmnist": (PointMnist, occupancy, f"{LOGISTIC}, occupancy of 28 x 28 cells"),
    "moving_mnist": (MovingMnist, frames, f"{LOGISTIC}, all pixels of all frames"),
}


@measurement("modalities", "floors", "what linear models reach on the modalities' data")
def floors(out: Path) -> Iterator[str]:
    """Measure missing baselines, and write the table."""
    records = Records(out / "floors.csv", KEYS, VALUES)
    for experiment, (make, features, learner) in FLOORS.items():
        if {"experiment": experiment, "learner": learner} in records:
            continue
        data = make()
        data.prepare_data()
        data.setup()
        score = classify(data, features) if features else forecast(data)
        metric = "test/acc" if features else "test/mse"
        sizes = {part: len(data.datasets[part]) for part in ("train", "test")}
        records.add({"experiment": experiment, "learner": learner, "metric": metric, "score": score, **sizes})
        yield f"{experiment}: {metric} {score:.4f}, {learner}"
    rows = [[row[c] for c in ("experiment", "learner", "metric", "score", "train", "test")] for row in records.rows]
    source, header = Provenance(records.rows, MEASURES), ["experiment", "linear model", "metric", "score"]
    table = markdown([*header, "training samples", "test samples"], source.marked(rows, "experiment", "learner"))
    text = (
        "## Linear floors of the modalities\n\n`python -m zoo benchmark modalities floors`\n\n"
        "What a linear model reaches on the same training and test parts. Forecasts: mean squared error of "
        f"standardised variables, lower is better. {source}\n\n{table}"
    )
    put_section(out.parent / "RESULTS.md", "modalities floors", text)
    yield table
