"""AutoModelForCausalLM, as a JSON file sees it.

Light: torch and transformers are imported by `build` only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, JsonValue

from pegboard import BuiltModel, ComponentConfig, ModelComponent, Problem

if TYPE_CHECKING:
    import numpy as np

    from pegboard.run_config import RunConfig

__all__ = ["AutoModelForCausalLM"]

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class AutoModelForCausalLM(ModelComponent):
    """Any dense causal language model of the installed transformers, by its config.json.

    Right for every architecture it takes, slower than a native one: layers run as transformers
    writes them, over packed rows, with Pegboard's loss, sharding, loading and saving. Never runs
    code of a repository.
    """

    known_as: ClassVar[tuple[str, ...]] = ("auto", "hf_model", "causal_lm", "auto_model")

    class Config(ComponentConfig):
        """Fields of AutoModelForCausalLM."""

        hf_config: dict[str, JsonValue] = Field(
            description="A config.json with its `model_type`; taken from `load_from` when left out."
        )
        attention: Literal["auto", "packed", "sdpa", "eager"] = Field(
            default="auto",
            description="`packed` attends each sample by itself; `sdpa` and `eager` are "
            "transformers' own, with a mask over the whole row: `sdpa` also knows windows, `eager` "
            "caps; `auto` is the first of them that does what the config asks.",
        )

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        config, where = self.config.hf_config, (*path, "hf_config")
        if not isinstance(config.get("model_type"), str):
            yield Problem(where, "no `model_type`; expected a config.json's content")
        if config.get("auto_map"):
            yield Problem(where, "`auto_map` asks for code of a repository, which is not run")
        for key in EXPERT_KEYS:
            if config.get(key):
                yield Problem(
                    where,
                    f"`{key}` is set: experts are published in another layout than transformers "
                    "holds them; use a native model such as Qwen3MoE",
                )
        if config.get("final_logit_softcapping") and type(run.loss).__name__ != "CrossEntropy":
            yield Problem(
                where,
                "`final_logit_softcapping` changes the logits, which ChunkedCrossEntropy does not "
                'do; set "loss": {"class_name": "CrossEntropy"}',
            )

    def build(self) -> BuiltModel:
        """ConfigError for an architecture that transformers doesn't know or that can't be taken."""
        from .modeling import build_causal_lm

        return build_causal_lm(self.config)

    def sample_costs(self, lengths: np.ndarray, num_tiles: np.ndarray) -> np.ndarray:
        """As a native text model's, by the config's hidden size."""
        del num_tiles
        hidden = self.config.hf_config.get("hidden_size", self.config.hf_config.get("n_embd"))
        size = hidden if isinstance(hidden, int) and hidden > 0 else 2048
        costs: np.ndarray = lengths + lengths * lengths / (12 * size)
        return costs

    @classmethod
    def config_from_hf(cls, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json itself."""
        return {"hf_config": dict(hf_config)}
