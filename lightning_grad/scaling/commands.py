"""The commands ``lightning-grad advise`` and ``lightning-grad scaling fit``."""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from lightning_grad.scaling._columns import Fit, budgets
from lightning_grad.scaling.chinchilla import Chinchilla, fit_chinchilla
from lightning_grad.scaling.isoflop import IsoflopParabola, fit_isoflop_parabola, parabola_vertex_shift
from lightning_grad.scaling.overtraining import Overtraining, fit_downstream, fit_overtraining
from lightning_grad.scaling.plots import check_target, draw
from lightning_grad.scaling.power_law import fit_power_law
from lightning_grad.scaling.step_law import FINAL_LR, step_law
from lightning_grad.scaling.table import needed, read_runs

LAWS: dict[str, tuple[str, ...]] = {
    "chinchilla": ("params", "tokens", "loss"),
    "approach3": ("params", "tokens", "loss"),
    "parabola": ("compute", "params", "loss"),
    "overtraining": ("compute", "ratio", "loss"),
    "downstream": ("loss", "error"),
    "power": ("x", "y"),
}
"""Columns of each law."""


class _Parser(argparse.ArgumentParser):
    """One line and exit status 2 for a mistake."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def _positive(text: str) -> float:
    unit = _SUFFIXES.get(text[-1:].upper())
    try:
        value = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a positive number like 1.2e9 or 1.2B, got {text!r}")
    return value


def _count(text: str) -> int:
    value = _positive(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(value)


def _not_negative(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be an integer >= 0, got {text!r}")
    return value


def advise(args: Sequence[str] | None = None) -> int:
    """Print Step Law's learning rate and batch size, and a config fragment."""
    parser = _Parser(
        prog="lightning-grad advise",
        description="Step Law (arXiv:2503.04715): peak learning rate of AdamW and batch size for a language model.",
    )
    parser.add_argument(
        "--params", type=_positive, required=True, help="parameters without embeddings, e.g. 1.2B or 1.2e9"
    )
    parser.add_argument("--tokens", type=_positive, required=True, help="training tokens, e.g. 100B or 100e9")
    parser.add_argument("--seq-len", type=_count, default=2048, help="tokens per sequence (default 2048)")
    parser.add_argument(
        "--multiple-of", type=_count, default=1, help="round the batch to this many sequences: processes x micro-batch"
    )
    options = parser.parse_args(args)
    law = step_law(options.params, options.tokens, options.seq_len)
    assert law.batch_sequences is not None
    unit = options.multiple_of
    sequences = max(unit, round(law.batch_sequences / unit) * unit)
    steps = max(1, round(options.tokens / (sequences * options.seq_len)))
    rows = [
        ("peak learning rate", f"{law.lr:.3e}", f"{law.refit_lr:.3e}"),
        ("batch, tokens", f"{law.batch_tokens:,.0f}", f"{law.refit_batch_tokens:,.0f}"),
        (f"batch, sequences of {options.seq_len}", f"{law.batch_sequences:.1f}",
         f"{law.refit_batch_tokens / options.seq_len:.1f}"),
    ]  # fmt: skip
    print(f"{'':32s}{'Step Law':>16s}{'refit of its runs':>20s}")
    for name, value, refit in rows:
        print(f"{name:32s}{value:>16s}{refit:>20s}")
    compute, ratio = 6 * options.params * options.tokens, options.tokens / options.params
    print(f"\ncompute 6ND {compute:.3g}, {ratio:.3g} tokens per parameter")
    print("A factor of 1.5 in the learning rate or of 2 in the batch costs about 0.1 to 0.3 % of the loss.")
    # in the fragment, so that it goes along when that is pasted into a config
    notice = textwrap.fill(law.notice, 110, initial_indent="# ", subsequent_indent="# ") + "\n" if law.notice else ""
    print(
        f"\n# {sequences} sequences a step; the law was fitted with a cosine that ends at {FINAL_LR:g}\n{notice}"
        f"trainer: {{max_steps: {steps}}}\n"
        f"optimizer: {{class_path: AdamW, init_args: {{lr: {law.lr:.3e}}}}}\n"
        f"lr_scheduler: {{class_path: CosineAnnealingLR, init_args: {{T_max: {steps}, eta_min: {FINAL_LR:.1e}}}}}\n"
        "lr_scheduler_interval: step"
    )
    return 0


def scaling(args: Sequence[str] | None = None) -> int:
    """Fit a law to a CSV file; returns 2 after one line on stderr if the input is bad."""
    parser = _Parser(prog="lightning-grad scaling", description="Scaling laws from a table of runs.")
    commands = parser.add_subparsers(required=True, parser_class=_Parser)
    fit = commands.add_parser("fit", help="fit a law, print a table and draw a plot")
    fit.add_argument("csv", type=Path, help="one row per run, names of columns in the first line")
    fit.add_argument("--law", choices=tuple(LAWS), help="default: chinchilla; power if only x and y are there")
    fit.add_argument("--loss", choices=("mse", "huber"), default="mse", help="of the residuals (chinchilla, power)")
    fit.add_argument("--delta", type=_positive, default=1e-3, help="threshold of Huber's loss (default 1e-3)")
    fit.add_argument("--no-constant", action="store_true", help="power law without a constant")
    fit.add_argument(
        "--bootstrap", type=_not_negative, default=200, help="resamples for 90 %% intervals (default 200; 0: none)"
    )
    fit.add_argument("--seed", type=_not_negative, default=0, help="of the resampling")
    fit.add_argument("--compute", type=_positive, nargs="+", help="budgets to print the optimum for")
    fit.add_argument("--plot", type=Path, default=Path("scaling_fit.png"), help="default scaling_fit.png")
    fit.add_argument("--no-plot", action="store_true", help="draw nothing")
    options = parser.parse_args(args)
    try:
        return _fit(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.error(" ".join(str(error).split()))


def _fit(options: argparse.Namespace) -> int:
    if not options.no_plot:
        check_target(options.plot)  # before the fit, which may take a while
    columns = read_runs(options.csv)
    xy = {"x", "y"} <= columns.keys() and not set(LAWS["chinchilla"]) <= columns.keys()
    law = options.law or ("power" if xy else "chinchilla")
    data = needed(columns, LAWS[law], law)
    found = _fitted(law, data, options)
    fitted = f"residual {math.sqrt(found.rss / len(data[0])):.3g} (root mean square)"
    if law == "approach3":
        fitted = f"Huber's loss of the logarithms {found.rss:.7g} (sum)"
    elif options.loss == "huber" and law in ("chinchilla", "power"):
        fitted = fitted.replace("root", "weighted root")
    print(f"{law}: {len(data[0])} rows, {fitted}")
    intervals = found.intervals()
    print(f"{'':10s}{'value':>14s}" + (f"{'90 % interval':>28s}" if intervals else ""))
    for name, value in found.parameters.items():
        low_high = f"{intervals[name][0]:14.6g}{intervals[name][1]:14.6g}" if name in intervals else ""
        print(f"{name:10s}{value:14.6g}{low_high}")
    _print_optima(found, columns, options)
    for doubt in found.status:
        print(f"doubt: {doubt}")
    if not options.no_plot:
        rows = {name: np.asarray(values) for name, values in columns.items()}
        try:
            draw(found, rows).savefig(options.plot, dpi=120)
            print(f"drawn: {options.plot}")
        except ModuleNotFoundError as error:
            print(f"not drawn: {error}")
    return 0


def _fitted(law: str, data: list[Any], options: argparse.Namespace) -> Fit:
    common: dict[str, Any] = {"bootstrap_resamples": options.bootstrap, "seed": options.seed}
    robust: dict[str, Any] = {"loss": options.loss, "delta": options.delta, **common}
    first, second, *third = data
    if law == "power":
        return fit_power_law(first, second, not options.no_constant, **robust)
    if law == "downstream":
        return fit_downstream(first, second, **common)
    if law == "overtraining":
        return fit_overtraining(first, second, third[0], **common)
    if law == "parabola":
        return fit_isoflop_parabola(first, second, third[0], **common)
    return fit_chinchilla(first, second, third[0], "approach3" if law == "approach3" else "vpnls", **robust)


def _print_optima(found: Fit, columns: dict[str, list[float]], options: argparse.Namespace) -> None:
    if isinstance(found, Overtraining):
        print(f"least loss at {found.best_ratio:.4g} tokens per parameter")
    if not isinstance(found, Chinchilla | IsoflopParabola):
        return
    largest = max(columns["compute"])
    print(f"\n{'compute':>10s}{'parameters':>14s}{'tokens':>14s}")
    for compute in options.compute or [largest, 10 * largest, 100 * largest]:
        n, d = found.optimal(compute)
        if math.isnan(n):
            print(f"{compute:10.3g}   no optimum: A or B is not positive")
            continue
        line = f"{compute:10.3g}{n:14.5g}{d:14.5g}"
        spread = found.optimal_intervals(compute) if isinstance(found, Chinchilla) else None
        if spread is not None:
            (n0, n1), (d0, d1) = spread
            line += f"   90 %: parameters {n0:.4g} to {n1:.4g}, tokens {d0:.4g} to {d1:.4g}"
            if math.isnan(n0):
                line += " (a resample without an optimum)"
        if compute > largest:
            line += f"   extrapolated: {compute / largest:.3g} times the largest run"
        print(line)
    if isinstance(found, IsoflopParabola) and "tokens" in columns:
        _print_bias(columns)


def _print_bias(columns: dict[str, list[float]]) -> None:
    """What the parabola's shape alone does to the answer, by the surface fitted to the same rows."""
    n, d, loss = (np.asarray(columns[name]) for name in ("params", "tokens", "loss"))
    surface = fit_chinchilla(n, d, loss)
    index = budgets(np.asarray(columns["compute"]))
    widths = [np.ptp(np.log10(n[index == k])) / 2 for k in range(index.max() + 1)]
    points = round(len(n) / (index.max() + 1))
    shift = parabola_vertex_shift(surface.alpha, surface.beta, float(np.mean(widths)), max(3, points))
    print(
        f"bias of the method on centred grids of this width: tokens {100 * (10**-shift - 1):+.2f} %, parameters"
        f" {100 * (10**shift - 1):+.2f} %; off-centre grids add to it. --law chinchilla has none."
    )
