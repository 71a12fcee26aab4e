"""What `config.json` of an export says when the run began with somebody's config.json.

Their file goes along as it is, keys included that Pegboard doesn't know; only what the run changed is
edited. A change is a difference between our config of the model and our config of the model as
published, so a key that they left out stays out while it means what it meant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from pegboard.component import ModelComponent
from pegboard.errors import ConfigError

__all__ = ["edited_config", "export_config"]


def export_config(
    component: ModelComponent, ours: Mapping[str, Any], weights: Path | None
) -> dict[str, Any]:
    """Their config.json with the run's changes; `ours` where there is none that the model reads.

    Args:
        component: the run's model.
        ours: `hf_config` of the built model.
        weights: folder of the weights the run starts from.
    """
    published = _read(weights)
    if published is None or published.get("model_type") != ours.get("model_type"):
        return dict(ours)
    try:
        with torch.device("meta"):
            unchanged = _as_published(component, published).build().hf_config
    except (ConfigError, NotImplementedError, ValidationError):
        return dict(ours)
    return edited_config(published, unchanged, ours)


def edited_config(
    published: Mapping[str, Any], unchanged: Mapping[str, Any], ours: Mapping[str, Any]
) -> dict[str, Any]:
    """`published` with the values in which `ours` differs from `unchanged`, object by object."""
    edited = dict(published)
    for key, value in ours.items():
        if key in unchanged and unchanged[key] == value:
            continue
        theirs, before = published.get(key), unchanged.get(key)
        if all(isinstance(one, Mapping) for one in (value, theirs, before)):
            edited[key] = edited_config(theirs, before, value)  # type: ignore[arg-type]
        else:
            edited[key] = value
    return edited


def _read(weights: Path | None) -> dict[str, Any] | None:
    if weights is None:
        return None
    try:
        content = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _as_published(component: ModelComponent, published: Mapping[str, Any]) -> ModelComponent:
    """The component that this config.json alone means; models inside keep their classes."""
    cls = type(component)
    fields = cls.config_from_hf(published)
    for name, value in fields.items():
        inner = getattr(component.config, name, None)
        if isinstance(inner, ModelComponent) and isinstance(value, Mapping):
            fields[name] = _as_published(inner, value)
    return cls(cls.Config.model_validate(fields))
