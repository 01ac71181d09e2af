"""Models that sample and are rewarded, their data and metrics."""

from lightning_grad.sampling.data_module import RolloutDataModule
from lightning_grad.sampling.metrics import AcceptanceRate, GroupSignal

__all__ = ["AcceptanceRate", "GroupSignal", "RolloutDataModule"]
