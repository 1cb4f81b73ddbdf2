"""Memory that was freed stays with the process, for the next tensor of its size."""

import ctypes

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
