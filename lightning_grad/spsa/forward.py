"""Forward passes of one slot that differ in the parameters only: same mode, same random numbers, same buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_grad.random import philox4x64_stream
from lightning_grad.spsa.signs import SIGN_TAG


class Forwards:
    """Runs the forwards of a slot alike.

    ``"eval"``: every submodule is in evaluation mode (no dropout, batch norm with its running statistics), and the
    forwards of a slot see the same state of torch's random numbers. ``"train"``: modules keep their mode; the
    generators are seeded from ``(seed, step, direction)`` before each forward and put back after the slot, and so are
    all buffers.

    Args:
        module: The model.
        mode: ``"eval"`` or ``"train"``.
        device: Whose generator is kept in step besides the CPU's.
    """

    def __init__(self, module: nn.Module, mode: str, device: torch.device) -> None:
        self._module, self._mode, self._device = module, mode, device

    @contextmanager
    def slot(self, seed: int, step: int, direction: int) -> Iterator[Callable[[], None]]:
        """Context of one slot; call what it yields before each forward."""
        outer = self._random_state()
        if self._mode == "train":
            word = int(philox4x64_stream((seed, SIGN_TAG), (0, 1, step, direction), 1)[0])
            buffers = [(b, b.detach().clone()) for b in self._module.buffers()]

            def before() -> None:
                torch.clear_autocast_cache()
                self._seed(word)
                for buffer, saved in buffers:
                    buffer.copy_(saved)

            try:
                yield before
            finally:
                self._set_random_state(outer)
                with torch.no_grad():
                    for buffer, saved in buffers:
                        buffer.copy_(saved)
            return

        flags = [(m, m.training) for m in self._module.modules()]
        first = True

        def again() -> None:
            nonlocal first
            # a cast cached by autocast would hide the change of a parameter
            torch.clear_autocast_cache()
            if not first:
                self._set_random_state(outer)
            first = False

        try:
            for m, _ in flags:
                m.training = False
            yield again
        finally:
            for m, training in flags:
                m.training = training

    def _random_state(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return torch.get_rng_state(), cuda

    def _set_random_state(self, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self._device)

    def _seed(self, word: int) -> None:
        torch.default_generator.manual_seed(word)
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                torch.cuda.manual_seed(word)
