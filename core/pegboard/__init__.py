"""Pegboard: a trainer that is mostly plugins. What a plugin author imports.

>>> import pegboard
>>> @pegboard.hookimpl
... def register_losses(register):
...     "Offer losses: register(MyLoss)."
>>> pegboard.IGNORE_INDEX  # a token that is not trained, in data that holds labels
-100
>>> isinstance(pegboard.RecordText([("a", True)]), pegboard.RecordContent)
True
"""

from pegboard.callbacks import (
    Callback,
    CheckpointSaved,
    StepEnd,
    TrainEnd,
    TrainFailure,
    TrainStart,
)
from pegboard.command import Command
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
    ParameterGroup,
    Problem,
    RecordFormatComponent,
    SaverComponent,
    TokenizeFnComponent,
    TokenizerComponent,
    TrackerComponent,
    TransformComponent,
)
from pegboard.component_field import ComponentOf
from pegboard.contracts import (
    IGNORE_INDEX,
    Adapter,
    Batch,
    BuiltModel,
    Example,
    Head,
    ImageTokens,
    LossOutput,
    ModelOutput,
    PackPlan,
    RecordChat,
    RecordContent,
    RecordText,
    RecordTokens,
    SampleKey,
    ShardUnit,
    StepReport,
    StepState,
    Table,
    Targets,
)
from pegboard.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DroppedSample,
    PegboardError,
    PluginError,
    TrainingError,
    WeightsError,
)
from pegboard.hookspecs import hookimpl
from pegboard.schema_config import SchemaConfig
from pegboard.weight_map import Entry, Piece, WeightMap, fused, renamed

__all__ = [
    "IGNORE_INDEX",
    "Adapter",
    "Batch",
    "BuiltModel",
    "Callback",
    "CallbackComponent",
    "CheckpointError",
    "CheckpointSaved",
    "CollatorComponent",
    "Command",
    "Component",
    "ComponentConfig",
    "ComponentOf",
    "ConfigError",
    "DataError",
    "DatasetComponent",
    "DroppedSample",
    "Entry",
    "Example",
    "Head",
    "ImageTokens",
    "LRScheduleComponent",
    "LossComponent",
    "LossOutput",
    "ModelComponent",
    "ModelOutput",
    "OptimizerComponent",
    "PackPlan",
    "PackerComponent",
    "ParameterGroup",
    "PegboardError",
    "Piece",
    "PluginError",
    "Problem",
    "RecordChat",
    "RecordContent",
    "RecordFormatComponent",
    "RecordText",
    "RecordTokens",
    "SampleKey",
    "SaverComponent",
    "SchemaConfig",
    "ShardUnit",
    "StepEnd",
    "StepReport",
    "StepState",
    "Table",
    "Targets",
    "TokenizeFnComponent",
    "TokenizerComponent",
    "TrackerComponent",
    "TrainEnd",
    "TrainFailure",
    "TrainStart",
    "TrainingError",
    "TransformComponent",
    "WeightMap",
    "WeightsError",
    "fused",
    "hookimpl",
    "renamed",
]
