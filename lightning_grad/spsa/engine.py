"""The perturbation engine: moves parameters along shared random directions and back, exactly and in place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_grad._validate import check_choice, check_int
from lightning_grad.spsa.errors import SPSAConfigError
from lightning_grad.spsa.grid import CHUNK, digest_chunk, hash_chunks, logical
from lightning_grad.spsa.kernels import Kernel, Pass, Weighted, make_kernel, self_test
from lightning_grad.spsa.layout import Layout, Restore, Storage, clean_name, make_storage, trainable_parameters
from lightning_grad.spsa.rule import Quantized, Term, quantize

KERNELS = ("auto", "numpy", "torch", "triton")


class SPSAEngine:
    r"""Holds the trainable parameters on the grid of ``eps`` and moves them.

    At the start every parameter is rounded to the grid once. :meth:`perturb` adds multiples of ``eps * z(step,
    direction)`` (one direction may be outstanding, at plus or minus one) and :meth:`apply` takes all of them back and
    applies an update in one pass: :math:`\theta \leftarrow \mathrm{snap}(\theta - \sum_i c_i z_i)`.

    Args:
        named_parameters: Names and parameters, as from ``module.named_parameters()``; those with ``requires_grad`` are
            trained.
        seed: Run seed of the signs, in [0, 2**64).
        eps_log2: Perturbation size as a power of two, in [-20, -2].
        restore: ``"exact"`` works in place; ``"copy"`` keeps a master copy of the trainable parameters.
        kernel: ``"auto"``, ``"numpy"``, ``"torch"`` or ``"triton"``; ``"auto"`` takes the fastest that passes a bitwise
            self-test on the device.

    Raises:
        SPSAConfigError: A parameter cannot be trained, or the kernel cannot run here.

    State: ``state`` maps ``(step, direction)`` to the multiple of ``eps`` the parameters are away from the exact point.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        *,
        seed: int,
        eps_log2: int,
        restore: Restore = "exact",
        kernel: str = "auto",
    ) -> None:
        check_choice("restore", restore, ("exact", "copy"))
        check_choice("kernel", kernel, KERNELS)
        self.seed = check_int("seed", seed, 0, 2**64 - 1)
        self.eps = 2.0 ** check_int("eps_log2", eps_log2, -20, -2)
        named = trainable_parameters(named_parameters)
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self.restore_mode = restore
        self.layout = Layout([p.numel() for p in self.params])
        self.device = self.params[0].device
        self.kernel = _choose_kernel(kernel, self.device)
        self.state: dict[tuple[int, int], int] = {}
        # the fingerprint names the weights as they came, before the grid
        self.base = hash_chunks(chunk for p in self.params for chunk in logical(p).split(16 * CHUNK))
        self.stores = [make_storage(p, restore) for p in self.params]
        for store in self.stores:
            store.snap(self.eps)
        self.check_limit()

    @property
    def specification(self) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """``(name, shape, dtype)`` of each parameter, as in a journal header."""
        rows = zip(self.names, self.params, strict=True)
        return tuple((name, tuple(p.shape), str(p.dtype).removeprefix("torch.")) for name, p in rows)

    def perturb(self, terms: Sequence[tuple[int, int, int]]) -> None:
        """Add ``multiple * eps * z(step, direction)`` for each ``(step, direction, multiple)``, in one pass."""
        moves: dict[tuple[int, int], int] = {}
        for step, direction, multiple in terms:  # one look-up for a direction that is named twice
            moves[step, direction] = moves.get((step, direction), 0) + multiple
        total = {key: self.state.get(key, 0) + moves.get(key, 0) for key in {**self.state, **moves}}
        total = {key: multiple for key, multiple in total.items() if multiple}
        if sum(map(abs, total.values())) > 1:
            raise ValueError(f"the grid holds one direction at a time, at +1 or -1 eps; this would be {total}.")
        self.state = total
        wanted = self.state if self.restore_mode == "copy" else moves
        self._run([(t, d, self.eps * multiple) for (t, d), multiple in wanted.items() if multiple])

    def restore(self) -> None:
        """Return to the exact point; nothing happens if the parameters are there."""
        if self.state:
            self.perturb([(t, d, -multiple) for (t, d), multiple in self.state.items()])

    def apply(self, terms: Sequence[Term], restore_direction: tuple[int, int] | None = None) -> bool:
        r"""Return to the exact point and apply :math:`-\sum_i c_i z_i` in the same pass.

        Args:
            terms: ``(step, direction, coefficient)``.
            restore_direction: The direction the caller believes is outstanding; checked if given. All that are
                outstanding are taken back in any case.

        Returns:
            Whether an update was applied (coefficients may all be zero or too small).

        Raises:
            OverflowError: A coefficient is not finite or too large; the parameters are back at the exact point.
        """
        if restore_direction is not None and restore_direction not in self.state:
            raise ValueError(
                f"`restore_direction` {restore_direction} is not outstanding; these are: {list(self.state)}."
            )
        try:
            quantized = quantize(terms)
        except OverflowError:
            self.restore()
            raise
        return self.apply_quantized(quantized)

    def apply_quantized(self, quantized: Quantized | None) -> bool:
        """:meth:`apply` for coefficients that are integers already; ``None`` only restores."""
        if quantized is None:
            self.restore()
            return False
        moves = self._way_back()
        self.state.clear()
        self._run(moves, changes(quantized))
        return True

    def digest64(self) -> int:
        """Digest of the exact point (the perturbation is taken back first)."""
        self.restore()
        total = 0
        for index, begin, chunk in self._chunks():
            total += digest_chunk(chunk, self.layout.offsets[index] + begin)
        return total & ((1 << 64) - 1)

    def preview_digest(self, quantized: Quantized | None) -> int:
        """The digest that :meth:`apply_quantized` would lead to; nothing is changed."""
        if quantized is None:
            return self.digest64()
        shadows = [_Shadow(store, offset) for store, offset in zip(self.stores, self.layout.offsets, strict=True)]
        self._pass(shadows, self._way_back(), changes(quantized))
        return sum(part for shadow in shadows for part in shadow.parts) & ((1 << 64) - 1)

    @torch.no_grad()
    def reset(self, values: Sequence[Tensor]) -> None:
        """Go back to base weights, as at the start."""
        self.state.clear()
        for p, value, store in zip(self.params, values, self.stores, strict=True):
            p.detach().copy_(value)
            store.load_extra_state(None)
            store.snap(self.eps)

    def fingerprint(self) -> str:
        """SHA-256 of the exact point."""
        self.restore()
        return hash_chunks(chunk for _, _, chunk in self._chunks())

    def check_limit(self) -> None:
        """Raise ``SPSAConfigError`` if a parameter is so large that a move by ``eps`` could round."""
        largest = [0.0] * len(self.params)
        for index, _, chunk in self._chunks():
            value = float(chunk.abs().max())
            largest[index] = value if math.isnan(value) else max(value, largest[index])
        for name, value, store in zip(self.names, largest, self.stores, strict=True):
            if not value < store.limit(self.eps):
                needed = 2.0 ** math.ceil(math.log2(value / store.limit(1.0)) + 1e-9) if math.isfinite(value) else value
                raise SPSAConfigError(
                    f"parameter {name} holds {value:.4g}, which is too large for eps {self.eps:g}; use eps >="
                    f" {needed:.3g} or freeze it."
                )

    def extra_state(self) -> dict[str, Tensor]:
        """What the parameters themselves do not hold (low halves of bfloat16, master copies), by name."""
        pairs = ((name, store.extra_state()) for name, store in zip(self.names, self.stores, strict=True))
        return {name: state for name, state in pairs if state is not None}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take back :meth:`extra_state`; call it after the parameters were loaded. Nothing is outstanding then."""
        self.state.clear()
        for name, store in zip(self.names, self.stores, strict=True):
            store.load_extra_state(state.get(name))

    def exact_state(self) -> dict[str, Tensor]:
        """Flat exact values by name (copies), in float32 or float64."""
        self.restore()
        parts: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for index, _, chunk in self._chunks():
            parts[self.names[index]].append(chunk.clone())
        return {name: torch.cat(chunks) for name, chunks in parts.items() if chunks}

    def rebind(self, named: Iterable[tuple[str, Any]]) -> bool:
        """Follow parameters that were replaced by other objects of the same shape; returns whether any was."""
        current = {clean_name(name): p for name, p in named}
        changed = False
        for index, name in enumerate(self.names):
            new = current.get(name)
            if new is not None and new is not self.params[index]:
                self.params[index] = self.stores[index].param = new
                changed = True
        return changed

    def _way_back(self) -> list[Weighted]:
        """Moves to the exact point; a master copy is there already."""
        copying = self.restore_mode == "copy"
        return [] if copying else [(t, d, -self.eps * multiple) for (t, d), multiple in self.state.items()]

    def _run(self, moves: Sequence[Weighted], changes: Sequence[Weighted] | None = None) -> None:
        if not moves and changes is None and self.restore_mode != "copy":
            return
        self._pass(self.stores, moves, changes)

    @torch.no_grad()
    def _pass(self, stores: Sequence[Storage], moves: Sequence[Weighted], changes: Sequence[Weighted] | None) -> None:
        for store in stores:
            store.open()
        try:
            self.kernel.run(self.layout, stores, Pass(self.seed, self.eps, moves, changes), 0, self.layout.extent)
        finally:
            for store in stores:
                store.close()

    @torch.no_grad()
    def _chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        for index, store in enumerate(self.stores):
            store.open()
            for begin in range(0, store.param.numel(), 16 * CHUNK):
                yield index, begin, store.load(begin, min(begin + 16 * CHUNK, store.param.numel()), moving=True)
            store.close()


class _Shadow(Storage):
    """Lets a pass run on copies of a parameter's chunks and keeps their digests only."""

    def __init__(self, inner: Storage, offset: int) -> None:
        super().__init__(inner.param)
        self._inner, self._offset = inner, offset
        self.parts: list[int] = []

    def open(self) -> None:
        self._inner.open()

    def close(self) -> None:
        self._inner.close()

    def load(self, begin: int, end: int, moving: bool) -> Tensor:
        return self._inner.load(begin, end, moving=True).clone()

    def save(self, begin: int, end: int, chunk: Tensor) -> None:
        self.parts.append(digest_chunk(chunk, self._offset + begin))


def changes(quantized: Quantized) -> list[Weighted]:
    """Weights of a pass for an update: integers times a power of two, so exact as floats."""
    scale = -(2.0**quantized.exponent)
    return [(t, d, scale * q) for (t, d), q in zip(quantized.directions, quantized.integers, strict=True)]


def _choose_kernel(name: str, device: torch.device) -> Kernel:
    if name == "auto":
        if device.type == "cpu":
            return make_kernel("numpy")
        for candidate in ("triton", "torch"):
            try:
                kernel = make_kernel(candidate)
                if self_test(kernel, device):
                    return kernel
                reason = "its results differ from the reference"
            except Exception as error:  # an optional kernel may fail in ways we cannot list
                reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"SPSA: the {candidate} kernel does not work on {device} ({reason}).", stacklevel=3)
        raise SPSAConfigError(f"SPSA: no kernel works on {device}.")
    if name == "numpy" and device.type != "cpu":
        raise SPSAConfigError(f'`kernel="numpy"` needs parameters on the CPU, got {device}; use "auto".')
    try:
        kernel = make_kernel(name)
    except ImportError as error:
        raise SPSAConfigError(
            f'`kernel="{name}"` needs Triton: pip install "lightning-grad[triton]". ({error})'
        ) from None
    if name != "numpy" and not self_test(kernel, device):
        raise SPSAConfigError(f'`kernel="{name}"` gives wrong bits on {device}; use "auto".')
    return kernel
