"""What an allocation is worth on ArithmeticChain: statistics of full gradients, from many samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_grad.allocation.e_step import EStep
from lightning_grad.allocation.prompt_weights import Objective, predicted_variance
from lightning_grad.demos import arithmetic as chain


@dataclass(frozen=True)
class GradientStatistics:
    """Acceptance rate, and moments of the full score over accepted and rejected samples; each ``[m]``."""

    p: Tensor
    norm2: Tensor
    mean2: Tensor
    norm2_rejected: Tensor

    def variance(self, counts: Tensor, objective: Objective) -> float:
        """Trace of the covariance of the unbiased gradient estimate under a plan."""
        return predicted_variance(
            counts,
            self.p,
            self.norm2,
            objective=objective,
            mean_grad_norm2=self.mean2,
            grad_norm2_rejected=self.norm2_rejected,
            exact=True,
        )


def score_sums(
    policy: chain.ChainTransformer, prompt: Tensor, responses: Tensor, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Sum of the full scores of some responses to one prompt ``[d]``, and the squared norm of each ``[n]``."""
    params = {name: p.detach() for name, p in policy.named_parameters()}

    def log_likelihood(params: dict[str, Tensor], response: Tensor) -> Tensor:
        tokens = torch.cat([prompt, response[:-1]])[None]
        logits = functional_call(policy, params, (tokens,))[0, chain.PROMPT_LENGTH - 1 :]
        token = torch.log_softmax(logits, -1).gather(-1, response[:, None])[:, 0]
        total: Tensor = (token * chain.response_mask(response[None])[0]).sum()
        return total

    total = torch.zeros(sum(p.numel() for p in params.values()), dtype=torch.float64)
    norms = []
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule
        for part in responses.split(chunk):
            grads = vmap(grad(log_likelihood), (None, 0))(params, part)
            flat = torch.cat([g.flatten(1) for g in grads.values()], 1)
            norms.append(flat.square().sum(1).double())
            total += flat.sum(0).double()
    return total, torch.cat(norms)


def gradient_statistics(
    policy: chain.ChainTransformer,
    prompts: Tensor,
    answers: Tensor,
    samples: int = 400,
    rejected: int = 50,
    seed: int = 0,
) -> GradientStatistics:
    """Measure a policy.

    Args:
        policy: The model.
        prompts: Tokens ``[m, 10]``.
        answers: ``[m]``.
        samples: Samples per prompt for acceptance rate and accepted scores.
        rejected: Rejected samples per prompt whose scores are measured, at most.
        seed: Seed of the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        responses, _ = policy.sample(prompt[None], torch.tensor([samples]), generator)
        right = chain.reward_of(responses, answer.expand(samples)).bool()
        count = int(right.sum())
        total, norms = score_sums(policy, prompt, responses[right]) if count else (torch.zeros(1), torch.zeros(1))
        wrong = responses[~right][:rejected]
        second = score_sums(policy, prompt, wrong)[1].mean() if len(wrong) else torch.zeros(())
        # without the diagonal the squared mean is unbiased
        mean2 = (total.square().sum() - norms.sum()) / (count * (count - 1)) if count > 1 else torch.zeros(())
        rows.append((count / samples, float(norms.mean()), max(0.0, float(mean2)), float(second)))
    p, norm2, mean2s, second2 = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return GradientStatistics(p.clamp_min(0.5 / samples), norm2, mean2s, second2)


@torch.no_grad()
def planned_ratios(
    truth: GradientStatistics, e_step: EStep, module: Any, prompts: list[Any], budget: int, repetitions: int
) -> Tensor:
    """Variance of plans made from fresh pilots, over that of an even split of the same budget, ``[repetitions]``."""
    objective = e_step.rule.objective
    even = truth.variance(e_step.rule.even(len(prompts), budget), objective)
    plans = [e_step.pilot_plan(module, prompts, budget, seed=seed) for seed in range(repetitions)]
    return torch.tensor([truth.variance(plan.counts, objective) for plan in plans]) / even
