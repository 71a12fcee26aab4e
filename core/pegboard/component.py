"""What a class must offer before a JSON file can name it.

A component is light: its name, its docstring, its `Config`, and a `build` that imports what is heavy. Its
config is flat in JSON, `{"class_name": "AdamW", "lr": 1e-6}`; a field may hold another component.
`COMPONENT_KINDS` is the one table of kinds: JSON section, hook and base class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from torch import nn

    from pegboard.callbacks import Callback
    from pegboard.contracts import (
        BuiltModel,
        Collator,
        Dataset,
        ImageTokens,
        Loss,
        LRSchedule,
        Packer,
        RecordFormat,
        TokenizeFn,
        Tokenizer,
    )
    from pegboard.run_config import RunConfig
    from pegboard.savers import Saver
    from pegboard.tracking import Tracker

__all__ = [
    "COMPONENT_KINDS",
    "TAKEN_OUT",
    "CallbackComponent",
    "CollatorComponent",
    "Component",
    "ComponentConfig",
    "DatasetComponent",
    "LRScheduleComponent",
    "LossComponent",
    "ModelComponent",
    "OptimizerComponent",
    "PackerComponent",
    "ParameterGroup",
    "Problem",
    "RecordFormatComponent",
    "SaverComponent",
    "TokenizeFnComponent",
    "TokenizerComponent",
    "TrackerComponent",
    "TransformComponent",
]


class ComponentConfig(BaseModel):
    """Base of every component's `Config`: strict, frozen, no unknown keys.

    >>> from pydantic import Field
    >>> from pegboard import ComponentConfig
    >>> class Config(ComponentConfig):
    ...     count: int = Field(ge=1, description="Number of records.")
    >>> Config.model_validate_json('{"count": 3}').count
    3
    """

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


class Problem(NamedTuple):
    """Something wrong with a config, found by a part's `check`.

    >>> from pegboard import Problem
    >>> Problem(("datasets", 1, "dataset", "path"), "no file 'a.db'").message
    "no file 'a.db'"
    """

    path: tuple[str | int, ...]
    """Where in the run config, such as `("datasets", 1, "tokenize_fn", "max_length")`."""
    message: str


class Component:
    """Base of everything that a JSON file can name.

    A subclass has a docstring, a nested `Config(ComponentConfig)`, the line `config: Config`, and the
    `build` of its kind. `__init__` reads no file and imports nothing heavy. Instead of `Config` it may have a
    `config_schema`.

    >>> from pegboard import Component, ComponentConfig
    >>> class Named(Component):
    ...     "Anything with a name."
    ...     class Config(ComponentConfig):
    ...         name: str
    >>> Named(Named.Config(name="lamp")).config.name
    'lamp'
    """

    kind: ClassVar[str] = ""
    known_as: ClassVar[tuple[str, ...]] = ()
    """Other projects' spellings; used in messages only."""

    class Config(ComponentConfig):
        """No fields."""

    config_schema: ClassVar[Any] = None
    """A JSON Schema (a dict) of the part's own keys; makes `Config`, and `config["key"]` is a key's value."""

    config: Any
    plugin: str | None = None
    """The plugin that the JSON picked beside `class_name`, if it did; set by the core."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "config_schema" in vars(cls) and "Config" not in vars(cls):
            from pegboard.schema_config import of_schema

            cls.Config = of_schema(cls, cls.config_schema)  # type: ignore[assignment, misc]

    def __init__(self, config: Any) -> None:
        self.config = config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        """Problems that show only beside other parts or on disk; called for valid configs, before torch is
        imported. `path` is this component's own place in the run config."""
        del run, path
        return ()


class TokenizerComponent(Component):
    """Makes a tokenizer.

    >>> from pegboard.plugin_manager import load_plugins
    >>> Bytes = load_plugins(third_party=False).registry.find("tokenizer", "ByteTokenizer")
    >>> Bytes(Bytes.Config()).build().encode("hi")
    [104, 105]
    """

    kind = "tokenizer"

    def build(self, *, trust_remote_code: bool = False) -> Tokenizer:
        raise NotImplementedError


class ModelComponent(Component):
    """Makes a model on meta.

    >>> from pegboard import ModelComponent
    >>> from pegboard.plugin_manager import load_plugins
    >>> Qwen3 = load_plugins(third_party=False).registry.find("model", "Qwen3")
    >>> issubclass(Qwen3, ModelComponent), Qwen3.hf_model_types
    (True, ('qwen3',))
    """

    kind = "model"
    hf_model_types: ClassVar[tuple[str, ...]] = ()
    """`model_type` values of a published config.json that mean this class."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Preset name -> fields; JSON fields win over the preset's."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """What a collator must provide beside text, such as `pixel_values`."""
    weight_fields: ClassVar[frozenset[str]] = frozenset()
    """Config fields that shape weights: they must agree with `load_from`; a dot leads into a nested config."""

    def build(self) -> BuiltModel:
        """Build on the current device (the core enters meta); reads no file, draws no random number."""
        raise NotImplementedError

    def num_experts(self) -> int:
        """Experts of a sparse layer, which `parallel.expert_parallel_size` must divide; 0 without any."""
        return 0

    def sample_costs(self, lengths: np.ndarray, num_tiles: np.ndarray) -> np.ndarray:
        """Time that training on each sample takes, in tokens of a short sample: packs are dealt to ranks by it.

        Attention costs `length / (12 hidden_size)` of all else, as a layer has about 12 hidden_size^2 weights.
        A vision model adds what its tiles cost.

        Args:
            lengths: (num_samples,) float64 tokens of each sample.
            num_tiles: (num_samples,) float64 vision tiles of each.

        Source: Kaplan et al., Scaling Laws for Neural Language Models, 2020, table 1.
        """
        del num_tiles
        hidden_size = getattr(self.config, "hidden_size", 2048)
        costs: np.ndarray = lengths + lengths * lengths / (12 * hidden_size)
        return costs

    @classmethod
    def config_from_hf(cls, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON fields of an equal component; ConfigError names a key it can't honour.

        A field that holds another model may be left as it was published (an object with `model_type`): the core
        finds the class that reads it.
        """
        raise NotImplementedError

    def image_tokens(self) -> ImageTokens | None:
        """How pictures become rows of the input; None for a text model. Light: tokenize functions ask."""
        return None


class DatasetComponent(Component):
    """Makes a dataset of records. `name` and `sample_ratio` are taken out by the core before its config is read.

    >>> from pegboard import ComponentConfig, DatasetComponent, SampleKey
    >>> class Squares(DatasetComponent):
    ...     "Questions about squares."
    ...     class Config(ComponentConfig):
    ...         count: int
    ...     def build(self, name):
    ...         return SquareRecords(name, self.config.count)
    >>> class SquareRecords:
    ...     def __init__(self, name, count):
    ...         self.name, self.count = name, count
    ...     def __len__(self):
    ...         return self.count
    ...     def __getitem__(self, index):
    ...         return {"prompt": f"{index} * {index} = ", "completion": str(index**2)}
    ...     def key(self, index):
    ...         return SampleKey(self.name, "squares", index + 1)
    ...     def fingerprint(self):
    ...         return f"squares {self.count}"
    >>> Squares(Squares.Config(count=9)).build("squares")[3]
    {'prompt': '3 * 3 = ', 'completion': '9'}
    """

    kind = "dataset"
    media_outside_root: bool = False
    """Whoever starts the run lets paths of media lead out of their folder; set by the command line, never by JSON."""

    def build(self, name: str) -> Dataset:
        raise NotImplementedError


class TokenizeFnComponent(Component):
    """Makes a tokenize function; `config.max_length` is the longest example it gives, in tokens.

    >>> from pegboard.plugin_manager import load_plugins
    >>> registry = load_plugins(third_party=False).registry
    >>> Bytes = registry.find("tokenizer", "ByteTokenizer")
    >>> Chat = registry.find("tokenize_fn", "ChatTokenizeFn")
    >>> tokenize = Chat(Chat.Config(max_length=64)).build(Bytes(Bytes.Config()).build(), model=None)
    >>> (example,) = tokenize({"prompt": "2+2=", "completion": "4"})
    >>> bytes(int(k) for k in example.input_ids[example.loss_mask] if k < 256)
    b'4'
    """

    kind = "tokenize_fn"

    def build(self, tokenizer: Tokenizer, model: ModelComponent) -> TokenizeFn:
        raise NotImplementedError


class RecordFormatComponent(Component):
    """Makes an adapter from one form of record to what tokenize functions read.

    >>> from pegboard import RecordFormatComponent, RecordText
    >>> class HaikuFormat(RecordFormatComponent):
    ...     "Records with a `haiku` of three lines."
    ...     def build(self):
    ...         return Haiku()
    >>> class Haiku:
    ...     def accepts(self, record):
    ...         return "haiku" in record
    ...     def read(self, record):
    ...         return RecordText([("\\n".join(record["haiku"]), True)])
    >>> haiku = HaikuFormat(HaikuFormat.Config()).build()
    >>> haiku.accepts({"messages": []}), haiku.accepts({"haiku": ["a", "b", "c"]})
    (False, True)
    """

    kind = "record_format"

    def build(self) -> RecordFormat:
        raise NotImplementedError


class PackerComponent(Component):
    """Makes a packer.

    >>> import numpy as np
    >>> from pegboard import PackerComponent, PackPlan
    >>> class Alone(PackerComponent):
    ...     "Every sample in a pack of its own."
    ...     def build(self):
    ...         return AlonePacks()
    >>> class AlonePacks:
    ...     def plan(self, lengths, pack_max_length, seed):
    ...         order = np.random.default_rng(seed).permutation(len(lengths))
    ...         return PackPlan(np.arange(len(lengths) + 1), order)
    >>> Alone(Alone.Config()).build().plan(np.array([3, 5]), 8, seed=0).offsets.tolist()
    [0, 1, 2]
    """

    kind = "packer"
    cuts_samples: ClassVar[bool] = False
    """Takes samples longer than a pack, and cuts them; the built packer has it too."""

    def build(self) -> Packer:
        raise NotImplementedError


class CollatorComponent(Component):
    """Makes a collator.

    >>> import numpy as np
    >>> from pegboard import Example
    >>> from pegboard.plugin_manager import load_plugins
    >>> Collator = load_plugins(third_party=False).registry.find("collator", "SFTLLMCollator")
    >>> collate = Collator(Collator.Config()).build(pad_token_id=0)
    >>> ids, mask = np.array([7, 8], dtype=np.int32), np.array([False, True])
    >>> batch = collate([Example(input_ids=ids, loss_mask=mask)] * 2)
    >>> batch.cu_seqlens.tolist(), batch.targets.labels_K.tolist()
    ([0, 2, 4], [8, 8])
    """

    kind = "collator"
    provides: ClassVar[frozenset[str]] = frozenset()

    def build(self, *, pad_token_id: int) -> Collator:
        raise NotImplementedError


class LossComponent(Component):
    """Makes a loss.

    >>> import torch
    >>> from pegboard import Head, LossComponent, LossOutput, Targets
    >>> class Plain(LossComponent):
    ...     "Cross entropy from all logits at once."
    ...     def build(self):
    ...         return PlainLoss()
    >>> class PlainLoss:
    ...     def __call__(self, hidden_TD, head, targets):
    ...         logits_KV = head.logits(hidden_TD[targets.positions_K])
    ...         losses_K = torch.nn.functional.cross_entropy(
    ...             logits_KV, targets.labels_K, reduction="none"
    ...         )
    ...         return LossOutput((losses_K * targets.weights_K).sum() * targets.scale, losses_K.detach())
    ...     def step_counts(self, batch):
    ...         return {"targets": float(batch.targets.weights_K.sum())}
    >>> one = torch.tensor([0])
    >>> out = torch.nn.Linear(2, 4)
    >>> loss = Plain(Plain.Config()).build()
    >>> loss(torch.ones(1, 2), Head(out.weight, out.bias, out), Targets(one, one, one, one, 1.0)).loss.shape
    torch.Size([])
    """

    kind = "loss"

    def build(self) -> Loss:
        raise NotImplementedError


class ParameterGroup(NamedTuple):
    """Trainable parameters that one mesh holds; the core never mixes meshes in a group.

    >>> import torch
    >>> from pegboard import ParameterGroup
    >>> linear = torch.nn.Linear(2, 3)
    >>> group = ParameterGroup(list(linear.named_parameters()), is_vector=[False, True])
    >>> [name for (name, _), vector in zip(*group) if vector]
    ['bias']
    """

    named_parameters: Sequence[tuple[str, nn.Parameter]]
    is_vector: Sequence[bool]
    """True for norms and biases (whole tensor of at most one dim)."""


class OptimizerComponent(Component):
    """Makes an optimizer; `config.lr` is the base learning rate that the schedule scales.

    >>> import torch
    >>> from pegboard import ComponentConfig, OptimizerComponent, ParameterGroup
    >>> class Descent(OptimizerComponent):
    ...     "Gradient descent."
    ...     class Config(ComponentConfig):
    ...         lr: float
    ...     def build(self, groups):
    ...         parameters = [p for group in groups for _, p in group.named_parameters]
    ...         return torch.optim.SGD(parameters, lr=self.config.lr)
    >>> linear = torch.nn.Linear(2, 3)
    >>> group = ParameterGroup(list(linear.named_parameters()), is_vector=[False, True])
    >>> Descent(Descent.Config(lr=0.1)).build([group]).param_groups[0]["lr"]
    0.1
    """

    kind = "optimizer"

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        raise NotImplementedError


class LRScheduleComponent(Component):
    """Makes a learning-rate schedule.

    >>> from pegboard import LRScheduleComponent
    >>> class ToZero(LRScheduleComponent):
    ...     "A straight line to zero."
    ...     def build(self, total_steps):
    ...         return lambda step, lr: lr * (1 - step / total_steps)
    >>> ToZero(ToZero.Config()).build(total_steps=10)(5, 0.5)
    0.25
    """

    kind = "lr_schedule"

    def build(self, total_steps: int) -> LRSchedule:
        raise NotImplementedError


class SaverComponent(Component):
    """Makes a saver.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from types import SimpleNamespace
    >>> from pegboard import SaverComponent
    >>> class StepSaver(SaverComponent):
    ...     "Writes down which step was the last."
    ...     def build(self):
    ...         return LastStep()
    >>> class LastStep:
    ...     def due(self, step, *, is_last):
    ...         return is_last
    ...     def save(self, request):
    ...         path = request.run_dir / "last_step.txt"
    ...         path.write_text(str(request.step))
    ...         return path
    >>> saver = StepSaver(StepSaver.Config()).build()
    >>> saver.due(3, is_last=False), saver.due(4, is_last=True)
    (False, True)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     saver.save(SimpleNamespace(run_dir=Path(folder), step=4)).read_text()
    '4'
    """

    kind = "saver"

    def build(self) -> Saver:
        raise NotImplementedError


class TrackerComponent(Component):
    """Makes a tracker, which is told the numbers of each logged step on rank 0.

    >>> from pathlib import Path
    >>> from pegboard import TrackerComponent
    >>> class PrintTracker(TrackerComponent):
    ...     "Prints the loss."
    ...     def build(self, run_dir):
    ...         return Prints()
    >>> class Prints:
    ...     def log(self, step, metrics):
    ...         print(step, metrics["loss"])
    ...     def close(self):
    ...         pass
    >>> PrintTracker(PrintTracker.Config()).build(Path("runs/a")).log(1, {"loss": 2.5})
    1 2.5
    """

    kind = "tracker"

    def build(self, run_dir: Path) -> Tracker:
        raise NotImplementedError


class TransformComponent(Component):
    """Makes a change to a built model: adapters, frozen parts, other layers.

    >>> from dataclasses import replace
    >>> from pegboard import BuiltModel, TransformComponent
    >>> class FreezeAll(TransformComponent):
    ...     "Trains nothing."
    ...     def build(self):
    ...         return lambda built: replace(built, frozen=("",))
    >>> built = BuiltModel(None, None, shard_units=(), hf_config={})  # a real one has a module
    >>> FreezeAll(FreezeAll.Config()).build()(built).frozen
    ('',)
    """

    kind = "transform"

    def build(self) -> Callable[[BuiltModel], BuiltModel]:
        """The change. It gets the model on meta, before sharding; base weights keep their names, and every
        parameter it adds gets an entry of the weight map or stands in its `unpublished`."""
        raise NotImplementedError


class CallbackComponent(Component):
    """Makes a callback, which is told what happens in a run.

    >>> from pathlib import Path
    >>> from pegboard import Callback, CallbackComponent, TrainEnd
    >>> class Goodbye(CallbackComponent):
    ...     "Prints how far the run came."
    ...     def build(self, run_dir):
    ...         return Prints()
    >>> class Prints(Callback):
    ...     def on_train_end(self, event):
    ...         print(event.step, "of", event.total_steps)
    >>> callback = Goodbye(Goodbye.Config()).build(Path("work_dirs/a"))
    >>> callback.on_train_end(TrainEnd(step=60, total_steps=100, stopped=None))
    60 of 100
    """

    kind = "callback"
    every_rank: ClassVar[bool] = False
    """Build it on every rank; else on rank 0 only."""

    def build(self, run_dir: Path) -> Callback:
        raise NotImplementedError


TAKEN_OUT: Mapping[str, tuple[str, ...]] = {
    "dataset": (
        "name",
        "sample_ratio",
        "sample_draw",
        "token_weight",
        "on_bad_record",
        "record_schema",
    ),
    "model": ("preset",),
}
"""Keys of a kind's JSON, beside class_name and plugin, that the core takes out before a part's own config is read."""


@dataclass(frozen=True)
class _Kind:
    base: type[Component]
    hook: str
    section: str
    """Where the JSON names it."""


COMPONENT_KINDS: Mapping[str, _Kind] = {
    "model": _Kind(ModelComponent, "register_models", "model"),
    "dataset": _Kind(DatasetComponent, "register_datasets", "datasets[].dataset"),
    "tokenize_fn": _Kind(TokenizeFnComponent, "register_tokenize_fns", "datasets[].tokenize_fn"),
    "record_format": _Kind(
        RecordFormatComponent, "register_record_formats", "datasets[].tokenize_fn.record_format"
    ),
    "collator": _Kind(CollatorComponent, "register_collators", "dataloader.collator"),
    "loss": _Kind(LossComponent, "register_losses", "loss"),
    "saver": _Kind(SaverComponent, "register_savers", "savers[]"),
    "tokenizer": _Kind(TokenizerComponent, "register_tokenizers", "tokenizer"),
    "packer": _Kind(PackerComponent, "register_packers", "dataloader.packer"),
    "optimizer": _Kind(OptimizerComponent, "register_optimizers", "optimizer"),
    "lr_schedule": _Kind(LRScheduleComponent, "register_lr_schedules", "lr_schedule"),
    "tracker": _Kind(TrackerComponent, "register_trackers", "trackers[]"),
    "transform": _Kind(TransformComponent, "register_transforms", "transforms[]"),
    "callback": _Kind(CallbackComponent, "register_callbacks", "callbacks[]"),
}
