"""Products of NVFP4 operands by the tiles of a CPU that multiply bf16: exact, and three times as fast as in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

_onednn: Any = torch.backends.mkldnn
#: Whether the tiles are there (AMX). Versions of torch that cannot say cannot use them from fp32 either.
TILES: bool = (
    hasattr(torch.cpu, "get_capabilities")
    and hasattr(_onednn, "matmul")
    and torch.cpu.get_capabilities().get("amx_bf16", False)
)
_lock = Lock()
_inside = 0
_before = ""


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products in here may be computed as bf16 products summed in fp32.

    Only for numbers that bf16 holds exactly, as operands are: then the order of the sums is all that changes. The
    setting is the process's, so it lasts no longer than the product, and the last thread to leave puts it back. Until
    then a float32 product of another Python thread is rounded to bf16 too.
    """
    if not TILES:
        yield
        return
    global _inside, _before
    setting = _onednn.matmul
    with _lock:
        if not _inside:
            _before = setting.fp32_precision
            setting.fp32_precision = "bf16"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                setting.fp32_precision = _before
