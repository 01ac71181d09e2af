"""Generated samples: what a sampling model hands over, and the loader that trains on them.

No Lightning here: a loop of your own fills a :class:`RolloutLoader` and iterates over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_grad._validate import check_int


@dataclass
class RolloutBatch:
    """Samples of a policy: ``n`` completions of up to ``R`` tokens after prompts of up to ``P`` tokens, on the CPU.

    Args:
        prompt_index: Which prompt of the list each row answers, int64 ``[n]``.
        prompt_ids: Prompt tokens ``[n, P]``.
        completion_ids: Sampled tokens ``[n, R]``.
        completion_mask: 1 up to and including the end token, ``[n, R]``.
        reward: ``[n]``; not-finite means that a sample could not be judged.
        logprob: Log-probability of each token when it was sampled, ``[n, R]``.
        prompt_mask: 1 on prompt tokens, 0 on left padding, ``[n, P]``; ``None``: no padding.
        extra: Further tensors with ``n`` rows.
    """

    prompt_index: Tensor
    prompt_ids: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    reward: Tensor
    logprob: Tensor | None = None
    prompt_mask: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt_index)

    @property
    def length(self) -> Tensor:
        """Tokens of each completion, int64 ``[n]``."""
        return self.completion_mask.long().sum(1)

    def rows(self, index: Tensor | slice) -> RolloutBatch:
        """Some of the samples."""
        return RolloutBatch.from_state_dict({name: value[index] for name, value in self.state_dict().items()})

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name; those of ``extra`` under ``extra.NAME``."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        tensors = {name: value for name, value in own.items() if value is not None}
        return tensors | {f"extra.{name}": value for name, value in self.extra.items()}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> RolloutBatch:
        """Inverse of :meth:`state_dict`."""
        own = {name: value for name, value in tensors.items() if not name.startswith("extra.")}
        extra = {name.removeprefix("extra."): value for name, value in tensors.items() if name.startswith("extra.")}
        return cls(**own, extra=extra)


def concatenate(parts: Sequence[RolloutBatch]) -> RolloutBatch:
    """Join batches whose prompts and completions may have different lengths (prompts are padded on the left)."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.prompt_ids.shape[1] for part in parts)
    length = max(part.completion_ids.shape[1] for part in parts)
    masked = any(part.prompt_mask is not None or part.prompt_ids.shape[1] < width for part in parts)
    masks = [torch.ones_like(p.prompt_ids) if p.prompt_mask is None else p.prompt_mask for p in parts]
    return RolloutBatch(
        torch.cat([p.prompt_index for p in parts]),
        torch.cat([_left(p.prompt_ids, width) for p in parts]),
        torch.cat([_right(p.completion_ids, length) for p in parts]),
        torch.cat([_right(p.completion_mask, length) for p in parts]),
        torch.cat([p.reward for p in parts]),
        _joined([p.logprob for p in parts], length),
        torch.cat([_left(mask, width) for mask in masks]) if masked else None,
        {name: torch.cat([p.extra[name] for p in parts]) for name in parts[0].extra},
    )


def _joined(values: list[Tensor | None], length: int) -> Tensor | None:
    known = [_right(value, length) for value in values if value is not None]
    return torch.cat(known) if len(known) == len(values) else None


def _left(value: Tensor, width: int) -> Tensor:
    return F.pad(value, (width - value.shape[1], 0))


def _right(value: Tensor, width: int) -> Tensor:
    return F.pad(value, (0, width - value.shape[1]))


@runtime_checkable
class SamplingModule(Protocol):
    """What a model implements to have its samples allocated.

    Optional methods: ``hidden_and_logits(rollouts) -> (hidden [n, R, d], logits [n, R, V])``, the inputs and outputs of
    the output head at the positions that predict the completion, for ``grad_norm="head"``, ``"token"`` and ``"full"``;
    ``sample_scores(rollouts) -> [n]`` for ``grad_norm="module"``.
    """

    def sample(self, prompts: list[Any], counts: Tensor, generator: torch.Generator) -> RolloutBatch:
        """Draw ``counts[i]`` completions of every ``prompts[i]``, rows grouped by prompt, and reward them."""
        ...


def weighted_policy_loss(logprob_sum: Tensor, batch: Mapping[str, Any]) -> Tensor:
    r"""The loss :math:`\sum_j v_j c_j (-\log \pi(y_j))` of a batch of a :class:`RolloutLoader`.

    Args:
        logprob_sum: Log-likelihood of each completion under the current policy, ``[n]``.
        batch: As the loader gives it; ``weight`` carries the scale, so this is a sum and never a mean.
    """
    coefficient = batch["weight"] * batch["advantage"]
    # padding and unscorable rows have weight 0, but 0 * inf would still be NaN
    used = torch.where(coefficient != 0, logprob_sum, torch.zeros_like(logprob_sum))
    loss: Tensor = -(coefficient.to(logprob_sum.dtype) * used).sum()
    return loss


def clipped_policy_loss(logprob: Tensor, batch: Mapping[str, Any], clip: float) -> Tensor:
    r"""The loss for samples of an older policy: :math:`-\sum_j v_j \sum_t \min(r_{jt} c_j, \bar r_{jt} c_j)`.

    :math:`r` is the ratio of the token's probability to that when it was sampled, :math:`\bar r` the same within
    ``1 - clip`` and ``1 + clip``. While the policy is the sampling one its gradient is that of
    :func:`weighted_policy_loss`.

    Args:
        logprob: Log-probability of each token under the current policy, ``[n, R]``.
        batch: As the loader gives it; ``logprob`` is that of the sampling policy.
        clip: In (0, 1).

    Raises:
        ValueError: The samples were handed over without ``logprob``.
    """
    if "logprob" not in batch:
        raise ValueError("the clipped loss needs `logprob` of the samples; give it to the RolloutBatch in sample().")
    weight, advantage = batch["weight"], batch["advantage"]
    mask = batch["completion_mask"].bool() & (weight * advantage != 0)[:, None]
    ratio = torch.where(mask, logprob - batch["logprob"], 0.0).exp()
    advantage = advantage.to(logprob.dtype)[:, None]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    loss: Tensor = -(weight.to(logprob.dtype) * torch.where(mask, gain, 0.0).sum(1)).sum()
    return loss


class RolloutLoader:
    """Gives the samples of an iteration as ``steps_per_iteration`` micro-batches.

    Batches are dicts of the tensors of :class:`RolloutBatch` (``extra`` is merged in) plus ``weight``, ``advantage``,
    ``accepted`` and ``is_padding``. Nothing is generated here: :meth:`fill` puts samples in, and the first ``next()``
    reads them, so an iterator may be made long before. It is deliberately not a ``DataLoader``, whose workers and
    injected samplers would look at the samples too early.

    Args:
        prompts: The prompts, any objects the model's ``sample`` understands.
        steps_per_iteration: Micro-batches per epoch, >= 1; the constant length of the loader.
        difficulty: Integer level of each prompt, for logging only.
    """

    def __init__(
        self, prompts: Sequence[Any], steps_per_iteration: int = 4, difficulty: Sequence[int] | Tensor | None = None
    ) -> None:
        if not len(prompts):
            raise ValueError("`prompts` must hold at least one prompt, got none.")
        if difficulty is not None and len(difficulty) != len(prompts):
            raise ValueError(f"`difficulty` must have one entry per prompt, got {len(difficulty)} for {len(prompts)}.")
        self.prompts = list(prompts)
        self.steps_per_iteration = check_int("steps_per_iteration", steps_per_iteration, 1)
        self.difficulty = None if difficulty is None else torch.as_tensor(difficulty).long()
        self.position = 0
        self._items: dict[str, Tensor] | None = None
        self._order = torch.zeros(0, dtype=torch.int64)

    def fill(self, items: dict[str, Tensor], order_seed: int, position: int = 0) -> None:
        """Put the samples of an iteration in, shuffled by ``order_seed``; batches before ``position`` are left out."""
        self._items = items
        self.reshuffle(order_seed, position)

    def reshuffle(self, order_seed: int, position: int = 0) -> None:
        """Start another pass over the same samples."""
        assert self._items is not None
        generator = torch.Generator().manual_seed(order_seed)
        self._order = torch.randperm(len(self._items["weight"]), generator=generator)
        self.position = position

    @property
    def items(self) -> dict[str, Tensor] | None:
        """What :meth:`fill` put in."""
        return self._items

    def __len__(self) -> int:
        return self.steps_per_iteration

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            if self._items is None:
                raise RuntimeError(
                    "RolloutLoader is empty: add the callback DynamicSampleAllocation, or call fill() before training."
                )
            if self.position >= self.steps_per_iteration:
                return
            index = self._order.tensor_split(self.steps_per_iteration)[self.position]
            self.position += 1
            yield self._batch(index)

    def _batch(self, index: Tensor) -> dict[str, Tensor]:
        assert self._items is not None
        if len(index):
            batch = {name: value[index] for name, value in self._items.items()}
            return batch | {"is_padding": torch.zeros(len(index), dtype=torch.bool)}
        # a process with fewer samples than steps still takes part in every step
        batch = {name: _one_row(value) for name, value in self._items.items()}
        batch["weight"] = torch.zeros(1, dtype=self._items["weight"].dtype)
        batch["completion_mask"] = torch.ones_like(batch["completion_mask"])
        return batch | {"is_padding": torch.ones(1, dtype=torch.bool)}

    def state_dict(self) -> dict[str, Any]:
        """The position; at the end of an epoch it is the next one's start."""
        return {"version": 1, "position": self.position % self.steps_per_iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a saved position; the samples themselves come back through the callback."""
        self.position = state_dict["position"]


def _one_row(value: Tensor) -> Tensor:
    return value[:1] if len(value) else value.new_zeros(1, *value.shape[1:])
