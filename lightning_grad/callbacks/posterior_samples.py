"""Collect parameter sets along a run and predict with all of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_grad._validate import check_choice, check_int

Sample = dict[str, Tensor]


class PosteriorSamples(pl.Callback):
    """Keep copies of the trainable parameters every few steps: samples of the posterior under SGLD, PSGLD or SGHMC.

    Args:
        burn_in_steps: Optimizer steps before the first sample counts, >= 0.
        every_n_steps: Steps between samples, >= 1.
        max_samples: Samples kept, >= 1.
        storage: ``"memory"`` (then they are part of the checkpoint), or a directory for files ``sample_{step}.pt``;
            files that are there already and not of this run are moved to a folder in it, with a warning.
        policy: When full: ``"last"`` drops the oldest; ``"reservoir"`` keeps a uniform choice of all seen.
        dtype: ``"float32"`` or ``"float16"``, of the copies.
        seed: Seed of the reservoir's choices.

    Raises:
        ValueError: An argument is out of range.

    State: number of samples seen, steps of the kept ones, and the samples themselves if they are in memory.

    Buffers (running statistics of BatchNorm) are not part of a sample. One chain underestimates the spread between
    modes: run several with different seeds and :meth:`merge` their directories.
    """

    def __init__(
        self,
        burn_in_steps: int = 0,
        every_n_steps: int = 100,
        max_samples: int = 100,
        storage: str = "memory",
        policy: Literal["last", "reservoir"] = "last",
        dtype: Literal["float32", "float16"] = "float32",
        seed: int = 0,
    ) -> None:
        self.burn_in_steps = check_int("burn_in_steps", burn_in_steps, 0)
        self.every_n_steps = check_int("every_n_steps", every_n_steps, 1)
        self.max_samples = check_int("max_samples", max_samples, 1)
        check_choice("policy", policy, ("last", "reservoir"))
        check_choice("dtype", dtype, ("float32", "float16"))
        self.storage, self.policy = storage, policy
        self.dtype = torch.float16 if dtype == "float16" else torch.float32
        self._random = random.Random(seed)
        self._seen = 0
        self._kept: list[int] = []  # steps
        self._samples: dict[int, Sample] = {}
        self._files: list[Path] = []  # of other runs, from merge
        self._last_step = -1

    @property
    def state_key(self) -> str:
        """Under which a checkpoint keeps the state."""
        return "PosteriorSamples"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Steps taken before do not count again, and the samples are those of this run."""
        self._last_step = trainer.global_step
        kept = self._kept
        if self.storage == "memory":
            kept = [step for step in kept if step in self._samples]
        elif trainer.is_global_zero:
            self._set_aside()
            kept = [step for step in kept if self._path(step).exists()]
        kept = trainer.strategy.broadcast(kept)
        if kept != self._kept:
            missing = sorted(set(self._kept) - set(kept))
            rank_zero_warn(
                f"PosteriorSamples: the samples of steps {missing} that the checkpoint lists are not in"
                f" storage={self.storage!r} any more; the run goes on without them."
            )
            self._kept = kept

    def _set_aside(self) -> None:
        """Move the samples of another run, or of the part of this one that is run again, where nothing finds them."""
        folder = Path(self.storage)
        folder.mkdir(parents=True, exist_ok=True)
        foreign = sorted(set(folder.glob("sample_*.pt")) - {self._path(step) for step in self._kept})
        if not foreign:
            return
        number = 1 + sum(1 for _ in folder.glob("set_aside_*"))
        target = folder / f"set_aside_{number}"
        target.mkdir()
        for path in foreign:
            path.rename(target / path.name)
        rank_zero_warn(
            f"PosteriorSamples: {len(foreign)} samples in {folder} are not of this run, or of steps that it takes again"
            f" after the checkpoint; they are in {target} now."
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a sample if one is due."""
        step = trainer.global_step
        if step == self._last_step:  # within a window of gradient accumulation
            return
        self._last_step = step
        after = step - self.burn_in_steps
        if after > 0 and after % self.every_n_steps == 0:
            self._take(step, pl_module, trainer.is_global_zero)

    def _take(self, step: int, module: nn.Module, writes: bool) -> None:
        self._seen += 1
        if len(self._kept) >= self.max_samples:
            place = 0 if self.policy == "last" else self._random.randrange(self._seen)
            if place >= self.max_samples:
                return
            self._drop(self._kept.pop(place), writes)
        self._kept.append(step)
        sample = {name: p.detach().to("cpu", self.dtype, copy=True) for name, p in _trainable(module)}
        if self.storage == "memory":
            self._samples[step] = sample
        elif writes:
            target = self._path(step)
            torch.save(sample, target.with_suffix(".tmp"))
            target.with_suffix(".tmp").replace(target)  # a killed run leaves no half sample

    def _drop(self, step: int, writes: bool) -> None:
        self._samples.pop(step, None)
        if self.storage != "memory" and writes:
            self._path(step).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return Path(self.storage) / f"sample_{step}.pt"

    def __len__(self) -> int:
        return len(self._kept) + len(self._files)

    def samples(self) -> Iterator[Sample]:
        """The kept samples, oldest first: parameter name -> tensor on CPU."""
        for step in self._kept:
            if self.storage == "memory":
                yield self._samples[step]
            else:
                yield torch.load(self._path(step), weights_only=True)
        for path in self._files:
            yield torch.load(path, weights_only=True)

    @torch.no_grad()
    def predict(self, module: nn.Module, fn: Callable[[], Tensor]) -> Tensor:
        """``fn()`` under every sample, stacked; the live parameters are restored, also after an exception.

        Args:
            module: The model that the samples are of.
            fn: Computes a prediction with the model as it is.

        Raises:
            RuntimeError: There is no sample.
        """
        if not len(self):
            raise RuntimeError("PosteriorSamples has no sample yet; lower `burn_in_steps` or `every_n_steps`.")
        live = {name: p.detach().clone() for name, p in _trainable(module)}
        parameters = dict(_trainable(module))
        outputs = []
        try:
            for sample in self.samples():
                for name, value in sample.items():
                    parameters[name].copy_(value)
                outputs.append(fn())
        finally:
            for name, value in live.items():
                parameters[name].copy_(value)
        return torch.stack(outputs)

    def mean_std(self, module: nn.Module, fn: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of ``fn()`` over the samples."""
        outputs = self.predict(module, fn)
        return outputs.mean(0), outputs.std(0, correction=0)

    @classmethod
    def merge(cls, directories: Sequence[str | Path]) -> PosteriorSamples:
        """The samples of several runs that wrote to directories, for :meth:`predict`."""
        merged = cls()
        for directory in directories:
            files = Path(directory).glob("sample_*.pt")
            merged._files += sorted(files, key=lambda path: int(path.stem.rpartition("_")[2]))
        return merged

    def state_dict(self) -> dict[str, Any]:
        """Counters and, in memory mode, the samples."""
        return {
            "seen": self._seen,
            "kept": list(self._kept),
            "samples": dict(self._samples),
            "random": self._random.getstate(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from :meth:`state_dict`."""
        self._seen, self._kept = state_dict["seen"], list(state_dict["kept"])
        self._samples = dict(state_dict["samples"])
        version, internal, gauss = state_dict["random"]
        self._random.setstate((version, tuple(internal), gauss))


def _trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
