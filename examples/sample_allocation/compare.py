"""An even split against allocated samples on ArithmeticChain: variance of the gradient, and accuracy at equal budget.

    python examples/sample_allocation/compare.py [--short] [--out FOLDER]

Prints the two tables of the README and draws compare.png (with --short: a few steps).
"""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_grad import DynamicSampleAllocation
from lightning_grad.allocation.e_step import EStep
from lightning_grad.allocation.integer import allocate
from lightning_grad.allocation.planner import AllocationRule
from lightning_grad.allocation.prompt_weights import allocation_weights
from lightning_grad.demos import ArithmeticPolicy, ArithmeticPrompts, comparison
from lightning_grad.demos import arithmetic as chain
from lightning_grad.demos.arithmetic_oracle import gradient_statistics, planned_ratios

HERE = Path(__file__).parent
EVEN = 10**9


def base_model(steps: int) -> ArithmeticPolicy:
    model = ArithmeticPolicy(base_steps=0)
    chain.train_base(model.policy, steps)
    return model.eval()


def variance_table(model: ArithmeticPolicy, prompts: int, samples: int, repetitions: int) -> None:
    loader = ArithmeticPrompts(prompts, seed=3).loader
    tokens = torch.stack([tokens for tokens, _ in loader.prompts])
    answers = torch.tensor([answer for _, answer in loader.prompts])
    truth = gradient_statistics(model.policy, tokens, answers, samples, rejected=40)
    budget = 8 * prompts
    print(f"Variance of the full gradient, {prompts} prompts, {budget} samples, {repetitions} draws of the pilots\n")
    print("| objective | rule | pilots | variance / even split | worst draw |\n|---|---|---|---|---|")
    for objective, pilots in (("em", 4), ("em", 8), ("em", 16), ("reward_baseline", 8)):
        e_step = EStep(AllocationRule(objective=objective), pilot_mode="discard", pilot_samples=pilots)
        ratios = planned_ratios(truth, e_step, model, loader.prompts, budget, repetitions)
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

    short, plot = comparison(__doc__, __file__)
    model = base_model(30 if short else 800)
    if short:
        variance_table(model, 4, 40, 2)
    else:
        variance_table(model, 64, 300, 10)
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
    plt.savefig(plot, dpi=100, bbox_inches="tight")
    print(f"drawn: {plot}")


if __name__ == "__main__":
    main()
