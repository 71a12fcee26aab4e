"""Write safetensors files by many processes at once, each its own byte ranges.

The header is made first from names, shapes and dtypes; so everybody knows where every element goes, and any
part of a tensor can be written by anybody in any order. Place in the file depends on the layout only: dtypes
of more bytes first (readers need aligned offsets), then by name.

Source: https://huggingface.co/docs/safetensors (header: u64 length, JSON, then the bytes).
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

__all__ = ["TensorFile", "TensorFileLayout", "TensorSpec", "num_bytes"]

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


class TensorFileLayout:
    """Where everything stands in a file.

    Args:
        specs: every tensor of the file.
        metadata: the header's `__metadata__`.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self.specs = dict(specs)
        starts: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name in sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name)):
            spec = specs[name]
            starts[name], end = end, end + num_bytes(spec)
            header[name] = {
                "dtype": _CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [starts[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        """Bytes before the data."""
        self.starts = {name: len(self.header) + start for name, start in starts.items()}
        """First byte of each tensor, from the start of the file."""
        self.num_bytes = len(self.header) + end
        """Size of the file."""


class TensorFile:
    """A file of a known layout, open for writing; leave the `with` block and it is on the disk.

    Raises:
        OSError: the disk refused.
    """

    def __init__(self, path: Path, layout: TensorFileLayout) -> None:
        self._path, self._layout = path, layout
        self._handle = os.open(path, os.O_WRONLY)

    @classmethod
    def create(cls, path: Path, layout: TensorFileLayout) -> Self:
        """Make the file (which must not exist), with its header and room for all; one process does."""
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        file = cls(path, layout)
        try:
            file._write_at(memoryview(layout.header), 0)
            os.ftruncate(file._handle, layout.num_bytes)
        except BaseException:
            os.close(file._handle)
            raise
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                os.fsync(self._handle)
        finally:
            os.close(self._handle)

    def write(self, name: str, part: Tensor, where: Sequence[slice] | None = None) -> int:
        """Write (part of) a tensor and say how many elements that were.

        Args:
            part: plain, on any device, of the tensor's dtype.
            where: the box of the whole tensor that `part` is; None: `part` is the whole.

        Raises:
            ValueError: a tensor that is not in the layout, or of another dtype or shape.
        """
        spec = self._layout.specs.get(name)
        if where is None:
            where = tuple(slice(0, size) for size in spec.shape) if spec else ()
        extents = tuple(box.stop - box.start for box in where)
        if spec is None or (tuple(part.shape), part.dtype) != (extents, spec.dtype):
            raise ValueError(
                f"{self._path}: {name} {tuple(part.shape)} {part.dtype} does not fit {spec} at {where}"
            )
        if part.numel():
            flat = part.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
            run_bytes, offsets = _runs(spec, where)
            for index, offset in enumerate(offsets):
                run = flat[index * run_bytes : (index + 1) * run_bytes]
                self._write_at(run, self._layout.starts[name] + offset)
        return part.numel()

    def _write_at(self, data: memoryview, offset: int) -> None:
        # NOTE: a write takes at most 2 GB at once and may take less.
        while data:
            written = os.pwrite(self._handle, data, offset)
            data, offset = data[written:], offset + written


def _runs(spec: TensorSpec, where: Sequence[slice]) -> tuple[int, Iterator[int]]:
    """(bytes of a run, where each begins) of a box: stretches without a gap, in the box's order."""
    shape = spec.shape
    last = len(shape)  # dims from here on are whole
    while last > 0 and (where[last - 1].start, where[last - 1].stop) == (0, shape[last - 1]):
        last -= 1
    # The last dim that is cut still makes one run: its rows follow each other.
    outer = max(0, last - 1)
    strides = [math.prod(shape[dim + 1 :]) * spec.dtype.itemsize for dim in range(len(shape))]
    run_bytes = spec.dtype.itemsize * math.prod(box.stop - box.start for box in where[outer:])
    first = sum(box.start * stride for box, stride in zip(where, strides, strict=True))
    steps = itertools.product(*(range(box.stop - box.start) for box in where[:outer]))
    offsets = (
        first + sum(i * stride for i, stride in zip(index, strides, strict=False))
        for index in steps
    )
    return run_bytes, offsets
