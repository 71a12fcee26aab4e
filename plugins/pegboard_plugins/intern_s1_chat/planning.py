"""Which pictures and frames of a record become how many tiles: sizes, grids, and what the token store keeps.

A picture is opened only if nothing else tells its size, or the dataset asks for a look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pegboard.contracts import ImageTokens
from pegboard_plugins.intern_s1_chat.placing import FoundMedia
from pegboard_plugins.media.frames import count_frames, pick_frames, read_frames
from pegboard_plugins.media.images import decode_image, read_image_size
from pegboard_plugins.media.parts import MediaPart, iter_media_parts
from pegboard_plugins.media.places import MediaError, is_data_url
from pegboard_plugins.media.references import RecordSource, open_part, part_name
from pegboard_plugins.media.tiling import choose_grid, count_tiles

if TYPE_CHECKING:
    from .component import InternS1TokenizeFn

__all__ = ["MediaPlan", "MediaPlanner"]


@dataclass
class MediaPlan:
    """The media of one record, as planned: what the store keeps, and the tokens of each."""

    items: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    """Image tokens of each item: of the picture, or of each frame of the video."""

    def reorder(self, order: Sequence[int]) -> None:
        self.items = [self.items[number] for number in order]
        self.tokens = [self.tokens[number] for number in order]


class MediaPlanner:
    """Plans the media of records.

    Args:
        counts: `pictures` and `frames` are added to it.
    """

    def __init__(
        self, config: InternS1TokenizeFn.Config, image_tokens: ImageTokens, counts: Counter[str]
    ) -> None:
        self._config = config
        self._image_tokens = image_tokens
        self._counts = counts

    def __call__(self, found: Sequence[FoundMedia], record: Any, source: RecordSource) -> MediaPlan:
        """The plan of what was found in one record, in that order.

        Raises:
            MediaError: a picture or video that can't be used.
        """
        plan = MediaPlan()
        num_pictures = sum(one.part.kind == "image" for one in found)
        most = max(1, self._config.max_dynamic_patch // max(1, num_pictures))
        for one in found:
            if one.part.kind == "image":
                reference = _reference(one, record, source)
                self._plan_picture(plan, one.part, reference, most, source)
            else:
                self._plan_video(plan, one.part, source)
        return plan

    def _plan_picture(
        self,
        plan: MediaPlan,
        part: MediaPart,
        reference: str | dict[str, Any],
        most: int,
        source: RecordSource,
    ) -> None:
        size = part.size
        if size is None or source.check != "lazy":
            with open_part(part, source.place) as file:
                if source.check == "decode":
                    found = decode_image(file, source.limits, part_name(part)).size
                else:
                    found = read_image_size(file, source.limits, part_name(part))
            if size is not None and size != found:
                raise MediaError(
                    "image_wh differs",
                    f"{part_name(part)} is {found[0]}x{found[1]}, but image_wh says "
                    f"{size[0]}x{size[1]}; put it right, or leave it out",
                )
            size = found
        elif isinstance(part.reference, str) and not is_data_url(part.reference):
            source.place.resolve(part.reference)  # a path that leads out fails now, not in training
        grid = (1, 1)
        if self._config.dynamic_image_size:
            grid = choose_grid(
                *size,
                tile_size=self._image_tokens.tile_size,
                min_tiles=min(self._config.min_dynamic_patch, most),
                max_tiles=most,
            )
        tiles = count_tiles(grid, use_thumbnail=self._config.use_thumbnail)
        plan.items.append({"ref": reference, "wh": list(size), "grid": list(grid)})
        plan.tokens.append([tiles * self._image_tokens.tokens_per_tile])
        self._counts["pictures"] += 1

    def _plan_video(self, plan: MediaPlan, part: MediaPart, source: RecordSource) -> None:
        if not isinstance(part.reference, str) or is_data_url(part.reference):
            raise MediaError(
                "video not a path", f"{part_name(part)}: a video is given by its path only"
            )
        num_frames = count_frames(part.reference, source.place, source.limits)
        picks = pick_frames(num_frames, self._config.max_num_frames)
        if source.check == "decode":
            for _ in read_frames(part.reference, picks, source.place, source.limits):
                pass
        plan.items.append({"ref": part.reference, "frames": picks, "num_frames": num_frames})
        plan.tokens.append([self._image_tokens.tokens_per_tile] * len(picks))
        self._counts["frames"] += len(picks)


def _reference(found: FoundMedia, record: Any, source: RecordSource) -> str | dict[str, Any]:
    """What the token store keeps of a picture: its path, or its place inside the record."""
    part = found.part
    if isinstance(part.reference, str) and not is_data_url(part.reference):
        return part.reference
    if source.at is None:
        raise MediaError(
            "image inside a record",
            f"{part_name(part)} is written inside its record, which can't be found again in a "
            "file of this format; write the picture to a file",
        )
    if found.listed_at:
        return {**source.at, "listed": list(found.listed_at)}
    for number, (written, _) in enumerate(iter_media_parts(record)):
        if written is found.written:
            return {**source.at, "part": number}
    raise MediaError(
        "image inside a record",
        f"{part_name(part)} is written inside its record, where its record format doesn't show it; "
        "write the picture to a file",
    )
