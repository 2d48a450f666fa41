"""Train on a folder of sounds and name a new one: under a minute on two cores."""

from __future__ import annotations

import wave
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import zoo

RATE = 8000  # Hz


def write_sounds(folder: Path, per_class: int = 24) -> None:
    """One second each of a steady tone, a rising tone and noise, with a random pitch."""
    draw, t = np.random.default_rng(0), np.arange(RATE) / RATE
    for i in range(per_class):
        pitch = draw.uniform(300, 900)
        sounds = {
            "steady": np.sin(2 * np.pi * pitch * t),
            "rising": np.sin(2 * np.pi * pitch * (t + t**2 / 2)),
            "noise": draw.normal(0, 0.4, RATE),
        }
        for name, sound in sounds.items():
            place = folder / name
            place.mkdir(parents=True, exist_ok=True)
            with wave.open(str(place / f"{i}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(RATE)
                file.writeframes((10000 * sound.clip(-3, 3)).astype("<i2").tobytes())


def main() -> None:
    """Train and predict."""
    with TemporaryDirectory() as place:
        sounds = Path(place, "sounds")
        write_sounds(sounds)
        run = zoo.train(
            {
                "experiment": "prompts",
                "data": "audiofolder",
                "data.path": sounds,
                "data.sample_rate": RATE,
                "data.duration": 1.0,
                "data.batch_size": 12,
                "data.num_workers": 0,
                "trainer.max_epochs": 14,
                "name": "example_sounds",
            }
        )
        print(f"test accuracy {run.metrics['test/acc']:.3f}")
        for answer in zoo.predict(run.output_dir, [sounds / "rising" / "0.wav", sounds / "noise" / "0.wav"]):
            print(Path(answer["file"]).parent.name, "sounds like", answer["predictions"][0])


if __name__ == "__main__":
    main()
