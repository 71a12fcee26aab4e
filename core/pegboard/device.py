"""The one seam to the hardware: which device, which backend, how much memory.

Nothing else in the core asks `torch.cuda`.
"""

from __future__ import annotations

import os
import resource

import torch

from pegboard.errors import ConfigError

__all__ = [
    "communication_backend",
    "default_compute_dtype",
    "device_memory_bytes",
    "device_name",
    "local_device",
    "peak_memory_gib",
    "random_states",
    "set_random_state",
    "takes_pinned_memory",
    "use_all_cores",
]


def local_device() -> torch.device:
    """Device of this process, made current: the local rank's GPU, else the CPU.

    Raises:
        ConfigError: more local ranks than GPUs.
    """
    if torch.cuda.is_available():
        index, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if index >= gpus:
            raise ConfigError(
                f"torchrun: local rank {index} has no GPU, this machine shows {gpus}; "
                f"start it with --nproc-per-node {gpus}"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def communication_backend(device: torch.device) -> str:
    """Backend of the process group; host tensors always go through gloo."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def default_compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def device_memory_bytes(device: torch.device) -> int:
    """Total memory of the device; of the machine, shared by its local ranks, on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory since the start: allocated on the GPU, resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def takes_pinned_memory(device: torch.device) -> bool:
    """Copies to the device are faster, and wait for nothing, from page-locked memory."""
    return device.type == "cuda"


def device_name(device: torch.device) -> str:
    """What the device calls itself, for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def random_states() -> dict[str, torch.Tensor]:
    """uint8 state of torch's generator of each device type in use, by type."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(device_type: str, state: torch.Tensor) -> None:
    """Put back one of `random_states`."""
    if device_type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state)


def use_all_cores() -> None:
    """Undo torchrun's OMP_NUM_THREADS=1 on the CPU: share the machine's cores among its local ranks."""
    if not torch.cuda.is_available() and "LOCAL_WORLD_SIZE" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
