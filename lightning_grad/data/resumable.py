"""A loader whose order depends only on (seed, epoch) and whose position survives a checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sized
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, SequentialSampler
from typing_extensions import override

from lightning_grad._validate import check_int

_MAX_SEED = 2**62
_T = TypeVar("_T")
_P = TypeVar("_P")


def epoch_order(num_samples: int, *, seed: int, epoch: int, shuffle: bool) -> Tensor:
    """Order of the samples in one epoch, from ``(seed, epoch)`` alone.

    Args:
        num_samples: Number of samples in the data set.
        seed: Seed of the run.
        epoch: Epoch, from 0.
        shuffle: Draw a permutation; otherwise ``0 ... num_samples - 1``.

    Returns:
        int64 tensor of shape ``(num_samples,)``. Shuffled, it is the order of ``torch.utils.data.DistributedSampler``
        with one replica and the same seed.
    """
    if not shuffle:
        return torch.arange(num_samples)
    # CPU on purpose, also under torch.set_default_device: other devices draw another permutation
    generator = torch.Generator(device="cpu").manual_seed(seed + epoch)
    return torch.randperm(num_samples, generator=generator, device="cpu")


class ResumableSampler(DistributedSampler[Any]):
    """Sampler for map-style data that shuffles by ``(seed, epoch)`` and gives every process its own share.

    It is a ``DistributedSampler`` so that Lightning sees that it shards itself and injects no second one. Unlike its
    parent it asks for rank and world size when it is used, so it may be built before the processes are started.

    Args:
        dataset: Data set with a length.
        shuffle: Draw a new permutation every epoch.
        seed: Seed of the permutations, in [0, 2**62]. The same on every process.
        drop_last: Leave out the samples that do not divide evenly over the processes; otherwise the first ones are
            repeated to make the shares equal.
        num_replicas: Number of shares; ``None``: the world size of ``torch.distributed``, 1 if it is not in use. Give
            it where processes share data, e.g. model-parallel ranks.
        rank: Which share; ``None``: the rank in ``torch.distributed``.

    Raises:
        TypeError: ``dataset`` has no length.
        ValueError: An argument is out of range, or only one of ``num_replicas`` and ``rank`` is given.
    """

    def __init__(
        self,
        dataset: Any,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if not isinstance(dataset, Sized) or isinstance(dataset, IterableDataset):
            raise TypeError(
                f"`dataset` must be map-style with a length, got {type(dataset).__name__}. The position in a stream is"
                " known only to the stream: give it a loader with its own state_dict()."
            )
        check_int("seed", seed, 0, _MAX_SEED)
        if (num_replicas is None) != (rank is None):
            raise ValueError(f"Give both `num_replicas` and `rank` or none, got {num_replicas!r} and {rank!r}.")
        if num_replicas is not None and rank is not None:
            check_int("num_replicas", num_replicas, 1)
            check_int("rank", rank, 0, num_replicas - 1)
        super().__init__(
            cast("Dataset[Any]", dataset), num_replicas=1, rank=0, shuffle=shuffle, seed=seed, drop_last=drop_last
        )
        self._fixed_share = None if num_replicas is None or rank is None else (num_replicas, rank)
        self.named_epoch = 0  # the one that set_epoch() was given last; passes since then are counted in `epoch`
        self.resumed: tuple[int, int] | None = None  # named epoch and epoch of a position that waits to be used
        self.resolve()

    @override
    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; of a position just restored, the epoch that was named before means the pass it is in."""
        # Lightning names the epoch again when it resumes, and a loader that is cycled beside a longer one is further
        self.named_epoch = epoch
        at = self.resumed
        super().set_epoch(at[1] if at is not None and at[0] == epoch else epoch)

    def advance(self) -> None:
        """Go on to the next epoch after a full pass."""
        named = self.named_epoch
        self.set_epoch(self.epoch + 1)
        self.named_epoch = named

    def resume(self, epoch: int, named_epoch: int) -> None:
        """Take over a saved epoch."""
        self.resumed = None
        self.set_epoch(epoch)
        self.named_epoch, self.resumed = named_epoch, (named_epoch, epoch)

    @property
    def dataset_size(self) -> int:
        """Number of samples in the data set, over all processes."""
        return len(cast(Sized, self.dataset))

    def resolve(self) -> None:
        """Read rank and world size; Lightning starts the processes after the loaders are built."""
        if self._fixed_share is not None:
            self.num_replicas, self.rank = self._fixed_share
        elif dist.is_available() and dist.is_initialized():
            self.num_replicas, self.rank = dist.get_world_size(), dist.get_rank()
        else:
            self.num_replicas, self.rank = 1, 0
        size = self.dataset_size
        self.num_samples = size // self.num_replicas if self.drop_last else -(-size // self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas

    def order(self) -> Tensor:
        """Samples of the current epoch over all processes, each exactly once."""
        return epoch_order(self.dataset_size, seed=self.seed, epoch=self.epoch, shuffle=self.shuffle)

    def local_order(self) -> Tensor:
        """Samples of the current epoch for this process; every process gets equally many."""
        self.resolve()
        order = self.order()
        missing = self.total_size - len(order)
        if missing > 0:
            order = torch.cat([order, order.repeat(-(-missing // len(order)))[:missing]])
        return order[self.rank : self.total_size : self.num_replicas]

    def __iter__(self) -> Iterator[int]:
        return iter(self.local_order().tolist())

    def __len__(self) -> int:
        self.resolve()
        return self.num_samples


class PositionedBatchSampler(Sampler[list[int]], Generic[_P]):
    """Batch sampler that says, with every batch, where the epoch stands after it.

    With worker processes the batches are drawn well before they are trained on. The loader therefore keeps the position
    of each drawn batch until that batch is delivered, and saves the position of the last delivered one. A position is
    any value that :meth:`state_dict` turns into plain numbers and lists.

    Attributes:
        sampler: Owns epoch, seed and order; Lightning calls ``set_epoch`` on it.
        dispatched: Positions of the batches drawn by the newest iterator and not yet delivered, oldest first.
    """

    sampler: ResumableSampler
    batch_size: int
    drop_last: bool
    dispatched: deque[_P]

    @abstractmethod
    def positioned_batches(self) -> Iterator[tuple[list[int], _P]]:
        """Batches of the epoch ``sampler.epoch`` that are left, each with the position after it."""

    @abstractmethod
    def start(self) -> _P:
        """Position from which :meth:`positioned_batches` would start now."""

    @abstractmethod
    def state_dict(self, position: _P) -> dict[str, Any]:
        """``position`` and all that must be equal on resume, in plain types; an epoch's end is the next one's start."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start the next iteration from a saved position, or refuse it with a ``ValueError``."""

    @abstractmethod
    def __len__(self) -> int:
        """Batches of a whole epoch."""

    def __iter__(self) -> Iterator[list[int]]:
        # one queue per iterator, so that an abandoned iterator cannot mix its positions with those of its successor
        self.dispatched = deque()
        return self._record(self.dispatched)

    def _record(self, queue: deque[_P]) -> Iterator[list[int]]:
        for batch, position in self.positioned_batches():
            queue.append(position)
            yield batch


class ResumableBatchSampler(PositionedBatchSampler[tuple[int, int]]):
    """Batches of a fixed size. The position is ``(epoch, batches)``.

    Args:
        sampler: A :class:`ResumableSampler`, or torch's ``SequentialSampler`` (which Lightning puts in for
            ``overfit_batches``).
        batch_size: Samples per batch and process, >= 1.
        drop_last: Leave out a last batch that is not full.

    Raises:
        TypeError: ``sampler`` is of another kind: its order would not be known after a restart.
        ValueError: ``batch_size`` is out of range.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool = False) -> None:
        if type(sampler) is SequentialSampler:
            sampler = ResumableSampler(sampler.data_source, shuffle=False, drop_last=drop_last)
        if not isinstance(sampler, ResumableSampler):
            raise TypeError(
                f"`sampler` must be a ResumableSampler, got {type(sampler).__name__}: its order cannot be restored."
                " Subclass ResumableSampler and override order()."
            )
        self.sampler = sampler
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.drop_last = drop_last
        self._resume: tuple[int, int] | None = None

    @override
    def start(self) -> tuple[int, int]:
        epoch = self.sampler.epoch
        # set_epoch() after load_state_dict() is the newer word: a position in another epoch is out of date
        return self._resume if self._resume is not None and self._resume[0] == epoch else (epoch, 0)

    @override
    def positioned_batches(self) -> Iterator[tuple[list[int], tuple[int, int]]]:
        epoch, done = self.start()
        self._resume = self.sampler.resumed = None
        order = self.sampler.local_order()
        for batch in range(done, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist(), (epoch, batch + 1)

    @override
    def state_dict(self, position: tuple[int, int]) -> dict[str, Any]:
        epoch, batches = position
        if batches >= len(self):
            epoch, batches = epoch + 1, 0
        position_state = {"version": 1, "epoch": epoch, "batches": batches, "dataset_size": self.sampler.dataset_size}
        return position_state | {"named_epoch": self.sampler.named_epoch} | self._settings()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("version") != 1:
            raise ValueError(
                f"ResumableDataLoader: the saved position has version {state_dict.get('version')!r}, this release"
                " reads 1. Resume with the release that wrote it, or load the weights only."
            )
        epoch, batches = state_dict["epoch"], state_dict["batches"]
        settings = {"dataset_size": self.sampler.dataset_size} | (self._settings() if batches else {})
        changed = [name for name, value in settings.items() if state_dict[name] != value]
        if changed:
            saved = ", ".join(f"`{name}` {state_dict[name]}" for name in changed)
            now = ", ".join(f"`{name}` {settings[name]}" for name in changed)
            advice = (
                "" if changed == ["dataset_size"] else " or resume from a checkpoint written at the end of an epoch,"
            )
            raise ValueError(
                f"ResumableDataLoader: the checkpoint was written after batch {batches} of epoch {epoch} with {saved};"
                f" this loader has {now}. Use the same again,{advice} or load the weights only."
            )
        self.sampler.resume(epoch, state_dict.get("named_epoch", epoch))
        self._resume = (epoch, batches)

    @override
    def __len__(self) -> int:
        samples = len(self.sampler)
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def _settings(self) -> dict[str, Any]:
        self.sampler.resolve()
        sampler = self.sampler
        return {
            "seed": sampler.seed,
            "shuffle": sampler.shuffle,
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            "num_replicas": sampler.num_replicas,
        }


class ResumableDataLoader(DataLoader[_T]):
    """A ``DataLoader`` for map-style data that continues with the very next batch after a restart.

    Lightning saves and restores its position by itself; in a loop of your own call ``state_dict()`` and
    ``load_state_dict()``. The order depends on ``seed`` and the epoch only, never on global random state. Each process
    of a distributed run gets its own share. The epoch advances when one was delivered in full; ``set_epoch`` sets it.

    Args:
        dataset: Map-style data set.
        batch_size: Samples per batch and process, >= 1.
        shuffle: Draw a new order every epoch.
        sampler: A :class:`ResumableSampler` of your own, instead of ``shuffle``, ``seed``, ``num_replicas``, ``rank``.
        batch_sampler: A :class:`PositionedBatchSampler`, instead of all of these and ``batch_size``.
        drop_last: Leave out a last batch that is not full.
        generator: Gives the worker processes their seeds; seeded anew each epoch from ``(seed, epoch)``.
        seed: Seed of the order, in [0, 2**62].
        num_replicas: As for :class:`ResumableSampler`.
        rank: As for :class:`ResumableSampler`.
        **kwargs: Everything else that ``torch.utils.data.DataLoader`` takes, but ``in_order=False``.

    Raises:
        TypeError: The data set is iterable-style, or a sampler is of a kind that cannot be resumed.
        ValueError: Arguments out of range or exclusive. On ``load_state_dict``: the position was saved in mid-epoch
            with other settings, or for a data set of another size.

    State: ``epoch, batches`` of the last batch *delivered*, the epoch given to ``set_epoch`` last (a loader cycled
    beside a longer one is further), and the settings that must be equal in mid-epoch; the same on every process.
    Random transforms that run in worker processes restart with the workers, so with them resume is exact at the end
    of an epoch only.
    """

    def __init__(
        self,
        dataset: Dataset[_T],
        # keyword-only: Trainer(overfit_batches=...) and predict() rebuild the loader with keywords of their own
        *,
        batch_size: int = 1,
        shuffle: bool = False,
        sampler: Sampler[int] | None = None,
        batch_sampler: Any = None,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not kwargs.get("in_order", True):
            raise ValueError("`in_order` must be True, got False: a position says which batch comes next.")
        if batch_sampler is None:
            if sampler is None:
                sampler = ResumableSampler(dataset, shuffle, seed, drop_last, num_replicas, rank)
            elif shuffle:
                raise ValueError("`shuffle` must be False with a `sampler`, which has its own, got True.")
            batch_sampler = ResumableBatchSampler(sampler, batch_size, drop_last)
        elif batch_size != 1 or shuffle or sampler is not None or drop_last:
            raise ValueError("`batch_sampler` excludes `batch_size`, `shuffle`, `sampler` and `drop_last`.")
        # Trainer.predict() wraps the batch sampler to note the indices; such a loader is never resumed
        predicting = isinstance(getattr(batch_sampler, "_batch_sampler", None), PositionedBatchSampler)
        if not predicting and not isinstance(batch_sampler, PositionedBatchSampler):
            raise TypeError(
                f"`batch_sampler` must be a PositionedBatchSampler, got {type(batch_sampler).__name__}: the position of"
                " other batch samplers cannot be restored."
            )
        generator = torch.Generator() if generator is None else generator
        super().__init__(dataset, batch_sampler=batch_sampler, generator=generator, **kwargs)
        # torch leaves a SequentialSampler and no batch size here. Lightning looks at `sampler` to decide whether to
        # inject a DistributedSampler, and to call set_epoch; torch forbids plain assignment.
        object.__setattr__(self, "sampler", batch_sampler.sampler)
        object.__setattr__(self, "batch_size", batch_sampler.batch_size)
        object.__setattr__(self, "drop_last", batch_sampler.drop_last)
        self._positions: PositionedBatchSampler[Any] | None = None if predicting else batch_sampler
        self._delivered: Any = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration delivers."""
        self.sampler.set_epoch(epoch)  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Position after the last delivered batch, in plain types."""
        if self._positions is None:
            return {}
        return self._positions.state_dict(self._positions.start() if self._delivered is None else self._delivered)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration continue after a saved position; an iterator that has begun is not affected."""
        if self._positions is not None:
            self._positions.load_state_dict(state_dict)
            self._delivered = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: order and position are fixed at the first batch, because Lightning makes the iterator before it
        # calls set_epoch, and (#20550) sometimes before the position is restored.
        return self._deliver() if self._positions is not None else super().__iter__()

    def _deliver(self) -> Iterator[Any]:
        positions = self._positions
        assert positions is not None
        epoch = positions.sampler.epoch
        assert self.generator is not None
        self.generator.manual_seed(positions.sampler.seed + epoch)
        self._delivered = positions.start()
        batches = super().__iter__()
        dispatched = positions.dispatched
        for batch in batches:
            self._delivered = dispatched.popleft()
            yield batch
        if positions.sampler.epoch == epoch:
            positions.sampler.advance()
