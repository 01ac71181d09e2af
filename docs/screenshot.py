"""Take the pictures of the documentation: a real TensorBoard on a real log, in a real browser.

    python3 run.py gallery
    python docs/screenshot.py all runs/gallery
    python docs/screenshot.py one runs/quickstart docs/assets/quickstart.png

`all` takes one picture of the Custom Scalars page for each example of the gallery that is shown in the documentation.
Needs `chromium` or `google-chrome` on the PATH. Nothing is fetched: TensorBoard brings its own page.
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

ASSETS = Path(__file__).parent / "assets"
#: example -> size of the window that shows its charts
PICTURES = {
    "adaptive_batch": "1280,860",
    "stability_edge": "1280,860",
    "nvfp4": "1280,860",
    "spsa_minilm": "1280,860",
    "sample_allocation": "1280,860",
}
SETTLE_MS = 20000  # virtual time the page gets to draw itself
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


def browser() -> str:
    """Return the first browser that is installed."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is installed")
    return found


def take(
    logdir: Path, picture: Path, tab: str, query: str = "", size: str = "1280,860", settle_ms: int = 20000
) -> None:
    """Start TensorBoard, take the picture, stop TensorBoard."""
    if not any(logdir.rglob("events.out.tfevents.*")):
        raise SystemExit(f"{logdir} has no TensorBoard log")
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", str(port), "--load_fast=false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://127.0.0.1:{port}/"
        wait_for(address + "data/runs")
        time.sleep(3)  # the first read of the log
        with tempfile.TemporaryDirectory() as profile:
            command = [
                browser(), *QUIET, f"--user-data-dir={profile}", f"--virtual-time-budget={SETTLE_MS}",
                f"--screenshot={picture.resolve()}", f"--window-size={size}", f"{address}?{query}#{tab}",
            ]  # fmt: skip
            subprocess.run(command, check=True, timeout=180, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    finally:
        server.terminate()
        server.wait()
    print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB", flush=True)


def main() -> None:
    """Take one picture, or all of the documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("one", help="one picture of one log")
    one.add_argument("logdir", type=Path)
    one.add_argument("picture", type=Path)
    one.add_argument("--tab", default="timeseries", help="scalars, timeseries, custom_scalars, hparams ...")
    one.add_argument("--query", default="", help="appended to the address, for instance tagFilter=val")
    one.add_argument("--size", default="1280,860")
    every = commands.add_parser("all", help="the pictures of the documentation")
    every.add_argument("gallery", type=Path, help="folder that `run.py gallery` has written")
    options = parser.parse_args()
    if options.command == "one":
        take(options.logdir, options.picture, options.tab, options.query, options.size)
    else:
        for name, size in PICTURES.items():
            take(options.gallery / name / "runs", ASSETS / f"{name}.png", "custom_scalars", size=size)


if __name__ == "__main__":
    main()
