"""Every error that Pegboard raises for its user, in one tree.

    PegboardError                 a person can act on it: printed without a traceback, exit code 2
    ├── ConfigError               the JSON, an override, or two parts that don't fit
    ├── PluginError               a plugin that breaks the contract, or could not be imported
    ├── DataError                 a record, a file or an index of a dataset
    │   └── DroppedSample         a record that is valid but gives nothing to train on; counted, not fatal
    ├── WeightsError              tensors that are missing, left over or misshapen when loading
    ├── CheckpointError           a checkpoint that can't be written, read or resumed
    └── TrainingError             a run that can't go on (too many non-finite steps, a dead worker)

A message is one line: where, what was found, what was expected, what to do.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DroppedSample",
    "PegboardError",
    "PluginError",
    "TrainingError",
    "WeightsError",
]


class PegboardError(Exception):
    """Base of all errors that a user can act on.

    >>> import pegboard
    >>> try:
    ...     raise pegboard.DataError("data/a.jsonl:3: invalid JSON")
    ... except pegboard.PegboardError as error:
    ...     print(error)
    data/a.jsonl:3: invalid JSON
    """


class ConfigError(PegboardError):
    """A run config that can't be run as it stands; the message may hold one line per problem.

    >>> from pegboard import ConfigError
    >>> raise ConfigError("a.json:3:9: seed: expected an integer, found 'x'")
    Traceback (most recent call last):
    pegboard.errors.ConfigError: a.json:3:9: seed: expected an integer, found 'x'
    """


class PluginError(PegboardError):
    """A plugin that breaks the contract or can't be imported.

    >>> from pegboard import PluginError
    >>> raise PluginError("dataset 'Signals' has no docstring; write one line")
    Traceback (most recent call last):
    pegboard.errors.PluginError: dataset 'Signals' has no docstring; write one line
    """


class DataError(PegboardError):
    """A dataset that can't be read; the message starts with `file:line`.

    >>> from pegboard import DataError
    >>> raise DataError("data/a.jsonl:3: messages: expected a list, found null")
    Traceback (most recent call last):
    pegboard.errors.DataError: data/a.jsonl:3: messages: expected a list, found null
    """


class DroppedSample(DataError):
    """A valid record that gives nothing to train on.

    Args:
        reason: a short class of reasons that is counted, such as `"no supervised token"`.

    >>> from pegboard import DroppedSample
    >>> DroppedSample("no supervised token").reason
    'no supervised token'
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class WeightsError(PegboardError):
    """Weights that don't fit the model: missing, unexpected or misshapen tensors.

    >>> from pegboard import WeightsError
    >>> raise WeightsError("models/x: lm_head.weight is missing; train from another folder")
    Traceback (most recent call last):
    pegboard.errors.WeightsError: models/x: lm_head.weight is missing; train from another folder
    """


class CheckpointError(PegboardError):
    """A checkpoint that can't be written, read or resumed.

    >>> from pegboard import CheckpointError
    >>> raise CheckpointError("runs/a/step_5: no trainer.json; resume an older step")
    Traceback (most recent call last):
    pegboard.errors.CheckpointError: runs/a/step_5: no trainer.json; resume an older step
    """


class TrainingError(PegboardError):
    """A run that can't go on.

    >>> from pegboard import TrainingError
    >>> raise TrainingError("3 steps in a row are not finite; lower optimizer.lr")
    Traceback (most recent call last):
    pegboard.errors.TrainingError: 3 steps in a row are not finite; lower optimizer.lr
    """
