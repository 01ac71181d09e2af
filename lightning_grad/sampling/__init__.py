"""Models that sample and are rewarded, their data and metrics."""

from lightning_grad.sampling.causal_lm import CausalLMSamplingModule
from lightning_grad.sampling.data_module import RolloutDataModule
from lightning_grad.sampling.metrics import AcceptanceRate, GroupSignal
from lightning_grad.sampling.prompt_file import JSONLPrompts, Prompt
from lightning_grad.sampling.rewards import BoxedAnswerReward, ExactNumberReward, MathAnswerReward

__all__ = [
    "AcceptanceRate",
    "BoxedAnswerReward",
    "CausalLMSamplingModule",
    "ExactNumberReward",
    "GroupSignal",
    "JSONLPrompts",
    "MathAnswerReward",
    "Prompt",
    "RolloutDataModule",
]
