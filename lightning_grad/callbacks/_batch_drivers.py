"""Three ways to carry out a batch plan in a running Trainer: change the loader, change accumulation, or only watch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_grad._lightning import set_epoch_length, wrap_train_dataloader
from lightning_grad._validate import check_choice, check_int
from lightning_grad.allocation.batch_size import BatchPlan
from lightning_grad.callbacks._processes import sum_over_processes
from lightning_grad.data.adaptive import AdaptiveDataLoader
from lightning_grad.data.batch_course import MicroBatch, bounds, check_power_of_two
from lightning_grad.statistics.sample_grads import samples_in


class WatchDriver:
    """Count samples and micro-batches of a run whose batch size is somebody else's business."""

    changes_loader = False

    def __init__(self, trainer: pl.Trainer) -> None:
        self.world = trainer.world_size
        self.micro = 0
        """Samples per micro-batch and process: the loader's batch size, or the mean of its batches; 0 if unknown."""
        self.accumulate = trainer.accumulate_grad_batches
        self.parts = 0
        self.expected = 0
        """Samples that the present step will have on all processes, as far as its first micro-batch tells."""
        self.population: int | None = None  # samples in the data set, if known
        self._stated = 0  # batch size of the loader, if it has one
        self._sizes = (0, 0)  # samples and number of the micro-batches of all steps, on all processes
        self._samples = 0  # of the present step, on this process

    @property
    def plan(self) -> BatchPlan:
        """The plan of the present step."""
        return BatchPlan(max(1, self.micro), self.accumulate, self.world)

    @property
    def batch_size(self) -> int:
        """Samples of the present step that the learning rate is to follow."""
        return self.expected

    def continue_from(self, other: Any) -> None:
        """Go on where the driver of an earlier fit of the same Trainer stopped."""
        self.load_state_dict(other.state_dict())

    def attach(self, trainer: pl.Trainer) -> None:
        """Before the loader exists."""

    def start(self, trainer: pl.Trainer) -> None:
        """The loader exists, nothing is trained yet."""
        loader: Any = trainer.train_dataloader
        size = getattr(loader, "batch_size", None)
        stated = size if isinstance(size, int) else 0
        if stated != self._stated:
            self._stated, self._sizes = stated, (0, 0)
        self._judge()
        try:
            self.population = len(loader.dataset)
        except (AttributeError, TypeError):
            self.population = None

    def _judge(self) -> None:
        samples, number = self._sizes
        self.micro = max(self._stated, -(-samples // max(1, number)))  # a collate_fn may make more of them

    def start_epoch(self, trainer: pl.Trainer) -> None:
        """A new epoch begins."""
        self.parts = self._samples = 0

    def start_batch(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> bool:
        """A micro-batch begins; returns whether it is the first of an optimizer step."""
        self.accumulate = trainer.accumulate_grad_batches
        samples = samples_in(batch)
        self.parts += 1
        self._samples += samples
        if batch_idx % self.accumulate:
            return False
        everyones = sum_over_processes(trainer, samples)
        self.micro = self.micro or -(-everyones // self.world)
        self.expected = everyones * self.accumulate
        return True

    def count_step(self, trainer: pl.Trainer) -> int:
        """Samples of the step just made, on all processes; called once."""
        samples = self.expected if self.accumulate == 1 else sum_over_processes(trainer, self._samples)
        self._sizes = (self._sizes[0] + samples, self._sizes[1] + self.parts * self.world)
        self._judge()
        return samples

    @property
    def gradient_correction(self) -> float:
        """Factor that makes ``.grad`` the mean over the micro-batches of the window that were seen."""
        return self.accumulate / self.parts

    def request(self, plan: BatchPlan) -> None:
        """Change the plan as soon as that is safe."""

    def plan_for(self, target: int, settings: PlanSettings) -> BatchPlan:
        """The plan for a batch of ``target`` samples."""
        return self.plan

    def end_batch(self, trainer: pl.Trainer, batch_idx: int, stepped: bool) -> None:
        """A micro-batch is done."""
        if (batch_idx + 1) % self.accumulate == 0:
            self.parts = self._samples = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"batch_size": self._stated, "sizes": list(self._sizes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        samples, number = state_dict.get("sizes", (0, 0))
        self._stated, self._sizes = state_dict.get("batch_size", 0), (samples, number)

    def detach(self, trainer: pl.Trainer) -> None:
        """Undo what :meth:`attach` did."""


class PlanSettings:
    """Limits of the plans, as the user gave them; ``None`` is filled in from the first plan.

    Raises:
        ValueError: One is out of range; the text calls it what the user calls it.
    """

    def __init__(
        self, max_batch: int, max_micro: int | None, min_accumulate: int, round_to: int, quantize: Any
    ) -> None:
        if max_micro is not None:
            check_int("max_micro_batch_size", max_micro, 1)
            if max_micro > max_batch:
                raise ValueError(
                    f"`max_micro_batch_size`={max_micro} is above `max_batch_size`={max_batch}, a whole step on all"
                    " processes, and would never be reached; lower it or raise `max_batch_size`."
                )
        check_power_of_two("min_accumulate", min_accumulate)
        if min_accumulate > max_batch:
            raise ValueError(
                f"`min_accumulate`={min_accumulate} micro-batches hold more samples than `max_batch_size`={max_batch};"
                " lower it or raise `max_batch_size`."
            )
        check_int("round_to", round_to, 1)
        check_choice("quantize", quantize, ("none", "pow2"))
        self.max_batch, self.max_micro = max_batch, max_micro
        self.min_accumulate, self.round_to, self.quantize = min_accumulate, round_to, quantize

    def plan(self, target: int, world: int, population: int | None) -> BatchPlan:
        """Micro-batch first, then accumulation."""
        assert self.max_micro is not None
        cap = self.max_batch if population is None else min(self.max_batch, population)
        return BatchPlan.from_target(
            min(target, cap), world, self.max_micro, self.round_to, self.min_accumulate, cap, self.quantize
        )


class AccumulateDriver(WatchDriver):
    """Change ``trainer.accumulate_grad_batches`` only: public API, any loader."""

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer)
        self._initial = trainer.accumulate_grad_batches
        check_power_of_two("accumulate_grad_batches", self._initial)
        self._wanted: int | None = None
        self._resumed: int | None = None

    def start(self, trainer: pl.Trainer) -> None:
        super().start(trainer)
        if self._resumed is not None:
            trainer.accumulate_grad_batches = self.accumulate = self._resumed

    def plan_for(self, target: int, settings: PlanSettings) -> BatchPlan:
        k = max(settings.min_accumulate, 1)
        step = self.world * max(1, self.micro)
        while step * k < target and step * 2 * k <= settings.max_batch:
            k *= 2
        return BatchPlan(max(1, self.micro), k, self.world)

    def request(self, plan: BatchPlan) -> None:
        self._wanted = None if plan.accumulate == self.accumulate else plan.accumulate

    def start_epoch(self, trainer: pl.Trainer) -> None:
        super().start_epoch(trainer)
        self._adopt(trainer)

    def end_batch(self, trainer: pl.Trainer, batch_idx: int, stepped: bool) -> None:
        super().end_batch(trainer, batch_idx, stepped)
        if stepped and self._wanted is not None and (batch_idx + 1) % self._wanted == 0:
            self._adopt(trainer)

    def _adopt(self, trainer: pl.Trainer) -> None:
        if self._wanted is not None:
            trainer.accumulate_grad_batches = self.accumulate = self._wanted
            self._wanted = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "accumulate": self.accumulate, "wanted": self._wanted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._resumed, self._wanted = state_dict["accumulate"], state_dict["wanted"]

    def detach(self, trainer: pl.Trainer) -> None:
        trainer.accumulate_grad_batches = self._initial


class SamplerDriver(WatchDriver):
    """Replace the train loader by an :class:`AdaptiveDataLoader` and drive it."""

    changes_loader = True

    def __init__(self, trainer: pl.Trainer, settings: PlanSettings, seed: int) -> None:
        super().__init__(trainer)
        self._initial = check_power_of_two("accumulate_grad_batches", trainer.accumulate_grad_batches)
        self.settings, self.seed = settings, seed
        self.loader: AdaptiveDataLoader[Any] | None = None
        self._earlier: AdaptiveDataLoader[Any] | None = None
        self._undo: Callable[[], None] | None = None
        self._state: dict[str, Any] | None = None
        self._consumed: MicroBatch | None = None
        self.on_loader: Callable[[BatchPlan], None] = lambda plan: None
        self.on_refused: Callable[[TypeError], None] | None = None

    @property
    def batch_size(self) -> int:
        return self.plan.batch_size

    def continue_from(self, other: Any) -> None:
        self._earlier = other.loader

    def attach(self, trainer: pl.Trainer) -> None:
        self._undo = wrap_train_dataloader(trainer, self._convert)

    def _convert(self, loader: Any) -> Any:
        if isinstance(loader, AdaptiveDataLoader):
            adaptive = loader
        elif isinstance(loader, DataLoader):
            try:
                adaptive = AdaptiveDataLoader.from_dataloader(loader, self._initial, self.seed)
            except TypeError as error:
                if self.on_refused is None or self.loader is not None:
                    raise
                self.on_refused(error)
                return loader
        else:
            raise MisconfigurationException(
                "AdaptiveBatchSize changes the batches of one DataLoader; the train loader is a"
                f" {type(loader).__name__}. With several loaders use"
                " GradientAccumulationScheduler, or combine the data sets."
            )
        if self.loader is not None and self.loader is not adaptive:
            if len(self.loader.dataset) != len(adaptive.dataset):  # type: ignore[arg-type]
                raise MisconfigurationException(
                    "reload_dataloaders_every_n_epochs with a data set of another length does not work with"
                    " AdaptiveBatchSize(mode='sampler'): use mode='accumulate'."
                )
            adaptive.adaptive.continue_from(self.loader.adaptive)
        first = self.loader is None
        self.loader = adaptive
        sampler = adaptive.adaptive
        if first:
            if self._earlier is not None:
                sampler.continue_from(self._earlier.adaptive)
            self.on_loader(BatchPlan(sampler.batch_size, sampler.accumulate, self.world))
            plan = self._first_plan(sampler.batch_size, sampler.accumulate)
            if plan is not None:
                sampler.request(plan.micro, plan.accumulate)
            if self._state is not None:
                adaptive.load_state_dict(self._state)
        return adaptive

    def _first_plan(self, micro: int, accumulate: int) -> BatchPlan | None:
        if accumulate >= self.settings.min_accumulate:
            return None
        return self.settings.plan(micro * accumulate * self.world, self.world, self._data_length())

    def _data_length(self) -> int:
        assert self.loader is not None
        return self.loader.adaptive.sampler.dataset_size

    def start(self, trainer: pl.Trainer) -> None:
        assert self.loader is not None
        self.population = self._data_length()
        if self._state is not None:
            # once more: Lightning drops the position when estimated_stepping_batches was read (its issue 20550)
            self.loader.load_state_dict(self._state)
            trainer.accumulate_grad_batches = self._state["accumulate"]
            self._state = None
        self._consumed = self.loader.current
        self.sync_length(trainer)

    def start_epoch(self, trainer: pl.Trainer) -> None:
        assert self.loader is not None
        self.parts = 0
        self.loader.adaptive.release_length()
        self.sync_length(trainer)

    def sync_length(self, trainer: pl.Trainer) -> None:
        """Keep Lightning's idea of the epoch equal to the loader's."""
        assert self.loader is not None
        batches = set_epoch_length(trainer, len(self.loader))
        if trainer.training:
            set_validation(trainer, batches, self.loader.current, self._data_length())

    def start_batch(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> bool:
        assert self.loader is not None
        where = self.loader.current
        if where.index != batch_idx:
            raise RuntimeError(
                f"AdaptiveBatchSize: the Trainer is at batch {batch_idx}, the loader at {where.index}; was the loader"
                " iterated elsewhere?"
            )
        trainer.accumulate_grad_batches = self.accumulate = where.accumulate
        self.micro = where.micro
        self.parts += 1
        left = int(trainer.num_training_batches) - (batch_idx - where.part)
        self.expected = _samples_in(where, min(where.accumulate, left), self.world)
        return where.part == 0

    def count_step(self, trainer: pl.Trainer) -> int:
        assert self.loader is not None
        where = self.loader.current
        return _samples_in(where, where.part + 1, self.world)

    def plan_for(self, target: int, settings: PlanSettings) -> BatchPlan:
        return settings.plan(target, self.world, self.population)

    def request(self, plan: BatchPlan) -> None:
        assert self.loader is not None
        self.loader.request(plan.micro, plan.accumulate)

    def end_batch(self, trainer: pl.Trainer, batch_idx: int, stepped: bool) -> None:
        assert self.loader is not None
        self._consumed = where = self.loader.current
        if where.part + 1 == where.accumulate:
            self.parts = 0
        self.sync_length(trainer)

    def state_dict(self) -> dict[str, Any]:
        if self.loader is None:
            return {} if self._state is None else dict(self._state)
        if self._consumed is None:
            return self.loader.state_dict()
        return self.loader.adaptive.state_dict(self._consumed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict or None

    def detach(self, trainer: pl.Trainer) -> None:
        trainer.accumulate_grad_batches = self._initial
        if self._undo is not None:
            self._undo()
            self._undo = None


def _samples_in(step: MicroBatch, parts: int, world: int) -> int:
    """Samples in the first ``parts`` micro-batches of a step, on all processes; a limit may leave out the others."""
    return bounds(parts * world, step.accumulate * world, step.step_size)[0]


def set_validation(trainer: pl.Trainer, batches: int, where: MicroBatch, population: int) -> None:
    """Set the batch number at which Lightning validates, for an epoch of ``batches`` batches.

    Lightning validates when the number of batches done is a multiple of ``val_check_batch``. An interval that is a
    fraction is met by samples, because the batches of an epoch need not be equal; under ``limit_train_batches`` by
    batches where these come first.
    """
    interval = trainer.val_check_interval
    if isinstance(interval, float) and interval < 1.0:
        done, limit = where.index + 1, trainer.limit_train_batches

        def points(parts: int, batches: int) -> int:
            """Points of the epoch at which validation is due, so many micro-batches into the step and the epoch."""
            progress = (where.step_start + where.step_size * parts // max(1, where.accumulate)) / population
            if isinstance(limit, int):
                progress = max(progress, batches / limit)
            return int(progress / interval + 1e-9)

        # the last batch ends the epoch, though samples may be dropped
        after = int(1.0 / interval + 1e-9) if done == batches else points(where.part + 1, done)
        trainer.val_check_batch = max(1, done) if after > points(where.part, done - 1) else done + 1
    elif isinstance(interval, float):
        trainer.val_check_batch = batches
    elif isinstance(interval, int) and trainer.check_val_every_n_epoch is not None:
        trainer.val_check_batch = min(interval, batches)


@torch.no_grad()
def rescale_gradients(params: list[torch.nn.Parameter], factor: float) -> None:
    """Multiply the gradients that exist by ``factor``."""
    grads = [p.grad for p in params if p.grad is not None]
    if grads and factor != 1.0:
        torch._foreach_mul_(grads, factor)
