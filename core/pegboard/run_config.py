"""A run as one JSON file: its sections, its validation, its dump.

One pydantic pass in strict JSON mode checks every section and, through the registry, every part;
rules between parts follow. All problems come in one report, each `file:line:column: path: message`.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pegboard.bad_records import BadRecordPolicy
from pegboard.component import (
    CallbackComponent,
    CollatorComponent,
    Component,
    ComponentConfig,
    DatasetComponent,
    LossComponent,
    LRScheduleComponent,
    ModelComponent,
    OptimizerComponent,
    PackerComponent,
    Problem,
    SaverComponent,
    TokenizeFnComponent,
    TokenizerComponent,
    TrackerComponent,
    TransformComponent,
)
from pegboard.component_field import DATASET_OPTIONS, ComponentOf, rewrite_errors
from pegboard.config_repair import ABSENT, child_of, what_is_valid
from pegboard.config_rules import (
    DEFAULT_COLLATOR,
    DEFAULT_PACK_MAX_LENGTH,
    check_parallel,
    check_rules,
    check_run_folder,
    check_saver_folders,
    dataset_lists,
    fill_in,
)
from pegboard.errors import ConfigError
from pegboard.json_source import ConfigSource, JsonPath, format_path, load_layers

if TYPE_CHECKING:
    from pegboard.registry import Registry

__all__ = [
    "ActivationCheckpointing",
    "ComponentOf",
    "DataLoading",
    "DatasetEntry",
    "Evaluation",
    "LoadedConfig",
    "Parallel",
    "PluginPolicy",
    "Precision",
    "RunConfig",
    "load_run_config",
    "parts_of",
    "validate_run_config",
]


def _named(class_name: str) -> Callable[[], Any]:
    """Default factory of a field that holds a part: its JSON, as it may be one not installed."""
    return lambda: {"class_name": class_name}


def _default_savers() -> Any:
    return ({"class_name": "CheckpointSaver"}, {"class_name": "HFSaver"})


class DatasetEntry(ComponentConfig):
    """A dataset and its tokenize fn; in JSON all fields but these two stand inside `dataset`."""

    name: str = Field(
        min_length=1,
        description="Name in logs and metrics; default: stem of anno_path, else dataset_<i>.",
    )
    sample_ratio: float = Field(
        default=1.0,
        gt=0,
        description="Times each record is seen per epoch; 0.5 is every other one.",
    )
    sample_draw: Literal["rotate", "redraw", "fixed"] = Field(
        default="rotate",
        description="Which records an epoch takes where it does not take all: rotate, the next ones of "
        "one shuffled order, so that all have their turn; redraw, drawn anew; fixed, the same ones.",
    )
    token_weight: float | None = Field(
        default=None,
        gt=0,
        description="Share of the epoch's tokens, against the other datasets' token_weight; instead of "
        "sample_ratio. The epoch has as many tokens as all the datasets together.",
    )
    on_bad_record: BadRecordPolicy = Field(
        default="error",
        description="Stop at a bad record, or leave bad ones out, counted and listed: all of them "
        'with "skip", a number with {"count": 100} or {"share": 0.001}.',
    )
    record_schema: str | None = Field(
        default=None,
        min_length=1,
        description="File of a JSON Schema that every record must fit; one that does not is bad.",
    )
    dataset: Annotated[DatasetComponent, ComponentOf("dataset")] = Field(
        description="Where the records come from."
    )
    tokenize_fn: Annotated[TokenizeFnComponent, ComponentOf("tokenize_fn")] = Field(
        description="How a record becomes tokens."
    )


class DataLoading(ComponentConfig):
    """From examples to micro-batches."""

    pack_max_length: int = Field(
        default=DEFAULT_PACK_MAX_LENGTH,
        gt=0,
        lt=2**31,
        description="Tokens of a pack, which is one micro-batch.",
    )
    packer: Annotated[PackerComponent, ComponentOf("packer")] = Field(
        default_factory=_named("ExpandSoftPacker"), description="Which samples share a pack."
    )
    collator: Annotated[CollatorComponent, ComponentOf("collator")] = Field(
        default_factory=_named(DEFAULT_COLLATOR),
        description="Makes a batch of a pack; default: one that provides what the model needs.",
    )
    num_workers: int = Field(
        default=0,
        ge=0,
        description="Processes that tokenize, and, on each rank, that make batches; 0 is none: a thread "
        "makes them, which does for text.",
    )


class Precision(ComponentConfig):
    """Number formats. Master weights are float32."""

    compute_dtype: Literal["bfloat16", "float32", "float64"] | None = Field(
        default=None,
        description="Dtype of forward and backward; null: bfloat16 on CUDA, else float32.",
    )
    reduce_dtype: Literal["float32", "float64", "bfloat16"] = Field(
        default="float32", description="Dtype in which gradients are summed over ranks."
    )


class ActivationCheckpointing(ComponentConfig):
    """Which layers recompute their activations in backward."""

    mode: Literal["none", "full", "ratio"] = Field(
        default="none", description="No layer, every layer, or the share given by ratio."
    )
    ratio: float | None = Field(
        default=None, gt=0, le=1, description="Share of the layers, for mode ratio only."
    )

    @model_validator(mode="after")
    def _ratio_belongs_to_its_mode(self) -> ActivationCheckpointing:
        if (self.mode == "ratio") != (self.ratio is not None):
            wanted = "needs" if self.mode == "ratio" else "takes no"
            raise ValueError(f"mode '{self.mode}' {wanted} \"ratio\"")
        return self


class Parallel(ComponentConfig):
    """How a model is spread over ranks."""

    class_name: Literal["FSDP2"] = Field(
        default="FSDP2", description="Fully sharded data parallel."
    )
    replicate_size: int = Field(
        default=1,
        ge=1,
        description="Groups of ranks that each hold the whole model, sharded inside.",
    )
    expert_parallel_size: int = Field(
        default=1,
        ge=1,
        description="Ranks that share the experts of a mixture: each keeps 1/size of them, and "
        "tokens travel. Divides the number of experts and the ranks of a replica.",
    )
    gradient_reduction: Literal["auto", "per_step", "per_micro_batch"] = Field(
        default="auto",
        description="Sum gradients once per step or per micro-batch; auto goes by memory.",
    )


class Evaluation(ComponentConfig):
    """Loss on held-out data while training."""

    datasets: tuple[DatasetEntry, ...] = Field(min_length=1, description="Held-out datasets.")
    every_steps: int = Field(ge=1, description="Steps between evaluations; also after the last.")


class PluginPolicy(ComponentConfig):
    """Which installed plugins may run."""

    allow: tuple[str, ...] | None = Field(
        default=None,
        description="Distributions whose plugins may be imported; null: any, []: none. Built-in plugins "
        "and --plugin files always may.",
    )


class RunConfig(ComponentConfig):
    """A whole run. Paths are relative to the current folder."""

    requires: tuple[str, ...] = Field(
        default=(),
        description='Distributions that must be installed, such as "pegboard-sqlite>=1".',
    )
    plugins: PluginPolicy = Field(
        default=PluginPolicy(), description="Which installed plugins may run."
    )
    work_dir: str = Field(default="work_dirs", min_length=1, description="Folder of run folders.")
    cache_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder of tokenized data, which runs and machines may share; null: "
        "work_dir/.token_store.",
    )
    run_name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
        description="Name of the run's folder inside work_dir; null: made from the time.",
    )
    seed: int = Field(
        default=42, ge=0, lt=2**32, description="Of weights, order of samples and dropout."
    )
    load_from: str | None = Field(
        default=None, min_length=1, description="Folder or hub id of weights; null: from scratch."
    )
    tokenizer: Annotated[TokenizerComponent, ComponentOf("tokenizer")] = Field(
        description="Default HFTokenizer of load_from."
    )
    model: Annotated[ModelComponent, ComponentOf("model")] = Field(
        description="What is trained; its fields beat load_from's config.json, which beats a preset."
    )
    transforms: tuple[Annotated[TransformComponent, ComponentOf("transform")], ...] = Field(
        default=(), description="Changes to the built model, in order, before it is sharded."
    )
    datasets: tuple[DatasetEntry, ...] = Field(min_length=1, description="What it is trained on.")
    dataloader: DataLoading = Field(
        description="From examples to micro-batches; an empty object if it is left out."
    )
    loss: Annotated[LossComponent, ComponentOf("loss")] = Field(
        default_factory=_named("ChunkedCrossEntropy"), description="What is minimised."
    )
    optimizer: Annotated[OptimizerComponent, ComponentOf("optimizer")] = Field(
        default_factory=_named("AdamW"), description="How weights move."
    )
    lr_schedule: Annotated[LRScheduleComponent, ComponentOf("lr_schedule")] = Field(
        default_factory=_named("CosineSchedule"), description="Learning rate of each step."
    )
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Global norm that gradients are clipped to; null: never."
    )
    on_changed_data: Literal["error", "continue"] = Field(
        default="error",
        description="When a run is resumed with other data, packing, seed or global_batch_size: stop, "
        "or go on at the same place of the new order.",
    )
    on_changed_plugins: Literal["error", "continue"] = Field(
        default="error",
        description="When a run is resumed and a part comes from another plugin, or from other code under "
        "the same version: stop, or go on with a warning.",
    )
    global_batch_size: int = Field(
        default=1, ge=1, description="Packs per optimizer step, over all ranks."
    )
    epoch_num: int | None = Field(
        default=None, ge=1, description="Length of the run in passes over the data; or total_steps."
    )
    total_steps: int | None = Field(
        default=None, ge=1, description="Length of the run in optimizer steps; or epoch_num."
    )
    precision: Precision = Field(default=Precision(), description="Number formats.")
    activation_checkpointing: ActivationCheckpointing = Field(
        default=ActivationCheckpointing(), description="Memory for time."
    )
    parallel: Parallel = Field(
        default=Parallel(), description="How the model is spread over ranks."
    )
    savers: tuple[Annotated[SaverComponent, ComponentOf("saver")], ...] = Field(
        default_factory=_default_savers, description="What is written, and when."
    )
    trackers: tuple[Annotated[TrackerComponent, ComponentOf("tracker")], ...] = Field(
        default=(), description="Where numbers go beside the log."
    )
    callbacks: tuple[Annotated[CallbackComponent, ComponentOf("callback")], ...] = Field(
        default=(), description="Who is told what happens in the run, and may ask it to stop."
    )
    eval: Evaluation | None = Field(default=None, description="Evaluation while training.")
    log_every_steps: int = Field(default=1, ge=1, description="Steps between lines of the log.")
    max_bad_steps: int = Field(
        default=10, ge=1, description="Non-finite steps in a row after which the run stops."
    )


@dataclass(frozen=True)
class LoadedConfig:
    """A valid config."""

    run: RunConfig
    source: ConfigSource
    resolved: dict[str, Any]
    """JSON of the run with every default written out; loads to an equal run."""


def load_run_config(
    path: str | os.PathLike[str], overrides: Sequence[str], registry: Registry
) -> LoadedConfig:
    """Read, merge and validate a config; torch is not imported.

    Raises:
        ConfigError: every problem, one line each.
    """
    return validate_run_config(load_layers(path, overrides), registry)


def validate_run_config(source: ConfigSource, registry: Registry) -> LoadedConfig:
    """Validate what was read; raises as `load_run_config`."""
    data = copy.deepcopy(source.data)
    report = _Report(source)
    report.add(fill_in(data, registry))
    run, failed = _validate(data, registry, report)
    report.add(check_rules(data, registry))
    checked = run
    if checked is None:
        checked = what_is_valid(RunConfig, data, failed, {"registry": registry})
    checks: list[Callable[[], Iterable[Problem]]] = [
        partial(check_run_folder, checked),
        partial(check_parallel, checked),
        partial(check_saver_folders, checked),
    ]
    for component, path in parts_of(checked):
        if not any(one[: len(path)] == path for one in failed):
            checks.append(partial(component.check, checked, path))
    for check in checks:
        report.add(_asked(check, complete=run is not None))
    report.raise_if_any()
    assert run is not None
    return LoadedConfig(run, source, _dump(run))


class _Report:
    """Problems with their places, sorted as they stand in the file."""

    def __init__(self, source: ConfigSource) -> None:
        self.source = source
        self.lines = [f"{place}: {message}" for place, message in source.problems]

    def add(self, problems: Iterable[Problem]) -> None:
        for path, message in problems:
            self.add_at(self.source.place(path), path, message)

    def add_at(self, place: str, path: JsonPath, message: str) -> None:
        where = f"{format_path(path)}: " if path else ""
        self.lines.append(f"{place}: {where}{message}")

    def raise_if_any(self) -> None:
        if self.lines:
            lines = dict.fromkeys(sorted(self.lines, key=_file_order))
            raise ConfigError("\n".join(lines))


def _file_order(line: str) -> tuple[bool, str, int, int]:
    """Overrides last; else file, line, column."""
    if line.startswith("--set "):
        return True, line, 0, 0
    head = line.split(": ", 1)[0].rsplit(":", 2)
    if len(head) == 3 and head[1].isdigit() and head[2].isdigit():
        return False, head[0], int(head[1]), int(head[2])
    return False, line, 0, 0


def _validate(
    data: dict[str, Any], registry: Registry, report: _Report
) -> tuple[RunConfig | None, list[JsonPath]]:
    """(the run or None, paths that are wrong), with every error reported."""
    try:
        return _parse(data, registry), []
    except ValidationError as error:
        rewritten = rewrite_errors(error, RunConfig)
    failed: list[JsonPath] = []
    for path, kind, message in _by_union(rewritten, data):
        if kind == "missing_key" and path == ("tokenizer",):
            message = '"tokenizer" is missing, and there is no load_from to take it from'
        if kind == "missing_key" and path == ("model",):
            message = '"model" is missing, and there is no config.json of load_from to take it from'
        failed.append(path)
        source = report.source
        place = source.key_place(path) if kind == "unknown_key" else source.place(path)
        report.add_at(place, path, message)
    return None, failed


def _by_union(error: ValidationError, data: Any) -> list[tuple[JsonPath, str, str]]:
    """(path, kind, message) of each error; what a union's members say of one value is one line."""
    found: list[tuple[JsonPath, str, str]] = []
    for one in error.errors(include_url=False):
        path, kind, message = _json_path(one["loc"], data), one["type"], one["msg"]
        if found and found[-1][:2] == (path, kind) and ", found " in found[-1][2]:
            earlier, tail = found[-1][2].rsplit(", found ", 1)
            if message.endswith(f", found {tail}"):
                other = message.removesuffix(f", found {tail}").removeprefix("expected ")
                found[-1] = (path, kind, f"{earlier}, or {other}, found {tail}")
                continue
        found.append((path, kind, message))
    return found


def _parse(data: dict[str, Any], registry: Registry) -> RunConfig:
    return RunConfig.model_validate_json(json.dumps(data), context={"registry": registry})


def _json_path(loc: tuple[str | int, ...], data: Any) -> JsonPath:
    """Where an error stands in the JSON: pydantic adds union members, and options were lifted."""
    path: list[str | int] = []
    node = data
    for step in loc:
        if node is not ABSENT and not isinstance(node, dict | list):
            break
        path.append(step)
        node = child_of(node, step)
    for depth in (1, 2):  # datasets[i].name and eval.datasets[i].name
        if len(path) == depth + 2 and path[depth - 1] == "datasets" and path[-1] in DATASET_OPTIONS:
            path.insert(-1, "dataset")
    return tuple(path)


def _asked(check: Callable[[], Iterable[Problem]], *, complete: bool) -> list[Problem]:
    try:
        return list(check())
    except AttributeError:
        # It looked at a part that is wrong itself, which is in the report.
        if complete:
            raise
        return []


def parts_of(run: RunConfig) -> list[tuple[Component, JsonPath]]:
    """Every part of a run with its path, nested ones included."""
    return [
        pair
        for name in RunConfig.model_fields
        for pair in _parts_in(getattr(run, name, None), (name,))
    ]


def _parts_in(value: Any, path: JsonPath) -> list[tuple[Component, JsonPath]]:
    found: list[tuple[Component, JsonPath]] = []
    if isinstance(value, Component):
        found.append((value, path))
        value = value.config
    if isinstance(value, ComponentConfig):
        items: list[tuple[str | int, Any]] = [
            (n, getattr(value, n, None)) for n in type(value).model_fields
        ]
    elif isinstance(value, tuple | list):
        items = list(enumerate(value))
    elif isinstance(value, dict):
        items = list(value.items())
    else:
        return found
    return found + [pair for step, item in items for pair in _parts_in(item, (*path, step))]


def _dump(run: RunConfig) -> dict[str, Any]:
    resolved = run.model_dump(mode="json")
    for _, entries in dataset_lists(resolved):
        for _, entry in entries:
            options = {key: entry.pop(key) for key in DATASET_OPTIONS}
            entry["dataset"] = {
                "class_name": entry["dataset"].pop("class_name"),
                **options,
                **entry["dataset"],
            }
    return resolved
