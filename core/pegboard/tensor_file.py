"""Write a safetensors file one tensor at a time.

The header is made first from names, shapes and dtypes; each tensor then goes to its own place in
the file in any order, so memory holds one tensor and not the file. Place in the file depends on
the layout only: dtypes of more bytes first (readers need aligned offsets), then by name.

Source: https://huggingface.co/docs/safetensors (header: u64 length, JSON, then the bytes).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

__all__ = ["TensorFileWriter", "TensorSpec", "num_bytes"]

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorSpec(NamedTuple):
    """What the header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def num_bytes(spec: TensorSpec) -> int:
    """Bytes of the tensor's data."""
    return math.prod(spec.shape) * spec.dtype.itemsize


class TensorFileWriter:
    """A safetensors file under construction; leave the `with` block normally and it is on disk.

    Args:
        path: file to make; must not exist.
        layout: every tensor that will be written.
        metadata: the header's `__metadata__`.

    Raises:
        OSError: the disk refused.
        ValueError: a tensor that differs from the layout, or was never written.
    """

    def __init__(
        self, path: Path, layout: Mapping[str, TensorSpec], metadata: Mapping[str, str]
    ) -> None:
        self._path = path
        self._layout = dict(layout)
        self._missing = set(layout)
        self._starts: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name in sorted(layout, key=lambda name: (-layout[name].dtype.itemsize, name)):
            spec = layout[name]
            start, end = end, end + num_bytes(spec)
            self._starts[name] = start
            header[name] = {
                "dtype": _CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._file = path.open("xb")
        try:
            self._file.write(len(text).to_bytes(8, "little") + text)
        except BaseException:
            self._abandon()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    @property
    def complete(self) -> bool:
        """Every tensor of the layout has been written."""
        return not self._missing

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a plain tensor (any device) of the shape and dtype that the layout says."""
        if name not in self._missing:
            raise ValueError(f"{self._path}: tensor {name!r} is not in the layout, or came twice")
        found = TensorSpec(tuple(tensor.shape), tensor.dtype)
        if found != self._layout[name]:
            raise ValueError(f"{self._path}: {name} is {found}, expected {self._layout[name]}")
        self._missing.remove(name)
        if tensor.numel() == 0:
            return
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        self._file.seek(self._data_start + self._starts[name])
        self._file.write(flat.numpy().data)

    def close(self) -> None:
        """Check that nothing is missing and bring the file to the disk."""
        if self._missing:
            self._abandon()
            raise ValueError(f"{self._path}: never written: {sorted(self._missing)[:5]}")
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            self._abandon()
            raise
        self._file.close()

    def _abandon(self) -> None:
        # A buffered file tries to flush once more while it closes and fails again on a full disk.
        with contextlib.suppress(OSError):
            self._file.close()
