"""A transformers causal language model that keeps Pegboard's contract.

The model is transformers' own object, with its own parameter names. Its class is extended: the
forward takes a packed `Batch`, the output projection becomes a head that the loss runs inside,
and modules with buffers learn to fill them after meta initialisation by transformers' own rule.

T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pegboard import (
    Batch,
    BuiltModel,
    ConfigError,
    Head,
    LossOutput,
    ModelOutput,
    PluginError,
    ShardUnit,
    Targets,
)
from pegboard.weight_map import WeightMap, renamed

from .attention import choose_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pegboard.contracts import Loss

    from .component import AutoModelForCausalLM

__all__ = ["OutputHead", "PackedCausalLM", "build_causal_lm"]

_UNKNOWN_HEADS = ("lm_head_multiplier", "dim_model_base", "mup_width_scale", "output_multiplier")
"""Keys that change the logits in ways that are not known here."""


class OutputHead(nn.Module):
    """The output projection, run inside the loss.

    Args:
        weight: (V, D); None for a tied head, whose `forward` is given the embedding's.
        bias: (V,) or None.
        scale: factor of the logits.
        cap: logits are `cap * tanh(logits / cap)`; None for no cap. Only `Head.logits` does it.
    """

    holds_vocabulary = True
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        *,
        scale: float,
        cap: float | None,
    ) -> None:
        super().__init__()
        self.scale, self.cap = scale, cap
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    def forward(
        self, hidden_TD: Tensor, targets: Targets, loss: Loss, tied_weight_VD: Tensor | None
    ) -> LossOutput:
        """Loss of the normed hidden states."""
        weight_VD = tied_weight_VD if self.weight is None else self.weight
        assert weight_VD is not None
        bias_V = self.bias

        def logits(hidden_CD: Tensor) -> Tensor:
            logits_CV = functional.linear(hidden_CD, weight_VD, bias_V)
            return logits_CV if self.cap is None else torch.tanh(logits_CV / self.cap) * self.cap

        # (scale * x) W = scale * (x W): a scaled head is a plain one on scaled hidden states.
        scaled_TD = hidden_TD if self.scale == 1.0 else hidden_TD * self.scale
        return loss(scaled_TD, Head(weight_VD, bias_V, logits), targets)


class PackedCausalLM(nn.Module):
    """Goes before a transformers class in the method order; a `pegboard.contracts.TextModel`."""

    base_model: Any
    get_input_embeddings: Any
    output_name: str
    """Module path of the `OutputHead`."""

    def embed(self, input_ids_T: Tensor) -> Tensor:
        """(T,) ids -> (T, D), before what the architecture does to its embeddings."""
        hidden_TD: Tensor = self.get_input_embeddings()(input_ids_T)
        return hidden_TD

    def run_layers(self, hidden_TD: Tensor, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """All of the base model, its final norm included."""
        return self._base(batch, inputs_embeds=hidden_TD[None]), {}

    def compute_loss(self, hidden_TD: Tensor, targets: Targets, loss: Loss) -> LossOutput:
        """The head with the loss inside; the norm is `run_layers`'s."""
        head = self.get_submodule(self.output_name)
        tied = self.get_input_embeddings().weight if head.weight is None else None
        out: LossOutput = head(hidden_TD, targets, loss, tied)
        return out

    def forward(self, batch: Batch, loss: Loss) -> ModelOutput:
        """Loss of one micro-batch, scaled by `batch.targets.scale`."""
        hidden_TD = self._base(batch, input_ids=batch.input_ids_T[None])
        out = self.compute_loss(hidden_TD, batch.targets, loss)
        return ModelOutput(out.loss, out.token_losses_K, {})

    def logits(self, batch: Batch) -> Tensor:
        """(T, V) logits of an unsharded model: for tests and comparisons, not for training."""
        hidden_TD = self._base(batch, input_ids=batch.input_ids_T[None])
        found: list[Tensor] = []

        def keep(scaled_TD: Tensor, head: Head, targets: Targets) -> LossOutput:
            found.append(head.logits(scaled_TD))
            return LossOutput(scaled_TD.sum(), targets.weights_K)

        self.compute_loss(hidden_TD, batch.targets, keep)  # type: ignore[arg-type]
        return found[0]

    def _base(self, batch: Batch, **inputs: Tensor) -> Tensor:
        cu_seqlens, longest = batch.cu_seqlens, batch.max_seqlen
        output = self.base_model(
            **inputs,
            position_ids=batch.position_ids_T[None],
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
        )
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD


class FilledByTransformers(nn.Module):
    """Goes before a transformers class whose parameters or buffers have values of their own kind."""

    whole_model: Any
    """The model that the module belongs to, whose rule fills it."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """transformers' own initial values, drawn from the generator's seed."""
        versions = {name: b._version for name, b in self._buffers.items() if b is not None}
        with torch.random.fork_rng(devices=[]):
            if generator is not None:
                torch.manual_seed(generator.initial_seed())
            self.whole_model._init_weights(self)
        for name, version in versions.items():
            buffer = self._buffers[name]
            if buffer is not None and buffer._version == version:
                raise PluginError(
                    f"model: {type(self).__name__} of transformers does not say how its buffer "
                    f"{name!r} is filled after meta initialisation; this architecture can't be used"
                )


def build_causal_lm(config: AutoModelForCausalLM.Config) -> BuiltModel:
    """The model on the current device and what the core must know of it."""
    model, published = _make(config)
    output_name, tied = _put_head(model, published)
    names = {name for name, _ in model.named_parameters()}
    layer_classes = set(getattr(model, "_no_split_modules", None) or ())
    layers = tuple(
        name for name, module in model.named_modules() if type(module).__name__ in layer_classes
    )
    if not layers:
        raise ConfigError(
            f"model.hf_config: transformers names no layers of {type(model).__name__} that may be "
            "sharded apart; this architecture can't be used"
        )
    _fill_after_meta(model)
    _extend(model, PackedCausalLM, {"output_name": output_name})
    model.initializer_range = float(published.get("initializer_range") or 0.02)
    embedding = next(
        name for name, module in model.named_modules() if module is model.get_input_embeddings()
    )
    entries = tuple(
        renamed(name, name, parameter.shape) for name, parameter in model.named_parameters()
    )
    assert names == {entry.ours for entry in entries}
    head = () if tied else (ShardUnit(output_name, reshard=False),)
    return BuiltModel(
        module=model,
        weight_map=WeightMap(
            entries, {f"{output_name}.weight": f"{embedding}.weight"} if tied else {}
        ),
        shard_units=(*(ShardUnit(path) for path in layers), *head),
        hf_config=published,
        checkpoint_units=layers,
        freeze_groups={"embeddings": (f"{embedding}.",)},
    )


def _make(config: AutoModelForCausalLM.Config) -> tuple[Any, dict[str, Any]]:
    """transformers' model and its config.json."""
    import transformers

    fields: dict[str, Any] = dict(config.hf_config)
    model_type = str(fields.pop("model_type"))
    for key in ("transformers_version", "torch_dtype", "dtype", "auto_map"):
        fields.pop(key, None)
    for key in _UNKNOWN_HEADS:
        if fields.get(key) not in (None, 1, 1.0):
            raise ConfigError(
                f"model.hf_config: {key} changes the logits in a way that is not known here; this "
                "architecture can't be used"
            )
    try:
        hf_config = transformers.AutoConfig.for_model(model_type, **fields)
        attention = choose_attention(config.attention, hf_config)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
            hf_config, attn_implementation=attention, dtype=torch.get_default_dtype()
        )
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"model.hf_config: transformers {transformers.__version__} makes no causal language "
            f"model of model_type {model_type!r}: {reason[:300]}"
        ) from error
    published = hf_config.to_dict()
    for key in ("_attn_implementation", "transformers_version", "dtype", "torch_dtype"):
        published.pop(key, None)
    return model, {**published, "architectures": [type(model).__name__], "model_type": model_type}


def _put_head(model: Any, published: Mapping[str, Any]) -> tuple[str, bool]:
    """Replace the output projection; (its path, whether it is tied to the embedding)."""
    output: Any = model.get_output_embeddings()
    if type(output) is not nn.Linear:
        raise ConfigError(
            f"model.hf_config: the output of {type(model).__name__} is {type(output).__name__}, "
            "expected a linear layer; this architecture can't be used"
        )
    name = next(path for path, module in model.named_modules() if module is output)
    tied = output.weight is model.get_input_embeddings().weight
    scale = float(published.get("logit_scale") or 1.0)
    scale /= float(published.get("logits_scaling") or 1.0)
    cap = published.get("final_logit_softcapping")
    weight: Any = None if tied else output.weight
    model.set_submodule(name, OutputHead(weight, output.bias, scale=scale, cap=cap))
    return name, tied


def _fill_after_meta(model: Any) -> None:
    """Let modules of transformers' own classes fill what `to_empty` leaves empty."""
    plain = (nn.Linear, nn.Embedding, nn.LayerNorm, OutputHead)
    for module in model.modules():
        owns = any(p is not None for p in [*module._parameters.values(), *module._buffers.values()])
        if owns and (type(module) not in plain):
            _extend(module, FilledByTransformers, {"whole_model": model})


def _extend(module: nn.Module, extension: type[nn.Module], attributes: dict[str, Any]) -> None:
    """Give the object the extension's methods; its class keeps its name, which transformers reads."""
    cls = type(module)
    module.__class__ = type(cls.__name__, (extension, cls), attributes)
