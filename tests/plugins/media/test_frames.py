"""The claim: a video gives the same frames every time, from a folder, an animated picture or a file."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pegboard_plugins.media.frames import count_frames, pick_frames, read_frames
from pegboard_plugins.media.images import ImageLimits
from pegboard_plugins.media.places import MediaError, MediaPlace

LIMITS = ImageLimits()


def _frame(number: int, side: int = 32) -> Image.Image:
    return Image.new("RGB", (side, side), (number * 20, 255 - number * 20, 0))


def _numbers(root: Path, reference: str, picks: list[int]) -> list[int]:
    frames = read_frames(reference, picks, MediaPlace(str(root)), LIMITS)
    return [round(int(np.asarray(frame)[16, 16, 0]) / 20) for frame in frames]


def test_frames_are_the_middles_of_equal_parts() -> None:
    assert pick_frames(8, 4) == [1, 3, 5, 7]
    assert pick_frames(100, 1) == [50]
    assert pick_frames(3, 24) == [0, 1, 2]
    for total in range(1, 60):
        picks = pick_frames(total, 7)
        assert len(picks) == min(total, 7) and picks == sorted(set(picks)) and picks[-1] < total


def test_a_folder_is_ordered_by_the_last_number_of_each_name(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in (10, 2, 1):
        _frame(number).save(folder / f"take3_{number}.png")
    (folder / "notes.txt").write_text("no frame")
    (folder / ".hidden.png").write_text("no frame")
    assert count_frames("clip", MediaPlace(str(tmp_path)), LIMITS) == 3
    assert _numbers(tmp_path, "clip/", [0, 1, 2]) == [1, 2, 10]


def test_a_frame_that_is_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "clip").mkdir(parents=True)
    _frame(1).save(tmp_path / "secret.png")
    (root / "clip" / "1.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(MediaError) as caught:
        list(read_frames("clip", [0], MediaPlace(str(root)), LIMITS))
    assert caught.value.reason == "image outside media_root"


def test_a_gif_gives_its_frames(tmp_path: Path) -> None:
    frames = [_frame(number) for number in range(8)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=50)
    assert count_frames("a.gif", MediaPlace(str(tmp_path)), LIMITS) == 8
    assert _numbers(tmp_path, "a.gif", [1, 3, 5, 7]) == [1, 3, 5, 7]


def test_a_broken_gif_an_empty_folder_and_an_unknown_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(b"GIF89a nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("#EXTM3U\nhttp://example.invalid/x.ts\n")
    place = MediaPlace(str(tmp_path))
    for reference in ("a.gif", "empty", "a.txt", "none.mp4"):
        with pytest.raises(MediaError):
            count_frames(reference, place, LIMITS)


@pytest.mark.parametrize(
    ("side", "reason"), [(60_000, "video broken"), (8_000, "image too many pixels")]
)
def test_a_later_frame_of_a_gif_is_no_bomb(tmp_path: Path, side: int, reason: str) -> None:
    frames = [Image.new("L", (16, 16), number * 9) for number in range(2)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    content = (tmp_path / "a.gif").read_bytes()
    second = content.rindex(b",\0\0\0\0") + 5  # width and height stand behind left and top
    content = content[:second] + struct.pack("<HH", side, side) + content[second + 4 :]
    (tmp_path / "a.gif").write_bytes(content)
    assert count_frames("a.gif", MediaPlace(str(tmp_path)), LIMITS) == 2
    with pytest.raises(MediaError) as caught:
        list(read_frames("a.gif", [0, 1], MediaPlace(str(tmp_path)), ImageLimits(max_pixels=9999)))
    assert caught.value.reason == reason


def test_a_video_shorter_than_planned_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    _frame(1).save(tmp_path / "clip" / "1.png")
    with pytest.raises(MediaError) as caught:
        _numbers(tmp_path, "clip", [0, 4])
    assert caught.value.reason == "video shorter than planned"


@pytest.mark.parametrize("now", [2, 4])
def test_a_folder_that_gained_or_lost_frames_is_refused(now: int, tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    for number in range(now):
        _frame(number).save(tmp_path / "clip" / f"{number}.png")
    place = MediaPlace(str(tmp_path))
    with pytest.raises(MediaError, match=rf"holds {now} frames, but 3 .*--fresh") as caught:
        list(read_frames("clip", [1], place, LIMITS, num_frames=3))
    assert caught.value.reason == "frames differ"
    assert len(list(read_frames("clip", [1], place, LIMITS, num_frames=now))) == 1


def test_an_mp4_gives_the_same_frames_twice(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="needs PyAV, the optional extra 'video'")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(12):
            picture = _frame(number, 64)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    place = MediaPlace(str(tmp_path))
    assert count_frames("a.mp4", place, LIMITS) == 12
    picks = pick_frames(12, 4)
    first = [f.tobytes() for f in read_frames("a.mp4", picks, place, LIMITS)]
    again = [f.tobytes() for f in read_frames("a.mp4", picks, place, LIMITS)]
    assert first == again and len(first) == 4
    assert _numbers(tmp_path, "a.mp4", picks) == picks


@pytest.mark.parametrize(
    ("degrees", "flips", "corner", "size"),
    [
        (0, {}, "upper left", (64, 32)),
        (90, {}, "lower left", (32, 64)),
        (180, {}, "lower right", (64, 32)),
        (270, {}, "upper right", (32, 64)),
        (0, {"hflip": True}, "upper right", (64, 32)),
        (0, {"vflip": True}, "lower left", (64, 32)),
        (90, {"hflip": True}, "lower right", (32, 64)),
        (270, {"hflip": True}, "upper left", (32, 64)),
        (45, {}, "upper left", (64, 32)),  # no quarter turn: as stored
    ],
)
def test_a_container_is_turned_as_its_display_matrix_says(
    tmp_path: Path, degrees: int, flips: dict[str, bool], corner: str, size: tuple[int, int]
) -> None:
    av = pytest.importorskip("av", reason="needs PyAV, the optional extra 'video'")
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    pixels[:16, :32] = 255  # where the upper left corner goes says it all, but for one flip
    pixels[:16, 32:] = (255, 0, 0)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV writes no display matrix")
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(degrees, **flips)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    (frame,) = read_frames("a.mp4", [0], MediaPlace(str(tmp_path)), LIMITS)
    assert frame.size == size
    width, height = size
    ends = {"left": width // 4, "right": 3 * width // 4, "upper": height // 4}
    ends["lower"] = 3 * height // 4
    row, column = corner.split()
    found: Any = frame.getpixel((ends[column], ends[row]))
    assert min(found) > 200, found
    # The corner that was beside it, along the frame's longer side, is red.
    long = (
        {"left": "right", "right": "left"}
        if width > height
        else {"upper": "lower", "lower": "upper"}
    )
    row, column = long.get(row, row), long.get(column, column)
    red: Any = frame.getpixel((ends[column], ends[row]))
    assert red[0] > 200 > 100 > max(red[1:]), red


def test_frames_before_the_start_of_a_cut_video_are_not_counted(tmp_path: Path) -> None:
    """Cut without being encoded anew, a video keeps what its first frame is decoded from."""
    av = pytest.importorskip("av", reason="needs PyAV, the optional extra 'video'")
    if "libx264" not in av.codecs_available:
        pytest.skip("this PyAV writes no H.264")
    options = {"avoid_negative_ts": "disabled"}  # what stands before 0 stays there, as in a cut
    with av.open(str(tmp_path / "cut.mp4"), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        pictures = [av.VideoFrame.from_image(_frame(number, 64)) for number in range(12)]
        for picture in [*pictures, None]:
            for packet in stream.encode(picture):
                shift = round(5 / 10 / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                container.mux(packet)
    num_frames = count_frames("cut.mp4", MediaPlace(str(tmp_path)), LIMITS)
    with av.open(str(tmp_path / "cut.mp4")) as container:
        assert num_frames == sum(1 for _ in container.decode(video=0)) < 12
    picks = pick_frames(num_frames, 24)
    assert _numbers(tmp_path, "cut.mp4", picks) == list(range(12 - num_frames, 12))


def test_a_playlist_named_mp4_opens_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="needs PyAV, the optional extra 'video'")
    (tmp_path / "a.mp4").write_text(f"#EXTM3U\nfile://{tmp_path}/b.mp4\n")
    with pytest.raises(MediaError) as caught:
        count_frames("a.mp4", MediaPlace(str(tmp_path)), LIMITS)
    assert caught.value.reason == "video broken"
