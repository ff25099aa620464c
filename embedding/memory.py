"""Host memory settings of a worker process."""

import ctypes
import logging

logger = logging.getLogger(__name__)

# Parameter numbers of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_HEAP_BLOCK_BYTES = 32 << 20
"""Blocks up to this size come from the heap; glibc accepts no more."""
_KEEP_BYTES = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Let the process keep freed memory up to 2 GiB instead of giving it back at once.

    Activations and column chunks are blocks of megabytes that are freed and allocated again every
    step. By default glibc returns them to the kernel each time, and every page must be faulted in
    and zeroed again: on virtual machines that costs more than the step's own work. Call it once,
    at the start of a worker.

    Returns:
        Whether the C library took the settings; others than glibc do not know them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        logger.info("this C library has no mallopt: freed memory goes back to the kernel")
        return False
    kept = mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES) == 1
    return kept and mallopt(_M_MMAP_THRESHOLD, _HEAP_BLOCK_BYTES) == 1
