"""The key-value store of an elastic run: torch's ``TCPStore``, with its failures told apart."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from lightning_grad.spsa.errors import StoreLostError

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2e-4, 2e-2
_GET_S = 0.5
_c10d: Any = dist  # the stubs know neither the stores nor that values are bytes


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``"host:port"``.

    Raises:
        ValueError: It is not one.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f'`store` must be "host:port", got {address!r}.')
    return host.strip("[]"), int(port)


class Store:
    """Binary keys and values of one run.

    A dead server shows as :class:`StoreLostError` from every call but :meth:`put`, which torch lets pass in silence; so
    whoever puts something reads something afterwards.

    Args:
        address: ``"host:port"``.
        run_id: Prefix of all keys.
        connect_timeout_s: How long to try to connect.
        serve: Whether to be the server.

    Raises:
        StoreLostError: Nobody answers at the address, or it cannot be served at.
    """

    def __init__(self, address: str, run_id: str, connect_timeout_s: float = 30.0, serve: bool = False) -> None:
        self.address = address
        host, port = split_address(address)
        timeout = timedelta(seconds=connect_timeout_s)
        try:
            self._tcp = _c10d.TCPStore(host, port, is_master=serve, wait_for_workers=False, timeout=timeout)
        except dist.DistNetworkError as error:
            if serve:
                reason = str(error).partition("\n")[0].rstrip(".")
                text = f"cannot serve at {address}: {reason}. Does another store run there? Choose another port."
            else:
                text = (
                    f"nobody answers at `store` {address} within {connect_timeout_s:g} s. Start it with `lightning-grad"
                    f" spsa store --port {port} --run-id {run_id}`, and see that this machine reaches it."
                )
            raise StoreLostError(f"SPSA: {text}") from error
        self._tcp.set_timeout(timedelta(seconds=_GET_S))
        self._keys = _c10d.PrefixStore(run_id, self._tcp)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except dist.DistNetworkError as error:
            raise StoreLostError(f"SPSA: lost the store at {self.address}.") from error

    def put(self, key: str, value: bytes) -> None:
        """Set a key."""
        with self._told():
            self._keys.set(key, value)

    def get(self, key: str) -> bytes | None:
        """Value of a key, or ``None``; does not wait for one."""
        with self._told():
            try:
                return bytes(self._keys.get(key)) if self._keys.check([key]) else None
            except dist.DistStoreError:  # deleted in between, and torch's get waits for a key
                return None

    def has(self, keys: Sequence[str]) -> bool:
        """Whether all keys are set."""
        with self._told():
            return bool(self._keys.check(list(keys)))

    def wait(self, keys: Sequence[str], timeout_s: float) -> bool:
        """Wait until all keys are set; ``False`` after the timeout."""
        deadline, pause = time.monotonic() + timeout_s, _FIRST_PAUSE_S
        # torch's own wait writes two warnings to stderr whenever it times out, and timing out is ordinary here
        while not self.has(keys):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(1.5 * pause, _LONGEST_PAUSE_S)
        return True

    def first(self, key: str, value: bytes, instead_of: bytes = b"") -> bytes:
        """Set a key unless it has a value (other than ``instead_of``); returns the value that holds for everyone."""
        with self._told():
            return bytes(self._keys.compare_set(key, instead_of, value))

    def count(self, key: str, amount: int) -> int:
        """Add to a counter and return it."""
        with self._told():
            return int(self._keys.add(key, amount))

    def drop(self, key: str) -> None:
        """Delete a key, if it is there."""
        with self._told():
            self._keys.delete_key(key)
