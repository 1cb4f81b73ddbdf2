"""Memory: what was freed stays with the process, and what to do when there is not enough."""

import ctypes
import gc

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's M_* constants, see mallopt(3)
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Ask glibc's malloc not to hand large blocks back to the kernel.

    A training step frees and allocates its gradients and activations anew, each a block of megabytes that
    malloc maps and unmaps: the kernel zeroes every page again, a quarter of a step of SmolLM2-135M on two cores.
    The process keeps its peak size instead. Another C library has no such switch and is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER)


_LACKING = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
"""What torch's CPU allocator, cuBLAS and CUDA itself say, by a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or a library on it, torch's allocator on a CPU, or Python had no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _LACKING)


def release_memory() -> None:
    """Give up tensors that only a caught error still held, and what a GPU's allocator keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_gpu_bytes(device: torch.device) -> int | None:
    """The most that tensors took on a GPU at a time since the last call; None for a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
