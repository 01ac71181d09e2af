"""Memory that a CPU asks for and frees again in every pass stays with the process."""

from __future__ import annotations

from functools import cache

import torch

#: glibc's largest block that raises its limits is 32 MB.
_LARGEST = (1 << 25) - (1 << 16)


@cache
def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MB of freed memory.

    glibc hands memory back to the system once twice the largest block freed so far is free. In a process of small
    tensors the temporaries of a quantized layer exceed that and are faulted in again, page by page, in every pass: a
    fifth of its time. Freeing one large block, never touched, raises the limit. Other C libraries do not mind.
    """
    torch.empty(_LARGEST, dtype=torch.uint8)
