"""Lightning callbacks, one file each."""

from lightning_grad.allocation.batch_size import (
    CABS,
    AugmentedInnerProductTest,
    CoordinateNormTest,
    Criterion,
    InnerProductTest,
    NoiseScale,
    NormTest,
)
from lightning_grad.callbacks.adaptive_batch_size import AdaptiveBatchSize
from lightning_grad.callbacks.batch_size_lr_scaler import BatchSizeLRScaler
from lightning_grad.callbacks.bind_data_size import BindDataSize
from lightning_grad.callbacks.iterate_averaging import IterateAveraging
from lightning_grad.callbacks.lanczos_learning_rate import LanczosLearningRate
from lightning_grad.callbacks.loss_normalized_lr import LossNormalizedLR
from lightning_grad.callbacks.nvfp4_monitor import NVFP4Monitor
from lightning_grad.callbacks.nvfp4_switch import NVFP4PrecisionSwitch
from lightning_grad.callbacks.optimizer_stats import OptimizerStats
from lightning_grad.callbacks.posterior_samples import PosteriorSamples
from lightning_grad.callbacks.random_state import RandomStateCheckpoint
from lightning_grad.callbacks.sample_allocation import DynamicSampleAllocation
from lightning_grad.callbacks.stability import SGDTemperatureMonitor, StabilityMonitor

__all__ = [
    "CABS",
    "AdaptiveBatchSize",
    "AugmentedInnerProductTest",
    "BatchSizeLRScaler",
    "BindDataSize",
    "CoordinateNormTest",
    "Criterion",
    "DynamicSampleAllocation",
    "InnerProductTest",
    "IterateAveraging",
    "LanczosLearningRate",
    "LossNormalizedLR",
    "NVFP4Monitor",
    "NVFP4PrecisionSwitch",
    "NoiseScale",
    "NormTest",
    "OptimizerStats",
    "PosteriorSamples",
    "RandomStateCheckpoint",
    "SGDTemperatureMonitor",
    "StabilityMonitor",
]
