"""Fresh weights that depend on the run's seed and a module's name, and on nothing else.

Every module draws its whole tensors on the CPU in float32 (float64 for float64 parameters) from a
generator seeded by (seed, module name); a rank keeps its own slice. So world size, sharding,
device, order of modules and compute dtype change nothing.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from pegboard.errors import PluginError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pegboard.weight_map import Box

__all__ = ["init_module_weights", "local_box", "local_part", "plain_name", "unfilled_tensors"]

_DEFAULT_RANGE = 0.02
_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")


def init_module_weights(
    module: nn.Module, seed: int, *, skip: Collection[str] = frozenset()
) -> None:
    """Fill every parameter in place. No communication.

    A module with `reset_parameters(generator)` draws its own parameters and buffers: the method
    must use that generator for every draw. Others get biases 0, vectors (norms) 1 and the rest
    normal(0, range), where range is the nearest `initializer_range` attribute of the module or a
    module around it, else 0.02.

    Args:
        module: allocated (not meta), plain or sharded, all tensors on any device.
        seed: the run's seed.
        skip: parameter names that are filled by other means; a module all of whose parameters are
            named is left alone. Never changes what the other modules get.

    Raises:
        PluginError: a module has a buffer but no `reset_parameters(generator)` to fill it, so that
            what is in it after meta initialisation is garbage.
    """
    import torch

    ranges = {"": float(getattr(module, "initializer_range", _DEFAULT_RANGE))}
    with torch.no_grad():
        for raw_name, owner in module.named_modules():
            name = plain_name(raw_name)
            around = ranges[plain_name(raw_name.rpartition(".")[0])]
            ranges[name] = float(getattr(owner, "initializer_range", around))
            prefix = name + "." if name else ""
            parameters = {key: p for key, p in owner._parameters.items() if p is not None}
            wanted = [key for key in parameters if prefix + key not in skip]
            if wanted or any(buffer is not None for buffer in owner._buffers.values()):
                _init_one(owner, name, parameters, ranges[name], _generator(seed, name))


def plain_name(name: str) -> str:
    """Module or parameter name without what wrappers (activation checkpointing, compile) put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def local_box(tensor: Tensor) -> Box:
    """(start, stop) of this rank's part, for every dim; a plain tensor is its own whole."""
    if not hasattr(tensor, "device_mesh"):
        return tuple((0, size) for size in tensor.shape)
    # NOTE: the only reader of nested (strided) shards that torch offers; semi-public, same in 2.11
    # to 2.13.
    chunk = tensor.__create_chunk_list__()[0]  # type: ignore[attr-defined]
    return tuple((o, o + size) for o, size in zip(chunk.offsets, chunk.sizes, strict=True))


def local_part(tensor: Tensor) -> Tensor:
    """The storage of this rank's part, detached; writing to it writes to `tensor`."""
    if hasattr(tensor, "device_mesh"):
        return tensor._local_tensor.detach()  # type: ignore[attr-defined, no-any-return]
    return tensor.detach()


def unfilled_tensors(module: nn.Module) -> list[str]:
    """Floats of a module's own that its `reset_parameters(generator)` does not fill; none without one.

    NOTE: what is not filled holds zeros (a buffer) or garbage (a parameter) after `init_module_weights`.
    """
    import torch

    if not _draws_by_generator(module):
        return []
    nan = float("nan")
    parameters, buffers = (
        {
            key: torch.full(t.shape, nan)
            for key, t in own.items()
            if t is not None and t.is_floating_point()
        }
        for own in (module._parameters, module._buffers)
    )
    others = {
        k: torch.zeros(b.shape, dtype=b.dtype) for k, b in module._buffers.items() if b is not None
    }
    buffers = {**others, **buffers}
    _stand_in(module, parameters, buffers).reset_parameters(_generator(0, ""))
    return [key for key, t in {**parameters, **buffers}.items() if not torch.isfinite(t).all()]


def _init_one(
    owner: nn.Module,
    name: str,
    parameters: dict[str, nn.Parameter],
    std: float,
    generator: torch.Generator,
) -> None:
    import torch

    drawn = {
        key: torch.empty(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device="cpu")
        for key, p in parameters.items()
    }
    buffers = {key: b for key, b in owner._buffers.items() if b is not None}
    if _draws_by_generator(owner):
        drawn_buffers = {key: torch.zeros(b.shape, dtype=b.dtype) for key, b in buffers.items()}
        _stand_in(owner, drawn, drawn_buffers).reset_parameters(generator)
        for key, buffer in buffers.items():
            buffer.copy_(drawn_buffers[key])
    elif buffers:
        raise PluginError(
            f"{name} ({type(owner).__name__}): buffer {next(iter(buffers))!r} has no value after "
            "meta initialisation; give the module a reset_parameters(generator) that fills it, or "
            "compute it in forward"
        )
    else:
        for key, tensor in drawn.items():
            if key.rpartition("_")[2] == "bias":
                tensor.zero_()
            elif tensor.ndim <= 1:
                tensor.fill_(1.0)
            else:
                tensor.normal_(0.0, std, generator=generator)
    for key, parameter in parameters.items():
        region = tuple(slice(start, stop) for start, stop in local_box(parameter))
        local_part(parameter).copy_(drawn[key][region])


def _generator(seed: int, name: str) -> torch.Generator:
    import torch

    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _draws_by_generator(owner: nn.Module) -> bool:
    method = getattr(owner, "reset_parameters", None)
    return method is not None and "generator" in inspect.signature(method).parameters


def _stand_in(owner: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
    # The same object with whole CPU tensors in place of its (perhaps sharded) own. Not copy.copy: a
    # module that FSDP has taken over re-runs __init__ when it is copied.
    from torch import nn

    stand_in = object.__new__(type(owner))
    stand_in.__dict__.update(owner.__dict__)
    stand_in.__dict__["_parameters"] = {
        **owner._parameters,
        **{key: nn.Parameter(tensor, requires_grad=False) for key, tensor in parameters.items()},
    }
    stand_in.__dict__["_buffers"] = {**owner._buffers, **buffers}
    return stand_in
