"""Learning-rate schedules that run on samples seen instead of optimizer steps."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad._validate import check_choice, check_int, check_range
from lightning_grad.optim._closed_form_lr import ClosedFormLR

Shape = Literal["cosine", "linear", "inverse_sqrt", "cooldown"]


class SamplesLR(ClosedFormLR):
    r"""A schedule whose progress is the number of samples processed, so that it ends where the data ends.

    With :math:`s` samples seen of :math:`N` in total, the first :math:`w` of them warm-up and
    :math:`u = (s - w)/(N - w)` in [0, 1], the factor on the base learning rate is :math:`s/w` during warm-up, then

    ================  ==================================================================================
    ``cosine``        :math:`f + (1 - f)(1 + \cos \pi u)/2`, with :math:`f` = ``final``
    ``linear``        :math:`1 - (1 - f) u`
    ``inverse_sqrt``  :math:`\sqrt{w'/s}` for :math:`s > w'`, :math:`w' = \max(w, N/100)`; no end
    ``cooldown``      1, then linear to :math:`f` over the last ``cooldown_fraction`` of the samples
    ================  ==================================================================================

    :class:`lightning_grad.AdaptiveBatchSize` (also with ``mode="monitor"``) tells the schedule, before each step, how
    many samples will be seen after it. Without that callback give ``total_samples`` and ``samples_per_step``; every
    ``step()`` counts the latter, so in a configuration of ``lightning-grad`` set ``lr_scheduler_interval: step``.

    Args:
        optimizer: The optimizer.
        total_samples: :math:`N` > 0, or ``"auto"``: data-set size times ``max_epochs``, filled in by the callback.
        base: Shape of the schedule.
        warmup_samples: :math:`w` >= 0, less than ``total_samples``.
        final: Factor :math:`f` in [0, 1] at the end.
        cooldown_fraction: Part of the samples in the cooldown, in (0, 1].
        samples_per_step: Samples of one optimizer step over all processes, for use without the callback.

    Raises:
        ValueError: An argument is out of range.
        RuntimeError: ``step()`` was called without the callback, and ``samples_per_step`` or ``total_samples`` is
            not known.

    State: the samples seen. The settings are the constructor's, so that a longer run can be resumed.

    Source: the AdAdaGrad experiments (arXiv:2402.11215) use cosine with ``final=0.1`` and 10 % warm-up.
    """

    _settings = ("total_samples", "base", "warmup_samples", "final", "cooldown_fraction", "samples_per_step")

    def __init__(
        self,
        optimizer: Optimizer,
        total_samples: int | Literal["auto"] = "auto",
        base: Shape = "cosine",
        warmup_samples: int = 0,
        final: float = 0.1,
        cooldown_fraction: float = 0.2,
        samples_per_step: int | None = None,
    ) -> None:
        if total_samples != "auto":
            check_int("total_samples", total_samples, 1)
        check_choice("base", base, ("cosine", "linear", "inverse_sqrt", "cooldown"))
        check_int("warmup_samples", warmup_samples, 0, None if total_samples == "auto" else total_samples - 1)
        check_range("final", final, 0.0, 1.0)
        check_range("cooldown_fraction", cooldown_fraction, 0.0, 1.0, "(]")
        if samples_per_step is not None:
            check_int("samples_per_step", samples_per_step, 1)
        self.total_samples: int | None = None if total_samples == "auto" else total_samples
        self.base, self.warmup_samples, self.final = str(base), warmup_samples, final
        self.cooldown_fraction, self.samples_per_step = cooldown_fraction, samples_per_step
        # the first step is made at the learning rate of the samples seen after it
        self.samples = samples_per_step or 0
        self.driven = False
        super().__init__(optimizer)

    def resolve(self, total_samples: int) -> None:
        """Fill in ``total_samples="auto"``; does nothing if a number was given or the number is known already.

        Args:
            total_samples: Samples of the whole run, more than ``warmup_samples``.
        """
        if self.total_samples is None:
            check_int("warmup_samples", self.warmup_samples, 0, total_samples - 1)
            self.total_samples = total_samples

    def set_progress(self, samples: int) -> None:
        """Set the learning rates for a step after which ``samples`` samples are seen; ``step()`` counts none any more.

        Args:
            samples: Samples seen since the beginning of training, over all processes.
        """
        self.samples, self.driven = samples, True
        self._write()

    def factor(self, samples: float) -> float:
        """Factor on the base learning rate after ``samples`` samples."""
        warmup = self.warmup_samples
        if samples < warmup:
            return samples / warmup
        if self.total_samples is None:
            return 1.0
        total = self.total_samples
        done = min(1.0, (samples - warmup) / (total - warmup))
        if self.base == "cosine":
            return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * done))
        if self.base == "linear":
            return 1.0 - (1.0 - self.final) * done
        if self.base == "inverse_sqrt":
            return math.sqrt(min(1.0, max(warmup, total / 100) / max(samples, 1)))
        left = (1.0 - min(1.0, samples / total)) / self.cooldown_fraction
        return 1.0 if left >= 1.0 else self.final + (1.0 - self.final) * left

    @override
    def _ready(self) -> bool:
        return self.total_samples is not None

    @override
    def _present_factor(self) -> float:
        return self.factor(self.samples)

    @override
    def _initial_step(self) -> None:
        # for torch a step; called in the constructor, and again by a SequentialLR around this schedule
        self.last_epoch += 1
        self._step_count = 1
        self._write()

    @override
    def step(self, epoch: int | None = None) -> None:
        """Count ``samples_per_step``, unless the callback sets the progress.

        Args:
            epoch: ``None``, or 0 to begin anew (an older ``SequentialLR``, when the schedule's turn comes).
        """
        if not self.driven and epoch == 0:
            self.samples = self.samples_per_step or 0
        elif not self.driven:
            if self.samples_per_step is None or self.total_samples is None:
                raise RuntimeError(
                    "SamplesLR does not know how many samples were seen, or will be: add the callback"
                    " AdaptiveBatchSize (mode='monitor' leaves the batch size alone), or give `samples_per_step` and"
                    " `total_samples`."
                )
            self.samples += self.samples_per_step
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._step_count += 1
        self._write()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.driven = False
