"""glibc's memory allocator, told to keep what is freed."""

import ctypes
import sys
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_BYTES = 1 << 28


def keep_freed_memory() -> None:
    """Keep freed blocks up to a quarter of a GiB for the next allocation; nothing happens where there is no glibc.

    Every operation on a CPU allocates its result. glibc gives blocks of megabytes back to the kernel when they are
    freed, and the next step pays for clean pages again: a fifth of a small model's time.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_MMAP_THRESHOLD, _BYTES)
            libc.mallopt(_TRIM_THRESHOLD, _BYTES)
