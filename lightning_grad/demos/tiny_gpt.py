"""A byte-level transformer, small enough for two CPU cores."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_grad._validate import check_choice, check_int, check_range

Attention = Literal["auto", "math"]


class _SelfAttention(nn.Module):
    """Causal multi-head attention, ``(B, T, dim)`` to ``(B, T, dim)``."""

    def __init__(self, dim: int, num_heads: int, dropout: float, backend: Attention) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        if self.backend == "math":
            with sdpa_kernel(SDPBackend.MATH):
                y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, length, dim))
        return out


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return out


class _Block(nn.Module):
    """Pre-norm residual block: attention, then the feed-forward layers."""

    def __init__(self, dim: int, num_heads: int, hidden: int, dropout: float, backend: Attention) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = _SelfAttention(dim, num_heads, dropout, backend)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = _MLP(dim, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


class TinyGPT(pl.LightningModule):
    """Byte-level language model: a pre-norm transformer decoder.

    Batches are pairs of byte values ``(inputs, targets)``, both ``(B, T)`` int64 with ``T <= block_size``, as
    :class:`SourceText` makes them. Linear layers are named ``blocks.N.attention.qkv``, ``blocks.N.attention.out``,
    ``blocks.N.mlp.up``, ``blocks.N.mlp.down`` and ``lm_head``; with the default sizes all their dimensions are
    multiples of 16.

    Args:
        num_layers: Transformer blocks.
        dim: Width of the residual stream; a multiple of ``num_heads``.
        num_heads: Attention heads.
        block_size: Longest sequence in bytes.
        mlp_ratio: Width of the hidden feed-forward layer in units of ``dim``.
        dropout: Probability of dropping an attention weight or a residual update, in [0, 1).
        tie_weights: Use the embedding matrix as the output layer's weight.
        vocab_size: Number of token values.
        attention: ``"auto"`` lets torch pick a fused kernel; ``"math"`` can be differentiated twice and forward-mode
            (fused kernels cannot), and is slower.
        lr: Learning rate of the default optimizer, AdamW; unused when an optimizer is given on the command line.

    Raises:
        ValueError: A size is out of range, or ``dim`` is not a multiple of ``num_heads``.

    Logs ``train/loss`` (every step) and ``val/loss``, ``test/loss``: mean cross-entropy in nats per byte.
    """

    def __init__(
        self,
        num_layers: int = 4,
        dim: int = 128,
        num_heads: int = 4,
        block_size: int = 128,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        tie_weights: bool = False,
        vocab_size: int = 256,
        attention: Attention = "auto",
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        check_int("num_layers", num_layers, 1)
        check_int("dim", dim, 1)
        check_int("num_heads", num_heads, 1)
        check_int("block_size", block_size, 1)
        check_int("mlp_ratio", mlp_ratio, 1)
        check_int("vocab_size", vocab_size, 2)
        check_range("dropout", dropout, 0.0, 1.0, "[)")
        check_range("lr", lr, 0.0, 1e10, "(]")
        check_choice("attention", attention, ("auto", "math"))
        if dim % num_heads:
            raise ValueError(f"`dim` must be a multiple of `num_heads`, got {dim} and {num_heads}.")
        self.save_hyperparameters()
        self.block_size = block_size
        self.lr = lr
        self.embedding = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(block_size, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            _Block(dim, num_heads, mlp_ratio * dim, dropout, attention) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        self._initialize(num_layers)
        if tie_weights:
            self.lm_head.weight = self.embedding.weight

    def _initialize(self, num_layers: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                # two updates per block add up in the residual stream: keep its variance independent of the depth
                into_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * num_layers) ** 0.5 if into_residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next byte, ``(B, T, vocab_size)``, for bytes ``(B, T)``."""
        length = tokens.shape[1]
        if length > self.block_size:
            raise ValueError(f"TinyGPT(block_size={self.block_size}) got a sequence of {length} bytes; shorten it.")
        x = self.embedding(tokens) + self.position(torch.arange(length, device=tokens.device))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits

    def sample_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy of each sequence, ``(B,)``, in nats per byte."""
        inputs, targets = batch
        losses = F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view_as(targets).mean(1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of the batch."""
        loss = self.sample_loss(batch).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the mean loss over the validation set."""
        self._evaluate("val/loss", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the mean loss over the test set."""
        self._evaluate("test/loss", batch)

    def _evaluate(self, name: str, batch: tuple[Tensor, Tensor]) -> None:
        loss = self.sample_loss(batch).mean()
        self.log(name, loss, on_epoch=True, prog_bar=True, batch_size=len(batch[0]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with torch's defaults; the command line's ``optimizer:`` replaces it."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    @torch.no_grad()
    def generate(self, prompt: bytes, num_bytes: int, temperature: float = 0.8, seed: int = 0) -> bytes:
        """Continue ``prompt`` by ``num_bytes`` sampled bytes.

        Args:
            prompt: At least one byte; the model sees the last ``block_size`` bytes.
            num_bytes: How many bytes to add.
            temperature: Divides the logits, in (0, inf); small values are greedy.
            seed: Seed of the draws, which leave the global random state alone.
        """
        if not prompt:
            raise ValueError("`prompt` must hold at least one byte.")
        check_range("temperature", temperature, 0.0, float("inf"), "()")
        was_training = self.training
        self.eval()
        generator = torch.Generator(self.device).manual_seed(seed)
        tokens = torch.tensor([list(prompt)], device=self.device)
        for _ in range(num_bytes):
            logits = self(tokens[:, -self.block_size :])[:, -1] / temperature
            tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
        self.train(was_training)
        return bytes(tokens[0, len(prompt) :].tolist())
