"""Streams of tasks: seeded, iterable and indexable, with what was drawn in their state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.data.checks import DataError
from zoo.data.task_streams import ContinualData, PermutedTasks, RotatedTasks, SplitTasks, TaskStream
from zoo.support import inputs

Part = tuple[Tensor, Tensor]


def part(n: int = 30, chans: int = 1, size: int = 6, classes: int = 6) -> Part:
    draw = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, chans, size, size), generator=draw, dtype=torch.uint8), torch.arange(n) % classes


KINDS = {"permuted": PermutedTasks, "rotated": RotatedTasks, "split": SplitTasks}
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind: str, **options: Any) -> TaskStream:
    return KINDS[kind](part(), part(12), tasks=3, **options)


@every_kind
def test_index_and_iteration_agree_and_the_seed_decides(kind: str) -> None:
    stream, again = build(kind, seed=5), build(kind, seed=5)
    tasks = list(stream)
    assert len(stream) == len(tasks) == 3
    for i, task in enumerate(tasks):
        assert task.number == i
        for mine, theirs in zip((*task.train, *task.test), (*again[i].train, *again[i].test), strict=True):
            assert torch.equal(mine, theirs)
    assert torch.equal(stream[-1].train[0], tasks[2].train[0])
    with pytest.raises(IndexError, match="task 3 of a stream of 3"):
        stream[3]
    other = build(kind, seed=6, **({"order": "random"} if kind == "split" else {}))
    drawn, mine = (list(s.state_dict().values())[-1] for s in (other, stream))
    assert not torch.equal(drawn, mine)
    other.load_state_dict(stream.state_dict())
    assert torch.equal(other[1].train[0], tasks[1].train[0])


def test_permutations_move_pixels_and_nothing_else() -> None:
    images = part(chans=3)
    stream = PermutedTasks(images, images, 4)
    assert torch.equal(stream[0].train[0], images[0])
    task = stream[2]
    order = stream.permutations[2]
    assert torch.equal(task.train[0].flatten(2), images[0].flatten(2)[..., order])
    assert torch.equal(task.train[0], task.test[0])
    with pytest.raises(DataError, match="4 orders of 36 pixels"):
        PermutedTasks(images, images, 4, permutations=torch.zeros(4, 36, dtype=torch.long))


def test_rotation_is_counter_clockwise_with_zeros_outside() -> None:
    images = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    images[0, 0, 2, 4] = 200  # at the right; a quarter turn puts it on top
    stream = RotatedTasks((images, torch.zeros(1, dtype=torch.long)), part(), 2, degrees=torch.tensor([0.0, 90.0]))
    assert torch.equal(stream[0].train[0], images)
    assert stream[1].train[0].nonzero().tolist() == [[0, 0, 0, 2]]
    drawn = RotatedTasks(part(), part(), 20, seed=3).degrees
    assert bool(((drawn > 10 * torch.arange(20) - 10) & (drawn <= 10 * torch.arange(20))).all())


def test_split_shares_the_classes_out() -> None:
    stream = SplitTasks(part(), part(12))
    assert [task.classes for task in stream] == [[0, 1], [2, 3], [4, 5]]
    assert set(stream[1].test[1].tolist()) == {2, 3}
    with pytest.raises(DataError, match="6 classes make 1 tasks of 4"):
        SplitTasks(part(), part(), 2, classes_per_task=4)


@every_kind
def test_samples_per_task(kind: str) -> None:
    stream = build(kind, train_samples=8)
    assert all(len(task.train[1]) == 8 for task in stream)
    if kind == "split":
        return
    with pytest.raises(DataError, match="train_samples=31"):
        build(kind, train_samples=31)


def test_classes_that_would_never_be_seen_are_told() -> None:
    ten, five = part(60, classes=10), part(20, classes=5)
    for tasks in (None, 3):
        with pytest.raises(DataError, match="tasks of 3, class 9 would never be seen"):
            SplitTasks(ten, ten, tasks, classes_per_task=3)
    assert [t.classes for t in SplitTasks(ten, ten, 2, classes_per_task=3)] == [[0, 1, 2], [3, 4, 5]]
    for tasks, message in ((3, "class 9 would never be seen"), (20, "10 classes make 3 tasks of 3 each, not 20")):
        with pytest.raises(ValueError, match=message):
            ContinualData("digits", "split", tasks=tasks, classes_per_task=3)
    for order in (
        [0, 1, 2],
        [0, 0, 1, 2, 3, 4, 5, 6, 7, 8],
        [[*range(10)]],
        [*range(1, 11)],
        [i + 0.5 for i in range(10)],
    ):
        with pytest.raises(DataError, match=r"order must name each of classes 0, 1, .*, 9 once"):
            SplitTasks(ten, ten, order=torch.tensor(order))
    backwards = SplitTasks(ten, ten, order=torch.arange(9, -1, -1))
    assert backwards[0].classes == [8, 9]
    with pytest.raises(DataError, match="order must name"):
        backwards.load_state_dict({"seed": 0, "order": torch.arange(3)})
    with pytest.raises(DataError, match="test part has no image of classes 6, 7, which belongs to task 3"):
        SplitTasks(ten, tuple(t[~torch.isin(ten[1], torch.tensor([6, 7]))] for t in ten))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no image of class 5"):
        SplitTasks(ten, five)
    assert len(SplitTasks(ten, five, 2)) == 2
    with pytest.raises(DataError, match="between 1 and 12, the images of task 0"):
        SplitTasks(ten, ten, train_samples=13)
    with pytest.raises(DataError, match="classes_per_task=0"):
        SplitTasks(ten, ten, classes_per_task=0)
    with pytest.raises(DataError, match="order='randm'"):
        SplitTasks(ten, ten, order="randm")  # type: ignore[arg-type]


@every_kind
def test_labels_are_those_of_the_task(kind: str) -> None:
    stream = build(kind, train_samples=7)
    for task in stream:
        assert torch.equal(stream.labels(task.number), task.train[1])


@pytest.mark.parametrize(
    ("images", "classes", "message"),
    [
        (torch.zeros(4, 1, 6, 6, dtype=torch.long), torch.arange(4), "images of type torch.int64"),
        (torch.zeros(4, 1, 6, 6), torch.arange(4.0), "whole numbers from 0 as classes"),
        (torch.zeros(4, 1, 6, 6), torch.arange(4) - 1, "whole numbers from 0 as classes"),
        (torch.zeros(4, 1, 6, 6), torch.zeros(4, 1, dtype=torch.long), "as many classes"),
    ],
)
def test_types_of_images_and_classes(images: Tensor, classes: Tensor, message: str) -> None:
    for train, test in (((images, classes), part()), (part(), (images, classes))):
        with pytest.raises(DataError, match=message):
            PermutedTasks(train, test, 2)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(DataError, match="needs images"):
        PermutedTasks((torch.rand(3, 5), torch.arange(3)), part())
    with pytest.raises(DataError, match="tasks=0"):
        RotatedTasks(part(), part(), 0)


def test_data_module_keeps_its_draws_and_leaves_images_out() -> None:
    data = ContinualData("digits", "permuted", tasks=2, seed=1)
    data.prepare_data()
    with pytest.raises(DataError, match="setup"):
        _ = data.stream
    data.setup()
    assert data.num_classes == 10
    assert data.preprocessing["mean"] == [0.0]
    other = ContinualData("digits", "permuted", tasks=2, seed=2)
    other.load_state_dict(data.state_dict())
    other.setup()
    assert torch.equal(other.stream[1].train[0], data.stream[1].train[0])
    val = ContinualData("digits", "permuted", tasks=2, seed=1, evaluate_on="val")
    val.setup()
    assert len(val.stream[0].train[1]) + len(val.stream[0].test[1]) == len(data.stream[0].train[1])
    with pytest.raises(ValueError, match="scenario"):
        ContinualData("digits", "shuffled")


def test_the_loader_gives_one_task_an_epoch() -> None:
    data = ContinualData("digits", "rotated", tasks=3, train_samples=20)
    data.setup()
    before, loader = torch.get_rng_state(), data.train_dataloader()
    found = [task for _ in range(3) for task in loader]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(loader) == 1
    assert [task.number for task in found] == [0, 1, 2]
    for given, own in zip(found, data.stream, strict=True):
        assert all(map(torch.equal, (*given.train, *given.test), (*own.train, *own.test)))


def test_the_record_says_what_tasks_do_to_pictures() -> None:
    records = [ContinualData("digits", s, tasks=2).input_record() for s in ("permuted", "rotated", "split")]
    assert [record.get("tasks") for record in map(inputs.check, records)] == ["permuted", "rotated", None]
    with pytest.raises(inputs.InputError, match="tasks: input should be 'permuted' or 'rotated'"):
        inputs.check(records[0] | {"tasks": "mirrored"})


def test_missing_cifar_is_told(tmp_path: Any) -> None:
    data = ContinualData("cifar100", "split", root=tmp_path, download=False, classes_per_task=5)
    data.prepare_data()
    with pytest.raises(DataError, match="cifar-100-python"):
        data.setup()
