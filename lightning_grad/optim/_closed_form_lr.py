"""Schedules whose learning rate is a function of a position, so that they can be asked and set at any time."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override


class ClosedFormLR(LRScheduler):
    """Base: ``get_lr`` depends on the schedule's own position and not on the present learning rates."""

    _settings: ClassVar[tuple[str, ...]] = ()
    """Attributes that a checkpoint does not bring back, so that a run can be resumed with a longer horizon."""

    def _ready(self) -> bool:
        """Whether everything the learning rates depend on is known."""
        return True

    def _present_factor(self) -> float:
        """The factor on the base learning rates at the present position."""
        raise NotImplementedError

    @override
    def get_lr(self) -> list[float | Tensor]:
        # a group that came after the schedule was made: finetuning callbacks add them
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            lr = group["lr"]
            self.base_lrs.append(group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr))
        factor = self._present_factor()
        return [lr * factor for lr in self.base_lrs]

    def _write(self) -> None:
        """Set the learning rates of the present position."""
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):  # a captured graph may hold it: keep the object
                group["lr"].fill_(float(lr))
            else:
                group["lr"] = lr
        self._last_lr: list[Any] = [group["lr"] for group in self.optimizer.param_groups]

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the position and set its learning rates; the settings stay those of the constructor.

        Args:
            state_dict: From ``state_dict()`` of the same class.
        """
        super().load_state_dict({k: v for k, v in state_dict.items() if k not in self._settings})
        if self._ready():
            self._write()
