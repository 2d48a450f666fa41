"""Streams of own tasks: any iterable, folders as tasks, a column of a list as the task."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from zoo.data import ContinualData, DataError, GivenTasks
from zoo.data.prepare import prepare

Pair = tuple[Tensor, Tensor]


def pair(classes: list[int], each: int = 10, size: int = 4) -> Pair:
    y = torch.tensor(classes).repeat(each)
    x = torch.randint(0, 256, (len(y), 1, size, size), dtype=torch.uint8)
    return x, y


def ready(data: ContinualData) -> ContinualData:
    data.prepare_data()
    data.setup()
    return data


# ---- iterables ---------------------------------------------------------------------------------------------


def test_any_iterable_of_pairs_is_a_stream() -> None:
    pairs = [pair([0, 1]), pair([2, 3], each=5), pair([0, 3])]
    stream = GivenTasks((x.numpy(), y.tolist()) for x, y in pairs)
    assert len(stream) == 3
    assert [len(task.train[1]) for task in stream] == [16, 8, 16]
    assert [len(task.test[1]) for task in stream] == [4, 2, 4]
    assert [task.classes for task in stream] == [[0, 1], [2, 3], [0, 3]]
    for t, (task, (images, _)) in enumerate(zip(stream, pairs, strict=True)):
        assert task.number == t
        both = torch.cat([task.train[0], task.test[0]])
        assert torch.equal(both.flatten(1).sort(0).values, images.flatten(1).sort(0).values), "no image is lost"
        assert torch.equal(stream.labels(t), task.train[1])
    given = GivenTasks(pairs, tests=[pair([0, 1]), pair([2, 3]), pair([0, 3], each=1)], train_samples=7)
    assert [(len(task.train[1]), len(task.test[1])) for task in given] == [(7, 20), (7, 20), (7, 2)]
    state = given.state_dict()
    given.load_state_dict(state)
    with pytest.raises(DataError, match="the tasks are not those of the checkpoint"):
        stream.load_state_dict(state)


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ([], "there are no tasks"),
        ([3], "task 0 is no pair of images and classes"),
        ([(torch.zeros(3, 4, 4), [0, 1, 2])], r"task 0 needs images \(N, C, H, W\)"),
        ([(torch.zeros(2, 1, 4, 4), [0.5, 1])], "task 0 needs whole numbers from 0 as classes"),
        ([(torch.zeros(2, 1, 4, 4), [0, -1])], "task 0 needs whole numbers from 0"),
        ([(torch.zeros(2, 1, 4, 4), [0])], "task 0 needs images"),
        ([(torch.zeros(2, 1, 4, 4).long(), [0, 1])], "task 0 needs images of uint8 or floating point, got torch.int64"),
        (
            [(torch.tensor([0.0, math.inf]).view(2, 1, 1, 1), [0, 1])],
            "task 0: image 1 holds values that are not finite",
        ),
        ([(torch.zeros(2, 1, 4, 4), [0, 1])], "task 0: there are too few images of each class to keep 20%"),
        (
            [(torch.zeros(9, 1, 4, 4), [0] * 9), (torch.zeros(9, 3, 4, 4), [1] * 9)],
            r"task 1 has images .*\(N, 3, 4, 4\)",
        ),
    ],
)
def test_what_is_no_task_is_told(tasks: list[Any], told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        GivenTasks(tasks)
    assert "\n" not in str(caught.value)


def test_options_of_given_tasks_are_checked() -> None:
    pairs = [pair([0, 1])]
    with pytest.raises(DataError, match="2 tests for 1 tasks"):
        GivenTasks(pairs, [pair([0, 1])] * 2)
    both = [pair([0, 1]), pair([2, 3])]
    with pytest.raises(DataError, match="test of task 0 asks for classes 2, 3, and task 0 has only classes 0, 1"):
        GivenTasks(both, both[::-1])
    with pytest.raises(DataError, match="test of task 1 asks for class 9, and the tasks 0 to 1 have only classes 0, 1"):
        GivenTasks(both, [pair([0, 1]), pair([0, 3, 9])])
    with pytest.raises(DataError, match="test_fraction=0 must lie between 0 and 1"):
        GivenTasks(pairs, test_fraction=0)
    with pytest.raises(DataError, match="train_samples=17 must be between 1 and 16"):
        GivenTasks(pairs, train_samples=17)


# ---- files -------------------------------------------------------------------------------------------------


def write(path: Path, colour: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(colour).randint(0, 256, (9, 12, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    """Two tasks, `site2` and `site10`, which share the class `b`; a list of the same files beside them."""
    rows = []
    for t, site in enumerate(("site2", "site10")):
        for k, name in enumerate(("ab", "bc")[t]):
            for i in range(10):
                part = "test" if i % 5 == 0 else "train"
                path = tmp_path / "sites" / site / part / name / f"{i}.png"
                write(path, 100 * t + 10 * k + i)
                rows.append([path.relative_to(tmp_path), name, site, part])
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "class", "site", "part"], *rows])
    return tmp_path


def test_folders_and_a_column_are_tasks(sites: Path) -> None:
    folders = ready(ContinualData(path=sites / "sites", image_size=8))
    column = ready(ContinualData(path=sites / "list.csv", task_column="site", part_column="part", image_size=8))
    for data in (folders, column):
        assert (data.tasks, data.class_names, data.in_chans, data.img_size) == (2, ["a", "b", "c"], 3, 8)
        assert [task.classes for task in data.stream] == [[0, 1], [1, 2]], "site2 comes before site10"
        assert [(len(task.train[1]), len(task.test[1])) for task in data.stream] == [(16, 4), (16, 4)]
        assert data.describe() == [
            "task 0 (site2): 16 images for training, 4 for test: a 8, b 8",
            "task 1 (site10): 16 images for training, 4 for test: b 8, c 8",
        ]
    for one, other in zip(folders.stream, column.stream, strict=True):
        assert all(map(torch.equal, one.train + one.test, other.train + other.test))
    shared = ready(ContinualData(path=sites / "sites", image_size=8, evaluate_on="val", tasks=1))
    assert [(len(task.train[1]), len(task.test[1])) for task in shared.stream] == [(12, 4)]
    held = ready(ContinualData(path=sites / "list.csv", task_column="site", image_size=8, test_fraction=0.3))
    assert [(len(task.train[1]), len(task.test[1])) for task in held.stream] == [(14, 6), (14, 6)]
    assert held.describe()[-1] == "test: of each class, 30% of the training part, the same for every seed"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_is_prepared_as_the_tasks_are(channels: Any, sites: Path) -> None:
    data = ready(ContinualData(path=sites / "sites", image_size=8, channels=channels))
    record = data.input_record()
    assert (record["channels"], record["size"], record["mean"], record["std"]) == (channels, [8, 8], [0.0] * channels,
                                                                                   [1.0] * channels)  # fmt: skip
    assert "tasks" not in record
    (found,) = prepare(sites / "sites" / "site2" / "test" / "a" / "0.png", record)
    right = data.stream[0].test[0][:1].float() / 255
    torch.testing.assert_close(found, right, rtol=0, atol=1e-6)


def test_a_scenario_makes_tasks_of_one_folder(sites: Path) -> None:
    own = sites / "sites" / "site2"
    split = ready(ContinualData(path=own, scenario="split", classes_per_task=1, image_size=8))
    assert [task.classes for task in split.stream] == [[0], [1]]
    turned = ready(ContinualData(path=own, scenario="rotated", tasks=3, image_size=8))
    assert len(turned.stream) == 3
    assert turned.input_record()["tasks"] == "rotated"
    listed = ready(ContinualData(path=sites / "list.csv", scenario="split", classes_per_task=3, image_size=8))
    assert [task.classes for task in listed.stream] == [[0, 1, 2]]


def test_what_gives_no_tasks_is_told(sites: Path) -> None:
    def told(match: str, **options: Any) -> None:
        with pytest.raises(DataError, match=match) as caught:
            ContinualData(**options).prepare_data()
        assert "\n" not in str(caught.value)

    told(r"site2 holds train/, where each folder of .*site2 is a task.*data.scenario=split", path=sites / "sites/site2")
    told("holds no class folders: .*; each folder of .* is a task", path=sites / "sites" / "site2" / "train")
    told("list.csv is a list: name its column of tasks with data.task_column", path=sites / "list.csv")
    told("has 2 tasks, not data.tasks = 3", path=sites / "sites", tasks=3)
    told("no column 'place'; .* with data.task_column=...", path=sites / "list.csv", task_column="place")
    told("image_size is for own images, given by path=...; digits is taken as it is", name="digits", image_size=8)
    write(sites / "sites" / "site2" / "val" / "a" / "0.png", 0)
    told("site2/val: a stream has train/ and test/", path=sites / "sites")
    (sites / "sites" / "site2" / "val").rename(sites / "elsewhere")
    write(sites / "sites" / "site2" / "test" / "z" / "0.png", 0)
    told("task site2 tests z, which no task trains", path=sites / "sites")
    write(sites / "sites" / "site10" / "train" / "z" / "0.png", 0)
    told("task site2 tests z, which only a later task trains", path=sites / "sites")


def test_published_sets_are_streams_as_before() -> None:
    data = ContinualData("digits", "split")
    assert (data.tasks, data.img_size, data.scenario) == (5, 8, "split")
    assert (ContinualData("digits").scenario, ContinualData("digits").tasks) == ("permuted", 20)
    assert (
        ready(ContinualData("digits", tasks=2)).describe()[0].startswith("task 0: 1,438 images for training, 359 for")
    )
