"""Change hyper-parameters for the duration of one optimizer step, so that any LR scheduler keeps working.

A scheduler reads and writes ``group["lr"]`` between steps; some compute the next value from the last one. Whoever wants
another value *in the step* therefore sets it just before and puts the old one back just after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

Edit = Callable[[int, dict[str, Any]], Mapping[str, Any]]
"""``(index of the group, group) -> new values``; sees what earlier edits of the same step did."""

_EDITS: WeakKeyDictionary[Optimizer, GroupEdits] = WeakKeyDictionary()


class GroupEdits:
    """The edits of one optimizer, made in the order they were added and undone together after the step.

    Factors on the learning rate multiply: every edit starts from what the one before it left.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._edits: list[Edit] = []
        self._saved: list[tuple[dict[str, Any], str, Any]] = []
        self._in_step = False
        optimizer.register_step_pre_hook(lambda opt, *_: self._apply(opt))
        optimizer.register_step_post_hook(lambda *_: self.restore())

    @staticmethod
    def of(optimizer: Optimizer) -> GroupEdits:
        """The one object that edits ``optimizer``."""
        if optimizer not in _EDITS:
            _EDITS[optimizer] = GroupEdits(optimizer)
        return _EDITS[optimizer]

    @staticmethod
    def in_step(optimizer: Optimizer, index: int) -> dict[str, Any]:
        """Parameter group ``index`` as the present or coming step has it.

        A step's closure sees the edited group, except under a loss scaler, which runs it before the step.
        """
        group = dict(optimizer.param_groups[index])
        edits = _EDITS.get(optimizer)
        if edits is not None and not edits._in_step:
            for edit in edits._edits:
                group |= edit(index, group)
        return group

    def add(self, edit: Edit) -> Callable[[], None]:
        """Edit every coming step; the returned function takes the edit off again."""
        self._edits.append(edit)
        return lambda: self._edits.remove(edit) if edit in self._edits else None

    def restore(self) -> None:
        """Put the values of before the step back; for a step that was left by an exception."""
        self._in_step = False
        while self._saved:
            group, key, value = self._saved.pop()
            _assign(group, key, value)

    def refresh(self, optimizer: Optimizer) -> None:
        """Make the edits anew from inside a step, for one that depends on what the step's closure computed.

        Outside a step it does nothing: if the closure ran before (a loss scaler does that), the step itself will do.
        """
        if self._in_step:
            self._apply(optimizer)

    @torch.no_grad()
    def _apply(self, optimizer: Optimizer) -> None:
        self.restore()
        self._in_step = True
        for edit in self._edits:
            for index, group in enumerate(optimizer.param_groups):
                for key, value in edit(index, group).items():
                    old = group[key]
                    self._saved.append((group, key, old.clone() if isinstance(old, Tensor) else old))
                    _assign(group, key, value)


@torch.no_grad()
def _assign(group: dict[str, Any], key: str, value: Any) -> None:
    # a tensor learning rate may be held by a captured graph: keep the object
    if isinstance(group[key], Tensor):
        group[key].copy_(torch.as_tensor(value))
    else:
        group[key] = value
