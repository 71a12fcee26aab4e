"""AdamW, with learning rate and weight decay chosen per parameter by name.

Each group of parameters that the core hands over is split by the rule that matches the name and
by whether weights decay; groups are never joined, because one group must live on one mesh. Every
torch group carries `name` and `base_lr`, from which the trainer sets `lr = schedule(step,
base_lr)`.

Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019 (arXiv:1711.05101).
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pegboard import ComponentConfig, ConfigError, OptimizerComponent, ParameterGroup

if TYPE_CHECKING:
    import torch

__all__ = ["AdamW", "ParameterRule"]

_Decay = Annotated[float, Field(ge=0, lt=1)]

FUSED_DEVICES = frozenset({"cpu", "cuda", "xpu"})


class ParameterRule(ComponentConfig):
    """What differs for the parameters with a matching name; the first matching rule counts."""

    match: str = Field(
        min_length=1,
        description="Pattern for whole parameter names; `*` is any run of characters, dots too: "
        "`vision_tower.*`.",
    )
    lr: float | None = Field(
        default=None, ge=0, description="Base learning rate; null is the optimizer's."
    )
    weight_decay: float | None = Field(
        default=None,
        ge=0,
        description="Weight decay, for norms and biases too; null is the optimizer's.",
    )


class AdamW(OptimizerComponent):
    """AdamW; norms and biases do not decay unless told to."""

    known_as = ("adamw_torch", "adamw_torch_fused", "adam_w", "AdamWConfig")

    class Config(ComponentConfig):
        lr: float = Field(
            default=1e-5, gt=0, description="Base learning rate, which the schedule scales."
        )
        betas: tuple[_Decay, _Decay] = Field(
            default=(0.9, 0.95),
            description="Decay rates of the running mean and mean square, each in [0, 1).",
        )
        eps: float = Field(default=1e-8, gt=0, description="Added to the root of the mean square.")
        weight_decay: float = Field(default=0.01, ge=0, description="Decoupled weight decay.")
        decay_vectors: bool = Field(
            default=False, description="Decay norms and biases (tensors of at most one dim) too."
        )
        param_groups: tuple[ParameterRule, ...] = Field(
            default=(),
            description="Learning rate or weight decay by parameter name; first match counts.",
        )

    config: Config

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.AdamW:
        """One torch group per input group, rule and decay, with its `name` and `base_lr`.

        Raises:
            ConfigError: a rule matches no parameter of any group, or there is nothing to train.
        """
        from .local_adamw import LocalAdamW

        config = self.config
        used: set[int] = set()
        parameters: list[dict[str, Any]] = []
        for index, group in enumerate(groups):
            parts: dict[tuple[int, bool], dict[str, Any]] = {}
            for (name, parameter), is_vector in zip(
                group.named_parameters, group.is_vector, strict=True
            ):
                number = self._rule_number(name)
                used.add(number)
                plain = is_vector and not config.decay_vectors
                part = parts.get((number, plain))
                if part is None:
                    part = parts[number, plain] = self._settings(index, number, plain)
                part["params"].append(parameter)
            parameters += parts.values()
        for number, rule in enumerate(config.param_groups):
            if number not in used:
                raise ConfigError(self._unmatched(number, rule, groups))
        if not parameters:
            raise ConfigError(
                "optimizer: no trainable parameter; expected at least one; unfreeze a part"
            )
        devices = {parameter.device.type for part in parameters for parameter in part["params"]}
        return LocalAdamW(
            parameters,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True if devices <= FUSED_DEVICES else None,
        )

    def _rule_number(self, name: str) -> int:
        """Position of the first rule that matches, -1 for none."""
        for number, rule in enumerate(self.config.param_groups):
            if fnmatchcase(name, rule.match):
                return number
        return -1

    def _settings(self, index: int, number: int, plain: bool) -> dict[str, Any]:
        config = self.config
        lr, weight_decay = config.lr, 0.0 if plain else config.weight_decay
        label = "default"
        if number >= 0:
            rule = config.param_groups[number]
            label = rule.match
            lr = lr if rule.lr is None else rule.lr
            weight_decay = weight_decay if rule.weight_decay is None else rule.weight_decay
        name = f"{index}/{label}/{'vectors' if plain else 'weights'}"
        return {"params": [], "name": name, "lr": lr, "base_lr": lr, "weight_decay": weight_decay}

    def _unmatched(self, number: int, rule: ParameterRule, groups: Sequence[ParameterGroup]) -> str:
        names = [name for group in groups for name, _ in group.named_parameters]
        where = f"optimizer.param_groups[{number}].match: {rule.match!r}"
        for name in names:
            if fnmatchcase(name, rule.match):
                taken = self.config.param_groups[self._rule_number(name)].match
                return (
                    f"{where} is left with nothing: earlier rule {taken!r} takes {name!r}; "
                    "put the narrower rule first"
                )
        example = f"names look like {names[0]!r}" if names else "there are none"
        return (
            f"{where} matches no trainable parameter; {example}; "
            "correct the pattern or unfreeze the part"
        )
