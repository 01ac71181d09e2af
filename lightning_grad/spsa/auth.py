"""Message authentication for elastic runs: HMAC-SHA256 over a message, its kind, its sender and its step."""

from __future__ import annotations

import hashlib
import hmac
import os

from lightning_grad.spsa.errors import SPSAConfigError

MAC_SIZE = 16
_MIN_KEY = 16


class Authenticator:
    """Adds and checks the 16 bytes behind a message; without a key, messages are plain.

    A message copied from another step, sender, kind or run fails the check, so it cannot be replayed. Members who
    know the key can still send any legal code, and anyone who reaches the store can flood it.

    Args:
        run_id: Name of the run.
        key: Secret of at least 16 bytes, or ``None``.
        variable: Environment variable the key is from, for errors.

    Raises:
        SPSAConfigError: The key is too short.
    """

    def __init__(self, run_id: str, key: bytes | None, variable: str | None = None) -> None:
        self._run_id, self._key = run_id, key
        self._name = "the key for messages" if variable is None else f"the key in {variable} (`auth_key_env`)"
        if key is not None and len(key) < _MIN_KEY:
            raise SPSAConfigError(f"{self._name} must have at least {_MIN_KEY} bytes, got {len(key)}.")

    @classmethod
    def from_environment(cls, run_id: str, variable: str) -> Authenticator:
        """Take the key from an environment variable; an unset or empty one means plain messages."""
        text = os.environ.get(variable, "")
        return cls(run_id, text.encode() or None, variable)

    @property
    def advice(self) -> str:
        """What to do when the messages of others cannot be read."""
        here = "is not set here" if self._key is None else "is not the sender's"
        return f"{self._name} {here}. Give the store and all workers of a run the same key, or none."

    def seal(self, kind: str, step: int, worker: int, payload: bytes) -> bytes:
        """The message to send."""
        return payload + self._mac(kind, step, worker, payload) if self._key is not None else payload

    def open(self, kind: str, step: int, worker: int, message: bytes) -> bytes | None:
        """The payload, or ``None`` if the message is not what it should be."""
        if self._key is None:
            return message
        payload, mac = message[:-MAC_SIZE], message[-MAC_SIZE:]
        good = len(message) >= MAC_SIZE and hmac.compare_digest(mac, self._mac(kind, step, worker, payload))
        return payload if good else None

    def _mac(self, kind: str, step: int, worker: int, payload: bytes) -> bytes:
        assert self._key is not None
        about = f"{kind}|{self._run_id}|{step}|{worker}|".encode()
        return hmac.new(self._key, about + payload, hashlib.sha256).digest()[:MAC_SIZE]
