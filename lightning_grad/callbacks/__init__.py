"""Lightning callbacks, one file each."""

from lightning_grad.callbacks.optimizer_stats import OptimizerStats
from lightning_grad.callbacks.random_state import RandomStateCheckpoint

__all__ = ["OptimizerStats", "RandomStateCheckpoint"]
