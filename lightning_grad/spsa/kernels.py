"""One pass over the parameters: add signed multiples, and optionally apply an update and return to the grid.

Three kernels behind one interface. All terms are exact in floating point (multiples of ``eps`` on the grid; integers
times a power of two), so the kernels agree bit for bit whatever their order of summation, and a self-test says so at
setup.

Bytes moved per pass: read and write of the parameters once, whatever the number of directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_grad.spsa.grid import CHUNK, ChunkSnap, snap_
from lightning_grad.spsa.layout import Layout, Storage
from lightning_grad.spsa.signs import SignStream, bit_table, sign_bytes

PASS_CHUNK = 4 * CHUNK  # of the numpy kernel: a call costs as much as thousands of elements
Weighted = tuple[int, int, float]  # (step, direction, weight): adds weight * z


@dataclass(frozen=True)
class Pass:
    """What one pass does: ``x += moves``, then, if there are ``changes``, ``x = snap(x + changes)``.

    Attributes:
        seed: Run seed.
        eps: Perturbation size; gives the grid.
        moves: Terms whose partial sums are exact on the grid.
        changes: Terms of an update; every partial sum is exact. ``None``: a move, without snap.
    """

    seed: int
    eps: float
    moves: Sequence[Weighted]
    changes: Sequence[Weighted] | None = None

    @property
    def moving(self) -> bool:
        """Whether this is a perturbation and not an update."""
        return self.changes is None


class Kernel(Protocol):
    """Carries out a pass."""

    name: str

    def run(self, layout: Layout, stores: Sequence[Storage], work: Pass, start: int, stop: int) -> None:
        """Do ``work`` on the elements with virtual index in ``[start, stop)``; ``start`` is a multiple of 256."""


class NumpyKernel:
    """CPU: Philox in numpy's C code, eight signs per table row, in chunks that stay in the cache."""

    name = "numpy"

    def run(self, layout: Layout, stores: Sequence[Storage], work: Pass, start: int, stop: int) -> None:
        """See :class:`Kernel`. Chunks are shared among ``torch.get_num_threads()`` threads."""
        threads = min(torch.get_num_threads(), (stop - start) // PASS_CHUNK)
        if threads <= 1:
            self._range(layout, stores, work, start, stop)
            return
        step = -(-(stop - start) // (threads * PASS_CHUNK)) * PASS_CHUNK
        bounds = [(b, min(b + step, stop)) for b in range(start, stop, step)]
        with ThreadPoolExecutor(len(bounds)) as pool:
            for future in [pool.submit(self._range, layout, stores, work, b, e) for b, e in bounds]:
                future.result()

    def _range(self, layout: Layout, stores: Sequence[Storage], work: Pass, start: int, stop: int) -> None:
        sums = _Sums(work.seed, [work.moves, work.changes or ()], start)
        snap = ChunkSnap(work.eps)
        arrays = [store.array() for store in stores]
        for begin in range(start, stop, PASS_CHUNK):
            size = min(PASS_CHUNK, stop - begin)
            added = sums.take(size)
            for piece in layout.pieces(begin, begin + size):
                array, chunk = arrays[piece.index], None
                if array is None:
                    chunk = stores[piece.index].load(piece.begin, piece.end, work.moving)
                    x = chunk.numpy()
                else:
                    x = array[piece.begin : piece.end]
                first = piece.virtual - begin
                for values in added:
                    np.add(x, values[first : first + x.size], out=x)
                if not work.moving:
                    snap(x)
                if chunk is not None:
                    stores[piece.index].save(piece.begin, piece.end, chunk)


class _Sums:
    """Signed sums over lists of directions, chunk after chunk; one generator per direction streams along.

    A direction may be in two lists: the last own one is taken back while its update is applied. Its bits are drawn
    once.
    """

    def __init__(self, seed: int, lists: Sequence[Sequence[Weighted]], start: int) -> None:
        lists = [terms for terms in lists if terms]
        self._sums = [np.empty((PASS_CHUNK // 8, 8), dtype=np.float32) for _ in lists]
        self._flat = [whole.reshape(-1) for whole in self._sums]
        self._next = np.empty((PASS_CHUNK // 8, 8), dtype=np.float32)
        self._index = np.empty(PASS_CHUNK // 8, dtype=np.intp)
        self._ratio = _ratio(lists)
        tables: dict[tuple[int, int], list[tuple[int, NDArray[np.float32]]]] = {}
        for number, terms in enumerate(lists if self._ratio is None else lists[:1]):
            for t, d, weight in terms:
                tables.setdefault((t, d), []).append((number, bit_table() * np.float32(weight)))
        self._streams = [(SignStream(seed, t, d, start // 256), uses) for (t, d), uses in tables.items()]

    def take(self, size: int) -> list[NDArray[np.float32]]:
        """Sums of the next ``size`` elements, for each list that is not empty; good until the next call."""
        rows, index = size // 8, self._index[: size // 8]
        started = [False] * len(self._sums)
        for stream, uses in self._streams:
            index[:] = stream.take(size)
            for number, table in uses:
                whole = self._sums[number][:rows]
                target = self._next[:rows] if started[number] else whole
                table.take(index, 0, target, "clip")  # "raise" would buffer; a byte is always a valid row
                if started[number]:
                    np.add(whole, target, out=whole)
                started[number] = True
        if self._ratio is not None:
            np.multiply(self._flat[0][:size], self._ratio, out=self._flat[1][:size])
        return self._flat


def _ratio(lists: Sequence[Sequence[Weighted]]) -> np.float32 | None:
    """Quotient of the weights of two lists that both hold the same single direction, if it is exact.

    A product costs less than a second look-up.
    """
    if [len(terms) for terms in lists] != [1, 1] or lists[0][0][:2] != lists[1][0][:2]:
        return None
    first, second = lists[0][0][2], lists[1][0][2]
    power_of_two = abs(math.frexp(first)[0]) == 0.5
    return np.float32(second / first) if power_of_two and 2.0**-100 < abs(second / first) < 2.0**100 else None


class TorchKernel:
    """Any device: Philox in int64 lanes, then the same table."""

    name = "torch"

    def run(self, layout: Layout, stores: Sequence[Storage], work: Pass, start: int, stop: int) -> None:
        """See :class:`Kernel`."""
        device = stores[0].param.device
        size = CHUNK if device.type == "cpu" else 64 * CHUNK
        table = torch.from_numpy(bit_table()).to(device)
        for begin in range(start, stop, size):
            end = min(begin + size, stop)
            added = self._sum(work.seed, work.moves, begin, end, table)
            changed = self._sum(work.seed, work.changes or (), begin, end, table)
            for piece in layout.pieces(begin, end):
                store = stores[piece.index]
                x = store.load(piece.begin, piece.end, work.moving)
                part = slice(piece.virtual - begin, piece.virtual - begin + x.numel())
                if added is not None:
                    x.add_(added[part])
                if changed is not None:
                    x.add_(changed[part])
                if not work.moving:
                    snap_(x, work.eps)
                store.save(piece.begin, piece.end, x)

    @staticmethod
    def _sum(seed: int, terms: Sequence[Weighted], begin: int, end: int, table: Tensor) -> Tensor | None:
        total: Tensor | None = None
        for t, d, weight in terms:
            rows = sign_bytes(seed, t, d, begin // 256, (end - begin) // 256, table.device)
            part = (table * weight).index_select(0, rows.int()).view(-1)
            total = part if total is None else total.add_(part)
        return total


def make_kernel(name: str) -> Kernel:
    """Kernel by name: ``"numpy"``, ``"torch"`` or ``"triton"``."""
    if name == "numpy":
        return NumpyKernel()
    if name == "torch":
        return TorchKernel()
    from lightning_grad.spsa.triton_kernel import TritonKernel

    return TritonKernel()


def self_test(kernel: Kernel, device: torch.device) -> bool:
    """Whether a kernel changes 4096 elements to the same bits as the numpy kernel."""
    values = torch.linspace(-3.0, 3.0, 4096)
    eps = 2.0**-10
    there, on, back = [(5, 1, eps)], [(5, 1, -eps), (2**40, 2**33, -eps)], [(2**40, 2**33, eps)]
    changes = [(7, 3, 3 * 2.0**-14), (2**40, 2**33, -(2.0**-14)), (8, 0, 11 * 2.0**-14)]
    results = []
    for other, place in ((NumpyKernel(), torch.device("cpu")), (kernel, device)):
        store = Storage(torch.nn.Parameter(values.clone().to(place)))
        store.snap(eps)
        layout = Layout([4096])
        for work in (Pass(9, eps, there), Pass(9, eps, on), Pass(9, eps, back, changes)):
            store.open()
            other.run(layout, [store], work, 0, layout.extent)
            store.close()
        results.append(store.param.detach().cpu())
    return torch.equal(*results)
