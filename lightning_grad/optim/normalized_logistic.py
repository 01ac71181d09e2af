r"""Logistic regression by gradient descent whose step is divided by the mean error probability.

For rows :math:`z_i = y_i a_i` and margins :math:`m_i = z_i^T \theta`,

.. math:: \theta \leftarrow \theta + \gamma \frac{\sum_i \sigma(-m_i)\, z_i}{\sum_i \sigma(-m_i)},

which is gradient descent on the mean logistic loss with the learning rate :math:`\gamma / \overline{(1 - p)}`, where
:math:`p_i = \sigma(m_i)` is the probability of the true class. From :math:`\theta = 0`, on separable data with
:math:`\|z_i\| \le R` and margin :math:`\mu`, at most :math:`(R^2 + 1.1139\, n/\gamma)/\mu^2` steps are made while a
margin is not positive. Callback: :class:`lightning_grad.LossNormalizedLR`.

Source: Tyurin, From logistic regression to the perceptron algorithm (arXiv:2412.08424); the bound is ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_grad._validate import check_int, check_range

# 4 max_x x/(1 + e^x) = 4 W(1/e)
_SLACK = 1.1138584


def normalized_logistic_gd(z: Tensor, gamma: float, steps: int) -> tuple[Tensor, int]:
    """Run from 0 until every margin is positive, at most ``steps`` steps.

    Args:
        z: Rows ``(n, d)``, features times the label (+1 or -1).
        gamma: Length scale of the step, > 0.
        steps: Most steps, >= 0.

    Returns:
        The parameters ``(d,)`` and the number of steps made.
    """
    check_range("gamma", gamma, 0.0, math.inf, "()")
    theta = torch.zeros_like(z[0])
    for done in range(check_int("steps", steps, 0)):
        margins = z @ theta
        if bool((margins > 0).all()):
            return theta, done
        # softmax of log sigma(-m): the weights stay finite when every sigma underflows
        theta = theta + gamma * (torch.softmax(torch.nn.functional.logsigmoid(-margins), 0) @ z)
    return theta, steps


def separation_bound(num_rows: int, radius: float, margin: float, gamma: float) -> float:
    """Return the largest number of steps :func:`normalized_logistic_gd` can need."""
    return (radius**2 + _SLACK * num_rows / gamma) / margin**2
