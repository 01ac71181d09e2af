"""Bytes among the processes of a fixed group, over ``torch.distributed`` with gloo: host scalars never touch NCCL."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist


class Exchange:
    """All-gathers small byte strings; a single process gets its own back.

    Args:
        timeout: Of one collective; ``None`` is torch's default.

    Attributes:
        sent: Payload bytes this process sent in the last collective.
        received: Payload bytes it got in the last collective (its own included).
        waited_s: Time spent in the last collective.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self.active = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.active else 0
        self.size = dist.get_world_size() if self.active else 1
        self._group = dist.new_group(backend="gloo", timeout=timeout) if self.active else None
        self.sent = self.received = 0
        self.waited_s = 0.0

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Payloads of all ranks, in rank order. All must have the same length."""
        self.sent, self.received, self.waited_s = len(payload), len(payload) * self.size, 0.0
        if not self.active:
            return [payload]
        start = time.perf_counter()
        mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        parts: list[Tensor] = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self._group)
        self.waited_s = time.perf_counter() - start
        return [bytes(part.numpy().tobytes()) for part in parts]

    def all_gather_any(self, payload: bytes) -> list[bytes]:
        """Payloads of all ranks, of any length; two collectives."""
        lengths = [int.from_bytes(part, "little") for part in self.all_gather(len(payload).to_bytes(8, "little"))]
        padded = self.all_gather(payload.ljust(max(max(lengths), 1), b"\0"))
        return [part[:length] for part, length in zip(padded, lengths, strict=True)]

    def broadcast_module(self, module: torch.nn.Module) -> None:
        """Copy parameters and buffers of rank 0 to all ranks."""
        if not self.active:
            return
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                plain = tensor.detach()
                whole = plain.contiguous()
                dist.broadcast(whole, src=0)
                if whole.data_ptr() != plain.data_ptr():
                    plain.copy_(whole)
