"""Plugin `auto_model`: causal language models as transformers writes them."""

from collections.abc import Callable

import pegboard

from .component import AutoModelForCausalLM


@pegboard.hookimpl
def register_models(register: Callable[[type[pegboard.ModelComponent]], None]) -> None:
    register(AutoModelForCausalLM)
