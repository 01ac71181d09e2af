r"""What is remembered about every prompt: decayed counts and sums, from which acceptance rates and norms follow.

With each visit, :math:`S \leftarrow \rho S + s` for successes, trials, squared norms, rewards and lengths alike.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_grad._validate import check_choice, check_int, check_range
from lightning_grad.allocation.prompt_weights import smooth_acceptance

Moment = Literal["rms", "mean"]

COLUMNS = (
    "successes",
    "trials",
    "scored_accepted",
    "norm_accepted",
    "scored_rejected",
    "norm_rejected",
    "reward",
    "reward2",
    "samples",
    "length",
)
_AT = {name: column for column, name in enumerate(COLUMNS)}


def visit_sums(
    prompt_index: Tensor,
    reward: Tensor,
    length: Tensor,
    num_prompts: int,
    *,
    grad_norm: Tensor | None = None,
    accept_threshold: float = 0.5,
    moment: Moment = "rms",
) -> Tensor:
    """Sums over the samples of one visit; sums of several processes are added.

    Args:
        prompt_index: Prompt of each sample, int64 ``[n]``.
        reward: ``[n]``. A sample whose reward is not finite counts towards the length only.
        length: Tokens of each completion, ``[n]``.
        num_prompts: ``m``.
        grad_norm: Score norms ``[n]``; not-finite ones (also: not measured) are left out of the norms.
        accept_threshold: A sample is accepted if its reward is above.
        moment: ``"rms"`` sums squares, ``"mean"`` the norms themselves.

    Returns:
        float64 tensor ``[m, len(COLUMNS)]``, on the CPU.
    """
    check_choice("moment", moment, get_args(Moment))
    reward, length = reward.detach().double().cpu(), length.detach().double().cpu()
    valid = torch.isfinite(reward)
    value = torch.where(valid, reward, 0.0)
    accepted = valid & (reward > accept_threshold)
    norm = torch.full_like(reward, torch.nan) if grad_norm is None else grad_norm.detach().double().cpu()
    known = torch.isfinite(norm) & valid
    power = torch.where(known, norm.square() if moment == "rms" else norm, 0.0)
    yes, no = (known & accepted).double(), (known & ~accepted).double()
    rows = [accepted.double(), valid.double(), yes, yes * power, no, no * power, value, value.square()]
    rows += [torch.ones_like(length), length]
    sums = torch.zeros(num_prompts, len(COLUMNS), dtype=torch.float64)
    return sums.index_add_(0, prompt_index.cpu(), torch.stack(rows, dim=1))


class PromptHistory:
    """Decayed sums per prompt.

    Args:
        num_prompts: ``m``, >= 1.
        decay: Factor in [0, 1] on what was known of a prompt when it is visited again; 0 keeps the last visit only.
        moment: ``"rms"`` for sums of squared norms, ``"mean"`` for sums of norms.

    State: ``sums``, float64 ``[m, 10]``.
    """

    def __init__(self, num_prompts: int, decay: float = 0.5, moment: Moment = "rms") -> None:
        self.num_prompts = check_int("num_prompts", num_prompts, 1)
        self.decay = check_range("decay", decay, 0.0, 1.0)
        self.moment = check_choice("moment", moment, get_args(Moment))
        self.sums = torch.zeros(num_prompts, len(COLUMNS), dtype=torch.float64)

    def __getitem__(self, column: str) -> Tensor:
        return self.sums[:, _AT[column]]

    def visit(self, prompts: Tensor, sums: Tensor) -> None:
        """Add the sums of one visit of ``prompts`` (distinct, int64 ``[k]``); ``sums`` is ``[k, 10]``."""
        self.sums[prompts] = self.decay * self.sums[prompts] + sums

    def of(self, prompts: Tensor) -> PromptHistory:
        """The history of some prompts only, as a copy."""
        part = PromptHistory(len(prompts), self.decay, self.moment)  # type: ignore[arg-type]
        part.sums = self.sums[prompts].clone()
        return part

    def acceptance(self, prior: tuple[float, float] | None = (0.5, 0.5)) -> Tensor:
        """Smoothed acceptance rates ``[m]``; see :func:`smooth_acceptance`."""
        return smooth_acceptance(self["successes"], self["trials"], prior)

    def grad_norm(self) -> Tensor:
        """Moment of the norms over accepted samples ``[m]``; NaN where none was scored."""
        return self._norm("accepted")

    def grad_norm_rejected(self) -> Tensor:
        """The same over rejected samples."""
        return self._norm("rejected")

    def _norm(self, kind: str) -> Tensor:
        mean = self[f"norm_{kind}"] / self[f"scored_{kind}"]  # 0/0 is the NaN that says "not known"
        return mean.sqrt() if self.moment == "rms" else mean

    def mean_reward(self) -> Tensor:
        """Mean of the finite rewards ``[m]``; NaN where there is none."""
        return self["reward"] / self["trials"]

    def reward_var(self) -> Tensor:
        """Variance of the rewards ``[m]``, mixed with one pseudo-sample of the variance pooled over all prompts."""
        count = self["trials"]
        mean = self["reward"] / count.clamp_min(1e-12)
        spread = (self["reward2"] - count * mean.square()).clamp_min(0.0)
        total = count.sum()
        pooled = spread.sum() / total if total > 0 else torch.ones((), dtype=torch.float64)
        return (spread + pooled) / (count + 1.0)

    def mean_length(self) -> Tensor:
        """Mean tokens of a completion ``[m]``; the mean over all prompts where there is none, 1 if there is none."""
        count, total = self["samples"], self["length"]
        overall = total.sum() / count.sum() if count.sum() > 0 else torch.ones((), dtype=torch.float64)
        return torch.where(count > 0, total / count.clamp_min(1e-12), overall).clamp_min(1.0)

    def state_dict(self) -> dict[str, Any]:
        """The sums, as a copy."""
        return {"sums": self.sums.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over saved sums.

        Raises:
            ValueError: They are of another number of prompts.
        """
        saved = state_dict["sums"]
        if len(saved) != self.num_prompts:
            raise ValueError(
                f"the checkpoint holds the history of {len(saved)} prompts, this run has {self.num_prompts}."
                " Use the same prompts or start without the checkpoint."
            )
        self.sums = saved.double().cpu().clone()
