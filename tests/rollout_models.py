"""Sampling models of the allocation tests: a policy without training whose rewards are cheap and not rare."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from lightning_grad.data.rollouts import RolloutLoader
from lightning_grad.demos import ArithmeticPolicy, ArithmeticPrompts
from lightning_grad.demos import arithmetic as chain


class EasyPolicy(ArithmeticPolicy):
    """Rewards a completion whose first token is below a threshold that depends on the prompt."""

    def __init__(self, **kwargs):
        super().__init__(**({"base_steps": 0, "eval_prompts": 0} | kwargs))

    def sample(self, prompts, counts, generator):
        rollouts = super().sample(prompts, counts, generator)
        rollouts.reward = (rollouts.completion_ids[:, 0] < 3 + 2 * rollouts.prompt_ids[:, 1]).float()
        return rollouts


class EasyRun(EasyPolicy):
    """With an argument that the command line sees."""

    def __init__(self, lr=3e-3):
        super().__init__(lr=lr)


class RolloutRun(EasyPolicy):
    """The run of the reliability tests, which has its own loader."""

    def __init__(self, case, num_workers=0):
        super().__init__()
        self.case = case
        self.hparams.clear()  # a case is not for checkpoints

    def train_dataloader(self):
        tokens, answers, k = chain.make_problems(10, torch.Generator().manual_seed(1))
        return RolloutLoader(list(zip(tokens, answers.tolist(), strict=True)), 6, difficulty=k)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def quiet_trainer(**kwargs):
    settings = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return pl.Trainer(**(settings | kwargs))


def prompts(num=12, seed=0):
    return ArithmeticPrompts(num, seed)
