"""Records of JSON-lines files that know where their media lie.

The dataset opens no picture: it hands on the folder that paths start from, what is allowed of a
picture, and where in the file the record stands, for pictures written inside it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, replace

from pegboard_plugins.jsonl.reading import JsonlRecords
from pegboard_plugins.media.images import ImageLimits
from pegboard_plugins.media.places import MediaPlace
from pegboard_plugins.media.references import MediaRecord, RecordSource

__all__ = ["MediaJsonlRecords"]


class MediaJsonlRecords(JsonlRecords):
    """The built VLMJsonlDataset.

    Args:
        media_root: folder of relative media paths; None is the current folder.
        max_image_pixels: larger pictures are refused from their header.
        check_media: `lazy`, `header` or `decode`; see `RecordSource`.
        allow_outside: follow absolute paths, `..` and links out of media_root.

    The other arguments are those of `JsonlRecords`.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[str],
        *,
        anno_path: str = "",
        max_records: int | None = None,
        media_root: str | None = None,
        unpack_dir: str = "",
        max_image_pixels: int = ImageLimits().max_pixels,
        check_media: str = "lazy",
        allow_outside: bool = False,
    ) -> None:
        super().__init__(
            name,
            files,
            anno_path=anno_path,
            max_records=max_records,
            media_root=media_root,
            unpack_dir=unpack_dir,
        )
        self._source = RecordSource(
            MediaPlace(os.path.abspath(media_root or "."), allow_outside),
            ImageLimits(max_pixels=max_image_pixels),
            check_media,
        )

    def __getitem__(self, index: int) -> MediaRecord:
        record = super().__getitem__(index)
        return MediaRecord(record, replace(self._source, at=self._place_in_file(index)))

    def fingerprint(self) -> str:
        state = f"{super().fingerprint()} {asdict(self._source)}"
        return hashlib.sha256(state.encode("utf-8", "surrogatepass")).hexdigest()

    def _place_in_file(self, index: int) -> dict[str, str | int]:
        file, line = self._locate(index)
        return self._files().files[file].place_of(line)
