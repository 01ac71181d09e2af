"""Fine-tuning with forward passes and one byte per direction; the part that needs torch and numpy only.

Replicas that hold the same header and the same records compute the same weights, bit for bit.
"""

from lightning_grad.spsa.codec import Codec, decode_e4m3, encode_e4m3
from lightning_grad.spsa.engine import SPSAEngine
from lightning_grad.spsa.errors import (
    JoinTimeoutError,
    JournalError,
    NoFiniteLossError,
    ReplicaMismatchError,
    SPSAConfigError,
    SPSAError,
    StoreLostError,
    UpdateOverflowError,
)
from lightning_grad.spsa.grid import digest64, eps_exponent, fingerprint, snap_
from lightning_grad.spsa.journal import Header, Journal, Record
from lightning_grad.spsa.replayer import replay
from lightning_grad.spsa.rule import ScaleTracker, UpdateRule, quantize
from lightning_grad.spsa.signs import rademacher

__all__ = [
    "Codec",
    "Header",
    "JoinTimeoutError",
    "Journal",
    "JournalError",
    "NoFiniteLossError",
    "Record",
    "ReplicaMismatchError",
    "SPSAConfigError",
    "SPSAEngine",
    "SPSAError",
    "ScaleTracker",
    "StoreLostError",
    "UpdateOverflowError",
    "UpdateRule",
    "decode_e4m3",
    "digest64",
    "encode_e4m3",
    "eps_exponent",
    "fingerprint",
    "quantize",
    "rademacher",
    "replay",
    "snap_",
]
