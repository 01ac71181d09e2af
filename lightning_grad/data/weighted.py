"""A loader for ordinary training examples that are drawn by a plan and carry a loss weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lightning_grad._validate import check_int


class AllocatedLoader:
    """Batches of examples in the order of a plan, which :class:`lightning_grad.DynamicSampleAllocation` makes.

    A batch is a dict: ``data`` (what a ``DataLoader`` would give), ``index`` int64 ``[B]``, ``weight`` float64 ``[B]``.
    Train on ``(batch["weight"] * losses).mean()``: its expectation is the mean loss over the data set. Without a plan
    the examples come in a random order with weight 1, another one each epoch.

    Args:
        dataset: Map-style data set with a length.
        batch_size: Examples per batch and process, >= 1.
        strata: Stratum of each example, integers from 0; for ``objective="strata"``.
        seed: Seed of the order, >= 0.
        collate_fn: Makes ``data`` of a list of examples.

    Raises:
        ValueError: An argument is out of range, or ``strata`` does not fit the data set.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int = 64,
        strata: Sequence[int] | Tensor | None = None,
        seed: int = 0,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        self.dataset = dataset
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.seed = check_int("seed", seed, 0)
        self.collate_fn = collate_fn
        self.num_examples = len(cast(Sized, dataset))
        self.strata = None if strata is None else torch.as_tensor(strata).long()
        if self.strata is not None and len(self.strata) != self.num_examples:
            raise ValueError(
                f"`strata` must have one entry per example, got {len(self.strata)} for {self.num_examples}."
            )
        if self.strata is not None and self.num_examples and int(self.strata.min()) < 0:
            raise ValueError(f"`strata` must be integers >= 0, got {int(self.strata.min())}.")
        self.epoch = 0
        self.position = 0
        self._at_start = True  # the next pass starts at `position`; otherwise a new epoch begins
        self._plan: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return max(1, self.num_examples // (self.batch_size * _world()))

    @property
    def draws(self) -> int:
        """Examples of one epoch over all processes."""
        return len(self) * self.batch_size * _world()

    def set_plan(self, index: Tensor, weight: Tensor, position: int = 0) -> None:
        """Examples of the next epoch over all processes, ``[draws]``, and their weights."""
        self._plan = (index, weight)
        self.position, self._at_start = position, True

    def clear_plan(self) -> None:
        """Go back to even random orders, from the next epoch on."""
        self._plan = None

    @property
    def plan(self) -> tuple[Tensor, Tensor] | None:
        """What :meth:`set_plan` was given."""
        return self._plan

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self._at_start or self.position >= len(self):
            self.position = 0
            self.epoch += 1
        self._at_start = False
        index, weight = self._plan or even_plan(self.num_examples, self.draws, self.seed + self.epoch)
        rank = dist.get_rank() if _world() > 1 else 0
        index, weight = index[rank :: _world()], weight[rank :: _world()]
        while self.position < len(self):
            rows = slice(self.position * self.batch_size, (self.position + 1) * self.batch_size)
            self.position += 1
            picked = index[rows]
            data = self.collate_fn([self.dataset[i] for i in picked.tolist()])
            yield {"data": data, "index": picked, "weight": weight[rows]}

    def state_dict(self) -> dict[str, Any]:
        """The position; at the end of an epoch it is the next one's start."""
        finished, position = divmod(self.position, len(self))
        return {"version": 1, "epoch": self.epoch + finished, "position": position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a saved position; the plan comes back through the callback."""
        self.epoch = state_dict.get("epoch", 0)
        self.position, self._at_start = state_dict["position"], True


def even_plan(num_examples: int, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random order of the examples (repeated or cut to ``draws``), all with weight 1."""
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))
    return order.repeat(-(-draws // num_examples))[:draws], torch.ones(draws, dtype=torch.float64)


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
