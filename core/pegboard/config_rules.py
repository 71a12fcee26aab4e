"""What a config may leave out, and the rules between its parts.

Both work on plain JSON data, before and beside pydantic: defaults that hang on another section are
written in (so a dump shows them), and a rule still speaks when an unrelated part is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegboard.component import (
    CollatorComponent,
    Component,
    ModelComponent,
    PackerComponent,
    Problem,
)
from pegboard.component_field import (
    DATASET_OPTIONS,
    ComponentOf,
    merge_fields,
    model_fields_of,
    shown,
)
from pegboard.errors import ConfigError
from pegboard.plugin_policy import check_requires
from pegboard.plugin_sources import BUILT_INS
from pegboard.schema_config import default_values

if TYPE_CHECKING:
    from pegboard.registry import Registry
    from pegboard.run_config import RunConfig

__all__ = [
    "check_run_folder",
    "check_parallel",
    "check_rules",
    "check_saver_folders",
    "dataset_lists",
    "fill_in",
]

DEFAULT_COLLATOR = "SFTLLMCollator"
DEFAULT_PACK_MAX_LENGTH = 4096

_IN_RUN_FOLDER = frozenset(
    "checkpoints logs config.json environment.json metrics.jsonl plugins.json".split()
)
"""What stands in every run's folder: an export of that name would take its place."""


def fill_in(data: dict[str, Any], registry: Registry) -> list[Problem]:
    """Write into `data` what follows from other sections; returns what stood in the way.

    The model's fields come from its preset, then `config.json` of `load_from`, then the JSON; the
    last wins. A dataset's name, sample ratio and policy move up to its entry.
    """
    problems = list(_fill_model(data, registry))
    if data.get("tokenizer") is None and isinstance(data.get("load_from"), str):
        data["tokenizer"] = {"class_name": "HFTokenizer", "path": data["load_from"]}
    problems += _fill_collator(data, registry)
    for path, entries in dataset_lists(data):
        problems += _lift_dataset_options(path, entries)
    return problems


def check_rules(data: Mapping[str, Any], registry: Registry) -> Iterator[Problem]:
    """Problems between sections, as far as a rule's own inputs can be read; `data` is filled in."""
    yield from check_requires(data, registry)
    yield from _check_length(data)
    yield from _check_load_from(data)
    yield from _check_collator(data, registry)
    yield from _check_max_lengths(data, registry)
    for path, entries in dataset_lists(data):
        yield from _check_names(path, entries)
        yield from _check_token_weights(path, entries)


def check_parallel(run: RunConfig) -> Iterator[Problem]:
    """Problems between `parallel` and the model; how many ranks there are isn't known yet."""
    size, num_experts = run.parallel.expert_parallel_size, run.model.num_experts()
    path = ("parallel", "expert_parallel_size")
    if size > 1 and num_experts == 0:
        yield Problem(path, f"{size}, but {type(run.model).__name__} has no experts; set it to 1")
    elif num_experts % size:
        yield Problem(
            path, f"{size} does not divide the {num_experts} experts of {type(run.model).__name__}"
        )


def check_saver_folders(run: RunConfig) -> Iterator[Problem]:
    """Savers that would write over each other or over the run: an export replaces what it finds."""
    taken = {name: "the run writes there itself" for name in _IN_RUN_FOLDER}
    for index, saver in enumerate(run.savers):
        name = getattr(saver.config, "folder_name", None)
        if not isinstance(name, str):
            continue
        if name in taken:
            yield Problem(
                ("savers", index, "folder_name"),
                f"{name!r} would be replaced, {taken[name]}; name another folder",
            )
        taken.setdefault(name, f"savers[{index}] writes there")


def check_run_folder(run: RunConfig) -> Iterator[Problem]:
    """Weights that lie in the folder of this very run, which is moved aside before they are read."""
    if run.load_from is None or run.run_name is None:
        return
    run_dir = (Path(run.work_dir) / run.run_name).resolve()
    if Path(run.load_from).resolve().is_relative_to(run_dir):
        yield Problem(
            ("load_from",),
            f"{run.load_from!r} lies in this run's own folder, which is moved aside when the run starts; "
            "give the run another run_name",
        )


def dataset_lists(
    data: Mapping[str, Any],
) -> list[tuple[tuple[str | int, ...], list[tuple[int, dict[str, Any]]]]]:
    """(path, numbered entries) of training and evaluation datasets; what is no object is out."""
    evaluation = data.get("eval")
    places: list[tuple[tuple[str | int, ...], Any]] = [(("datasets",), data.get("datasets"))]
    if isinstance(evaluation, dict):
        places.append((("eval", "datasets"), evaluation.get("datasets")))
    return [
        (path, [(i, entry) for i, entry in enumerate(entries) if isinstance(entry, dict)])
        for path, entries in places
        if isinstance(entries, list)
    ]


def _fill_model(data: dict[str, Any], registry: Registry) -> Iterator[Problem]:
    model = data.get("model", {})
    if not isinstance(model, dict):
        return
    published = _published_config(data.get("load_from"))
    if isinstance(published, str):
        yield Problem(("load_from",), published)
        return
    try:
        cls = _model_class(model, registry)
        if cls is None and published and "class_name" not in model and "preset" not in model:
            cls = registry.for_hf_model_type(str(published.get("model_type")))
    except ConfigError:
        return  # pydantic's pass says it, with the place
    if published is None or (cls is None and "class_name" in model):
        return
    if cls is None:
        if "preset" not in model:
            model_type = published.get("model_type")
            elsewhere = registry.offered_elsewhere("model_type", str(model_type))
            yield Problem(
                ("model",),
                f"no installed model reads model_type {shown(model_type)} of "
                f'{data["load_from"]}/config.json; name one with "class_name"{elsewhere}',
            )
        return
    yield from _merge_published(data, model, cls, published, registry)


def _merge_published(
    data: dict[str, Any],
    model: dict[str, Any],
    cls: type[ModelComponent],
    published: dict[str, Any],
    registry: Registry,
) -> Iterator[Problem]:
    where = f"{data['load_from']}/config.json"
    found = published.get("model_type")
    if cls.hf_model_types and found not in cls.hf_model_types:
        yield Problem(
            ("model", "class_name"),
            f"{where} is of model_type {shown(found)}, but {cls.__name__} reads "
            f"{' or '.join(map(repr, cls.hf_model_types))}",
        )
        return
    try:
        fields = _with_models_read(cls, cls.config_from_hf(published), model, registry)
    except NotImplementedError:
        return
    except ConfigError as error:
        yield Problem(("load_from",), f"{where}: {error}")
        return
    yield from _weight_conflicts(cls, model, fields, ("model",), where, registry)
    data["model"] = merge_fields({"class_name": cls.__name__, **fields}, model)


def _with_models_read(
    cls: type[ModelComponent],
    fields: Mapping[str, Any],
    model: Mapping[str, Any],
    registry: Registry,
) -> dict[str, Any]:
    """`fields` of `cls` with the models inside, left as they were published, as JSON fields of their classes:
    of the class that `model`, the run's JSON, names there, else of the one that reads that `model_type`.

    Raises:
        ConfigError: no installed model reads one of them, or it has a key that can't be honoured.
    """
    read = dict(fields)
    for name, inner in fields.items():
        if not isinstance(inner, Mapping) or "class_name" in inner or "model_type" not in inner:
            continue
        field = cls.Config.model_fields.get(name)
        if field is None or not any(isinstance(mark, ComponentOf) for mark in field.metadata):
            continue  # a value like any other
        changes = model.get(name)
        changes = changes if isinstance(changes, Mapping) else {}
        inner_cls = _class_of("model", changes, registry) or registry.for_hf_model_type(
            str(inner["model_type"])
        )
        if inner_cls is None or not issubclass(inner_cls, ModelComponent):
            raise ConfigError(
                f"{name}: no installed model reads model_type {shown(inner['model_type'])}; name "
                'one that can, such as {"class_name": "AutoModelForCausalLM"}'
                + registry.offered_elsewhere("model_type", str(inner["model_type"]))
            )
        if inner_cls.hf_model_types and inner["model_type"] not in inner_cls.hf_model_types:
            raise ConfigError(
                f"{name}: model_type {shown(inner['model_type'])} is not read by "
                f"{inner_cls.__name__}, which reads {' or '.join(map(repr, inner_cls.hf_model_types))}"
            )
        own = _with_models_read(inner_cls, inner_cls.config_from_hf(inner), changes, registry)
        read[name] = {"class_name": inner_cls.__name__, **own}
    return read


def _weight_conflicts(
    cls: type[ModelComponent],
    model: Mapping[str, Any],
    fields: Mapping[str, Any],
    path: tuple[str | int, ...],
    where: str,
    registry: Registry,
) -> Iterator[Problem]:
    """Fields of `model` that the weights described by `fields` can't be loaded into."""
    for name in sorted(cls.weight_fields):
        steps = name.split(".")
        ours, theirs = _value_at(model, steps), _value_at(fields, steps)
        if ours is _ABSENT or theirs is _ABSENT or ours == theirs:
            continue
        if name == "vocab_size" and model.get("resize_embeddings") is True:
            continue
        yield Problem(
            (*path, *steps),
            f"{shown(ours)} does not fit the weights: {where} has {shown(theirs)}",
        )
    for name, inner in fields.items():
        changes = model.get(name)
        if not (isinstance(inner, Mapping) and isinstance(changes, Mapping)):
            continue
        if "class_name" not in inner:
            continue
        picked = changes.get("class_name", inner["class_name"])
        if picked != inner["class_name"]:
            yield Problem(
                (*path, name, "class_name"),
                f"{shown(picked)} does not fit the weights: {where} is read by {inner['class_name']}",
            )
            continue
        inner_cls = _class_of("model", inner, registry)
        if inner_cls is not None and issubclass(inner_cls, ModelComponent):
            yield from _weight_conflicts(inner_cls, changes, inner, (*path, name), where, registry)


_ABSENT: Any = object()


def _value_at(fields: Any, steps: list[str]) -> Any:
    for step in steps:
        if not isinstance(fields, Mapping) or step not in fields:
            return _ABSENT
        fields = fields[step]
    return fields


def _model_class(model: Mapping[str, Any], registry: Registry) -> type[ModelComponent] | None:
    """The class a model section means by itself; None if it names none. Raises ConfigError."""
    named = model_fields_of(model, registry)
    cls = _class_of("model", named, registry)
    return cls if cls is not None and issubclass(cls, ModelComponent) else None


def _class_of(kind: str, fields: Any, registry: Registry) -> type[Component] | None:
    if not isinstance(fields, Mapping) or not isinstance(fields.get("class_name"), str):
        return None
    plugin = fields.get("plugin")
    try:
        return registry.find(
            kind, fields["class_name"], plugin if isinstance(plugin, str) else None
        )
    except ConfigError:
        return None


def _published_config(load_from: Any) -> dict[str, Any] | str | None:
    """config.json of a local folder; None if there is none, a message if it can't be read."""
    if not isinstance(load_from, str) or not (Path(load_from) / "config.json").is_file():
        return None
    path = Path(load_from) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"can't read {path}: {error}"
    return content if isinstance(content, dict) else f"{path}: expected an object"


def _fill_collator(data: dict[str, Any], registry: Registry) -> Iterator[Problem]:
    """A collator that provides all the model requires, by `_default_collators`.

    Which one does not hang on what is merely installed: of several it is for the config to name one.
    """
    loader = data.setdefault("dataloader", {})
    if not isinstance(loader, dict) or loader.get("collator") is not None:
        return
    loader.pop("collator", None)
    try:
        cls = _model_class(data["model"], registry) if isinstance(data.get("model"), dict) else None
    except ConfigError:
        return
    requires = cls.requires if cls else frozenset()
    collators = [c for c in registry.classes("collator") if issubclass(c, CollatorComponent)]
    fitting = _default_collators([c for c in collators if c.provides >= requires])
    if not fitting:
        if cls and collators:
            yield Problem(
                ("dataloader", "collator"),
                f"no installed collator provides what {cls.__name__} requires: "
                f"{', '.join(sorted(requires))}",
            )
        return
    if len(fitting) > 1:
        yield Problem(
            ("dataloader", "collator"),
            f"{', '.join(fitting)} provide what the model requires; name one of them",
        )
        return
    loader["collator"] = {"class_name": fitting[0]}


def _default_collators(fitting: Sequence[type[CollatorComponent]]) -> list[str]:
    """SFTLLMCollator if it is there, else the built-in ones, else all; sorted names."""
    names = {c.__name__ for c in fitting}
    if DEFAULT_COLLATOR in names:
        return [DEFAULT_COLLATOR]
    built_in = {c.__name__ for c in fitting if c.__module__.startswith(f"{BUILT_INS}.")}
    return sorted(built_in or names)


def _lift_dataset_options(
    path: tuple[str | int, ...], entries: list[tuple[int, dict[str, Any]]]
) -> Iterator[Problem]:
    for index, entry in entries:
        for key in DATASET_OPTIONS:
            if key in entry:
                del entry[key]
                yield Problem(
                    (*path, index, key), f"unknown key '{key}'; write it inside \"dataset\""
                )
        dataset = entry.get("dataset")
        if not isinstance(dataset, dict):
            continue
        for key in DATASET_OPTIONS:
            if key in dataset:
                entry[key] = dataset.pop(key)
        if "name" not in entry:
            anno_path = dataset.get("anno_path")
            stem = Path(anno_path).name.split(".")[0] if isinstance(anno_path, str) else ""
            entry["name"] = stem or f"dataset_{index}"


def _check_length(data: Mapping[str, Any]) -> Iterator[Problem]:
    given = [key for key in ("epoch_num", "total_steps") if data.get(key) is not None]
    if not given:
        yield Problem((), 'the length of the run is missing; write "epoch_num" or "total_steps"')
    if len(given) == 2:
        yield Problem(("total_steps",), "epoch_num and total_steps are both set; keep one of them")


def _check_load_from(data: Mapping[str, Any]) -> Iterator[Problem]:
    load_from = data.get("load_from")
    if not isinstance(load_from, str) or Path(load_from).is_dir():
        return
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", load_from) or load_from.startswith("."):
        yield Problem(("load_from",), f"no folder {shown(load_from)} (relative to {Path.cwd()})")
    elif "/" in load_from and Path(load_from).parent.is_dir():
        yield Problem(
            ("load_from",),
            f"no folder {shown(load_from)}, though {shown(str(Path(load_from).parent))} is one; "
            "a hub id can't begin like a folder here",
        )


def _check_collator(data: Mapping[str, Any], registry: Registry) -> Iterator[Problem]:
    loader = data.get("dataloader")
    collator = (
        _class_of("collator", loader.get("collator"), registry)
        if isinstance(loader, dict)
        else None
    )
    try:
        model = (
            _model_class(data["model"], registry) if isinstance(data.get("model"), dict) else None
        )
    except ConfigError:
        return
    if model is None or collator is None or not issubclass(collator, CollatorComponent):
        return
    if lacking := model.requires - collator.provides:
        fitting = [
            c.__name__
            for c in registry.classes("collator")
            if issubclass(c, CollatorComponent) and c.provides >= model.requires
        ]
        hint = f"; use {' or '.join(fitting)}" if fitting else ""
        yield Problem(
            ("dataloader", "collator", "class_name"),
            f"{collator.__name__} does not provide {', '.join(sorted(lacking))}, "
            f"which {model.__name__} requires{hint}",
        )


def _check_max_lengths(data: Mapping[str, Any], registry: Registry) -> Iterator[Problem]:
    loader = data.get("dataloader")
    longest = (
        loader.get("pack_max_length", DEFAULT_PACK_MAX_LENGTH) if isinstance(loader, dict) else None
    )
    if type(longest) is not int:
        return
    assert isinstance(loader, dict)
    packer = _class_of("packer", loader.get("packer"), registry)
    if packer is not None and issubclass(packer, PackerComponent) and packer.cuts_samples:
        return
    for path, entries in dataset_lists(data):
        for index, entry in entries:
            tokenize_fn = entry.get("tokenize_fn")
            cls = _class_of("tokenize_fn", tokenize_fn, registry)
            defaults = default_values(cls.Config) if cls is not None else {}
            if "max_length" not in defaults:
                continue
            assert isinstance(tokenize_fn, dict)
            max_length = tokenize_fn.get("max_length", defaults["max_length"])
            if type(max_length) is int and max_length > longest:
                yield Problem(
                    (*path, index, "tokenize_fn", "max_length"),
                    f"{max_length} is more than dataloader.pack_max_length {longest}; "
                    "an example could be too long for a pack",
                )


def _check_names(
    path: tuple[str | int, ...], entries: list[tuple[int, dict[str, Any]]]
) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, entry in entries:
        name = entry.get("name")
        if not isinstance(name, str):
            continue
        if name in first:
            yield Problem(
                (*path, index, "dataset", "name"),
                f"two datasets are called {name!r} (the other is [{first[name]}]); "
                'give this one its own "name"',
            )
        first.setdefault(name, index)


def _check_token_weights(
    path: tuple[str | int, ...], entries: list[tuple[int, dict[str, Any]]]
) -> Iterator[Problem]:
    weighted = [index for index, entry in entries if entry.get("token_weight") is not None]
    for index, entry in entries:
        if weighted and index not in weighted:
            yield Problem(
                (*path, index, "dataset", "token_weight"),
                f"is missing, and [{weighted[0]}] has one; give it to all datasets or to none",
            )
        if index in weighted and entry.get("sample_ratio", 1) != 1:
            yield Problem(
                (*path, index, "dataset", "sample_ratio"),
                "sample_ratio and token_weight are both set; keep one of them",
            )
