"""Error of the self-normalised estimate from samples: against an enumerated policy and against Monte Carlo."""

import pytest
import torch

from lightning_grad import DynamicSampleAllocation
from lightning_grad.allocation import mean_gradients as mg
from lightning_grad.allocation.integer import allocate
from tests.rollout_models import EasyPolicy, prompts, quiet_trainer
from tests.unit.tabular import TabularPolicy


@pytest.fixture(scope="module")
def policy():
    return TabularPolicy()


def sums_of(policy, count, seed=0):
    """Sums over accepted samples of ``count`` draws of every prompt, one repetition; also by another process."""
    index, answer = policy.draw(torch.full((policy.m,), count), 1, seed)
    answer = answer[0]
    right = policy.right[index, answer]
    return mg.gradient_sums(index[right], policy.score[index, answer][right], policy.m)


def test_trace_and_length_of_the_mean_are_unbiased(policy):
    """Mean over 2000 draws of 100 samples within 4.5 standard errors, 12 + 3 numbers: false alarm 1e-4."""
    traces, lengths = [], []
    long = policy.mean2 > 0.2  # whose estimate is hardly ever below 0, where it is cut
    assert int(long.sum()) > 2
    for seed in range(2000):
        trace, mean = mg.mean_gradients(sums_of(policy, 100, seed))
        traces.append(trace)
        lengths.append(mean.square().sum(1)[long])
    for draws, truth in ((traces, policy.norm2 - policy.mean2), (lengths, policy.mean2[long])):
        draws = torch.stack(draws)
        error = draws.std(0) / 2000**0.5
        assert bool(((draws.mean(0) - truth).abs() < 4.5 * error).all())


def test_prompts_with_few_accepted_samples():
    rows = torch.tensor([[2.0, 0.0], [0.0, 2.0], [3.0, 0.0], [1.0, float("nan")]])
    sums = mg.gradient_sums(torch.tensor([0, 0, 1, 1]), rows, 3)
    assert sums[:, -1].tolist() == [2, 1, 0]  # a row that is not finite is left out
    trace, mean = mg.mean_gradients(sums)
    # prompt 0: mean (1, 1), second moment 4, variance 4: nothing of it is in the mean
    assert trace.tolist() == [4, 9, 4]
    assert float(mean.abs().max()) == 0
    rows = torch.tensor([[2.0, 1.0], [2.0, -1.0], [3.0, 0.0]])
    trace, mean = mg.mean_gradients(mg.gradient_sums(torch.tensor([0, 0, 1]), rows, 3))
    torch.testing.assert_close(trace, torch.tensor([2.0, 0.4 * 9, 0.4 * 5]).double())  # 2 of 5 are spread
    assert float(mean[0].square().sum()) == pytest.approx(3)
    assert float(mean[2].square().sum()) == pytest.approx(0.6 * 5)
    assert mg.mean_gradients(mg.gradient_sums(torch.tensor([0, 1]), rows[:2], 3)) is None


def test_ratio_is_that_of_the_real_errors(policy):
    """A plan against an even split, 20 000 repetitions each; the ratio's standard error is 0.7 %, bound 4 %: 1e-8."""
    even = torch.full((policy.m,), 4)
    plan = allocate(policy.p, 4 * policy.m, min_samples=1)  # a bad one: what em needs is the other way round
    errors = []
    for seed, n in enumerate((plan, even)):
        index, answer = policy.draw(n, 20_000, seed)
        right = policy.right[index].expand(20_000, -1, -1).gather(2, answer[..., None])[..., 0].double()
        score = policy.score[index[None], answer] * right[..., None]
        total = torch.zeros(20_000, policy.m, policy.d, dtype=torch.float64).index_add_(1, index, score)
        found = torch.zeros(20_000, policy.m, dtype=torch.float64).index_add_(1, index, right)
        estimate = (total / found.clamp_min(1)[..., None]).mean(1)
        errors.append((estimate - policy.mean.mean(0)).square().sum(1))
    means = [float(e.mean()) for e in errors]
    relative = sum(float(e.var()) / 20_000 / m**2 for e, m in zip(errors, means, strict=True)) ** 0.5
    assert relative < 0.007
    want = means[0] / means[1]
    assert want > 1.1
    exact = mg.sn_mse_ratio(plan, even, policy.p, policy.norm2 - policy.mean2, policy.mean)
    assert exact == pytest.approx(want, rel=0.04)
    from_samples = mg.sn_mse_ratio(plan, even, policy.p, *mg.mean_gradients(sums_of(policy, 400)))
    assert from_samples == pytest.approx(exact, rel=0.05)


class Gradients(EasyPolicy):
    """The gradient of its head over each sample, by autograd, as it was when the samples were scored."""

    def hidden_and_logits(self, rollouts):
        self.scored = rollouts
        with torch.enable_grad():
            head = self.policy.head.weight
            logp = self.logprob(rollouts.state_dict())
            self.gradients = torch.stack([torch.autograd.grad(row, head, retain_graph=True)[0] for row in logp])
        return super().hidden_and_logits(rollouts)


@pytest.mark.parametrize("mode", ["reuse", "history"])
def test_what_is_logged_is_what_whole_gradients_give(mode):
    """Sketches of 256 numbers against the 1296 of the head; the errors of plan and even split mostly cancel."""
    model, done = Gradients(), []
    allocation = DynamicSampleAllocation(samples_per_prompt=8, pilot_samples=4, pilot_mode=mode)
    run = allocation.e_step.run
    object.__setattr__(allocation.e_step, "run", lambda *args, **kw: done.append(run(*args, **kw)) or done[-1])
    quiet_trainer(max_epochs=2, callbacks=[allocation]).fit(model, datamodule=prompts(16))
    plan, report = done[-1].plan, done[-1].report
    sums = mg.gradient_sums(model.scored.prompt_index, model.gradients.flatten(1), 16)
    even = allocate(torch.ones(16), 128, min_samples=4 if mode == "reuse" else 1)
    want = mg.sn_mse_ratio(plan.counts, even, plan.p, *mg.mean_gradients(sums))
    assert report["sn_mse_ratio"] == pytest.approx(want, abs=0.03)
    assert want != pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"objective": "reward"},
        {"estimator": "flat"},
        {"grad_norm": "none"},
        {"warmup_iterations": 9},
        {"log_sn_mse_ratio": False},
    ],
)
def test_nothing_is_logged_where_it_means_nothing(kwargs):
    allocation, done = DynamicSampleAllocation(**kwargs), []
    run = allocation.e_step.run
    object.__setattr__(allocation.e_step, "run", lambda *args, **kw: done.append(run(*args, **kw)) or done[-1])
    quiet_trainer(max_epochs=1, callbacks=[allocation]).fit(EasyPolicy(), datamodule=prompts(4))
    assert "sn_mse_ratio" not in done[0].report
