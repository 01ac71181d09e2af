"""Optimizers: each one update rule, with the full contract of ``torch.optim``."""

from lightning_grad.optim.adagrad_norm import AdaGradNorm
from lightning_grad.optim.diffgrad import DiffGrad

__all__ = ["AdaGradNorm", "DiffGrad"]
