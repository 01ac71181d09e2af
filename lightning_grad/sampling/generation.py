"""Sample from causal language models of ``transformers``, and score what was sampled. Imports it when called only."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids of different lengths as one tensor ``[n, P]``, and the mask that is 0 on the padding."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def end_mask(completions: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """1 up to and including the first end token, all ones without one; int64 ``[n, R]``."""
    ends = torch.isin(completions, torch.tensor(list(eos_ids), device=completions.device)).long()
    return (ends.cumsum(1) - ends == 0).long()


class _Draw:
    """Draws the next token itself and leaves ``generate`` no choice: numbers come from our own generator."""

    def __init__(self, temperature: float, generator: torch.Generator) -> None:
        self.temperature, self.generator = temperature, generator
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logp = torch.log_softmax(scores.float() / self.temperature, -1)
        # Gumbel-max: the largest of logp + noise is distributed as softmax
        noise = torch.empty_like(logp).exponential_(generator=self.generator)
        token = (logp - noise.log()).argmax(-1, keepdim=True)
        self.logprobs.append(logp.gather(-1, token)[:, 0])
        return torch.full_like(logp, -torch.inf).scatter_(-1, token, 0.0)


@contextmanager
def _bare_generation(model: Any) -> Iterator[None]:
    """Without the settings the checkpoint recommends: penalties and cut tails would be another policy."""
    from transformers import GenerationConfig

    saved = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = saved


@torch.no_grad()
def generate(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    temperature: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw one completion of every row.

    Args:
        model: A causal language model of ``transformers``.
        prompt_ids: Left-padded ``[n, P]``, on the model's device.
        prompt_mask: 0 on the padding.
        max_new_tokens: Longest completion.
        eos_ids: End tokens.
        pad_id: Fills up after the end.
        temperature: Of the softmax, > 0.
        generator: On the model's device.

    Returns:
        Tokens int64 ``[n, R]`` with ``R <= max_new_tokens``, and the log-probability of each, 0 after the end.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    draw = _Draw(temperature, generator)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=list(eos_ids), pad_token_id=pad_id
    )
    with _bare_generation(model):
        ids = model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),
        )
    completions = ids[:, prompt_ids.shape[1] :]
    logprob = torch.stack(draw.logprobs, 1)[:, : completions.shape[1]]
    return completions, logprob * end_mask(completions, eos_ids)


def completion_logits(
    model: Any, prompt_ids: Tensor, prompt_mask: Tensor | None, completion_ids: Tensor, completion_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Inputs ``[n, R, d]`` and outputs ``[n, R, V]`` of the output head where it predicts the completion."""
    length = completion_ids.shape[1]
    ids = torch.cat([prompt_ids, completion_ids[:, :-1]], 1)
    before = torch.ones_like(prompt_ids) if prompt_mask is None else prompt_mask
    mask = torch.cat([before, completion_mask[:, :-1]], 1)
    wanted = {
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),  # left padding shifts the tokens, not their positions
        "logits_to_keep": length,
        "use_cache": False,
    }
    known = inspect.signature(model.forward).parameters
    caught: list[Tensor] = []
    head: nn.Module = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        output = model(input_ids=ids, attention_mask=mask, **{k: v for k, v in wanted.items() if k in known})
    finally:
        handle.remove()
    return caught[-1][:, -length:], output.logits[:, -length:]


def pad_right(value: Tensor, width: int, fill: float = 0) -> Tensor:
    """Lengthen the second dimension."""
    return F.pad(value, (0, width - value.shape[1]), value=fill)
