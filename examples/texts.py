"""Sort short texts by adapters in MiniLM, a pretrained encoder (83 MB, fetched once): under a minute on two cores."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory

import zoo

OPENINGS = ("I must say", "After a week", "To be honest", "My family agrees", "As expected")
THINGS = ("the coffee", "this soup", "the bread", "their tea", "the jam")
GOOD = ("is delicious", "tastes wonderful", "is the best I know", "made my day")
BAD = ("is awful", "tastes of nothing", "went straight into the bin", "made me ill")


def write_reviews(path: Path, rows: int = 160) -> None:
    """Reviews as a table with the columns comment and stars."""
    draw = random.Random(0)
    lines = ["comment,stars"]
    for i in range(rows):
        words = draw.choice(GOOD if i % 2 else BAD)
        lines.append(f'"{draw.choice(OPENINGS)}, {draw.choice(THINGS)} {words}.",{"five" if i % 2 else "one"}')
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Train and predict."""
    with TemporaryDirectory() as place:
        reviews = Path(place, "reviews.csv")
        write_reviews(reviews)
        run = zoo.train(
            {
                "experiment": "food_reviews_snnk",
                "data": "texts",
                "data.path": reviews,
                "data.text": "comment",
                "data.target": "stars",
                "data.max_length": 24,
                "trainer.max_epochs": 2,
                "name": "example_texts",
            }
        )
        print(f"test accuracy {run.metrics['test/acc']:.3f}")
        letter = Path(place, "letter.txt")
        letter.write_text("We threw the cake away: it was horrible.\n")
        (answer,) = zoo.predict(run.output_dir, letter)
        print(letter.read_text().strip(), answer["predictions"][0])


if __name__ == "__main__":
    main()
