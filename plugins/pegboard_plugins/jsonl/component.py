"""The file datasets as a config names them; files are opened by `build` only."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pegboard import ComponentConfig, DatasetComponent, Problem
from pegboard_plugins.records.file_kinds import (
    RECORD_FILES,
    default_unpack_dir,
    missing_package,
)

if TYPE_CHECKING:
    from pegboard.contracts import Dataset
    from pegboard.run_config import RunConfig

__all__ = ["JsonlDataset", "VLMJsonlDataset", "find_record_files"]


class JsonlDataset(DatasetComponent):
    """Records from a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, or all of these in a folder."""

    known_as: ClassVar[tuple[str, ...]] = ("jsonl", "json_lines", "openai_jsonl")

    class Config(ComponentConfig):
        anno_path: str = Field(
            min_length=1,
            description="A file of JSON lines (also .gz and .zst), of one JSON list of records "
            "(.json) or of parquet rows, or a folder "
            "searched recursively for *.jsonl, *.jsonl.gz, *.jsonl.zst and *.parquet "
            "(sorted by path; hidden files and folders are left out).",
        )
        max_records: int | None = Field(
            default=None,
            ge=1,
            description="Use only the first this many records; for trying things out.",
        )
        unpack_dir: str | None = Field(
            default=None,
            min_length=1,
            description="Folder where .gz and .zst files are unpacked, once; null: "
            "pegboard/unpacked in the user's cache folder.",
        )

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        del run
        anno_path = self.config.anno_path
        if not os.path.exists(anno_path):
            yield Problem((*path, "anno_path"), f"no file or folder at {anno_path!r}")
            return
        files = find_record_files(anno_path)
        if not files:
            others = ", ".join(f"*{ending}" for ending in RECORD_FILES[1:])
            yield Problem(
                (*path, "anno_path"),
                f"no *.jsonl file (nor {others}) under the folder {anno_path!r}",
            )
        for problem in dict.fromkeys(map(missing_package, files)):
            if problem is not None:
                yield Problem((*path, "anno_path"), f"{anno_path!r}: {problem}")

    def build(self, name: str) -> Dataset:
        from .reading import JsonlRecords

        return JsonlRecords(
            name,
            find_record_files(self.config.anno_path),
            anno_path=self.config.anno_path,
            max_records=self.config.max_records,
            unpack_dir=self.config.unpack_dir or default_unpack_dir(),
        )


class VLMJsonlDataset(JsonlDataset):
    """Records that may name images, from the same files as JsonlDataset."""

    known_as: ClassVar[tuple[str, ...]] = ("vlm_jsonl", "mllm_jsonl", "multimodal_jsonl")

    class Config(JsonlDataset.Config):
        media_root: str | None = Field(
            default=None,
            description="Folder that media paths in the records start from, and that none of them "
            "may leave; null means the current folder.",
        )
        check_media: Literal["lazy", "header", "decode"] = Field(
            default="lazy",
            description="What is opened before training: only pictures whose record gives no "
            "image_wh (lazy), the header of every picture, or every picture whole (decode), so "
            "that none can fail later.",
        )
        max_image_pixels: int = Field(
            default=89_478_485,
            ge=1,
            le=178_956_970,
            description="Width times height above which a picture is refused, from its header. Pillow itself "
            "opens none of more than 178,956,970.",
        )

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        yield from super().check(run, path)
        if importlib.util.find_spec("PIL") is None:
            yield Problem(
                (*path, "class_name"),
                "VLMJsonlDataset needs Pillow, which is not installed; pip install 'pegboard[media]'",
            )
        root = self.config.media_root
        if root is not None and not os.path.isdir(root):
            yield Problem((*path, "media_root"), f"no folder at {root!r}")

    def build(self, name: str) -> Dataset:
        from .media_records import MediaJsonlRecords

        return MediaJsonlRecords(
            name,
            find_record_files(self.config.anno_path),
            anno_path=self.config.anno_path,
            max_records=self.config.max_records,
            media_root=self.config.media_root,
            unpack_dir=self.config.unpack_dir or default_unpack_dir(),
            max_image_pixels=self.config.max_image_pixels,
            check_media=self.config.check_media,
            allow_outside=self.media_outside_root,
        )


def find_record_files(anno_path: str) -> tuple[str, ...]:
    """The files that `anno_path` means, sorted by path; empty if there are none."""
    if not os.path.isdir(anno_path):
        return (anno_path,) if os.path.exists(anno_path) else ()
    found: list[str] = []
    seen: set[str] = set()
    for folder, folders, files in os.walk(anno_path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder already walked, or a circle of links
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            os.path.join(folder, name)
            for name in files
            if name.endswith(RECORD_FILES) and not name.startswith(".")
        ]
    return tuple(sorted(found))
