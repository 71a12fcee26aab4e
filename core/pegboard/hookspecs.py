"""The whole contract between the core and a plugin: every hook, in call order.

A plugin is a module with functions marked `@pegboard.hookimpl`. Each hook is called once, when plugins are
loaded, with a `register` function that checks a class at the line that offers it:

    import pegboard

    @pegboard.hookimpl
    def register_datasets(register):
        register(MyDataset)

Hooks only register: what is merely installed changes no run; a part acts when a config names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pluggy

from pegboard.command import Command
from pegboard.component import (
    CallbackComponent,
    CollatorComponent,
    DatasetComponent,
    LossComponent,
    LRScheduleComponent,
    ModelComponent,
    OptimizerComponent,
    PackerComponent,
    RecordFormatComponent,
    SaverComponent,
    TokenizeFnComponent,
    TokenizerComponent,
    TrackerComponent,
    TransformComponent,
)

__all__ = ["hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("pegboard")
"""Marks a hook of the contract below."""
hookimpl = pluggy.HookimplMarker("pegboard")
"""Marks a plugin's function of that name; `@pegboard.hookimpl(specname="register_losses")` for another one."""

Register = Callable[[type[Any]], None]


@hookspec
def register_models(register: Callable[[type[ModelComponent]], None]) -> None:
    """Offer models, named by `model.class_name`: `register(Qwen3)`."""


@hookspec
def register_datasets(register: Callable[[type[DatasetComponent]], None]) -> None:
    """Offer datasets, named by `datasets[].dataset.class_name`: `register(JsonlDataset)`."""


@hookspec
def register_tokenize_fns(register: Callable[[type[TokenizeFnComponent]], None]) -> None:
    """Offer tokenize functions, named by `datasets[].tokenize_fn.class_name`: `register(ChatTokenizeFn)`."""


@hookspec
def register_record_formats(register: Callable[[type[RecordFormatComponent]], None]) -> None:
    """Offer record formats, named by `datasets[].tokenize_fn.record_format.class_name`: `register(AlpacaFormat)`."""


@hookspec
def register_collators(register: Callable[[type[CollatorComponent]], None]) -> None:
    """Offer collators, named by `dataloader.collator.class_name`: `register(SFTLLMCollator)`."""


@hookspec
def register_losses(register: Callable[[type[LossComponent]], None]) -> None:
    """Offer losses, named by `loss.class_name`: `register(ChunkedCrossEntropy)`."""


@hookspec
def register_savers(register: Callable[[type[SaverComponent]], None]) -> None:
    """Offer savers, named by `savers[].class_name`: `register(HFSaver)`."""


@hookspec
def register_tokenizers(register: Callable[[type[TokenizerComponent]], None]) -> None:
    """Offer tokenizers, named by `tokenizer.class_name`: `register(HFTokenizer)`."""


@hookspec
def register_packers(register: Callable[[type[PackerComponent]], None]) -> None:
    """Offer packers, named by `dataloader.packer.class_name`: `register(ExpandSoftPacker)`."""


@hookspec
def register_optimizers(register: Callable[[type[OptimizerComponent]], None]) -> None:
    """Offer optimizers, named by `optimizer.class_name`: `register(AdamW)`."""


@hookspec
def register_lr_schedules(register: Callable[[type[LRScheduleComponent]], None]) -> None:
    """Offer learning-rate schedules, named by `lr_schedule.class_name`: `register(CosineSchedule)`."""


@hookspec
def register_trackers(register: Callable[[type[TrackerComponent]], None]) -> None:
    """Offer trackers, named by `trackers[].class_name`: `register(TensorBoardTracker)`."""


@hookspec
def register_transforms(register: Callable[[type[TransformComponent]], None]) -> None:
    """Offer changes to a built model, named by `transforms[].class_name`: `register(Freeze)`."""


@hookspec
def register_callbacks(register: Callable[[type[CallbackComponent]], None]) -> None:
    """Offer callbacks, named by `callbacks[].class_name`: `register(EarlyStopping)`."""


@hookspec
def register_commands(register: Callable[[type[Command]], None]) -> None:
    """Offer commands of the command line, `pegboard prepare ...`: `register(PrepareCommand)`."""
