"""Take the pictures of the documentation: a real TensorBoard on a real log, in a real browser.

`python docs/screenshot.py LOGDIR docs/assets/quickstart.png [--tab custom_scalars]` needs `chromium` or
`google-chrome` on the PATH. Nothing is fetched: TensorBoard brings its own page.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (  # noqa: SIM905
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --hide-scrollbars"
).split()


def free_port() -> int:
    """Return a port nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, timeout_s: float = 60.0) -> None:
    """Return once the server answers."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def main() -> None:
    """Start TensorBoard, take the picture, stop TensorBoard."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logdir")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--tab", default="timeseries", help="scalars, timeseries, custom_scalars, hparams ...")
    parser.add_argument("--query", default="", help="appended to the address, for instance tagFilter=val")
    parser.add_argument("--size", default="1280,860")
    parser.add_argument("--settle-ms", type=int, default=20000, help="virtual time the page gets to draw itself")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is installed")
    port = free_port()
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tensorboard.main",
            "--logdir",
            options.logdir,
            "--port",
            str(port),
            "--load_fast=false",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://127.0.0.1:{port}/"
        wait_for(address + "data/runs")
        time.sleep(3)  # the first read of the log
        with tempfile.TemporaryDirectory() as profile:
            picture = [f"--screenshot={options.picture.resolve()}", f"--window-size={options.size}"]
            patience = f"--virtual-time-budget={options.settle_ms}"
            url = f"{address}?{options.query}#{options.tab}"
            command = [browser, *QUIET, f"--user-data-dir={profile}", patience, *picture, url]
            subprocess.run(command, check=True, timeout=180, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    finally:
        server.terminate()
        server.wait()
    print(f"{options.picture}: {options.picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
