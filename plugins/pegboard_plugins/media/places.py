"""Where a media reference may point, and the file behind it.

A record is untrusted text. A reference is a path under `media_root`, a `data:` URL or bytes, and
nothing else: no URL is fetched, no absolute path, no `..`, no link that leads out of the root is
followed, and only regular files are opened (a pipe would wait for ever). Every refusal is a
MediaError with a short reason, so that refusals can be counted.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from dataclasses import dataclass
from io import BytesIO
from typing import IO
from urllib.parse import unquote_to_bytes

from pegboard.errors import DataError

__all__ = [
    "MAX_FILE_BYTES",
    "MediaError",
    "MediaPlace",
    "decode_data_url",
    "is_data_url",
    "open_regular_file",
    "shown",
]

MAX_FILE_BYTES = 1 << 30
"""Larger files are refused; a picture is decoded in memory."""

_MAX_PATH = 4096
"""Characters of a path; no system here opens a longer one."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|(?:file|http|https|ftp|s3|gs):", re.IGNORECASE)


class MediaError(DataError):
    """A picture or video that can't be used.

    Args:
        reason: a short class of reasons that is counted, such as `"image missing"`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str]]:
        return MediaError, (self.reason, str(self))


@dataclass(frozen=True)
class MediaPlace:
    """The folder that media paths start from.

    Args:
        root: the folder; "" is the current one.
        allow_outside: follow absolute paths, `..` and links that lead out of it.
    """

    root: str
    allow_outside: bool = False

    def resolve(self, reference: str) -> str:
        """The real path that a relative path means; nothing is opened.

        Raises:
            MediaError: it is a URL, leads out of the root, or can't be a path.
        """
        if not reference or "\0" in reference:
            raise MediaError("image path invalid", f"image path {shown(reference)} is no path")
        if len(reference) > _MAX_PATH:  # resolving takes the square of the length
            raise MediaError(
                "image path invalid",
                f"image path {shown(reference)} has {len(reference)} characters, expected at most "
                f"{_MAX_PATH}; if it is the picture itself in base64, write it as a data: URL",
            )
        if _SCHEME.match(reference):
            raise MediaError(
                "image is a URL",
                f"image {shown(reference)} is a URL, and nothing is fetched; download it and give "
                "its path under media_root",
            )
        try:
            root = os.path.realpath(self.root or ".")
            path = os.path.realpath(os.path.join(root, reference))
        except (OSError, ValueError) as error:
            raise MediaError(
                "image path invalid", f"image path {shown(reference)} is no path: {error}"
            ) from None
        if self.allow_outside:
            return path
        parts = reference.split("/")
        if os.path.isabs(reference) or ".." in parts or not _is_under(path, root):
            raise MediaError(
                "image outside media_root",
                f"image {shown(reference)} leads out of media_root {shown(self.root)}; move it "
                "under it, or start with --allow-media-outside-root",
            )
        return path


def open_regular_file(path: str, reference: str, root: str) -> IO[bytes]:
    """Open a resolved path for reading; the caller closes it.

    Raises:
        MediaError: there is none, it is no regular file, is empty, too large or can't be read.
    """
    where = f"image {shown(reference)}"
    try:
        # NONBLOCK: opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        raise MediaError(
            "image missing", f"{where} not found under media_root {shown(root)}"
        ) from None
    except (OSError, ValueError) as error:
        text = getattr(error, "strerror", None) or str(error)
        raise MediaError("image unreadable", f"{where} can't be opened: {text}") from None
    status = os.fstat(descriptor)
    problem = None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        problem = MediaError("image no file", f"{where} is {kind}")
    elif status.st_size == 0:
        problem = MediaError("image empty", f"{where} is an empty file")
    elif status.st_size > MAX_FILE_BYTES:
        problem = MediaError(
            "image too large", f"{where} has {status.st_size} bytes, over {MAX_FILE_BYTES}"
        )
    if problem is not None:
        os.close(descriptor)
        raise problem
    return os.fdopen(descriptor, "rb")


def is_data_url(reference: str) -> bool:
    """Whether the reference holds its bytes itself: `data:image/png;base64,...`."""
    return reference[:5].lower() == "data:"


def decode_data_url(url: str) -> BytesIO:
    """The bytes of a `data:` URL.

    Raises:
        MediaError: no comma, not base64, empty, or too large.
    """
    head, comma, payload = url.partition(",")
    if not comma:
        raise MediaError("image data URL invalid", f"data URL {shown(url)} has no comma")
    if len(payload) > MAX_FILE_BYTES:
        raise MediaError("image too large", f"data URL of {len(payload)} characters")
    try:
        if head.lower().rstrip().endswith(";base64"):
            content = base64.b64decode("".join(payload.split()), validate=True)
        else:
            content = unquote_to_bytes(payload)
    except (binascii.Error, ValueError) as error:
        raise MediaError(
            "image data URL invalid", f"data URL {shown(url)} is not base64: {error}"
        ) from None
    if not content:
        raise MediaError("image empty", f"data URL {shown(url)} holds no bytes")
    return BytesIO(content)


def shown(reference: object) -> str:
    """A reference as a message quotes it: short, on one line."""
    text = repr(reference)
    return text if len(text) <= 120 else f"{text[:80]}...{text[-20:]}"


def _is_under(path: str, root: str) -> bool:
    return path != root and path.startswith(root if root.endswith(os.sep) else root + os.sep)
