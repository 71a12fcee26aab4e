"""Plugin `lora`: low-rank adapters on any model, and their export for peft."""

from collections.abc import Callable

import pegboard

from .component import AdapterSaver, LoRA


@pegboard.hookimpl
def register_transforms(register: Callable[[type[pegboard.TransformComponent]], None]) -> None:
    register(LoRA)


@pegboard.hookimpl
def register_savers(register: Callable[[type[pegboard.SaverComponent]], None]) -> None:
    register(AdapterSaver)
