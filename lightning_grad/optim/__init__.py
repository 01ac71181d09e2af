"""Optimizers: each one update rule, with the full contract of ``torch.optim``; and schedules."""

from lightning_grad.optim.adagrad_norm import AdaGradNorm
from lightning_grad.optim.adamp import AdamP
from lightning_grad.optim.diffgrad import DiffGrad
from lightning_grad.optim.last_iterate_lr import CooldownLR, InverseSqrtLR, LinearDecayLR, StronglyConvexLR
from lightning_grad.optim.normalized_gd import NormalizedGD
from lightning_grad.optim.optimistic import OptimisticFTRL, OptimisticOMD
from lightning_grad.optim.optimistic_adam import OptimisticAdam
from lightning_grad.optim.samples_lr import SamplesLR
from lightning_grad.optim.sgdp import SGDP
from lightning_grad.optim.sgmcmc import PSGLD, SGHMC, SGLD

__all__ = [
    "PSGLD",
    "SGDP",
    "SGHMC",
    "SGLD",
    "AdaGradNorm",
    "AdamP",
    "CooldownLR",
    "DiffGrad",
    "InverseSqrtLR",
    "LinearDecayLR",
    "NormalizedGD",
    "OptimisticAdam",
    "OptimisticFTRL",
    "OptimisticOMD",
    "SamplesLR",
    "StronglyConvexLR",
]
