"""Fit the losses that were read off figure 4 of the Chinchilla paper, and compare with the published replication.

    python benchmarks/chinchilla_data.py svg_extracted_data.csv

The file is data/svg_extracted_data.csv of https://github.com/epoch-research/analyzing-chinchilla (commit 9225883).
It has no licence, so it is not in this repository.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1])]

from lightning_grad.scaling import fit_chinchilla  # noqa: E402
from lightning_grad.scaling.table import read_runs  # noqa: E402

# printed by the replication's notebook: its best of 4500 starts of L-BFGS on the same objective
PUBLISHED = {"E": 1.817235504463726, "A": 477.84171252965143, "B": 2143.8637880335505,
             "alpha": 0.34731265761033453, "beta": 0.3671826173946711}  # fmt: skip
PUBLISHED_OBJECTIVE = 0.0010182740346154362


def main() -> None:
    columns = read_runs(Path(sys.argv[1]))
    n, d, loss = (np.array(columns[name]) for name in ("params", "tokens", "loss"))
    kept = loss < np.sort(loss)[-5]  # the replication leaves out the five largest losses
    print(f"{len(loss)} rows, {kept.sum()} of them fitted")
    print(f"{'':36s}" + "".join(f"{name:>12s}" for name in PUBLISHED) + f"{'objective':>18s}")
    ours = fit_chinchilla(n[kept], d[kept], loss[kept], method="approach3")
    rows = {
        "replication, 4500 starts": (PUBLISHED, PUBLISHED_OBJECTIVE),
        "approach3, the same objective": (ours.parameters, ours.rss),
    }
    for kind in ("mse", "huber"):
        fit = fit_chinchilla(n[kept], d[kept], loss[kept], loss=kind)
        rows[f"vpnls, {kind} of the loss"] = (fit.parameters, fit.rss)
    rows["approach3, all rows"] = ((whole := fit_chinchilla(n, d, loss, method="approach3")).parameters, whole.rss)
    for name, (p, objective) in rows.items():
        print(f"{name:36s}" + "".join(f"{p[key]:12.6g}" for key in PUBLISHED) + f"{objective:18.11g}")
    gap = max(abs(ours.parameters[key] / value - 1) for key, value in PUBLISHED.items())
    print(f"largest relative difference to the replication {gap:.1e}")
    n_opt, d_opt = ours.optimal(6 * 70e9 * 1.4e12)
    print(f"tokens per parameter at Chinchilla's compute: {d_opt / n_opt:.1f}")


if __name__ == "__main__":
    main()
