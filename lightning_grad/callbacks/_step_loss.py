"""The loss of ``training_step`` once more, as a function of batch or parameters, without a trace in the module."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.func import functional_call
from torchmetrics import Metric

from lightning_grad.statistics.sample_grads import SampleLoss

_OF_TORCH = frozenset(vars(nn.Module()))  # parameters, buffers, submodules, hooks


@contextmanager
def undisturbed(pl_module: pl.LightningModule) -> Iterator[None]:
    """Logging does nothing, and on leaving all modules have the attributes of before, metrics' states included.

    So have their lists, dicts, sets and deques, however nested, the items of before. Out of reach: what is kept in
    class attributes, globals, or objects of other kinds.
    """
    kept = [(vars(m), {k: _copied(m, v) for k, v in vars(m).items()}) for m in pl_module.modules()]
    items: dict[int, tuple[Any, Any]] = {}
    for _, before in kept:
        for name, value in before.items():
            if name not in _OF_TORCH:
                _note_items(value, items)
    own = vars(pl_module)
    own["log"] = own["log_dict"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for now, before in kept:
            for name in now.keys() - before.keys():
                del now[name]
            now.update(before)
        for container, content in items.values():
            container.clear()
            (container.update if isinstance(container, dict | set) else container.extend)(content)


def _copied(module: nn.Module, value: Any) -> Any:
    # metrics add to their states in place
    return value.detach().clone() if isinstance(value, Tensor) and isinstance(module, Metric) else value


def _note_items(value: Any, items: dict[int, tuple[Any, Any]]) -> None:
    """Add ``value`` and the containers in it to ``items``: by id, each with what it holds."""
    if not isinstance(value, list | dict | set | deque) or id(value) in items:
        return
    content = dict(value) if isinstance(value, dict) else list(value)
    items[id(value)] = value, content
    for item in content.values() if isinstance(content, dict) else content:
        _note_items(item, items)


def batch_loss(pl_module: pl.LightningModule) -> Callable[[Any], Tensor]:
    """``loss(batch)``: ``pl_module.curvature_loss`` if there is such a method, else the loss of ``training_step``.

    Raises (the function returned):
        FloatingPointError: ``training_step`` returned None, with which Lightning skips the batch.
        MisconfigurationException: It returned something else that holds no loss.
    """
    own: Callable[[Any], Tensor] | None = getattr(pl_module, "curvature_loss", None)
    if own is not None:
        return own
    # as Lightning decides it
    index = (0,) if is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2) else ()

    def loss(batch: Any) -> Tensor:
        output = pl_module.training_step(batch, *index)
        if output is None:
            raise FloatingPointError("training_step returned no loss for this batch.")
        value = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(value, Tensor):
            name = type(pl_module).__name__
            raise MisconfigurationException(
                f"{name}.training_step returned no loss, so it cannot be differentiated again. Define"
                f" {name}.curvature_loss(batch)."
            )
        return value

    return loss


class _Loss(nn.Module):
    """Compute the loss in ``forward``, which is what ``functional_call`` can reach."""

    def __init__(self, inner: pl.LightningModule) -> None:
        super().__init__()
        self.inner = inner
        self._of_batch = batch_loss(inner)

    def forward(self, batch: Any) -> Tensor:
        return self._of_batch(batch)


def step_loss(pl_module: pl.LightningModule) -> SampleLoss:
    """``loss(params, batch)`` with the parameter names of ``pl_module``; see :func:`batch_loss`."""
    module = _Loss(pl_module)

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        with undisturbed(pl_module):
            value: Tensor = functional_call(module, {f"inner.{n}": p for n, p in params.items()}, (batch,))
            return value

    return loss
