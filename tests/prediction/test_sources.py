import os

import numpy as np
import pytest
from PIL import Image

from hourglass import InputError
from hourglass.prediction.sources import Video, VideoFile, find_sources, read_pixels
from tests.predictions import write_video


def test_files_and_folders(tmp_path):
    for name in ("b.jpg", "a.PNG", "notes.txt", "deep/b.jpg", "deep/clip.mp4", "b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "b.jpg").touch()
    sources = find_sources(
        [str(tmp_path / "in"), str(tmp_path / "b.jpg"), str(tmp_path / "in" / "notes.txt"), "gone.jpg"]
    )
    # Each name once, whatever the folders and suffixes.
    assert [source.name for source in sources] == ["a", "b", "b_2", "deep/b", "deep/clip", "b_3", "notes", "gone"]
    assert [source.name for source in sources if source.is_video] == ["deep/clip"]


def test_pixels_are_those_of_evaluation(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (5, 7), np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = read_pixels(tmp_path / "deep.png", "full")
    assert image.shape == (5, 7, 3) and np.array_equal(image[..., 0], np.round(values / 257))
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(colours).save(tmp_path / "colours.png")
    assert np.array_equal(read_pixels(tmp_path / "colours.png", "full"), colours[..., ::-1])


def test_bad_images_are_said_in_a_line(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:3000])
    for name in ("text.png", "empty.jpg", "cut.jpg"):
        with pytest.raises(InputError, match=f"{name} cannot be read as an image") as error:
            read_pixels(tmp_path / name, "full")
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="gone.jpg is missing"):
        read_pixels(tmp_path / "gone.jpg", "full")


def test_a_video_frame_by_frame(tmp_path):
    drawn = write_video(tmp_path / "clip.mp4", 4)
    video = Video(tmp_path / "clip.mp4")
    frames = list(video)
    assert video.rate == 5 and video.length == len(frames) == 4
    for frame, expected in zip(frames, drawn):
        assert frame.shape == expected.shape and abs(int(frame.mean()) - int(expected.mean())) < 4
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(InputError, match="text.mp4 cannot be read as a video"):
        Video(tmp_path / "text.mp4")
    with pytest.raises(InputError, match="gone.mp4 is missing"):
        Video(tmp_path / "gone.mp4")


def test_a_video_is_written_whole_or_not_at_all(tmp_path):
    for keep in (True, False):
        file = VideoFile(tmp_path / f"{keep}.mp4", 5)
        for brightness in (50, 200):
            file.add(np.full((33, 47, 3), brightness, np.uint8))  # of odd sides, which the format does not have
        file.add(np.full((64, 94, 3), 100, np.uint8))
        assert not (tmp_path / f"{keep}.mp4").exists()
        file.close(complete=keep)
    assert [path.name for path in tmp_path.iterdir()] == ["True.mp4"]
    frames = list(Video(tmp_path / "True.mp4"))
    assert [frame.shape for frame in frames] == [(32, 46, 3)] * 3


@pytest.mark.parametrize("rate", [23.976, 59.9401, 65.537, 119.951, 239.834, 1000.0])
def test_a_video_of_any_rate_is_written(rate, tmp_path):
    file = VideoFile(tmp_path / "clip.mp4", rate)
    for brightness in (50, 200):
        file.add(np.full((32, 48, 3), brightness, np.uint8))
    file.close()
    video = Video(tmp_path / "clip.mp4")
    assert len(list(video)) == 2 and video.rate == pytest.approx(rate, rel=1e-4)


def test_a_video_whose_name_is_no_utf8_is_refused(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    write_video(tmp_path / "clip.mp4", 1)
    os.rename(tmp_path / "clip.mp4", path)
    message = r"the path of a video must be UTF-8, got '.*caf\?.mp4': rename it"
    with pytest.raises(InputError, match=message):
        Video(path)
    with pytest.raises(InputError, match=message):
        VideoFile(path, 5).add(np.zeros((32, 48, 3), np.uint8))


def test_the_folder_of_a_user_that_is_not_there():
    assert [source.path.name for source in find_sources(["~no such user/a.jpg"])] == ["a.jpg"]
