"""Host memory settings of a worker process."""

import ctypes
import logging

import pyarrow as pa

logger = logging.getLogger(__name__)

# Parameter numbers of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "THP_MEM_ALLOC_ENABLE": "1"}
"""For the start of a worker process: one arena (see `keep_freed_memory`), and torch asks for pages
of 2 MiB for its large CPU tensors. Lookups in tables and passes over activations then miss the
translation cache less: bf16 steps on CPU were 3 to 15% faster (benchmarks/training.py)."""
_HEAP_BLOCK_BYTES = 32 << 20
"""Blocks up to this size come from the heap; glibc accepts no more."""
_KEEP_BYTES = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Let the process keep freed memory up to 2 GiB instead of giving it back at once.

    Activations and column chunks are blocks of megabytes that are freed and allocated again every
    step. By default glibc and Arrow's own allocator return them to the kernel, and every page must
    be faulted in and zeroed again: on virtual machines that costs more than the work itself. One
    arena for all threads and for Arrow lets the loader and the trainer reuse each other's blocks.

    Call it once, at the start of a worker, before it starts threads: a thread keeps the arena it
    has, and arenas other than the first give memory back. Where other libraries start threads
    first (Ray does), start them with WORKER_ENVIRONMENT as well.

    Returns:
        Whether the C library took the settings; others than glibc do not know them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        logger.info("this C library has no mallopt: freed memory goes back to the kernel")
        return False
    settings = (
        (_M_ARENA_MAX, 1),
        (_M_TRIM_THRESHOLD, _KEEP_BYTES),
        (_M_MMAP_THRESHOLD, _HEAP_BLOCK_BYTES),
    )
    taken = all(mallopt(parameter, value) == 1 for parameter, value in settings)
    pa.set_memory_pool(pa.system_memory_pool())
    return taken
