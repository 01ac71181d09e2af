"""What AdaptiveBatchSize logs, and when."""

from __future__ import annotations

import math

import lightning.pytorch as pl

from lightning_grad._tensorboard import log_scalars
from lightning_grad.allocation.batch_size import BatchPlan, Decision
from lightning_grad.callbacks._batch_probe import GradientProbe
from lightning_grad.callbacks.batch_size_lr_scaler import BatchSizeLRScaler


class BatchLog:
    """Writes the values of optimizer steps to the loggers of a Trainer.

    Args:
        scope: The callback's, for the name of the noise scale.
        vs_samples: Also log with samples seen as the step.
    """

    def __init__(self, scope: str | list[str], vs_samples: bool) -> None:
        self.scope, self.vs_samples = scope, vs_samples
        self._logged_step = -1

    def step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        plan: BatchPlan,
        decision: Decision | None,
        probe: GradientProbe,
        scaler: BatchSizeLRScaler | None,
        *,
        samples_seen: int,
        skipped_tests: int,
        steps: int,
        changed: bool,
    ) -> None:
        """Log the first step, those that Lightning would log, and those that changed the batch size."""
        pl_module.log("batching/batch_size", float(plan.batch_size), prog_bar=True, logger=False, batch_size=1)
        if scaler is not None and scaler.log_values:
            scaler.log_to(pl_module, trainer)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if changed or steps - self._logged_step >= every or self._logged_step < 0:
            self._logged_step = steps
            values = self.values(plan, decision, samples_seen, skipped_tests, probe.seconds)
            log_scalars(trainer, values if scaler is None else {**values, "batching/lr_factor": scaler.factor})
        if self.vs_samples:
            by_samples = {"samples/batch_size": float(plan.batch_size)}
            if probe.loss is not None:
                by_samples["samples/train_loss"] = probe.loss
            for logger in trainer.loggers:
                logger.log_metrics(by_samples, step=samples_seen)

    def values(
        self, plan: BatchPlan, decision: Decision | None, samples_seen: int, skipped_tests: int, seconds: float
    ) -> dict[str, float]:
        """Tags and values of one step; those of a test only where there was one and they are finite."""
        values = {
            "batching/batch_size": float(plan.batch_size),
            "batching/micro_batch_size": float(plan.micro),
            "batching/accumulate": float(plan.accumulate),
            "batching/samples_seen": float(samples_seen),
            "batching/skipped_tests": float(skipped_tests),
        }
        if decision is not None:
            stats = decision.stats
            scale = "batching/noise_scale_proxy" if self.scope == "norm_layers" else "batching/noise_scale"
            found: dict[str, float | None] = {
                "batching/target": decision.target,
                "batching/test_ratio": decision.test_ratio,
                scale: stats.noise_scale,
                "batching/grad_sq_norm": stats.grad_sq_norm,
                "batching/grad_sq_norm_unbiased": stats.grad_sq_norm_unbiased,
                "batching/trace_cov": stats.trace_cov,
                "batching/inner_var": stats.inner_var,
                "batching/orth_var": stats.orth_var,
                "batching/test_time_ms": 1e3 * seconds,
            }
            values |= {name: value for name, value in found.items() if value is not None and math.isfinite(value)}
        return values
