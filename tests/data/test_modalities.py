"""Recordings, clips, clouds and spectra: shapes, splits, seeds, and what is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.data import AudioFolder, DataError, IndianPines, MovingMnist, PointMnist, Prompts, SpokenDigits, VideoFolder
from zoo.data.audio import VOICES, WORDS, Clips
from zoo.data.hyperspectral import Patches
from zoo.data.points import Points, farthest_points
from zoo.data.sampling import SampleKey
from zoo.data.video import MOTIONS, MovingDigits

# ---- sound -------------------------------------------------------------------------------------------------


def record(path: Path, seconds: float, tone: float, rate: int = 8000) -> None:
    soundfile = pytest.importorskip("soundfile")
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(seconds * rate)) / rate
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * tone * time), rate)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    for name, tone in (("low", 200.0), ("high", 1500.0)):
        for i in range(12):
            record(tmp_path / name / f"{i:02}.wav", 0.2 + 0.1 * i, tone, 8000 if i % 2 else 16000)
    return tmp_path


def test_recordings_in_folders(recordings: Path) -> None:
    data = AudioFolder(recordings, sample_rate=8000, duration=0.5, batch_size=4)
    data.prepare_data()
    data.setup()
    assert data.class_names == ["high", "low"]
    assert {part: len(d) for part, d in data.datasets.items()} == {"train": 16, "val": 2, "test": 6}
    waves, targets = next(iter(data.train_dataloader()))
    assert waves.shape == (4, 4000)
    for wave, target in zip(waves, targets.tolist(), strict=True):
        peak = torch.fft.rfft(wave).abs().argmax() * 8000 / 4000
        assert abs(peak - (1500 if target == 0 else 200)) < 10, "resampled to one rate, and the class is right"


def test_lists_of_speech_commands(recordings: Path) -> None:
    (recordings / "testing_list.txt").write_text("low/00.wav\nhigh/03.wav\n")
    (recordings / "validation_list.txt").write_text("low/01.wav\n")
    data = AudioFolder(recordings, sample_rate=8000)
    data.setup()
    assert {part: len(d) for part, d in data.datasets.items()} == {"train": 21, "val": 1, "test": 2}


def test_clips_are_cut_and_filled() -> None:
    clips = [torch.arange(10, dtype=torch.int16), torch.arange(3, dtype=torch.int16)]
    cut, filled = Clips(clips, [0, 1], 5, "repeat").images([SampleKey(0), SampleKey(1)]) * 32768
    assert cut.tolist() == [2, 3, 4, 5, 6]
    assert filled.tolist() == [0, 1, 2, 0, 1]
    (silent,) = Clips(clips, [0, 1], 7, "silence").images([SampleKey(1)]) * 32768
    assert silent.tolist() == [0, 0, 0, 1, 2, 0, 0]
    drawn = [Clips(clips, [0, 1], 5, "repeat", seed=0).images([SampleKey(0, epoch)])[0] for epoch in range(8)]
    assert len({tuple(wave.tolist()) for wave in drawn}) > 1
    again = Clips(clips, [0, 1], 5, "repeat", seed=0).images([SampleKey(1, 3), SampleKey(0, 3)])[1]
    assert torch.equal(again, drawn[3]), "a clip's cut does not depend on its neighbours"


def test_training_clips_are_first_cut_to_a_random_length() -> None:
    clips = Clips([torch.arange(100, 200, dtype=torch.int16)], [0], 50, "repeat", seed=0, min_cut=5)
    waves = [(clips.images([SampleKey(0, epoch)])[0] * 32768).long() for epoch in range(50)]
    kept = [len(wave.unique()) for wave in waves]
    assert set(kept) <= set(range(5, 51))
    assert len(set(kept)) > 10
    for wave, n in zip(waves, kept, strict=True):
        assert torch.equal(wave, wave[:n].repeat(-(-50 // n))[:50])
        assert int(wave[n - 1] - wave[0]) == n - 1
    whole = Clips([torch.arange(100, 104, dtype=torch.int16)], [0], 50, "repeat", seed=0, min_cut=5)
    assert len(whole.images([SampleKey(0, 1)])[0].unique()) == 4, "what is shorter stays whole"


def test_languages_are_read_and_silence_is_not(tmp_path: Path) -> None:
    for i, name in enumerate(Prompts.names):
        for j in range(4):
            record(tmp_path / name / "digits" / f"{j}.wav", 1.0, 300 + 100 * i)
        record(tmp_path / name / "silence" / "1.wav", 1.0, 1.0)
    data = Prompts(tmp_path, val_fraction=0.0)
    data.prepare_data()
    data.setup()
    assert sum(len(d) for d in data.datasets.values()) == 20
    assert data.num_classes == 5
    (tmp_path / "ru").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"no folder .*ru; install .*asterisk-core-sounds-\{en,es,fr,it,ru\}-wav"):
        Prompts(tmp_path).prepare_data()


def test_no_voice_is_in_two_parts(tmp_path: Path) -> None:
    sets = [set(voices) for voices in VOICES.values()]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 15
    clip = torch.ones(100, dtype=torch.int16).numpy()
    said = {f"{voice}/0/{d}": clip for voices in VOICES.values() for voice in voices for d in range(len(WORDS))}
    np.savez_compressed(tmp_path / "spoken_digits.npz", **said)
    data = SpokenDigits(tmp_path)
    data.prepare_data()
    data.setup()
    assert {part: len(d) for part, d in data.datasets.items()} == {"train": 90, "val": 20, "test": 40}
    (tmp_path / "spoken_digits.npz").write_bytes(b"x")
    with pytest.raises(DataError, match="is damaged"):
        SpokenDigits(tmp_path).setup()
    with pytest.raises(DataError, match="place espeakng_loader"):
        SpokenDigits(tmp_path / "none", download=False).prepare_data()


def test_wrong_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        AudioFolder(tmp_path / "none").prepare_data()
    with pytest.raises(DataError, match="has no folders, one for each class"):
        AudioFolder(tmp_path).prepare_data()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.wav").write_bytes(b"no sound")
    with pytest.raises(DataError, match=r"cannot read the recording .*x\.wav"):
        AudioFolder(tmp_path).setup()


def test_lengths_that_contradict_each_other_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"min_cut=2\.0 s must not be longer than duration=1\.0 s"):
        AudioFolder(tmp_path, min_cut=2.0)
    with pytest.raises(ValueError, match=r"min_seconds=3\.0 above max_seconds=2\.0"):
        AudioFolder(tmp_path, min_seconds=3.0, max_seconds=2.0)


# ---- video -------------------------------------------------------------------------------------------------


@pytest.fixture
def digits() -> Tensor:
    images = torch.zeros(16, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 8:20, 10:18] = 255
    return images


def test_digits_move_as_they_are_called(digits: Tensor) -> None:
    clips, motions = MovingDigits(digits, 16, 32, seed=0).batch(range(16))
    assert clips.shape == (16, 1, 16, 32, 32)
    angle = 2 * torch.pi * torch.arange(32) / 32
    phase = {}
    for axis, kept in (("x", 3), ("y", 4)):
        mass = clips[:, 0].sum({3: 2, 4: 3}[kept])  # B T 32: a digit on a torus has a circular mean
        phase[axis] = torch.atan2((mass * angle.sin()).sum(-1), (mass * angle.cos()).sum(-1))
    step = {axis: torch.remainder(p.diff(dim=1) + torch.pi, 2 * torch.pi) - torch.pi for axis, p in phase.items()}
    size = clips[:, 0].sum((2, 3))
    for i, motion in enumerate(motions.tolist()):
        dx, dy = step["x"][i], step["y"][i]
        match MOTIONS[motion]:
            case "right":
                assert dx.min() > 0
                assert dy.abs().max() < 0.05
            case "left":
                assert dx.max() < 0
            case "down":
                assert dy.min() > 0
            case "up":
                assert dy.max() < 0
            case "clockwise" | "anticlockwise":
                turn = (dx[:-1] * dy[1:] - dy[:-1] * dx[1:]).mean()
                assert turn > 0 if MOTIONS[motion] == "clockwise" else turn < 0
            case "grow":
                assert size[i, -1] > 1.3 * size[i, 0]
            case "shrink":
                assert size[i, -1] < size[i, 0] / 1.3


def test_motions_are_drawn_anew_for_training_only(digits: Tensor) -> None:
    moving = MovingDigits(digits, 4, 16, seed=0)
    one, two = (moving.images([SampleKey(3, epoch)]) for epoch in (0, 1))
    assert not torch.equal(one, two)
    assert torch.equal(one, moving.images([SampleKey(5), SampleKey(3)])[1:])


def test_the_test_clips_are_the_same_for_every_seed(mnist5k: Path) -> None:
    first, second = (MovingMnist(mnist5k, size=16, frames=4, seed=seed) for seed in (0, 1))
    first.setup()
    second.setup()
    for part, same in (("train", False), ("val", True), ("test", True)):
        clips = [data.datasets[part].batch(range(2))[0] for data in (first, second)]
        assert torch.equal(*clips) == same


@pytest.fixture
def mnist5k(tmp_path: Path) -> Path:
    """A file in the place of the real one: twenty images of each class."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (200, 1, 28, 28)).astype(np.uint8)
    np.savez(tmp_path / "mnist5k.npz", images=images, targets=np.repeat(np.arange(10), 20))
    return tmp_path


def test_video_files(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="reads and writes video files")
    for name, colour in (("dark", 40), ("light", 200)):
        for i in range(3):
            path = tmp_path / "train" / name / f"{i}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            with av.open(str(path), "w") as container:
                stream = container.add_stream("mpeg4", rate=10)
                stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
                for _ in range(10):
                    picture = np.full((32, 48, 3), colour, np.uint8)
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                container.mux(stream.encode())
    data = VideoFolder(tmp_path, frames=4, size=16, batch_size=4, num_workers=0, val_fraction=0.34)
    data.prepare_data()
    data.setup()
    clips, targets = next(iter(data.train_dataloader()))
    assert clips.shape == (4, 3, 4, 16, 16)
    assert ((clips.mean((1, 2, 3, 4)) > 0).long() == targets).all()
    assert len(data.datasets["val"]) == 2
    (tmp_path / "train" / "dark" / "0.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"cannot read the video .*0\.mp4"):
        data.datasets["train"].batch([0])
    with pytest.raises(DataError, match="one for each class: set"):
        VideoFolder(tmp_path / "none").prepare_data()


# ---- point clouds ------------------------------------------------------------------------------------------


def test_farthest_points() -> None:
    line = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [10, 0, 0]]])
    assert farthest_points(line, 3).tolist() == [[0, 3, 2]]
    assert sorted(farthest_points(line, 4)[0].tolist()) == [0, 1, 2, 3]
    assert set(farthest_points(line, 6)[0].tolist()) == {0, 1, 2, 3}


def test_clouds_of_digits(mnist5k: Path) -> None:
    data = PointMnist(mnist5k, num_points=20, batch_size=8)
    data.prepare_data()
    data.setup()
    points, targets = next(iter(data.train_dataloader()))
    assert points.shape == (8, 20, 3)
    assert targets.shape == (8,)
    still = data.datasets["test"].points
    assert still[..., :2].abs().max() <= 1
    assert still[..., 2].min() > 32 / 511
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    image[0, 0, 0, 27] = 255
    assert torch.allclose(data.clouds(image)[0], torch.tensor([1.0, 1.0, 0.5]).expand(20, 3)), "y points up"


def test_clouds_are_stretched_and_shifted_in_training() -> None:
    points = torch.ones(2, 5, 3)
    moved = Points(points, torch.zeros(2), 1.5, 0.2, seed=0).images([SampleKey(0), SampleKey(1)])
    assert (moved != 1).all()
    assert moved.min() >= 1 / 1.5 - 0.2
    assert moved.max() <= 1.7
    assert torch.equal(moved[:, :1].expand_as(moved), moved), "all points of a cloud move alike"
    assert torch.equal(Points(points, torch.zeros(2)).images([SampleKey(0)]), points[:1])


# ---- many channels -----------------------------------------------------------------------------------------


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    np.save(tmp_path / "Indian_pines_corrected.npy", generator.normal(5, 2, (145, 145, 200)).astype(np.float32))
    np.save(tmp_path / "Indian_pines_gt.npy", generator.integers(0, 17, (145, 145)).astype(np.uint8))
    return tmp_path


def test_patches_of_the_scene(scene: Path) -> None:
    data = IndianPines(scene, patch=5, batch_size=8)
    data.prepare_data()
    data.setup()
    patches, _ = next(iter(data.train_dataloader()))
    assert patches.shape == (8, 200, 5, 5)
    middle = torch.cat([data.datasets["train"].images([SampleKey(i)])[:, :, 2, 2] for i in range(0, 8000, 8)])
    assert abs(float(middle.mean())) < 0.05
    assert abs(float(middle.std()) - 1) < 0.05
    with pytest.raises(DataError, match="a patch has a middle pixel"):
        IndianPines(scene, patch=4)
    (scene / "Indian_pines_gt.npy").write_bytes(b"x")
    with pytest.raises(DataError, match=r"Indian_pines_gt\.npy is damaged"):
        IndianPines(scene).setup()


def test_no_training_patch_reaches_into_a_test_square(scene: Path) -> None:
    places = IndianPines(scene, patch=5, split="blocks").places()
    tested = np.zeros((145 + 4, 145 + 4), bool)
    tested[places["test"][:, 0] + 2, places["test"][:, 1] + 2] = True
    for part in ("train", "val"):
        assert len(places[part])
        for row, column in places[part]:
            assert not tested[row : row + 5, column : column + 5].any()
    shares = {part: len(p) for part, p in places.items()}
    assert shares["test"] > shares["train"] > shares["val"]


def test_patches_are_turned_in_training() -> None:
    scene = torch.arange(50.0).view(2, 5, 5)
    place, target = torch.tensor([[1, 1]]), torch.tensor([0])
    still = Patches(scene, place, target, 3).images([SampleKey(0)])
    assert torch.equal(still[0], scene[:, 1:4, 1:4])
    turned = [Patches(scene, place, target, 3, seed=0).images([SampleKey(0, e)])[0] for e in range(40)]
    assert len({tuple(t.flatten().tolist()) for t in turned}) == 8
    assert all(torch.equal(t[:, 1, 1], scene[:, 2, 2]) for t in turned)
