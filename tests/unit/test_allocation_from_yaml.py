"""Every way to allocate samples, from a configuration to the last epoch."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_grad import DynamicSampleAllocation
from lightning_grad.allocation.importance import linear_head_scores
from lightning_grad.cli import main

CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: {epochs}
  default_root_dir: {root}
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  log_every_n_steps: 1
  logger: {{class_path: TensorBoardLogger, init_args: {{save_dir: {root}, name: '', version: ''}}}}
  callbacks:
    - {callback}
"""
PROMPTS = """
model: {class_path: tests.rollout_models.EasyRun, init_args: {lr: 3.0e-3}}
data: {class_path: lightning_grad.demos.ArithmeticPrompts, init_args: {num_prompts: 24}}
"""
DIGITS = """
model: {class_path: tests.allocated_digits.AllocatedDigits, init_args: {lr: 3.0e-3}}
data: {class_path: tests.allocated_digits.AllocatedDigitsData, init_args: {batch_size: 32}}
"""


def run(tmp_path, callback, rest, epochs):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(root=tmp_path, callback=callback, epochs=epochs) + rest)
    assert main(["fit", "-c", str(config)]) == 0
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    return {tag: [e.value for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


PUBLISHED = (
    "{class_path: DynamicSampleAllocation, init_args: {pilot_mode: discard, pilot_samples: 8, alpha: 1.0e-3, beta: 2.0,"
    " prior: null, zero_policy: drop, min_samples: 0, rounding: largest_remainder, moment: mean, estimator: flat}}"
)


@pytest.mark.parametrize("how", ["written out", "reference"])
def test_published_pipeline(how, tmp_path):
    """Gradients of the flat loss go where acceptance is high already; it learns here all the same."""
    callback = PUBLISHED if how == "written out" else "class_path: lightning_grad.DynamicSampleAllocation.reference"
    values = run(tmp_path, callback, PROMPTS, epochs=4)
    assert values["alloc/budget"] == [192] * 4
    assert values["alloc/pilot_generated"] == [192] * 4
    assert values["alloc/generated_total"] == [384, 768, 1152, 1536]
    assert values["alloc/acceptance_rate"][-1] > values["alloc/acceptance_rate"][0] + 0.1


def test_the_preset_is_what_the_page_writes_out():
    import yaml

    written = yaml.safe_load(PUBLISHED)["init_args"]
    assert DynamicSampleAllocation(**written)._settings == DynamicSampleAllocation.reference()._settings
    assert DynamicSampleAllocation.reference(objective="reward_baseline", seed=3).objective == "reward_baseline"


@pytest.mark.parametrize("kwargs", ["advantage: loo", "advantage: mean_std, pilot_mode: history", "grad_norm: none"])
def test_policy_gradient_with_a_group_baseline(kwargs, tmp_path):
    callback = f"{{class_path: DynamicSampleAllocation, init_args: {{objective: reward_baseline, {kwargs}}}}}"
    values = run(tmp_path, callback, PROMPTS, epochs=6)
    assert values["alloc/budget"] == [192] * 6
    assert min(values["alloc/n_min"]) >= 2
    assert values["alloc/acceptance_rate"][-1] > values["alloc/acceptance_rate"][0] + 0.1
    assert "alloc/sn_mse_ratio" not in values


@pytest.mark.parametrize("objective", ["importance", "strata"])
def test_an_ordinary_classifier(objective, tmp_path):
    pytest.importorskip("sklearn")
    callback = f"{{class_path: DynamicSampleAllocation, init_args: {{objective: {objective}, activate_below: 0.95}}}}"
    values = run(tmp_path, callback, DIGITS, epochs=5)
    assert values["val/acc"][-1] > 0.85
    assert values["alloc/active"][0] == 0  # nothing is known of the examples yet
    assert values["alloc/active"][-1] == 1
    assert 0 < values["alloc/variance_ratio"][-1] < 1
    assert values["alloc/weight_max"][-1] <= 10  # 1 / uniform_mix


def test_scores_of_a_linear_head_are_gradient_norms():
    gen = torch.Generator().manual_seed(0)
    hidden, labels = torch.randn(6, 5, generator=gen).double(), torch.randint(4, (6,), generator=gen)
    head = torch.nn.Linear(5, 4).double()
    for bias in (True, False):
        if not bias:
            head.bias = None
        got = linear_head_scores(hidden, head(hidden), labels, bias=bias)
        for h, y, score in zip(hidden, labels, got, strict=True):
            loss = torch.nn.functional.cross_entropy(head(h[None]), y[None])
            grads = torch.autograd.grad(loss, list(head.parameters()))
            assert float(score) == pytest.approx(float(sum(g.square().sum() for g in grads).sqrt()), rel=1e-10)
