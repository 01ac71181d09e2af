"""One pass over the parameters: add signed multiples, and optionally apply an update and return to the grid.

Three kernels behind one interface. All terms are exact in floating point (multiples of ``eps`` on the grid; integers
times a power of two), so the kernels agree bit for bit whatever their order of summation, and a self-test says so at
setup.

Bytes moved per pass: read and write of the parameters once, whatever the number of directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_grad.spsa.grid import CHUNK, NumpySnap, snap_
from lightning_grad.spsa.layout import Layout, Storage
from lightning_grad.spsa.signs import SignStream, bit_table, sign_bytes

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
        threads = min(torch.get_num_threads(), (stop - start) // (4 * CHUNK))
        if threads <= 1:
            self._range(layout, stores, work, start, stop)
            return
        step = -(-(stop - start) // (threads * CHUNK)) * CHUNK
        bounds = [(b, min(b + step, stop)) for b in range(start, stop, step)]
        with ThreadPoolExecutor(len(bounds)) as pool:
            for future in [pool.submit(self._range, layout, stores, work, b, e) for b, e in bounds]:
                future.result()

    def _range(self, layout: Layout, stores: Sequence[Storage], work: Pass, start: int, stop: int) -> None:
        sums = _Sums(work.seed, [work.moves, work.changes or ()], start)
        snap = NumpySnap(work.eps)
        for begin in range(start, stop, CHUNK):
            size = min(CHUNK, stop - begin)
            added, changed = sums.take(size)
            for piece in layout.pieces(begin, begin + size):
                store = stores[piece.index]
                chunk = store.load(piece.begin, piece.end, work.moving)
                x = chunk.numpy()
                part = slice(piece.virtual - begin, piece.virtual - begin + len(x))
                if added is not None:
                    np.add(x, added[part], out=x)
                if changed is not None:
                    np.add(x, changed[part], out=x)
                if not work.moving:
                    snap(x)
                store.save(piece.begin, piece.end, chunk)


class _Sums:
    """Signed sums over lists of directions, chunk after chunk; one generator per direction streams along."""

    def __init__(self, seed: int, lists: Sequence[Sequence[Weighted]], start: int) -> None:
        # a direction may be in several lists: the last own one is taken back while its update is applied
        tables: dict[tuple[int, int], list[tuple[int, NDArray[np.float32]]]] = {}
        for number, terms in enumerate(lists):
            for t, d, weight in terms:
                tables.setdefault((t, d), []).append((number, bit_table() * np.float32(weight)))
        self._streams = [(SignStream(seed, t, d, start // 256), rows) for (t, d), rows in tables.items()]
        self._sums = [np.empty((CHUNK // 8, 8), dtype=np.float32) if terms else None for terms in lists]
        self._next = np.empty((CHUNK // 8, 8), dtype=np.float32)
        self._index = np.empty(CHUNK // 8, dtype=np.intp)

    def take(self, size: int) -> list[NDArray[np.float32] | None]:
        """Sums of the next ``size`` elements; ``None`` for an empty list."""
        rows, index = size // 8, self._index[: size // 8]
        started = [False] * len(self._sums)
        for stream, uses in self._streams:
            index[:] = stream.take(size)
            for number, table in uses:
                whole = self._sums[number]
                assert whole is not None, "a list with terms has a sum"
                target = self._next[:rows] if started[number] else whole[:rows]
                # mode="raise" would buffer; a byte is always a valid row
                np.take(table, index, axis=0, out=target, mode="clip")
                if started[number]:
                    np.add(whole[:rows], target, out=whole[:rows])
                started[number] = True
        return [None if whole is None else whole[:rows].reshape(-1) for whole in self._sums]


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
