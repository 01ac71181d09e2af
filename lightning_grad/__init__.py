"""The research frontier of stochastic-gradient methods as PyTorch Lightning plugins.

Importing this package makes the bare class names below usable in LightningCLI YAML.
"""

from typing import TYPE_CHECKING

from lightning_grad._command import answers_alone, load_classes

__version__ = "0.1.1.dev0"

if not answers_alone():
    from lightning_grad.callbacks import (
        CABS,
        AdaptiveBatchSize,
        AugmentedInnerProductTest,
        BatchSizeLRScaler,
        BindDataSize,
        CoordinateNormTest,
        DynamicSampleAllocation,
        InnerProductTest,
        IterateAveraging,
        LanczosLearningRate,
        LossNormalizedLR,
        NoiseScale,
        NormTest,
        NVFP4Monitor,
        NVFP4PrecisionSwitch,
        OptimizerStats,
        PosteriorSamples,
        RandomStateCheckpoint,
    )
    from lightning_grad.callbacks.stability import SGDTemperatureMonitor, StabilityMonitor
    from lightning_grad.checkpoint_io import ChecksumCheckpointIO
    from lightning_grad.data import AdaptiveDataLoader, ResumableDataLoader, ResumableSampler
    from lightning_grad.optim import (
        PSGLD,
        SGDP,
        SGHMC,
        SGLD,
        AdaGradNorm,
        AdamP,
        CooldownLR,
        DiffGrad,
        InverseSqrtLR,
        LinearDecayLR,
        NormalizedGD,
        OptimisticAdam,
        OptimisticFTRL,
        OptimisticOMD,
        SamplesLR,
        StronglyConvexLR,
    )
    from lightning_grad.optim.groups import param_groups
    from lightning_grad.precision import NVFP4FSDPPrecision, NVFP4Precision
    from lightning_grad.sampling import CausalLMSamplingModule, JSONLPrompts, RolloutDataModule
    from lightning_grad.strategies import ElasticSPSAStrategy, SharedSeedSPSAStrategy
elif not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        load_classes()
        return globals()[name]


__all__ = [
    "CABS",
    "PSGLD",
    "SGDP",
    "SGHMC",
    "SGLD",
    "AdaGradNorm",
    "AdamP",
    "AdaptiveBatchSize",
    "AdaptiveDataLoader",
    "AugmentedInnerProductTest",
    "BatchSizeLRScaler",
    "BindDataSize",
    "CausalLMSamplingModule",
    "ChecksumCheckpointIO",
    "CooldownLR",
    "CoordinateNormTest",
    "DiffGrad",
    "DynamicSampleAllocation",
    "ElasticSPSAStrategy",
    "InnerProductTest",
    "InverseSqrtLR",
    "IterateAveraging",
    "JSONLPrompts",
    "LanczosLearningRate",
    "LinearDecayLR",
    "LossNormalizedLR",
    "NVFP4FSDPPrecision",
    "NVFP4Monitor",
    "NVFP4Precision",
    "NVFP4PrecisionSwitch",
    "NoiseScale",
    "NormTest",
    "NormalizedGD",
    "OptimisticAdam",
    "OptimisticFTRL",
    "OptimisticOMD",
    "OptimizerStats",
    "PosteriorSamples",
    "RandomStateCheckpoint",
    "ResumableDataLoader",
    "ResumableSampler",
    "RolloutDataModule",
    "SGDTemperatureMonitor",
    "SamplesLR",
    "SharedSeedSPSAStrategy",
    "StabilityMonitor",
    "StronglyConvexLR",
    "__version__",
    "param_groups",
]
