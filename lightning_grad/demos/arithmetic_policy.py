"""ArithmeticChain for Lightning: a policy that samples and is rewarded, and its prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from lightning_grad._validate import check_int, check_range
from lightning_grad.data.rollouts import RolloutBatch, weighted_policy_loss
from lightning_grad.demos import arithmetic as chain
from lightning_grad.sampling.data_module import RolloutDataModule
from lightning_grad.sampling.metrics import AcceptanceRate


class ArithmeticPrompts(RolloutDataModule):
    """Sums of one to eight digits modulo 10; a prompt is ``(tokens [10], answer)``, its difficulty the digits.

    Args:
        num_prompts: Prompts.
        seed: Seed of the problems.
    """

    def __init__(self, num_prompts: int = 128, seed: int = 0) -> None:
        check_int("num_prompts", num_prompts, 1)
        generator = torch.Generator().manual_seed(check_int("seed", seed, 0))
        tokens, answers, k = chain.make_problems(num_prompts, generator)
        super().__init__(list(zip(tokens, answers.tolist(), strict=True)), difficulty=k)


class ArithmeticPolicy(pl.LightningModule):
    """A 60 k-parameter transformer that first learns to imitate imperfect solutions, then improves by its own samples.

    Logs ``train/accuracy``: the acceptance rate of fresh samples on held-out problems, once per epoch.

    Args:
        lr: Learning rate of AdamW.
        base_steps: Steps of imitation before the run, 0 for none. A run with ``max_steps`` makes at most ten times as
            many, so that a trial run is short.
        base_seed: Seed of the base model.
        base_path: File that keeps the base model for the next run; ``None``: train it again each time.
        eval_prompts: Held-out problems; 0: none.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        base_steps: int = 800,
        base_seed: int = 0,
        base_path: str | None = None,
        eval_prompts: int = 256,
    ) -> None:
        super().__init__()
        self.lr = check_range("lr", lr, 0.0, 1e10, "(]")
        self.base_steps = check_int("base_steps", base_steps, 0)
        self.base_seed = check_int("base_seed", base_seed, 0)
        self.base_path = base_path
        self.eval_prompts = check_int("eval_prompts", eval_prompts, 0)
        self.save_hyperparameters()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(base_seed)
            self.policy = chain.ChainTransformer()
        self.accuracy = AcceptanceRate()

    def setup(self, stage: str) -> None:
        """Train the base model, or read it."""
        if stage != "fit" or not self.base_steps:
            return
        steps = self.base_steps if self.trainer.max_steps < 0 else min(self.base_steps, 10 * self.trainer.max_steps)
        path = None if self.base_path is None or steps < self.base_steps else Path(self.base_path)
        if path is not None and path.exists():
            self.policy.load_state_dict(torch.load(path, weights_only=True))
            return
        rank_zero_info(f"ArithmeticPolicy: imitating demonstrations for {steps} steps (800 take half a minute).")
        with torch.enable_grad():
            chain.train_base(self.policy, steps, self.base_seed)
        if path is not None:
            self._keep(path)

    @rank_zero_only
    def _keep(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.policy.state_dict(), path)

    def sample(self, prompts: list[Any], counts: Tensor, generator: torch.Generator) -> RolloutBatch:
        """Draw and reward completions."""
        tokens = torch.stack([tokens for tokens, _ in prompts])
        answers = torch.tensor([answer for _, answer in prompts])
        index = torch.repeat_interleave(torch.arange(len(prompts)), counts)
        responses, logprob = self.policy.sample(tokens.to(self.device), counts, generator)
        responses = responses.cpu()
        reward = chain.reward_of(responses, answers[index])
        return RolloutBatch(index, tokens[index], responses, chain.response_mask(responses), reward, logprob.cpu())

    def hidden_and_logits(self, rollouts: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Inputs and outputs of the head where it predicts the completion."""
        prompts, responses = rollouts.prompt_ids.to(self.device), rollouts.completion_ids.to(self.device)
        return self.policy.response_hidden_and_logits(prompts, responses)

    def logprob(self, batch: dict[str, Tensor]) -> Tensor:
        """Log-likelihood of each completion, ``[n]``."""
        ids, mask = batch["completion_ids"], batch["completion_mask"]
        logits = self.policy.response_hidden_and_logits(batch["prompt_ids"], ids)[1]
        token = torch.log_softmax(logits.float(), -1).gather(-1, ids[..., None])[..., 0]
        return (token * mask).sum(1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the weighted policy loss."""
        loss = weighted_policy_loss(self.logprob(batch), batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["weight"]))
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the accuracy on held-out problems, and leave the random state alone."""
        if self.eval_prompts:
            self.log("train/accuracy", self.held_out_accuracy(), prog_bar=True, sync_dist=True)

    @torch.no_grad()
    def held_out_accuracy(self, samples: int = 4) -> float:
        """Acceptance rate on problems that are not trained on."""
        generator = torch.Generator().manual_seed(2**31 + self.base_seed)
        prompts, answers, _ = chain.make_problems(self.eval_prompts, generator)
        counts = torch.full((self.eval_prompts,), samples)
        responses, _ = self.policy.sample(prompts.to(self.device), counts, generator)
        self.accuracy.reset()
        self.accuracy.update(
            chain.reward_of(responses.cpu(), answers.repeat_interleave(samples)).bool().to(self.device)
        )
        rate = float(self.accuracy.compute())
        self.accuracy.reset()
        return rate

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; the command line's ``optimizer:`` replaces it."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
