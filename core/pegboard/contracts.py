"""What parts exchange: records, examples, packs, batches, built models and their outputs.

Light on purpose: tensors are named in annotations only, so a dataset or a tokenize function can import this
module without torch. Values that travel through FSDP are NamedTuples (torch 2.11 finds tensors in tuples,
not in dataclasses).

Shape legend: T tokens of a micro-batch, K supervised positions, S samples of a pack, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from pegboard.weight_map import WeightMap

__all__ = [
    "IGNORE_INDEX",
    "Adapter",
    "Batch",
    "BuiltModel",
    "Collator",
    "Dataset",
    "Example",
    "Head",
    "ImageTokens",
    "LRSchedule",
    "Loss",
    "LossOutput",
    "ModelOutput",
    "PackPlan",
    "Packer",
    "RecordChat",
    "RecordContent",
    "RecordFormat",
    "RecordText",
    "RecordTokens",
    "SampleKey",
    "ShardUnit",
    "StepReport",
    "StepState",
    "Table",
    "Targets",
    "TextModel",
    "TokenizeFn",
    "Tokenizer",
]

IGNORE_INDEX = -100
"""Label of a token that is not trained, in data that holds labels (as in PyTorch and transformers)."""


class SampleKey(NamedTuple):
    """Where a sample came from; travels with it through pack and batch, and into every error message.

    >>> from pegboard import SampleKey
    >>> print(SampleKey(source="chat", file="data/chat.jsonl", line=17))
    data/chat.jsonl:17
    """

    source: str
    """Name of the dataset in the config."""
    file: str
    """Path of the file, as the dataset opened it; any locator for a dataset without files."""
    line: int
    """Line in the file, from 1; the record number for a dataset without lines."""
    part: int = 0
    """Which example of the record, from 0, where a tokenize function makes several."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(slots=True, kw_only=True)
class Example:
    """One tokenized sample, before packing.

    >>> import numpy as np
    >>> from pegboard import Example
    >>> ids, mask = np.array([7, 8, 9], dtype=np.int32), np.array([False, True, True])
    >>> Example(input_ids=ids, loss_mask=mask).input_ids[mask].tolist()  # what is to be predicted
    [8, 9]
    """

    input_ids: np.ndarray
    """(T,) int32 token ids."""
    loss_mask: np.ndarray
    """(T,) bool: True where the token itself is to be predicted (unshifted; the collator shifts)."""
    media: Mapping[str, Any] = field(default_factory=dict)
    """Where a vision model's collator finds pictures: plain JSON data (paths, sizes, places in the ids), never
    pixels. The token store keeps it as it is; the collator opens it when the batch is made."""
    num_tiles: int = 0
    """Vision tiles that `media` makes, known before anything is opened: packs are planned with it."""
    may_skip: bool = False
    """The dataset's policy (`on_bad_record: skip`) lets a collator leave this sample out, counted, if its media
    can't be read; set by the data loader."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Anything a plugin pair agrees on."""
    part: int | None = None
    """Which part of its record it is, from 0 (`SampleKey.part`), such as the number of the assistant turn that it
    trains; None: its place in the list that the tokenize function gave."""
    next_id: int | None = None
    """The supervised token that came after the last one, where a packer cut the sample there: a target of the
    last position. Set by the data loader; of the part behind the cut, the first token is no target."""
    draw: int = 0
    """Tells apart each time that the run takes a sample, for whoever varies it at random: from the run's seed and the
    sample's place in the epoch, whatever the ranks and workers. Set by the data loader."""
    key: SampleKey | None = None
    """Set by the data loader."""
    source_id: int = 0
    """Index of the dataset in the run's list; set by the data loader."""


class ImageTokens(NamedTuple):
    """How a vision-language model turns pictures into rows of its input.

    >>> from pegboard import ImageTokens
    >>> pictures = ImageTokens(tile_size=448, tokens_per_tile=256, image_token_id=152957)
    >>> 3 * pictures.tokens_per_tile  # rows that a picture of three tiles fills
    768
    """

    tile_size: int
    """Side of a square tile, in pixels."""
    tokens_per_tile: int
    """Rows of the input that one tile fills."""
    image_token_id: int
    """Id that stands at each of those rows."""


class Targets(NamedTuple):
    """The supervised positions of a micro-batch; labels are already shifted inside each sample.

    >>> import torch
    >>> from pegboard import Targets
    >>> rows, labels = torch.tensor([0, 1, 3]), torch.tensor([8, 9, 6])
    >>> targets = Targets(rows, labels, torch.ones(3), torch.zeros(3, dtype=torch.int64), scale=1 / 3)
    >>> float(targets.weights_K.sum() * targets.scale)  # over the whole step: a mean
    1.0
    """

    positions_K: Tensor
    """(K,) int64: rows of hidden_TD from which a label is predicted."""
    labels_K: Tensor
    """(K,) int64: the token to predict there."""
    weights_K: Tensor
    """(K,) float32: weight of each token's loss (1 for the token mean)."""
    source_ids_K: Tensor
    """(K,) int64: dataset each token came from."""
    scale: float
    """1 / sum of weights over the whole optimizer step, all ranks and micro-batches."""


@dataclass(kw_only=True)
class Batch:
    """One micro-batch: a packed row of T tokens. There is no padded form.

    >>> import torch
    >>> from pegboard import Batch, Targets
    >>> rows, labels = torch.tensor([0, 1, 3]), torch.tensor([8, 9, 6])
    >>> batch = Batch(  # the samples [7, 8, 9] and [5, 6]
    ...     input_ids_T=torch.tensor([7, 8, 9, 5, 6]),
    ...     position_ids_T=torch.tensor([0, 1, 2, 0, 1]),
    ...     cu_seqlens=torch.tensor([0, 3, 5], dtype=torch.int32),
    ...     max_seqlen=3,
    ...     targets=Targets(rows, labels, torch.ones(3), torch.zeros(3, dtype=torch.int64), 1.0),
    ...     num_tokens=5,
    ... )
    >>> batch.with_scales({"targets": 0.25}).targets.scale
    0.25
    """

    input_ids_T: Tensor
    """(T,) int64."""
    position_ids_T: Tensor
    """(T,) int64, restarting at 0 with each sample."""
    cu_seqlens: Tensor
    """(S+1,) int32 cumulative sample lengths, from 0 to T."""
    max_seqlen: int
    """Longest sample, a Python int so that no device sync is needed."""
    targets: Targets
    num_tokens: int
    """Real tokens (T less padding)."""
    num_skipped: int = 0
    """Samples left out because their media could not be read (`Example.may_skip`)."""
    keys: tuple[SampleKey, ...] = ()
    """Identity of each sample, in pack order."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """1 / global count of each name in the step's counts, 0.0 where that is 0; set by the trainer before the forward.
    So all ranks know alike whether a step has, say, any `tiles`."""
    media: Mapping[str, Tensor] = field(default_factory=dict)
    """What a vision model reads: `pixel_values` (M, 3, S, S) uint8 tiles in order, `image_positions` (P,) int64 rows
    of `input_ids_T` that hold their features in order, `tile_counts` int32 tiles of each picture. Empty for a batch
    without pictures."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Anything a plugin pair agrees on. Beside pictures: `num_tiles` and `tiles_of_samples`, Python ints."""

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """Copy with every tensor on `device`."""

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=non_blocking) if hasattr(value, "to") else value

        return replace(
            self,
            input_ids_T=move(self.input_ids_T),
            position_ids_T=move(self.position_ids_T),
            cu_seqlens=move(self.cu_seqlens),
            targets=Targets(*(move(value) for value in self.targets)),
            media={name: move(value) for name, value in self.media.items()},
            extras={name: move(value) for name, value in self.extras.items()},
        )

    def pin_memory(self) -> Batch:
        """Copy in page-locked memory, from which a copy to a GPU doesn't wait."""

        def pin(value: Any) -> Any:
            return value.pin_memory() if hasattr(value, "pin_memory") else value

        return replace(
            self,
            input_ids_T=pin(self.input_ids_T),
            position_ids_T=pin(self.position_ids_T),
            cu_seqlens=pin(self.cu_seqlens),
            targets=Targets(*(pin(value) for value in self.targets)),
            media={name: pin(value) for name, value in self.media.items()},
            extras={name: pin(value) for name, value in self.extras.items()},
        )

    def with_scales(self, scales: Mapping[str, float]) -> Batch:
        """Copy that knows the step's global normalisers; `targets.scale` is `scales["targets"]`."""
        return replace(
            self, scales=dict(scales), targets=self.targets._replace(scale=scales["targets"])
        )


class LossOutput(NamedTuple):
    """What a loss returns for one micro-batch.

    >>> import torch
    >>> from pegboard import LossOutput
    >>> losses_K, scale = torch.tensor([1.0, 3.0], requires_grad=True), 0.5
    >>> LossOutput(losses_K.sum() * scale, losses_K.detach()).loss.item()
    2.0
    """

    loss: Tensor
    """() the scaled sum, to call backward on."""
    token_losses_K: Tensor
    """(K,) float32, detached and unweighted: for per-source losses."""


class ModelOutput(NamedTuple):
    """What a model's forward returns: a NamedTuple, so that FSDP finds its tensors.

    >>> import torch
    >>> from pegboard import ModelOutput
    >>> balance = torch.tensor(0.01)
    >>> out = ModelOutput(torch.tensor(2.0) + balance, torch.tensor([2.0]), {"balance_loss": balance})
    >>> sorted(out.metrics)
    ['balance_loss']
    """

    loss: Tensor
    """() everything to call backward on, auxiliary losses included, already scaled."""
    token_losses_K: Tensor
    """(K,) float32, detached."""
    metrics: Mapping[str, Tensor]
    """Detached scaled sums to report beside the loss; summing them over ranks and micro-batches is right."""


class Head(NamedTuple):
    """The output projection, as a loss sees it (inside the head's own forward).

    >>> import torch
    >>> from pegboard import Head
    >>> linear = torch.nn.Linear(4, 10, bias=False)
    >>> head = Head(linear.weight, None, linear)
    >>> head.logits(torch.zeros(3, 4)).shape
    torch.Size([3, 10])
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    logits: Callable[[Tensor], Tensor]
    """(C, D) hidden rows -> (C, V) logits, in the compute dtype."""


class Loss(Protocol):
    """A built loss."""

    def __call__(self, hidden_TD: Tensor, head: Head, targets: Targets) -> LossOutput:
        """Scaled sum over the micro-batch's targets; needs no logits of the whole."""
        ...

    def step_counts(self, batch: Batch) -> Mapping[str, float]:
        """Host-side counts of this micro-batch by name; must include `targets`."""
        ...


@runtime_checkable
class TextModel(Protocol):
    """What the module of a text model offers, so that a vision-language model takes any of them."""

    def embed(self, input_ids_T: Tensor) -> Tensor:
        """(T,) ids -> hidden_TD; a vision-language model overwrites rows of it."""
        ...

    def run_layers(self, hidden_TD: Tensor, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """All decoder layers, no final norm; and auxiliary losses, scaled and with their graph, by name."""
        ...

    def compute_loss(self, hidden_TD: Tensor, targets: Targets, loss: Loss) -> LossOutput:
        """Final norm and head."""
        ...

    def forward(self, batch: Batch, loss: Loss) -> ModelOutput:
        """The three in a row: what is wrapped when the text model is the whole model."""
        ...


class Table(NamedTuple):
    """Numbers of one step with a name for each row, such as the load of each expert by layer.

    >>> from pegboard import Table
    >>> load = Table(("layers.0", "layers.1"), [[0.5, 0.5], [0.9, 0.1]])
    >>> dict(zip(load.row_names, load.values))["layers.1"]
    [0.9, 0.1]
    """

    row_names: tuple[str, ...]
    values: Sequence[Sequence[float]]


class StepReport(NamedTuple):
    """What a model reports of a step beside its losses.

    >>> from pegboard import StepReport
    >>> StepReport(numbers={"idle_experts": 2.0}).tables
    {}
    """

    numbers: Mapping[str, float] = {}
    """Go into `metrics.jsonl` and to every tracker."""
    tables: Mapping[str, Table] = {}
    """Go to the trackers that take tables."""


@runtime_checkable
class StepState(Protocol):
    """What a model carries through a whole optimizer step, such as the load of its experts.

    A module inside the model that keeps this protocol is found by the trainer, at any depth, so a
    vision-language model need not know of its text model's. What must survive a restart stands in
    persistent buffers. Every call comes on all ranks in the same order; `sum_over_ranks` sums a
    tensor in place.

    >>> from pegboard import StepReport, StepState
    >>> class CountsSteps:
    ...     steps = 0
    ...     def wants_first_pass(self, num_micro_batches):
    ...         return False
    ...     def end_first_pass(self, sum_over_ranks):
    ...         pass
    ...     def end_step(self, sum_over_ranks):
    ...         self.steps += 1
    ...     def report(self):
    ...         return StepReport({"steps": self.steps})
    >>> isinstance(CountsSteps(), StepState)
    True
    """

    def wants_first_pass(self, num_micro_batches: int) -> bool:
        """Called at the start of a step: whether all micro-batches are to pass forward once
        without gradients (and without targets) before the step. What a step that was skipped has
        left is to be dropped here."""
        ...

    def end_first_pass(self, sum_over_ranks: Callable[[Tensor], None]) -> None:
        """The pass that was wanted is over."""
        ...

    def end_step(self, sum_over_ranks: Callable[[Tensor], None]) -> None:
        """All micro-batches have passed forward and backward, and the optimizer has made its step. Not
        called where it was skipped, because loss or gradients were not finite. No host sync."""
        ...

    def report(self) -> StepReport:
        """Of the last step; called for logged steps only."""
        ...


class ShardUnit(NamedTuple):
    """A module that is gathered and freed as one.

    >>> from pegboard import ShardUnit
    >>> [ShardUnit(f"model.layers.{k}").path for k in range(2)]
    ['model.layers.0', 'model.layers.1']
    """

    path: str
    """Module path, such as `model.layers.0`."""
    mesh: str = "dense"
    """`dense` (sharded over all data ranks) or `expert`."""
    param_dtype: str | None = None
    """Compute dtype of this unit where it differs from the run's, such as `float32` for a router."""
    reshard: bool = True
    """Free the gathered weights after forward (False for a unit that backward needs at once)."""


class Adapter(NamedTuple):
    """What a transform added to a model that is published apart from it.

    >>> from pegboard import Adapter
    >>> from pegboard.weight_map import WeightMap, renamed
    >>> names = WeightMap((renamed("proj.low", "base_model.model.proj.low", (4, 8)),))
    >>> Adapter(names, {"r": 4}).load_from is None  # its weights are initialised
    True
    """

    weight_map: WeightMap
    """The added parameters and their names in the adapter's own file."""
    config: dict[str, Any]
    """What `adapter_config.json` says."""
    load_from: str | None = None
    """Folder of an adapter to start from; None: initialised."""


@dataclass(eq=False)
class BuiltModel:
    """A module on meta and what the core must know of it; a vision-language model or a transform may rewrite any field.

    >>> import torch
    >>> from pegboard import BuiltModel
    >>> from pegboard.weight_map import WeightMap, renamed
    >>> with torch.device("meta"):
    ...     module = torch.nn.Linear(2, 3, bias=False)
    >>> names = WeightMap((renamed("weight", "model.weight", (3, 2)),))
    >>> BuiltModel(module, names, shard_units=(), hf_config={"model_type": "line"}).frozen
    ()
    """

    module: nn.Module
    weight_map: WeightMap
    """Names and layouts, ours <-> published; covers every parameter."""
    shard_units: tuple[ShardUnit, ...]
    """Inner before outer; never the root, never a nested text model."""
    hf_config: dict[str, Any]
    """What `config.json` says in an export."""
    checkpoint_units: tuple[str, ...] = ()
    """Module paths that activation checkpointing may wrap (usually the decoder layers), in order."""
    expert_axis: Mapping[str, int] = field(default_factory=dict)
    """Parameter name -> dim that holds experts."""
    freeze_groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Group -> parameter-name prefixes, such as `vision` -> (`vision_tower.`,)."""
    frozen: tuple[str, ...] = ()
    """Parameter-name prefixes that do not train."""
    step_counts: Callable[[Batch], Mapping[str, float]] | None = None
    """Counts the model's own auxiliary losses are divided by; added to the loss's."""
    adapter: Adapter | None = None
    """What was added by a transform and is published by itself."""


class PackPlan(NamedTuple):
    """Which samples share a pack: pack i holds `samples[offsets[i]:offsets[i+1]]`.

    >>> import numpy as np
    >>> from pegboard import PackPlan
    >>> plan = PackPlan(offsets=np.array([0, 2, 3]), samples=np.array([5, 0, 2]))
    >>> [plan.samples[a:b].tolist() for a, b in zip(plan.offsets, plan.offsets[1:])]
    [[5, 0], [2]]
    """

    offsets: np.ndarray
    """(num_packs+1,) int64. What stands behind the last is kept for the next epoch, and is less than a pack."""
    samples: np.ndarray
    """(num_samples,) integer indices into the lengths that were planned."""
    starts: np.ndarray | None = None
    """(num_samples,) integer first token of each entry in its sample; None: all are whole samples."""
    stops: np.ndarray | None = None
    """(num_samples,) integer end of each entry in its sample."""


class Packer(Protocol):
    """A built packer.

    May also have `cuts_samples = True`: it then takes samples of any length, may give parts of them (`starts`,
    `stops`), and may keep the rest of the data for the next epoch.
    """

    def plan(self, lengths: np.ndarray, pack_max_length: int, seed: int) -> PackPlan:
        """Packs of at most `pack_max_length` tokens, the same for the same `seed`.

        Args:
            lengths: (num_samples,) int64 tokens per sample, each in [1, pack_max_length]; the datasets stand one
                after the other, each in its own order.
        """
        ...


class Collator(Protocol):
    """A built collator: examples of one pack -> Batch (CPU tensors). Must pickle (loader processes).

    May also have `max_tiles_per_pack` (an int): packs are then planned to hold no more vision tiles.
    """

    def __call__(self, examples: Sequence[Example]) -> Batch: ...


class Dataset(Protocol):
    """A built dataset: records by index. Must pickle (spawned workers)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The record; raises DataError that starts with `file:line`."""
        ...

    def key(self, index: int) -> SampleKey:
        """Where record `index` comes from, without reading it."""
        ...

    def fingerprint(self) -> str | None:
        """Changes whenever a record may have changed; None if that can't be told (nothing is cached then)."""
        ...


class RecordChat(NamedTuple):
    """What a record of chat says, in OpenAI's form.

    >>> from pegboard import RecordChat
    >>> question = {"role": "user", "content": "2 + 2?"}
    >>> RecordChat([question, {"role": "assistant", "content": "4"}]).tools is None
    True
    """

    messages: Sequence[Any]
    """Objects with `role` and `content`; whoever renders them checks them. `"loss": false` in an assistant message
    keeps it out of the loss."""
    tools: Sequence[Any] | None = None
    """Function definitions the model may call."""


class RecordText(NamedTuple):
    """What a record of plain text says: no chat template is applied.

    >>> from pegboard import RecordText
    >>> text = RecordText([("Q: 2 + 2? A: ", False), ("4", True)])
    >>> "".join(piece for piece, has_loss in text.pieces if has_loss)
    '4'
    """

    pieces: Sequence[tuple[str, bool]]
    """(text, whether it gets loss), joined as they are; an end token follows."""


class RecordTokens(NamedTuple):
    """What a record that is tokenized already says.

    >>> import numpy as np
    >>> from pegboard import RecordTokens
    >>> tokens = RecordTokens(np.array([7, 8], dtype=np.int32), np.array([False, True]))
    >>> int(tokens.loss_mask.sum())
    1
    """

    input_ids: np.ndarray
    """(T,) int32."""
    loss_mask: np.ndarray
    """(T,) bool, as in `Example`."""


RecordContent = RecordChat | RecordText | RecordTokens
"""What a record format's `read` may return."""


class RecordFormat(Protocol):
    """A built record format: an adapter from one form of record to what tokenize functions read. Must pickle."""

    def accepts(self, record: Any) -> bool:
        """Whether the record's keys are this form's; looks no deeper than the first item of a list."""
        ...

    def read(self, record: Any) -> RecordContent:
        """What the record says; DataError names the key that is wrong."""
        ...


class TokenizeFn(Protocol):
    """A built tokenize function. Must pickle (spawned workers)."""

    max_length: int

    def __call__(self, record: Mapping[str, Any]) -> Sequence[Example]:
        """One record -> its examples.

        Raises DataError for a broken record, DroppedSample(reason) for one with nothing to train on.
        The caller adds the place (`file:line`) in front of the message.
        """
        ...

    def take_counts(self) -> Mapping[str, int]:
        """Counts since the last call, by event (`truncated`, `turns shown`, ...); reported, then reset.

        Called where a span of records begins and ends. What is estimated for a span goes under
        `~name`: reports add it to what stands under `name`, and mark the sum.
        """
        ...

    def fingerprint(self) -> str:
        """Changes whenever the result for some record may change."""
        ...


class Tokenizer(Protocol):
    """A built tokenizer."""

    eos_token_ids: tuple[int, ...]
    """Ids that end a generated turn."""
    pad_token_id: int
    vocab_size: int
    """Smallest embedding that holds every id."""
    chat_template: str | None

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Text -> ids, adding nothing; `special_tokens=False` reads the spelling of one as plain text."""
        ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The chat template's text; equals transformers' apply_chat_template(tokenize=False)."""
        ...

    def save(self, folder: str) -> None:
        """Write the files that AutoTokenizer.from_pretrained(folder) opens."""
        ...

    def fingerprint(self) -> str:
        """Changes with any file or template that changes ids."""
        ...


LRSchedule = Callable[[int, float], float]
"""(step from 1 to total_steps, base lr) -> lr of that step."""
