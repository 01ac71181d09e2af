"""The Python standard library's own source files as a byte-level corpus."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_grad._validate import check_int, check_range
from lightning_grad.data import ResumableDataLoader
from lightning_grad.demos._corpus import read_corpus, standard_library

Sequence = tuple[Tensor, Tensor]


class ByteBlocks(Dataset[Sequence]):
    """Consecutive blocks of a byte string, each with the bytes that follow one position later.

    Item ``i`` is ``(text[s : s + block_size], text[s + 1 : s + block_size + 1])`` as int64, with ``s = i * stride``.

    Args:
        text: 1-D uint8.
        block_size: Bytes per item.
        stride: Distance between the starts of neighbouring items; ``None``: ``block_size``.
    """

    def __init__(self, text: Tensor, block_size: int, stride: int | None = None) -> None:
        self.text = text
        self.block_size = block_size
        self.stride = block_size if stride is None else stride

    def __len__(self) -> int:
        # the last item needs one byte more, as its last target
        return max(0, (len(self.text) - 1 - self.block_size) // self.stride + 1)

    def __getitem__(self, index: int) -> Sequence:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        block = self.text[index * self.stride :][: self.block_size + 1].long()
        return block[:-1], block[1:]


class SourceText(pl.LightningDataModule):
    """Bytes of the Python standard library's own source files, cut into blocks; for :class:`TinyGPT`.

    Nothing is downloaded: the files are those of the running interpreter (in a virtual environment, of the Python it
    was made from), without tests, in the order of their path. A file belongs to the training or the validation part
    by a hash of its path. The corpus differs a little between Python versions, and so do losses.

    Batches are ``(inputs, targets)``, both ``(batch_size, block_size)`` int64.

    Args:
        block_size: Bytes per sequence.
        batch_size: Sequences per batch.
        max_bytes: Read at most this much, ``val_fraction`` of it for validation; the whole corpus is about 8 MB.
        val_fraction: Expected fraction of the files in the validation part, in (0, 1).
        num_val_blocks: At most this many validation sequences, evenly spread over the validation part.
        root: Folder with ``*.py`` files to read instead of the standard library.
        seed: Seed of the order of the training blocks.
        num_workers: Worker processes of each loader.

    Raises:
        ValueError: A size is out of range, or the corpus is too small for one block in each part.
        FileNotFoundError: There is no folder with source files.
    """

    def __init__(
        self,
        block_size: int = 128,
        batch_size: int = 16,
        max_bytes: int = 16_000_000,
        val_fraction: float = 0.1,
        num_val_blocks: int = 512,
        root: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_int("block_size", block_size, 1)
        check_int("batch_size", batch_size, 1)
        check_int("max_bytes", max_bytes, 1)
        check_range("val_fraction", val_fraction, 0.0, 1.0, "()")
        check_int("num_val_blocks", num_val_blocks, 1)
        check_int("seed", seed, 0)
        check_int("num_workers", num_workers, 0)
        self.save_hyperparameters()
        self.block_size = block_size
        self.batch_size = batch_size
        self.max_bytes = max_bytes
        self.val_fraction = val_fraction
        self.num_val_blocks = num_val_blocks
        self.root = root
        self.seed = seed
        self.num_workers = num_workers
        self.train_set: ByteBlocks | None = None
        self.val_set: ByteBlocks | None = None

    def setup(self, stage: str) -> None:
        """Read the files (once)."""
        if self.train_set is not None:
            return
        root = standard_library() if self.root is None else Path(self.root)
        if not root.is_dir():
            raise FileNotFoundError(f"`root` must be a folder with *.py files, got {self.root!r}.")
        train, val = read_corpus(root, self.max_bytes, self.val_fraction)
        need = self.block_size + 1
        if len(train) < need or len(val) < need:
            raise ValueError(
                f"SourceText read {len(train)} training and {len(val)} validation bytes from {root};"
                f" `block_size`={self.block_size} needs at least {need} of each. Raise `max_bytes` or `val_fraction`."
            )
        self.train_set = ByteBlocks(train, self.block_size)
        spread = (len(val) - need) // max(1, self.num_val_blocks - 1)
        self.val_set = ByteBlocks(val, self.block_size, stride=max(self.block_size, spread))

    def train_dataloader(self) -> DataLoader[Sequence]:
        """Shuffled training blocks; the order depends on ``seed`` and the epoch, and survives a checkpoint."""
        assert self.train_set is not None, "call setup() first"
        return ResumableDataLoader(
            self.train_set,
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=True,
            seed=self.seed,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader[Sequence]:
        """Validation blocks in order."""
        assert self.val_set is not None, "call setup() first"
        # a generator of its own: otherwise each pass over the loader draws from the global random state
        return DataLoader(
            self.val_set, self.batch_size, num_workers=self.num_workers, generator=torch.Generator().manual_seed(0)
        )

    def test_dataloader(self) -> DataLoader[Sequence]:
        """Same as :meth:`val_dataloader`: the demos choose nothing by validation."""
        return self.val_dataloader()
