"""Plugin `freezing`: parts of a model that do not train."""

from collections.abc import Callable

import pegboard

from .component import Freeze


@pegboard.hookimpl
def register_transforms(register: Callable[[type[pegboard.TransformComponent]], None]) -> None:
    register(Freeze)
