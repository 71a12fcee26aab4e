"""The claim: no reference in a record leads out of media_root, and nothing but regular files is opened."""

from __future__ import annotations

import base64
import os
import pickle
import time
from pathlib import Path

import pytest

from pegboard_plugins.media.places import (
    MediaError,
    MediaPlace,
    decode_data_url,
    open_regular_file,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "media"
    (root / "sub").mkdir(parents=True)
    (root / "a.png").write_bytes(b"inside")
    (root / "sub" / "b.png").write_bytes(b"inside too")
    (tmp_path / "secret.png").write_bytes(b"outside")
    (tmp_path / "media2").mkdir()
    (tmp_path / "media2" / "c.png").write_bytes(b"outside")
    return root


def _reason(root: Path, reference: str) -> str:
    place = MediaPlace(str(root))
    with pytest.raises(MediaError) as caught:
        open_regular_file(place.resolve(reference), reference, place.root).close()
    assert "\n" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("reference", ["a.png", "./a.png", "sub/b.png", "sub//b.png"])
def test_paths_under_the_root_are_opened(root: Path, reference: str) -> None:
    place = MediaPlace(str(root))
    with open_regular_file(place.resolve(reference), reference, place.root) as file:
        assert file.read().startswith(b"inside")


@pytest.mark.parametrize(
    "reference",
    [
        "../secret.png",
        "sub/../../secret.png",
        "sub/../a.png",
        "../media2/c.png",
        "/etc/passwd",
        "..",
        ".",
    ],
)
def test_paths_that_lead_out_are_refused(root: Path, reference: str) -> None:
    assert _reason(root, reference) == "image outside media_root"


def test_links_that_lead_out_are_refused_and_links_inside_are_not(root: Path) -> None:
    (root / "out.png").symlink_to(root.parent / "secret.png")
    (root / "outdir").symlink_to(root.parent)
    (root / "in.png").symlink_to(root / "sub" / "b.png")
    assert _reason(root, "out.png") == "image outside media_root"
    assert _reason(root, "outdir/secret.png") == "image outside media_root"
    assert MediaPlace(str(root)).resolve("in.png") == str((root / "sub" / "b.png").resolve())


@pytest.mark.parametrize(
    "reference",
    ["http://x/a.png", "https://x/a.png", "s3://b/a.png", "file:///etc/passwd", "FILE:/etc/passwd"],
)
def test_urls_are_never_fetched(root: Path, reference: str) -> None:
    assert _reason(root, reference) == "image is a URL"


@pytest.mark.parametrize("reference", ["", "a\0.png"])
def test_what_is_no_path_is_refused(root: Path, reference: str) -> None:
    assert _reason(root, reference) == "image path invalid"


def test_a_path_longer_than_the_system_allows_is_refused(root: Path) -> None:
    assert _reason(root, "x" * 5000).startswith("image")
    assert _reason(root, "x/" * 4000).startswith("image")


@pytest.mark.parametrize("allow_outside", [False, True])
def test_base64_in_place_of_a_path_is_refused_at_once(root: Path, allow_outside: bool) -> None:
    """Every slash is a folder to look for, under a name as long as all before it: minutes for a photo."""
    place = MediaPlace(str(root), allow_outside=allow_outside)
    start = time.process_time()
    with pytest.raises(MediaError, match="write it as a data: URL") as caught:
        place.resolve("/9j/4AAQ" * 500_000)
    assert caught.value.reason == "image path invalid"
    assert time.process_time() - start < 1


def test_missing_empty_and_odd_files_have_their_own_reasons(root: Path) -> None:
    (root / "empty.png").touch()
    os.mkfifo(root / "pipe.png")
    assert _reason(root, "none.png") == "image missing"
    assert _reason(root, "a.png/x.png") == "image missing"
    assert _reason(root, "empty.png") == "image empty"
    assert _reason(root, "sub") == "image no file"
    assert _reason(root, "pipe.png") == "image no file"  # and nobody waits for a writer


def test_the_launcher_may_allow_what_leads_out(root: Path) -> None:
    place = MediaPlace(str(root), allow_outside=True)
    assert place.resolve("../secret.png") == str((root.parent / "secret.png").resolve())
    assert place.resolve("/etc/passwd") == os.path.realpath("/etc/passwd")
    with pytest.raises(MediaError):
        place.resolve("http://x/a.png")


def test_data_urls_hold_bytes() -> None:
    coded = base64.b64encode(b"picture").decode()
    assert decode_data_url(f"data:image/png;base64,{coded}").read() == b"picture"
    assert decode_data_url(f"data:image/png;base64,{coded[:4]}\n {coded[4:]}").read() == b"picture"
    assert decode_data_url("data:,a%20b").read() == b"a b"


@pytest.mark.parametrize("url", ["data:image/png;base64", "data:;base64,****", "data:;base64,a"])
def test_broken_data_urls_are_refused(url: str) -> None:
    with pytest.raises(MediaError) as caught:
        decode_data_url(url)
    assert caught.value.reason == "image data URL invalid"


def test_an_error_comes_whole_out_of_a_worker() -> None:
    error = pickle.loads(pickle.dumps(MediaError("image missing", "image 'a' not found")))
    assert error.reason == "image missing" and str(error) == "image 'a' not found"
