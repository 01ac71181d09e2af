"""Which parameters are trained, where each lies in the virtual index, and how its exact value is stored.

Parameter ``i`` starts at the first multiple of 256 behind parameter ``i - 1``; element ``m`` in row-major order has
virtual index ``offset + m``, whatever the strides. The padding between parameters is never used.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_grad.spsa.errors import SPSAConfigError
from lightning_grad.spsa.grid import LIMIT_LOG2, snap_
from lightning_grad.spsa.signs import BLOCK

Restore = Literal["exact", "copy"]
_SUPPORTED = (torch.float32, torch.float64, torch.bfloat16)


@dataclass(frozen=True)
class Piece:
    """Elements ``begin..end`` of parameter ``index``; the first has virtual index ``virtual``."""

    index: int
    begin: int
    end: int
    virtual: int


class Layout:
    """Virtual offsets of a list of parameters.

    Args:
        numels: Elements per parameter, in list order.

    Attributes:
        offsets: First virtual index of each parameter.
        extent: End of the virtual index, a multiple of 256.
        numel: Trainable elements, without padding.
    """

    def __init__(self, numels: Sequence[int]) -> None:
        self.numels = list(numels)
        self.offsets: list[int] = []
        self.extent = 0
        for numel in self.numels:
            self.offsets.append(self.extent)
            self.extent += -(-numel // BLOCK) * BLOCK
        self.numel = sum(self.numels)

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Parts of parameters with virtual index in ``[start, stop)``, in order."""
        first = max(bisect_right(self.offsets, start) - 1, 0)
        for index in range(first, len(self.offsets)):
            offset, numel = self.offsets[index], self.numels[index]
            if offset >= stop:
                return
            begin, end = max(start, offset) - offset, min(stop, offset + numel) - offset
            if begin < end:
                yield Piece(index, begin, end, offset + begin)


def select_trainable(named: Iterable[tuple[str, torch.nn.Parameter]], patterns: Sequence[str] | None) -> None:
    """Set ``requires_grad`` by name: parameters that match a pattern are trained, all others are frozen.

    Args:
        named: Names and parameters.
        patterns: ``fnmatch`` patterns; ``None`` leaves the flags as they are.

    Raises:
        SPSAConfigError: A pattern matches nothing.
    """
    if patterns is None:
        return
    pairs = [(clean_name(name), p) for name, p in named]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name, _ in pairs):
            raise SPSAConfigError(
                f"`trainable`: no parameter matches {pattern!r}. The first names are: "
                + ", ".join(name for name, _ in pairs[:20])
                + "."
            )
    for name, p in pairs:
        wanted = any(fnmatchcase(name, pattern) for pattern in patterns)
        if p.dtype.is_floating_point or not wanted:
            p.requires_grad_(wanted)


def trainable_parameters(named: Iterable[tuple[str, torch.nn.Parameter]]) -> list[tuple[str, Tensor]]:
    """The parameters to train, checked; tied ones once, under their first name.

    Raises:
        SPSAConfigError: None is left, or one has a type that cannot be perturbed exactly.
    """
    out: list[tuple[str, Tensor]] = []
    names: list[str] = []
    seen: set[int] = set()
    for name, p in named:
        names.append(clean_name(name))
        if p.requires_grad and id(p) not in seen:
            seen.add(id(p))
            _check_parameter(names[-1], p)
            out.append((names[-1], p))
    if not out:
        raise SPSAConfigError(
            "SPSA found no trainable parameter. Set `trainable` to patterns of names, or requires_grad on some of: "
            + ", ".join(names[:20])
            + "."
        )
    devices = {p.device for _, p in out}
    if len(devices) > 1:
        raise SPSAConfigError(f"SPSA needs all trainable parameters on one device, got {sorted(map(str, devices))}.")
    return out


def clean_name(name: str) -> str:
    """Name without the prefixes that ``torch.compile`` adds."""
    return name.replace("_orig_mod.", "")


def _check_parameter(name: str, p: Tensor) -> None:
    if type(p).__name__ == "DTensor" or p.is_meta or p.layout != torch.strided:
        kind = "sharded" if type(p).__name__ == "DTensor" else "meta" if p.is_meta else "sparse"
        raise SPSAConfigError(f"SPSA cannot train `{name}`: it is {kind}. Freeze it, or keep it whole on one device.")
    if p.dtype not in _SUPPORTED:
        raise SPSAConfigError(
            f"SPSA cannot train `{name}` of dtype {p.dtype}. Use float32, float64 or bfloat16 parameters"
            ' (precision "16-mixed" keeps them in float32), or freeze it.'
        )


class Storage:
    """Exact value of one parameter, in flat float32 or float64 chunks.

    ``load`` gives a chunk to compute on and ``save`` takes it back; for a plain parameter the chunk is a view.
    """

    def __init__(self, param: Tensor) -> None:
        self.param = param
        self._dense: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the logical value."""
        return torch.float64 if self.param.dtype == torch.float64 else torch.float32

    def open(self) -> None:
        """Start a pass. A parameter that is not contiguous is worked on in a row-major copy."""
        self._dense = self.param.detach()
        self._dense = self._dense.view(-1) if self._dense.is_contiguous() else self._dense.reshape(-1)

    def close(self) -> None:
        """End a pass."""
        if self._dense is not None and not self.param.is_contiguous():
            self.param.detach().copy_(self._dense.view(self.param.shape))
        if not self.param.is_inference():  # numpy and Triton write behind autograd's back; caches of weights look at it
            torch.autograd.graph.increment_version(self.param)
        self._dense = None

    @property
    def flat(self) -> Tensor:
        """The parameter's elements during a pass."""
        assert self._dense is not None, "Storage.open() comes first"
        return self._dense

    def array(self) -> NDArray[np.floating[Any]] | None:
        """During a pass on the CPU: the logical value itself, to be changed in place; ``None``: only by chunks."""
        return self.flat.numpy() if type(self) is Storage else None

    def load(self, begin: int, end: int, moving: bool) -> Tensor:
        """Chunk of the logical value; ``moving`` says that a perturbation follows, not an update."""
        return self.flat[begin:end]

    def save(self, begin: int, end: int, chunk: Tensor) -> None:
        """Store a chunk that ``load`` gave and the caller changed."""

    def snap(self, eps: float) -> None:
        """Round the logical value to the grid, once, at the start."""
        self.open()
        for begin in range(0, self.param.numel(), 1 << 20):
            end = min(begin + (1 << 20), self.param.numel())
            chunk = self.load(begin, end, moving=False)
            snap_(chunk, eps)
            self.save(begin, end, chunk)
        self.close()

    def limit(self, eps: float) -> float:
        """Largest magnitude at which moves by ``eps`` are exact."""
        return float(2.0 ** LIMIT_LOG2[self.dtype] * eps)

    def extra_state(self) -> Tensor | None:
        """What the parameter itself does not hold."""
        return None

    def load_extra_state(self, state: Tensor | None) -> None:
        """Take back :meth:`extra_state`; ``None`` derives it from the parameter."""


class SplitStorage(Storage):
    """A bfloat16 parameter and 16 more bits beside it: together a float32, at two bytes per element.

    ``bits = (hi << 16) + lo``; storing rounds half up, so that ``lo`` always fits into int16 (nearest-even would give
    +32768 at a tie).
    """

    def __init__(self, param: Tensor) -> None:
        super().__init__(param)
        self.low = torch.zeros(param.numel(), dtype=torch.int16, device=param.device)

    def load(self, begin: int, end: int, moving: bool) -> Tensor:  # noqa: D102
        high = self.flat[begin:end].view(torch.int16).to(torch.int32)
        return ((high << 16) + self.low[begin:end]).view(torch.float32)

    def save(self, begin: int, end: int, chunk: Tensor) -> None:  # noqa: D102
        bits = chunk.view(torch.int32)
        high = (bits + 0x8000) >> 16
        self.flat[begin:end].view(torch.int16).copy_(high)
        self.low[begin:end].copy_(bits - (high << 16))

    def extra_state(self) -> Tensor | None:  # noqa: D102
        return self.low.cpu().clone()

    def load_extra_state(self, state: Tensor | None) -> None:  # noqa: D102
        if state is None:
            self.low.zero_()
        else:
            self.low.copy_(state)


class CopyStorage(Storage):
    """A float32 (or float64) master copy; the parameter is only ever written, as master plus perturbation."""

    def __init__(self, param: Tensor) -> None:
        super().__init__(param)
        self.master = param.detach().to(self.dtype, copy=True).reshape(-1).clone()

    def load(self, begin: int, end: int, moving: bool) -> Tensor:  # noqa: D102
        chunk = self.master[begin:end]
        return chunk.clone() if moving else chunk

    def save(self, begin: int, end: int, chunk: Tensor) -> None:  # noqa: D102
        self.flat[begin:end].copy_(chunk)

    def extra_state(self) -> Tensor | None:  # noqa: D102
        return self.master.cpu().clone() if self.param.dtype != self.master.dtype else None

    def load_extra_state(self, state: Tensor | None) -> None:  # noqa: D102
        self.master.copy_(self.param.detach().reshape(-1) if state is None else state)


def make_storage(param: Tensor, restore: Restore) -> Storage:
    """Storage for a checked parameter."""
    if restore == "copy":
        return CopyStorage(param)
    return SplitStorage(param) if param.dtype == torch.bfloat16 else Storage(param)
