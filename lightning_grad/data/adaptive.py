"""A loader whose batch size changes in mid-epoch while every sample is still delivered exactly once an epoch.

What a change of plan may do and when is in :mod:`lightning_grad.data.batch_course`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)
from typing_extensions import override

from lightning_grad._validate import check_int
from lightning_grad.data.batch_course import Course, MicroBatch, bounds, check_power_of_two
from lightning_grad.data.resumable import PositionedBatchSampler, ResumableDataLoader, ResumableSampler

_T = TypeVar("_T")
_VERSION = 1


class AdaptiveBatchSampler(PositionedBatchSampler[MicroBatch]):
    """Micro-batches of a plan ``(batch_size, accumulate)`` that :meth:`request` may change at any time.

    Args:
        sampler: Owns epoch, seed and the order of all samples.
        batch_size: Samples per micro-batch and process at the start.
        accumulate: Micro-batches per optimizer step at the start, a power of two.
        drop_last: Leave out the samples that do not fill a last optimizer step; otherwise they make a smaller one.

    Raises:
        ValueError: An argument is out of range, or the data set is smaller than one sample per micro-batch of a step.
    """

    def __init__(
        self, sampler: ResumableSampler, batch_size: int, accumulate: int = 1, drop_last: bool = False
    ) -> None:
        self.sampler = sampler
        self.drop_last = drop_last
        check_int("batch_size", batch_size, 1)
        check_power_of_two("accumulate", accumulate)
        self._course = Course(MicroBatch(-1, -1, -1, accumulate, batch_size, 0, 0, 0), [], None)
        self._resume: Course | None = None
        self._held_length: int | None = None

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """Samples per micro-batch and process in the optimizer step dispatched last."""
        return self._newest.micro

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step, in the one dispatched last."""
        return self._newest.accumulate

    @property
    def _newest(self) -> Course:
        return self._course if self._resume is None else self._resume

    def request(self, batch_size: int, accumulate: int) -> None:
        """Change the plan at the next optimizer step where that is possible; only the latest request counts."""
        check_int("batch_size", batch_size, 1)
        check_power_of_two("accumulate", accumulate)
        course = self._newest
        unchanged = (batch_size, accumulate) == course.final_plan
        course.request = None if unchanged else (batch_size, accumulate, course.index)

    def release_length(self) -> None:
        """Let ``len()`` speak of the coming epoch although a state saved at the end of an epoch was loaded."""
        self._held_length = None

    def continue_from(self, other: AdaptiveBatchSampler) -> None:
        """Take over the plan and the pending change of the sampler this one replaces."""
        self._course = other._newest.fresh(-1)

    def _next_course(self) -> Course:
        """What an iteration that starts now would do."""
        epoch, saved = self.sampler.epoch, self._resume
        if saved is not None and saved.start.epoch == epoch:
            course = Course(saved.start, saved.ahead, saved.request)
            course.fit(self.sampler.dataset_size, self.sampler.num_replicas)
            return course
        # set_epoch() after load_state_dict() is the newer word: a position in another epoch is out of date
        return self._newest.fresh(epoch)

    @override
    def start(self) -> MicroBatch:
        return self._next_course().start

    @override
    def positioned_batches(self) -> Iterator[tuple[list[int], MicroBatch]]:
        self.sampler.resolve()
        course = self._course = self._next_course()
        self._resume = self._held_length = None
        order = self.sampler.order()
        total, epoch = len(order), course.start.epoch
        world, rank = self.sampler.num_replicas, self.sampler.rank
        if total < course.accumulate * world:
            raise ValueError(
                f"the dataset of {total} samples is smaller than one sample for each of the {course.accumulate}"
                f" micro-batches of a step on {world} processes; accumulate fewer."
            )
        while True:
            size = course.form(total, world, self.drop_last)
            if size == 0:
                return
            index, cursor, micro, parts, skip = (
                course.index,
                course.cursor,
                course.micro,
                course.accumulate,
                course.skip,
            )
            course.index, course.cursor, course.skip = index + parts, cursor + size, 0
            for part in range(skip, parts):
                low, high = bounds(part * world + rank, parts * world, size)
                samples = order[cursor + low : cursor + high].tolist()
                yield samples, MicroBatch(epoch, index + part, part, parts, micro, len(samples), cursor, size)

    @override
    def state_dict(self, position: MicroBatch) -> dict[str, Any]:
        course = self._course if position.epoch == self._course.start.epoch else self._next_course()
        step_index = max(0, position.index - position.part)
        first = position.index + 1 if position.part + 1 == position.accumulate else step_index + 1
        changes = [list(c) for c in (*course.changes, *course.ahead) if c[0] >= first]
        return {
            "version": _VERSION,
            "epoch": position.epoch,
            "batches": position.index + 1,
            "step_index": step_index,
            "step_start": position.step_start,
            "step_size": position.step_size,
            "batch_size": position.micro,
            "accumulate": position.accumulate,
            "changes": changes if position.index >= 0 else [list(c) for c in (*course.changes, *course.ahead)],
            "request": None if course.request is None else list(course.request),
            **self._settings(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("version") != _VERSION or "step_index" not in state_dict:
            raise ValueError(
                f"AdaptiveDataLoader: the saved position has version {state_dict.get('version')!r} or is that of"
                f" another loader; this release reads its own version {_VERSION}. Resume with the release and the"
                " loader that wrote it, or load the weights only."
            )
        batches = state_dict["batches"]
        position = MicroBatch(
            epoch=state_dict["epoch"],
            index=batches - 1,
            part=batches - 1 - state_dict["step_index"] if batches else -1,
            accumulate=state_dict["accumulate"],
            micro=state_dict["batch_size"],
            size=0,
            step_start=state_dict["step_start"],
            step_size=state_dict["step_size"],
        )
        ahead = [(index, micro, k) for index, micro, k in state_dict["changes"]]
        request = state_dict["request"]
        course = Course(position, ahead, None if request is None else (request[0], request[1], request[2]))
        settings = self._settings()
        self._refuse_changed(state_dict, settings, inside=course.skip > 0)
        self._resume, self._held_length = course, None
        trial = Course(course.start, course.ahead, course.request)
        finished = batches > 0 and trial.form(settings["dataset_size"], settings["num_replicas"], self.drop_last) == 0
        if finished:
            # The end of an epoch is the start of the next. Until that begins, the length is that of the finished one,
            # because Lightning compares it with the batches it has counted.
            self._held_length = batches
        self.sampler.set_epoch(position.epoch + finished)

    def _refuse_changed(self, state_dict: dict[str, Any], settings: dict[str, Any], inside: bool) -> None:
        fixed = ["dataset_size", "seed", "shuffle", "drop_last", *(["num_replicas"] if inside else [])]
        changed = [name for name in fixed if state_dict[name] != settings[name]]
        if changed:
            saved = ", ".join(f"`{name}` {state_dict[name]}" for name in changed)
            now = ", ".join(f"`{name}` {settings[name]}" for name in changed)
            raise ValueError(
                f"AdaptiveDataLoader: the checkpoint was written after micro-batch {state_dict['batches']} of epoch"
                f" {state_dict['epoch']} with {saved}; this loader has {now}. Use the same again, or load the weights"
                " only."
            )

    def _settings(self) -> dict[str, Any]:
        self.sampler.resolve()
        return {
            "seed": self.sampler.seed,
            "shuffle": self.sampler.shuffle,
            "drop_last": self.drop_last,
            "dataset_size": self.sampler.dataset_size,
            "num_replicas": self.sampler.num_replicas,
        }

    @override
    def __len__(self) -> int:
        """Micro-batches of the epoch ``sampler.epoch`` under the present plan and the pending change."""
        if self._held_length is not None:
            return self._held_length
        self.sampler.resolve()
        same = self._resume is None and self._course.start.epoch == self.sampler.epoch
        course = self._course if same else self._next_course()
        return course.length(self.sampler.dataset_size, self.sampler.num_replicas, self.drop_last)


class DrawnOrderSampler(ResumableSampler):
    """The order that another sampler draws, once an epoch, with random numbers that depend on ``(seed, epoch)`` only.

    "Every sample once" then means every entry of the drawn list once. Resume is exact for samplers that draw from
    torch's global generator or from their own ``generator``; others must be a function of the epoch themselves.

    Args:
        sampler: The sampler to ask; ``set_epoch`` is passed on.
        dataset: Its data set.
        seed: Seed of the draws.
    """

    def __init__(self, sampler: Sampler[int], dataset: Any, seed: int = 0) -> None:
        super().__init__(dataset, shuffle=True, seed=seed)
        self.drawn = sampler

    @property
    @override
    def dataset_size(self) -> int:
        return len(self.drawn) if hasattr(self, "drawn") else super().dataset_size  # type: ignore[arg-type]

    @override
    def order(self) -> Tensor:
        if hasattr(self.drawn, "set_epoch"):
            self.drawn.set_epoch(self.epoch)
        generator = getattr(self.drawn, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(self.seed + self.epoch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + self.epoch)
            return torch.tensor(list(self.drawn), dtype=torch.int64)


class AdaptiveDataLoader(ResumableDataLoader[_T]):
    """A loader whose batch size :meth:`request` changes in mid-epoch; every sample once an epoch, exact on resume.

    ``current`` describes the micro-batch delivered last. Alone it is a resumable loader whose ``batch_size`` you change
    by hand; :class:`lightning_grad.callbacks.AdaptiveBatchSize` drives it in a Trainer.

    Args:
        dataset: Map-style data set.
        batch_size: Samples per micro-batch and process at the start.
        accumulate: Micro-batches per optimizer step at the start, a power of two.
        shuffle: Draw a new order every epoch.
        sampler: A :class:`ResumableSampler` instead of ``shuffle``, ``seed``.
        drop_last: Leave out the samples that do not fill a last optimizer step.
        seed: Seed of the order.
        **kwargs: Everything else that ``torch.utils.data.DataLoader`` takes.

    State: the position after the micro-batch delivered last, the plan, and the changes of plan that wait.
    """

    def __init__(
        self,
        dataset: Dataset[_T],
        *,
        batch_size: int = 1,
        accumulate: int = 1,
        shuffle: bool = False,
        sampler: Sampler[int] | None = None,
        drop_last: bool = False,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                "the micro-batch size of an IterableDataset cannot be changed; use mode='accumulate' of"
                " AdaptiveBatchSize."
            )
        if sampler is None:
            sampler = ResumableSampler(dataset, shuffle, seed)
        elif shuffle:
            raise ValueError("`shuffle` must be False with a `sampler`, which has its own, got True.")
        elif not isinstance(sampler, ResumableSampler):
            sampler = DrawnOrderSampler(sampler, dataset, seed)
        self.adaptive = AdaptiveBatchSampler(sampler, batch_size, accumulate, drop_last)
        super().__init__(dataset, batch_sampler=self.adaptive, **kwargs)

    @property
    def current(self) -> MicroBatch:
        """The micro-batch delivered last; before the first one, an entry with ``index`` -1."""
        delivered: MicroBatch | None = self._delivered
        return self.adaptive.start() if delivered is None else delivered

    def request(self, batch_size: int, accumulate: int) -> None:
        """See :meth:`AdaptiveBatchSampler.request`. With worker processes the change shows some batches later."""
        self.adaptive.request(batch_size, accumulate)

    @classmethod
    def from_dataloader(cls, loader: DataLoader[_T], accumulate: int = 1, seed: int = 0) -> AdaptiveDataLoader[_T]:
        """An adaptive loader with the data and the settings of ``loader``.

        Its order comes from ``seed`` and the epoch; a custom sampler is asked for its list once an epoch.

        Raises:
            TypeError: ``loader`` streams, or batches in a way of its own.
        """
        reason = None
        if isinstance(loader.dataset, IterableDataset):
            reason = "the micro-batch size of an IterableDataset cannot be changed"
        elif loader.batch_sampler is None:
            reason = "the micro-batch size of a DataLoader with batch_size=None cannot be changed"
        elif type(loader.batch_sampler) is not BatchSampler and not isinstance(loader, ResumableDataLoader):
            reason = "a DataLoader with its own batch_sampler decides on its batches itself"
        elif not getattr(loader, "in_order", True):
            reason = "a DataLoader with in_order=False delivers batches in an unknown order"
        if reason is not None:
            raise TypeError(f"{reason}; use mode='accumulate', or build an AdaptiveDataLoader.")
        assert loader.batch_size is not None
        sampler = loader.sampler
        common: dict[str, Any] = {"sampler": sampler}
        if isinstance(sampler, ResumableSampler):
            pass
        elif isinstance(sampler, DistributedSampler):
            common = {"shuffle": sampler.shuffle, "seed": sampler.seed}
        elif type(sampler) is SequentialSampler:
            common = {"shuffle": False, "seed": seed}
        elif type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None:
            common = {"shuffle": True, "seed": seed}
        else:
            common["seed"] = seed
        return cls(
            loader.dataset,
            batch_size=loader.batch_size,
            accumulate=accumulate,
            drop_last=loader.drop_last,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            **common,
        )
