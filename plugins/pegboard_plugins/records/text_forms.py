"""Read records of plain text, and records that are tokenized already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pegboard.contracts import IGNORE_INDEX, RecordContent, RecordText, RecordTokens
from pegboard.errors import DataError
from pegboard_plugins.records.chat_forms import is_object

if TYPE_CHECKING:
    from pegboard_plugins.records.formats import PlainTextFormat, PretokenizedFormat

__all__ = ["TextRecords", "TokenRecords"]

_MASK_KEYS = ("loss_mask", "completion_mask", "assistant_masks")


class TextRecords:
    """Built PlainTextFormat."""

    def __init__(self, config: PlainTextFormat.Config) -> None:
        self._keys = ("text", "content") if config.text is None else (config.text,)

    def accepts(self, record: Any) -> bool:
        return is_object(record) and any(key in record for key in self._keys)

    def read(self, record: Any) -> RecordContent:
        keys = [key for key in self._keys if is_object(record) and key in record]
        if len(keys) > 1:
            raise DataError(
                f"record: it has both {' and '.join(keys)}; name the text's key in "
                'tokenize_fn.record_format: {"class_name": "PlainTextFormat", "text": ...}'
            )
        name = keys[0] if keys else self._keys[0]
        text = record.get(name) if is_object(record) else None
        if not isinstance(text, str):
            raise DataError(f"{name}: expected a string, found {_found(record, name)}")
        return RecordText([(text, True)])


class TokenRecords:
    """Built PretokenizedFormat."""

    def __init__(self, config: PretokenizedFormat.Config) -> None:
        self._config = config
        self._mask_keys = _MASK_KEYS if config.loss_mask is None else (config.loss_mask,)

    def accepts(self, record: Any) -> bool:
        return is_object(record) and self._config.input_ids in record

    def read(self, record: Any) -> RecordContent:
        config = self._config
        ids = _integers(record, config.input_ids)
        if ids.size and int(ids.min()) < 0:
            raise DataError(f"{config.input_ids}: a negative id, {int(ids.min())}")
        masks = [key for key in self._mask_keys if record.get(key) is not None]
        if len(masks) + (record.get(config.labels) is not None) > 1:
            both = [*masks, *([config.labels] if record.get(config.labels) is not None else [])]
            raise DataError(f"record: it has {' and '.join(both)}; keep one of them")
        if masks:
            mask = _integers(record, masks[0])
            if bool(np.any((mask != 0) & (mask != 1))):
                raise DataError(f"{masks[0]}: expected 0 and 1 only")
            return RecordTokens(ids, _same_length(mask, ids, masks[0]) == 1)
        if record.get(config.labels) is not None:
            labels = _same_length(_integers(record, config.labels), ids, config.labels)
            trained = labels != IGNORE_INDEX
            if bool(np.any(labels[trained] != ids[trained])):
                place = int(np.flatnonzero(trained & (labels != ids))[0])
                raise DataError(
                    f"{config.labels}[{place}]: {int(labels[place])}, but the id there is "
                    f"{int(ids[place])}; labels are the ids themselves, unshifted, or -100"
                )
            return RecordTokens(ids, trained)
        if config.without_mask == "error":
            raise DataError(
                f"record: it has {config.input_ids} but neither {config.labels} nor "
                f"{' nor '.join(self._mask_keys)}; add one, or set without_mask to 'train_all'"
            )
        return RecordTokens(ids, np.ones(len(ids), dtype=bool))


def _integers(record: Mapping[str, Any], key: str) -> np.ndarray:
    """(T,) int32."""
    values = record.get(key)
    try:
        array = np.asarray(values)
        if array.ndim == 1 and not array.size:
            return np.empty(0, dtype=np.int32)
        if array.ndim == 1 and array.dtype.kind in "iub":
            if bool(np.any(array != array.astype(np.int32))):
                raise DataError(f"{key}: a number that no token id can be")
            return array.astype(np.int32)
    except (ValueError, OverflowError):  # ragged, or beyond 64 bits
        pass
    raise DataError(f"{key}: expected a list of integers")


def _same_length(values: np.ndarray, ids: np.ndarray, key: str) -> np.ndarray:
    if len(values) != len(ids):
        raise DataError(f"{key}: {len(values)} of them for {len(ids)} ids")
    return values


def _found(record: Any, name: str) -> str:
    if not is_object(record):
        return "a record that is no object"
    if name not in record:
        return f"no such key (keys: {', '.join(repr(key) for key in list(record)[:8])})"
    return f"a {type(record[name]).__name__}"
