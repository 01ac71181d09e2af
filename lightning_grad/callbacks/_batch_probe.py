"""What AdaptiveBatchSize measures, when, and by which estimator; it decides nothing."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_grad._validate import check_choice, check_int
from lightning_grad.callbacks._batch_checks import MAX_COPIES
from lightning_grad.callbacks._batch_drivers import WatchDriver
from lightning_grad.callbacks._step_loss import step_loss
from lightning_grad.optim.group_edits import GroupEdits
from lightning_grad.statistics.collector import Estimator, NoiseCollector, NoSampleLossError
from lightning_grad.statistics.ghost import UnsupportedLayerError, is_norm_layer
from lightning_grad.statistics.gradient_noise import GradStats
from lightning_grad.statistics.sample_grads import samples_in

AUTO_INTERVAL: dict[str, int] = {"micro_batch": 2, "ghost": 8, "vmap": 50}
"""Optimizer steps between tests that keep the cost of measuring below a twentieth of a step."""


class GradientProbe:
    """Statistics of the gradient of some optimizer steps of a running Trainer.

    Args:
        estimator: As the user gave it.
        scope: Which parameters.
        needs: What the criterion needs besides the norms.
        test_interval: Optimizer steps between tests.
        warmup_steps: Optimizer steps before the first test.
        with_loss: Whether the loss of each step is wanted for other reasons than the criterion's.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        estimator: Estimator | Literal["auto"],
        scope: str | list[str],
        needs: frozenset[str],
        test_interval: int | Literal["auto"],
        warmup_steps: int,
        with_loss: bool,
    ) -> None:
        check_choice("estimator", estimator, ("auto", "micro_batch", "ghost", "vmap"))
        if isinstance(scope, str):
            check_choice("scope", scope, ("all", "norm_layers"))
        if test_interval != "auto":
            check_int("test_interval", test_interval, 1)
        check_int("warmup_steps", warmup_steps, 0)
        self.estimator, self.scope, self.needs = estimator, scope, needs
        self.test_interval, self.warmup_steps = test_interval, warmup_steps
        self.loss: float | None = None
        """Mean loss of the present step on this process, once it is complete; None if nobody wants it."""
        self.on_no_ghost: Callable[[object], None] = lambda reason: None
        self.on_other_parameters: Callable[[], None] = lambda: None
        self._use_ghost = self._use_samples = True
        self._measured: list[str] | None = None
        self._last_test: int | None = None
        self._with_loss = with_loss or "loss" in needs
        self._loss_sum: Tensor | None = None
        self._losses = 0
        self._collector: NoiseCollector | None = None

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "last_test": self._last_test,
            "use_ghost": self._use_ghost,
            "use_samples": self._use_samples,
            "measured": self._measured,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._last_test, self._use_ghost = state_dict["last_test"], state_dict["use_ghost"]
        # not in checkpoints of 0.1.0
        self._use_samples, self._measured = state_dict.get("use_samples", True), state_dict.get("measured")

    def attach(self, pl_module: pl.LightningModule) -> None:
        """Get ready to measure ``pl_module``."""
        names = self._names(pl_module)
        if not names:
            raise ValueError(f"`scope`={self.scope!r} matches no trainable parameter.")
        self._collector = NoiseCollector(pl_module, names, self.needs, step_loss(pl_module))

    def _follow(self, collector: NoiseCollector) -> bool:
        """Measure what is trainable now, which other callbacks may change; returns whether there is anything."""
        names = self._names(collector.module)
        if not names:
            return False
        if names != list(collector.params):
            collector.watch(names)
        if self._measured not in (None, names):
            self.on_other_parameters()
        self._measured = names
        return True

    def detach(self) -> None:
        """Take all hooks off."""
        if self._collector is not None:
            self._collector.remove()
            self._collector = None

    def _names(self, module: nn.Module) -> list[str]:
        names = [n for n, p in module.named_parameters() if p.requires_grad]
        if self.scope == "all":
            return names
        if self.scope == "norm_layers":
            norms = {f"{n}.weight" for n, m in module.named_modules() if is_norm_layer(m)}
            return [n for n in names if n in norms]
        return [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in self.scope)]

    @property
    def seconds(self) -> float:
        """What the last test took."""
        return 0.0 if self._collector is None else self._collector.seconds

    # ── one step ─────────────────────────────────────────────────────────────────────────────────────────────────
    def begin_step(self, driver: WatchDriver, steps: int) -> None:
        """An optimizer step begins, after ``steps`` of them; start a test if one is due."""
        assert self._collector is not None
        if self._collector.collecting:
            self._collector.cancel()
        self._loss_sum, self._losses, self.loss = None, 0, None
        estimator = self._choose(driver)
        if estimator is None or steps < self.warmup_steps:
            return
        interval = AUTO_INTERVAL[estimator] if self.test_interval == "auto" else self.test_interval
        if self._last_test is not None and steps - self._last_test < interval:
            return
        if not self._follow(self._collector):
            return
        try:
            self._collector.begin(estimator)
        except UnsupportedLayerError as error:
            self._no_ghost(error)

    def before_forward(self, batch: Any) -> None:
        """A micro-batch is about to go forward."""
        assert self._collector is not None
        if self._collector.collecting:
            self._collector.before_forward(batch, samples_in(batch))

    def before_backward(self, trainer: pl.Trainer, loss: Tensor) -> None:
        """``loss`` is about to be differentiated: Lightning divided it by k, and a GradScaler multiplied it."""
        if self._with_loss:
            value = loss.detach() * _mean_loss_over(trainer)
            self._loss_sum = value if self._loss_sum is None else self._loss_sum + value
            self._losses += 1

    def after_backward(self, trainer: pl.Trainer) -> None:
        """A backward pass is done."""
        if self._collector is None or not self._collector.collecting:
            return
        try:
            self._collector.after_backward(_mean_loss_over(trainer))
        except UnsupportedLayerError as error:
            self._collector.cancel()
            self._no_ghost(error)
        except NoSampleLossError as error:
            self._no_samples(error)

    def finish(self, trainer: pl.Trainer, driver: WatchDriver, optimizer: Optimizer, steps: int) -> GradStats | None:
        """Statistics of the step, when ``.grad`` is complete; None if this step is not tested."""
        if self._loss_sum is not None:
            self.loss = float(self._loss_sum) / self._losses
        if self._collector is None or not self._collector.collecting:
            return None
        lr = float(GroupEdits.in_step(optimizer, 0)["lr"])
        try:
            stats = self._collector.finish(driver.world, lambda v: _reduce(trainer, v), loss=self.loss, lr=lr)
        except NoSampleLossError as error:
            self._no_samples(error)
            return None
        if stats is not None:
            self._last_test = steps
        return stats

    def _choose(self, driver: WatchDriver) -> Estimator | None:
        """The estimator of the step that begins; None if it has none."""
        groups = driver.world * driver.accumulate
        inner = "inner" in self.needs
        if self.estimator == "micro_batch":
            return "micro_batch" if groups >= 2 else None
        if self.estimator == "vmap":
            return "vmap"
        if self.estimator == "ghost":
            blind = inner and driver.accumulate > 1 and not self._use_samples
            return "ghost" if self._use_ghost and not blind else None
        if groups >= 2:
            if inner and self.scope == "all" and driver.accumulate > MAX_COPIES:
                return "vmap" if self._use_samples else None
            return "micro_batch"
        assert self._collector is not None
        if self._use_ghost and any(isinstance(m, _BatchNorm) and m.training for m in self._collector.module.modules()):
            self._no_ghost("a BatchNorm in training mode leaves no gradient of a single sample")
        return "ghost" if self._use_ghost and "element" not in self.needs else None

    def _no_samples(self, reason: object) -> None:
        """The loss of this model cannot be had sample by sample."""
        assert self._collector is not None
        self._collector.cancel()
        self._use_samples = False
        name = type(self._collector.module).__name__
        text = (
            f"AdaptiveBatchSize(estimator={self.estimator!r}): {reason}. If {name}.training_step does more than compute"
            f" a loss (update metrics, say), define {name}.curvature_loss(batch), which returns the loss and does"
            " nothing else."
        )
        if self.estimator == "vmap":
            raise MisconfigurationException(f"{text} Or use another estimator.")
        rank_zero_warn(
            f"{text} Without it no inner products are measured while accumulation is above"
            f" {MAX_COPIES if self.estimator == 'auto' else 1}, and the batch stays as it is; `scope` with the names of"
            " some parameters, a larger `max_micro_batch_size` or the criterion 'norm' avoid that."
        )

    def _no_ghost(self, reason: object) -> None:
        """Per-sample norms cannot be told from this model."""
        self._use_ghost = False
        if self.estimator == "ghost":
            raise MisconfigurationException(f"AdaptiveBatchSize(estimator='ghost'): {reason}")
        self.on_no_ghost(reason)


def _mean_loss_over(trainer: pl.Trainer) -> float:
    """The mean loss of a micro-batch over the loss that Lightning differentiates."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return trainer.accumulate_grad_batches / (1.0 if scaler is None else float(scaler.get_scale()))


def _reduce(trainer: pl.Trainer, vector: Tensor) -> Tensor:
    if trainer.world_size == 1:
        return vector
    summed: Tensor = trainer.strategy.reduce(vector.to(trainer.strategy.root_device), reduce_op="sum")
    return summed.cpu()
