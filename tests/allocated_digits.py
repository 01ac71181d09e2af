"""An ordinary classifier whose examples are allocated: what a user's own module looks like."""

import torch
from torch.nn import functional as F

from lightning_grad.allocation.importance import linear_head_scores
from lightning_grad.data.weighted import AllocatedLoader
from lightning_grad.demos import DigitsData, DigitsMLP


class AllocatedDigits(DigitsMLP):
    """Weighted loss; the score of an example is the gradient norm of the last layer."""

    def training_step(self, batch, batch_idx):
        images, labels = batch["data"]
        *body, head = self.network
        hidden = torch.nn.Sequential(*body)(images)
        logits = head(hidden)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return {"loss": (batch["weight"] * losses).mean(), "score": linear_head_scores(hidden, logits, labels)}


class AllocatedDigitsData(DigitsData):
    """The digits, with the class as stratum."""

    def train_dataloader(self):
        return AllocatedLoader(self.train_set, self.batch_size, strata=self.train_set.tensors[1], seed=self.seed)
