"""What a TensorBoard log says, in the terminal: `python -m lightning_grad.demos.report LOG_DIR`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple


class Curve(NamedTuple):
    """First and last point of a scalar."""

    first_step: int
    first: float
    last_step: int
    last: float


def curves(log_dir: str | Path) -> dict[str, Curve]:
    """Return the end points of every scalar in a log directory, by tag.

    Args:
        log_dir: Directory that holds one run's event files.

    Raises:
        FileNotFoundError: There is no event file.
    """
    if not any(Path(log_dir).glob("events.out.tfevents.*")):
        raise FileNotFoundError(f"`log_dir`: there is no TensorBoard event file in {str(log_dir)!r}.")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    log.Reload()
    found = {}
    for tag in log.Tags()["scalars"]:
        points = log.Scalars(tag)
        found[tag] = Curve(points[0].step, points[0].value, points[-1].step, points[-1].value)
    return found


def report(log_dir: str | Path) -> str:
    """Return a table of the scalars and, if the log has one, the validation loss in words."""
    found = {tag: curve for tag, curve in curves(log_dir).items() if tag not in ("epoch", "hp_metric")}
    width = max([len(tag) for tag in found] + [3])
    lines = [f"{'tag':<{width}}  {'first':>11}  {'last':>11}  at step"]
    for tag, curve in sorted(found.items()):
        lines.append(f"{tag:<{width}}  {curve.first:>11.4g}  {curve.last:>11.4g}  {curve.last_step:>7}")
    if "val/loss" in found:
        loss = found["val/loss"].last
        lines += ["", f"Validation loss: {loss:.4f} nats ({loss / math.log(2):.3f} bits)"]
    return "\n".join(lines)


def main(args: list[str]) -> int:
    """Print the report of one log directory."""
    if len(args) != 1:
        print("usage: python -m lightning_grad.demos.report LOG_DIR", file=sys.stderr)
        return 2
    print(report(args[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
