"""Optimizers: each one update rule, with the full contract of ``torch.optim``."""

from lightning_grad.optim.adagrad_norm import AdaGradNorm
from lightning_grad.optim.adamp import AdamP
from lightning_grad.optim.diffgrad import DiffGrad
from lightning_grad.optim.sgdp import SGDP

__all__ = ["SGDP", "AdaGradNorm", "AdamP", "DiffGrad"]
