"""Sample allocation: a plan for a million prompts, and what head norms cost beside the forward pass that they need.

    python benchmarks/bench_allocation.py [--only plan|norms]

Prints two tables; rows go to benchmarks/results/allocation_plan.csv and allocation_norms.csv.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from _harness import Bench  # noqa: E402

from lightning_grad.allocation.history import PromptHistory  # noqa: E402
from lightning_grad.allocation.integer import allocate  # noqa: E402
from lightning_grad.allocation.planner import AllocationRule  # noqa: E402
from lightning_grad.sampling.generation import completion_logits  # noqa: E402
from lightning_grad.statistics.head_norm import head_grad_norm, head_grad_sketch  # noqa: E402

PROMPTS = 1_000_000


def plans() -> None:
    """Eight samples per prompt; the whole plan also estimates rates, norms and the predicted variance."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(PROMPTS, generator=generator, dtype=torch.float64)
    weights = {
        "equal": torch.ones(PROMPTS),
        "lognormal, sd 1": normal.exp(),
        "lognormal, sd 4": (4 * normal).exp(),
        "nine of ten are 0": torch.where(torch.arange(PROMPTS) % 10 == 0, normal.exp(), 0.0),
    }
    history = PromptHistory(PROMPTS)
    history["trials"][:] = 8.0
    history["successes"][:] = torch.randint(9, (PROMPTS,), generator=generator).double()
    history["scored_accepted"][:] = history["successes"]
    history["norm_accepted"][:] = history["successes"] * normal.exp()
    history["reward"][:] = history["reward2"][:] = history["successes"]
    rule = AllocationRule()
    variants = {f"allocate: {name}": lambda w=w: allocate(w, 8 * PROMPTS) for name, w in weights.items()}
    variants["allocate: 1 to 16 each"] = lambda: allocate(
        weights["lognormal, sd 1"], 8 * PROMPTS, min_samples=1, max_samples=16
    )
    variants["allocate: largest remainder"] = lambda: allocate(
        weights["lognormal, sd 1"], 8 * PROMPTS, rounding="largest_remainder"
    )
    variants["allocate: five units above one each"] = lambda: allocate(weights["lognormal, sd 1"], PROMPTS + 5)
    variants["allocate: seven units below 16 each"] = lambda: allocate(
        weights["lognormal, sd 1"], 16 * PROMPTS - 7, max_samples=16
    )
    variants["allocate: half are 1, half 2"] = lambda: allocate((normal > 0) + 1, 8 * PROMPTS + 300_001)
    variants["whole plan"] = lambda: rule.plan(history, 8 * PROMPTS)
    bench = Bench("allocation_plan", f"{PROMPTS} prompts", "allocate: lognormal, sd 1", "float64")
    bench.run(variants, rounds=5, warmup=1)
    bench.report()


SMALL = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
# the sizes of Qwen2.5-0.5B
HALF_A_BILLION = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def norms(sizes: dict[str, int], vocabulary: int, length: int, rows: int, prompt: int = 64) -> None:
    """Llama architecture, random weights; the forward pass is that of prompt and completion, head on the completion."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=1024, **sizes)).eval()
    ids = torch.randint(vocabulary, (rows, prompt))
    completion = torch.randint(vocabulary, (rows, length))
    mask = torch.ones_like(completion)

    @torch.no_grad()
    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        return completion_logits(model, ids, None, completion, mask)

    hidden, logits = forward()
    variants = {"forward pass": forward}
    for method in ("auto", "gram", "sketch", "direct"):
        variants[method] = lambda method=method: head_grad_norm(
            hidden, logits, completion, mask, method=method, generator=torch.Generator().manual_seed(0)
        )
    large = logits - 60.0  # as some models have them, GPT-2 for one: the exponentials need a shift
    variants["auto, logits near -60"] = lambda: head_grad_norm(hidden, large, completion, mask)
    variants["sketched gradients"] = lambda: head_grad_sketch(hidden, logits, completion, mask)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    width, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    shape = f"V={vocabulary} d={width} L={layers} R={length} P={prompt} {size:.0f} M parameters, {rows} rows"
    bench = Bench("allocation_norms", shape, "forward pass")
    bench.run(variants, rounds=7, warmup=1)
    bench.report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("plan", "norms"))
    only = parser.parse_args().only
    torch.set_num_threads(1)
    if only != "norms":
        plans()
    if only != "plan":
        for vocabulary in (8192, 32768):
            for length in (64, 256):
                norms(SMALL, vocabulary, length, rows=4)
        norms(HALF_A_BILLION, 151936, 256, rows=1)


if __name__ == "__main__":
    main()
