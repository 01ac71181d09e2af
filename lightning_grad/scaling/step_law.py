r"""Learning rate and batch size before the run: Step Law.

:math:`\eta = 1.79\, N^{-0.713} D^{0.307}`, :math:`B = 0.58\, D^{0.571}` tokens, for the *peak* learning rate of AdamW
under a cosine schedule that ends at 1e-5, sequences of 2048 tokens; :math:`N` counts parameters **without embeddings**.

Source: Li et al. (arXiv:2503.04715). Fitted to runs with :math:`N` in [2e8, 1.1e9] and :math:`D` in [4e9, 1e11].
Refitting the published runs of dense models with the published recipe gives other exponents
(:math:`77.7\, N^{-0.766} D^{0.197}` and :math:`0.209\, D^{0.613}`): inside that range the two agree, far
outside they do not, so both are reported. The optimum is flat: a factor of 1.5 in the learning rate or of 2 in the
batch costs 0.1 to 0.3 % loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_grad._validate import check_int, check_range

if TYPE_CHECKING:
    from torch import nn

PARAMS_RANGE = (2e8, 1.1e9)
TOKENS_RANGE = (4e9, 1e11)
FINAL_LR = 1e-5
"""Learning rate at the end of the schedule that the law was fitted with."""


@dataclass(frozen=True)
class StepLaw:
    """What the law says.

    Attributes:
        lr: Peak learning rate.
        batch_tokens: Tokens of an optimizer step.
        batch_sequences: The same in sequences; ``None`` if no length was given.
        refit_lr: Learning rate by the refit of the published runs.
        refit_batch_tokens: Batch by the refit.
        notice: Says that the question lies outside the runs behind the law; empty inside.
    """

    lr: float
    batch_tokens: float
    batch_sequences: float | None
    refit_lr: float
    refit_batch_tokens: float
    notice: str


def step_law(N: float, D: float, seq_len: int | None = None) -> StepLaw:
    """Return learning rate and batch size for ``N`` non-embedding parameters trained on ``D`` tokens.

    Args:
        N: Parameters without embeddings, > 0; see :func:`count_non_embedding`.
        D: Training tokens, > 0.
        seq_len: Tokens of a sequence, >= 1, to give the batch in sequences too.

    Raises:
        ValueError: A number is out of range.
    """
    check_range("N", N, 0.0, math.inf, "()")
    check_range("D", D, 0.0, math.inf, "()")
    if seq_len is not None:
        check_int("seq_len", seq_len, 1)
    lr, batch = 1.79 * N**-0.713 * D**0.307, 0.58 * D**0.571
    refit_lr, refit_batch = 77.7 * N**-0.766 * D**0.197, 0.209 * D**0.613
    outside = [
        f"{name} {value:.3g} (runs: {low:.3g} to {high:.3g})"
        for name, value, (low, high) in (("params", N, PARAMS_RANGE), ("tokens", D, TOKENS_RANGE))
        if not low <= value <= high
    ]
    notice = ""
    if outside:
        ratio = max(lr / refit_lr, refit_lr / lr)
        notice = (
            f"Extrapolation: {' and '.join(outside)}. A refit of the published runs gives a learning rate that differs"
            f" by a factor of {ratio:.2f} here, {refit_lr:.3e} instead of {lr:.3e}; try both."
        )
    return StepLaw(lr, batch, None if seq_len is None else batch / seq_len, refit_lr, refit_batch, notice)


def count_non_embedding(model: nn.Module) -> int:
    """Return the number of parameters of ``model`` outside embedding tables; a shared output layer is one of them.

    An output layer of its own is counted; the law's :math:`N` has attention and feed-forward weights only.
    """
    from torch import nn  # here, so that the commands start without torch

    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    return sum(p.numel() for p in model.parameters() if id(p) not in tables)
