"""An even split against allocated samples on ArithmeticChain: variance of the gradient, and accuracy at equal budget.

    python examples/sample_allocation/compare.py [--short] [--shrink] [--out FOLDER]

Prints the two tables of the README and draws compare.png (with --short: a few steps). --shrink: the table of the
methods page instead, what mixing the weights of the reward objectives with an even split does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_grad import DynamicSampleAllocation
from lightning_grad.allocation.e_step import EStep
from lightning_grad.allocation.integer import allocate
from lightning_grad.allocation.planner import AllocationRule
from lightning_grad.allocation.prompt_weights import allocation_weights
from lightning_grad.demos import ArithmeticPolicy, ArithmeticPrompts
from lightning_grad.demos import arithmetic as chain
from lightning_grad.demos.arithmetic_oracle import GradientStatistics, gradient_statistics, planned_ratios
from lightning_grad.demos.comparison import comparison_parser, parse_comparison

HERE = Path(__file__).parent
EVEN = 10**9


def base_model(steps: int) -> ArithmeticPolicy:
    model = ArithmeticPolicy(base_steps=0)
    chain.train_base(model.policy, steps)
    return model.eval()


def measured(model: ArithmeticPolicy, prompts: int, samples: int) -> tuple[list[Any], GradientStatistics]:
    """Problems, and what is true of the model on them."""
    problems = ArithmeticPrompts(prompts, seed=3).loader.prompts
    tokens = torch.stack([tokens for tokens, _ in problems])
    answers = torch.tensor([answer for _, answer in problems])
    return problems, gradient_statistics(model.policy, tokens, answers, samples, rejected=40)


def shrink_table(model: ArithmeticPolicy, prompts: int, samples: int, repetitions: int) -> None:
    problems, truth = measured(model, prompts, samples)
    shrinks = (0.0, 0.5, 0.6, 0.75, 0.9)
    print(f"8 pilots, {repetitions} draws, variance / even split: mean and worst\n")
    print("| objective | " + " | ".join(f"shrink {s:g}" for s in shrinks) + " |\n|" + "---|" * (len(shrinks) + 1))
    for objective in ("reward_baseline", "reward"):
        cells = []
        for shrink in shrinks:
            rule = AllocationRule(objective=objective, shrink=shrink)
            e_step = EStep(rule, pilot_mode="discard", pilot_samples=8)
            ratios = planned_ratios(truth, e_step, model, problems, 8 * prompts, repetitions)
            cells.append(f"{ratios.mean():.3f}, {ratios.max():.3f}")
        print(f"| {objective} | " + " | ".join(cells) + " |", flush=True)


def variance_table(model: ArithmeticPolicy, prompts: int, samples: int, repetitions: int) -> None:
    problems, truth = measured(model, prompts, samples)
    budget = 8 * prompts
    print(f"Variance of the full gradient, {prompts} prompts, {budget} samples, {repetitions} draws of the pilots\n")
    print("| objective | rule | pilots | variance / even split | worst draw |\n|---|---|---|---|---|")
    for objective, pilots in (("em", 4), ("em", 8), ("em", 16), ("reward_baseline", 8)):
        e_step = EStep(AllocationRule(objective=objective), pilot_mode="discard", pilot_samples=pilots)
        ratios = planned_ratios(truth, e_step, model, problems, budget, repetitions)
        numbers = f"{ratios.mean():.3f} ± {ratios.std():.3f} | {ratios.max():.3f}"
        print(f"| {objective} | its own | {pilots} | {numbers} |", flush=True)
    weights = allocation_weights(truth.p, truth.norm2.sqrt())
    plan = allocate(weights, budget, min_samples=1)
    for objective in ("reward", "reward_baseline"):
        ratio = truth.variance(plan, objective) / truth.variance(torch.full_like(plan, 8), objective)
        print(f"| {objective} | that of em | true statistics | {ratio:.3f} | |", flush=True)


def train(state: dict[str, torch.Tensor], warmup: int, epochs: int, seed: int) -> list[float]:
    pl.seed_everything(seed, verbose=False)
    model = ArithmeticPolicy(base_steps=0)
    model.load_state_dict(state)
    curve = [model.held_out_accuracy()]

    class Record(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            curve.append(model.held_out_accuracy())

    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        gradient_clip_val=5.0,
        callbacks=[DynamicSampleAllocation(warmup_iterations=warmup, seed=seed), Record()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=ArithmeticPrompts(128, seed))
    return curve


def main() -> None:
    import matplotlib.pyplot as plt

    parser = comparison_parser(__doc__)
    parser.add_argument("--shrink", action="store_true", help="the table of the methods page instead")
    options = parse_comparison(parser, __file__)
    short = options.short
    model = base_model(30 if short else 800)
    if options.shrink:
        shrink_table(model, *((4, 40, 2) if short else (64, 300, 60)))
        return
    variance_table(model, *((4, 40, 2) if short else (64, 300, 10)))
    state = model.state_dict()
    epochs, seeds = (1, 2) if short else (8, 3)
    print(f"\nHeld-out accuracy at equal budget, 128 prompts, 1024 samples an iteration, {seeds} seeds\n")
    print("| samples | start | 2 iterations | 4 | 8 |\n|---|---|---|---|---|")
    for name, warmup in (("even split", EVEN), ("allocated", 0)):
        curves = torch.tensor([train(state, warmup, epochs, seed) for seed in range(seeds)])
        mean, spread = curves.mean(0), curves.std(0)
        cells = [f"{mean[k]:.3f} ± {spread[k]:.3f}" for k in (0, 2, 4, 8) if k <= epochs]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        plt.errorbar(range(epochs + 1), mean, spread, marker="o", capsize=3, label=name)
    plt.xlabel("iteration (8 samples per prompt)")
    plt.ylabel("held-out accuracy")
    plt.legend()
    plt.savefig(options.plot, dpi=100, bbox_inches="tight")
    print(f"drawn: {options.plot}")


if __name__ == "__main__":
    main()
