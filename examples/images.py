"""Train on a folder of pictures, look at a new one, and publish the model to a folder: under a minute on two cores."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from sklearn.datasets import load_digits

import zoo


def write_pictures(folder: Path) -> None:
    """Small grey pictures of 0, 1 and 2: `train/CLASS/*.png` and `test/CLASS/*.png`."""
    digits = load_digits(n_class=3)
    for i, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / ("test" if i % 5 == 0 else "train") / str(digit)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).resize((32, 32)).save(place / f"{i}.png")


def main() -> None:
    """Train, predict, and save."""
    with TemporaryDirectory() as place:
        photos = Path(place, "photos")
        write_pictures(photos)
        run = zoo.train(
            {
                "model": "unireplknet_z",
                "data": "imagefolder",
                "data.path": photos,
                "data.image_size": 32,
                "data.batch_size": 32,
                "data.num_workers": 0,
                "data.hflip": 0,
                "data.crop_scale": [0.8, 1],
                "trainer.max_epochs": 4,
                "name": "example_images",
            }
        )
        print(f"test accuracy {run.metrics['test/acc']:.3f}")
        picture = next((photos / "test" / "2").iterdir())
        (answer,) = zoo.predict(run.output_dir, picture)
        print(picture.name, answer["predictions"][0])
        model = run.load_model()
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, in {run.model_dir}")


if __name__ == "__main__":
    main()
