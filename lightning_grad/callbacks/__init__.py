"""Lightning callbacks, one file each."""

from lightning_grad.callbacks.random_state import RandomStateCheckpoint

__all__ = ["RandomStateCheckpoint"]
