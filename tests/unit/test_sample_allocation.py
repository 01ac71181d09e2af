"""The callback: budgets, the gradient of an epoch, resume, what it leaves alone, what it refuses."""

import pickle
import threading
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import TensorDataset

from lightning_grad import DynamicSampleAllocation, RolloutDataModule
from lightning_grad.allocation.e_step import EStep, Processes, check_rollouts
from lightning_grad.allocation.history import PromptHistory
from lightning_grad.allocation.planner import AllocationRule, gini, share_of
from lightning_grad.callbacks._supervised_allocation import ScoreHistory
from lightning_grad.data.rollouts import RolloutBatch, RolloutLoader, concatenate
from lightning_grad.data.weighted import AllocatedLoader
from lightning_grad.demos import DigitsMLP
from tests.rollout_models import EasyPolicy, prompts, quiet_trainer


class Spy(Callback):
    """Plans, and gradients of the optimizer steps."""

    def __init__(self, allocation):
        self.allocation, self.plans, self.grads = allocation, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.plans.append(self.allocation.plan)
            self.items = self.allocation._prompts.loader.items

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.grads.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).clone())


class Frozen(EasyPolicy):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(model=None, epochs=1, data=None, trainer=None, **kwargs):
    allocation = DynamicSampleAllocation(**kwargs)
    spy = Spy(allocation)
    runner = quiet_trainer(max_epochs=epochs, callbacks=[allocation, spy], **(trainer or {}))
    runner.fit(model or EasyPolicy(), datamodule=data or prompts())
    return allocation, spy


@pytest.mark.parametrize("mode", ["reuse", "discard", "history"])
def test_budget_is_met_and_bounds_kept(mode):
    allocation, spy = fit(epochs=3, pilot_mode=mode, samples_per_prompt=6, min_samples=2, max_samples=11)
    for plan in spy.plans:
        assert int(plan.sum()) == 72
        assert int(plan.min()) >= (4 if mode == "reuse" else 2)
        assert int(plan.max()) <= 11
    assert allocation.generated == 3 * (72 + (48 if mode == "discard" else 0))
    assert len({tuple(plan.tolist()) for plan in spy.plans}) > 1


@pytest.mark.parametrize(("steps", "accumulate"), [(1, 1), (2, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("objective", ["em", "reward", "reward_baseline"])
def test_an_epoch_estimates_the_weighted_gradient(steps, accumulate, objective):
    model = Frozen()
    _, spy = fit(model, trainer={"accumulate_grad_batches": accumulate}, steps_per_iteration=steps, objective=objective)
    assert len(spy.grads) == steps // accumulate
    items = spy.items
    scale = items["weight"] * items["advantage"] / steps
    loss = -(scale * model.logprob(items).double()).sum()
    direct = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(torch.stack(spy.grads).mean(0), direct, rtol=1e-4, atol=1e-5 * float(direct.abs().max()))
    if objective == "em":
        assert float((items["weight"] / steps).sum()) == pytest.approx(1.0)


def test_warm_up_is_even_and_draws_no_pilots():
    allocation, spy = fit(warmup_iterations=10**9, pilot_mode="discard", samples_per_prompt=5, epochs=2)
    assert all(bool((plan == 5).all()) for plan in spy.plans)
    assert allocation.generated == 120


def test_random_state_and_training_flags_are_left_as_found():
    class Watched(EasyPolicy):
        def on_train_epoch_start(self):  # after the callback's
            assert torch.equal(torch.get_rng_state(), self.before)
            assert self.training
            assert not self.policy.norm.training
            assert all(p.grad is None for p in self.parameters())

        def on_train_start(self):
            self.policy.norm.eval()
            self.before = torch.get_rng_state()

    fit(Watched())


@pytest.mark.parametrize("save", [True, False])
def test_resume_at_the_end_of_an_epoch_repeats_the_next_plans(save, tmp_path):
    kwargs = {"pilot_mode": "history", "save_rollouts": save, "prompts_per_iteration": 7}

    def run(path=None, epochs=4):
        allocation = DynamicSampleAllocation(**kwargs)
        spy = Spy(allocation)
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[allocation, spy, saver], enable_checkpointing=True)
        torch.manual_seed(0)
        model = EasyPolicy()
        trainer.fit(model, datamodule=prompts(), ckpt_path=path, weights_only=None if path is None else True)
        return spy.plans, model.state_dict()

    plans, weights = run()
    again, same = run(tmp_path / "epoch=1.ckpt")
    assert [p.tolist() for p in again] == [p.tolist() for p in plans[2:]]
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_two_processes_plan_as_one_would_for_their_pooled_samples():
    barrier, shared, done = threading.Barrier(2), [None, None], [None, None]
    estep = EStep(AllocationRule(), pilot_mode="history")
    data, model = prompts(9).loader.prompts, EasyPolicy().eval()

    def process(rank):
        def add(value):
            shared[rank] = value
            barrier.wait()
            total = shared[0] + shared[1]
            barrier.wait()
            return total

        history, who = PromptHistory(9), Processes(rank, 2, add)
        plans = []
        for seed in range(3):
            with torch.no_grad():
                result = estep.run(model, data, history, 41, seed=seed, uniform=seed == 0, processes=who)
            history.visit(torch.arange(9), result.sums)
            plans.append(result)
        done[rank] = history, plans

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    (history, first), (other, second) = done
    assert torch.equal(history.sums, other.sums)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.plan.counts, b.plan.counts)
        drawn = torch.bincount(torch.cat([a.items["prompt_index"], b.items["prompt_index"]]), minlength=9)
        assert torch.equal(drawn, a.plan.counts)
        assert float(a.items["weight"].sum() + b.items["weight"].sum()) == pytest.approx(1.0)
    lone = PromptHistory(9)
    lone.visit(torch.arange(9), first[0].sums)
    assert torch.equal(AllocationRule().plan(lone, 41).counts, first[1].plan.counts)


def test_shares_of_a_plan_are_blocks():
    counts = torch.tensor([3, 0, 5, 1])
    parts = [share_of(counts, rank, 4) for rank in range(4)]
    assert [int(part.sum()) for part in parts] == [2, 2, 2, 3]
    assert torch.equal(sum(parts), counts)
    assert parts[1].tolist() == [1, 0, 1, 0]
    assert gini(torch.full((5,), 3)) == 0
    assert gini(torch.tensor([0, 0, 0, 8])) == pytest.approx(0.75)


class Rewarded(EasyPolicy):
    reward_of = staticmethod(lambda rollouts: rollouts.reward)

    def sample(self, prompts, counts, generator):
        rollouts = super().sample(prompts, counts, generator)
        rollouts.reward = self.reward_of(rollouts)
        return rollouts


def test_samples_that_cannot_be_judged_count_as_not_drawn():
    model = Rewarded()
    model.reward_of = lambda r: torch.where(torch.arange(len(r)) % 3 == 0, float("nan"), r.reward)
    for objective in ("em", "reward", "reward_baseline"):
        with pytest.warns(UserWarning, match="reward that is not finite"):
            _, spy = fit(model, objective=objective)
        bad = spy.items["reward"].isnan()
        assert bool(bad.any())
        assert float(spy.items["weight"][bad].abs().sum()) == 0
        assert float(spy.items["advantage"][bad].abs().sum()) == 0
        assert all(bool(g.isfinite().all()) for g in spy.grads)


@pytest.mark.filterwarnings("ignore:.*accepted.*:UserWarning")
def test_nothing_accepted_changes_nothing_and_stops_after_a_while():
    model = Rewarded()
    model.reward_of = lambda r: torch.zeros(len(r))
    _, spy = fit(model, epochs=2)
    assert all(float(g.abs().max()) == 0 for g in spy.grads)
    with pytest.raises(RuntimeError, match="no sample was accepted in 3 iterations"):
        fit(model, epochs=4)


def test_reference_drops_hopeless_prompts():
    model = Rewarded()
    model.reward_of = lambda r: torch.where(r.prompt_index < 3, 0.0, r.reward)
    allocation = DynamicSampleAllocation.reference(budget=50)
    spy = Spy(allocation)
    quiet_trainer(max_epochs=1, callbacks=[allocation, spy]).fit(model, datamodule=prompts())
    assert allocation.plan[:3].tolist() == [0, 0, 0]
    assert int(allocation.plan.sum()) == 50
    accepted = spy.items["accepted"]
    assert spy.items["weight"][accepted].unique().numel() == 1
    assert allocation.generated == 50 + 12 * 8


def test_more_epochs_on_the_same_samples():
    allocation, _ = fit(epochs=4, every_n_epochs=3)
    assert allocation.iteration == 1
    assert allocation.generated == 2 * 96


def test_a_second_fit_goes_on():
    model, data, allocation = EasyPolicy(), prompts(), DynamicSampleAllocation(pilot_mode="history")
    for epochs in (2, 3):
        quiet_trainer(max_epochs=epochs, callbacks=[allocation]).fit(model, datamodule=data)
    assert allocation.iteration == 4
    assert allocation.generated == 5 * 96


def test_fewer_samples_than_steps():
    _, spy = fit(data=prompts(1), samples_per_prompt=2, pilot_samples=1, steps_per_iteration=4, patience_empty=9)
    assert len(spy.grads) == 4
    assert all(bool(g.isfinite().all()) for g in spy.grads)


def test_token_budget():
    history = PromptHistory(4)
    history.sums[:, 8:] = torch.tensor([[1.0, 2.0], [1.0, 4.0], [1.0, 8.0], [1.0, 16.0]])
    counts = AllocationRule(cost="tokens").plan(history, 20).counts
    length = torch.tensor([2, 4, 8, 16])
    assert int((counts * length).sum()) <= 20 * 7.5
    assert int((counts * length).sum()) > 20 * 7.5 - 16
    assert bool((counts[:-1] > counts[1:]).all())


def test_batches_of_different_widths_are_joined():
    def part(width, length, index):
        ones = torch.ones(2, length, dtype=torch.int64)
        prompt = torch.full((2, width), 5)
        return RolloutBatch(
            torch.tensor(index), prompt, ones, ones, torch.ones(2), ones.float(), extra={"x": ones[:, 0]}
        )

    both = concatenate([part(3, 2, [0, 0]), part(4, 5, [1, 2])])
    assert both.prompt_mask[0].tolist() == [0, 1, 1, 1]
    assert both.length.tolist() == [2, 2, 5, 5]
    assert both.logprob.shape == (4, 5)
    again = RolloutBatch.from_state_dict(both.state_dict())
    assert torch.equal(again.rows(torch.tensor([3])).extra["x"], both.extra["x"][3:])


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"pilot_samples": 8}, "leaves nothing to allocate at samples_per_prompt=8"),
        ({"estimator": "horvitz_thompson"}, "biased with `pilot_mode='reuse'`"),
        ({"beta": 0.5}, "`beta` must be in"),
        ({"objective": "rewards"}, "`objective` must be one of"),
        ({"objective": "reward_baseline", "max_samples": 1}, "`max_samples` must be an integer >= 2"),
        ({"min_samples": 5, "max_samples": 4}, "`max_samples` must be an integer >= 5"),
    ],
)
def test_refused_arguments(kwargs, text):
    with pytest.raises(ValueError, match=text):
        DynamicSampleAllocation(**kwargs)


def test_refused_runs():
    plain = RolloutDataModule([1, 2])
    with pytest.raises(MisconfigurationException, match=r"DigitsMLP has none"):
        fit(DigitsMLP(), data=plain)
    with pytest.raises(ValueError, match="budget 5 is smaller than 12 prompts x min_samples"):
        fit(budget=5, pilot_mode="history")
    with pytest.raises(ValueError, match="pilot_samples=4 leaves nothing to allocate of the 48 samples for 12 prompts"):
        fit(budget=48)
    with pytest.raises(ValueError, match=r"budget 96 exceeds 12 prompts x max_samples 7 = 84"):
        fit(max_samples=7)
    with pytest.raises(MisconfigurationException, match="reload_dataloaders_every_n_epochs=0"):
        fit(trainer={"reload_dataloaders_every_n_epochs": 1})
    with pytest.raises(MisconfigurationException, match=r"grad_norm='module' needs .* sample_scores"):
        fit(grad_norm="module")


def test_wrong_samples_are_named():
    ones = torch.ones(3, 2, dtype=torch.int64)
    rollouts = RolloutBatch(torch.tensor([0, 0, 1]), ones, ones, ones, torch.ones(3))
    check_rollouts(rollouts, torch.tensor([2, 1]), "M")
    with pytest.raises(ValueError, match=r"M.sample\(\) returned 2 samples of prompt 0, 1 were asked"):
        check_rollouts(rollouts, torch.tensor([1, 2]), "M")
    rollouts.reward = torch.ones(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="floating-point reward"):
        check_rollouts(rollouts, torch.tensor([2, 1]), "M")


@pytest.mark.parametrize("kind", ["head", "token", "full", "none"])
def test_all_kinds_of_norms_run(kind):
    allocation, _ = fit(grad_norm=kind)
    assert int(allocation.plan.sum()) == 96


class Weighted(DigitsMLP):
    def training_step(self, batch, batch_idx):
        losses = self.sample_loss(batch["data"])
        self.seen.append(batch)
        return {"loss": (batch["weight"] * losses).mean(), "score": self.scores[batch["index"]]}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("objective", ["importance", "strata"])
def test_ordinary_examples(objective):
    """From the second epoch on examples with a large score are drawn more often, with less weight."""
    gen = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(80, 1, 8, 8, generator=gen), torch.randint(10, (80,), generator=gen))
    strata = torch.arange(80) // 40
    model = Weighted()
    model.seen, model.scores = [], torch.where(strata == 1, 9.0, 1.0)
    allocation = DynamicSampleAllocation(objective=objective)
    loader = AllocatedLoader(data, batch_size=8, strata=strata)
    quiet_trainer(max_epochs=3, callbacks=[allocation]).fit(model, loader)
    first, second = model.seen[:10], model.seen[10:20]
    assert torch.cat([b["index"] for b in first]).unique().numel() == 80
    assert all(bool((b["weight"] == 1).all()) for b in first)
    index, weight = (torch.cat([b[key] for b in second]) for key in ("index", "weight"))
    large = strata[index] == 1
    assert int(large.sum()) > 60
    assert float(weight[large].max()) < 1 < float(weight[~large].min())
    # each stratum carries the weight of its share in the data, up to the draw of one example
    assert float(weight[large].sum()) == pytest.approx(40, abs=0.01 if objective == "strata" else 5.0)


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_training_step_of_before_is_told_what_a_batch_holds(fails_at):
    class Unchanged(Weighted):
        def training_step(self, batch, batch_idx):
            if batch_idx == fails_at:
                _images, _labels = batch
            return super().training_step(batch, batch_idx)

    model = Unchanged()
    model.seen, model.scores = [], torch.ones(16)
    loader = AllocatedLoader(TensorDataset(torch.rand(16, 1, 8, 8), torch.zeros(16, dtype=torch.int64)), batch_size=8)
    trainer = quiet_trainer(max_epochs=1, callbacks=[DynamicSampleAllocation(objective="importance")])
    with pytest.raises(ValueError, match="too many values to unpack") as raised:
        trainer.fit(model, loader)
    notes = "".join(getattr(raised.value, "__notes__", []))
    assert ("Unchanged.training_step takes its examples from batch['data']" in notes) == (fails_at == 0)


def examples(n=80):
    gen = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(n, 1, 8, 8, generator=gen), torch.randint(10, (n,), generator=gen))


def weighted(n=80, cls=Weighted):
    model = cls()
    model.seen, model.scores = [], torch.where(torch.arange(n) < n // 2, 1.0, 9.0)
    return model


def test_a_second_fit_on_examples_remembers_their_scores():
    model, loader = weighted(), AllocatedLoader(examples(), batch_size=8)
    allocation = DynamicSampleAllocation(objective="importance")
    for epochs in (1, 2):
        quiet_trainer(max_epochs=epochs, callbacks=[allocation]).fit(model, loader)
    assert float(model.seen[10]["weight"].max()) != 1.0


def test_a_failed_fit_leaves_no_plan_in_the_loader(tmp_path):
    class Fails(Weighted):
        def training_step(self, batch, batch_idx):
            if len(self.seen) == 25:
                raise OSError("disk full")
            return super().training_step(batch, batch_idx)

    model, loader = weighted(cls=Fails), AllocatedLoader(examples(), batch_size=8)
    allocation = DynamicSampleAllocation(objective="importance")
    saver = OnExceptionCheckpoint(tmp_path, "failed")
    with pytest.raises(OSError, match="disk full"):
        quiet_trainer(max_epochs=3, callbacks=[allocation, saver], enable_checkpointing=True).fit(model, loader)
    saved = torch.load(tmp_path / "failed.ckpt", weights_only=True)["callbacks"]["DynamicSampleAllocation"]
    assert len(saved["scores"]["index"]) == 80  # the checkpoint has it still
    plain = weighted()
    quiet_trainer(max_epochs=1).fit(plain, loader)
    assert all(bool((batch["weight"] == 1).all()) for batch in plain.seen)
    # and with the callback, the scores from before the failure count
    again = weighted()
    quiet_trainer(max_epochs=1, callbacks=[allocation]).fit(again, loader)
    assert float(again.seen[0]["weight"].max()) != 1.0


def test_a_batch_that_is_left_out_has_no_score():
    class Skips(Weighted):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            return None if batch_idx == 3 else output

    model, loader = weighted(cls=Skips), AllocatedLoader(examples(), batch_size=8)
    allocation = DynamicSampleAllocation(objective="importance")
    quiet_trainer(max_epochs=1, callbacks=[allocation]).fit(model, loader)
    scored = (allocation._scores.fresh[:, 1] > 0).nonzero().flatten()
    missing = set(range(80)) - set(scored.tolist())
    assert missing == set(model.seen[3]["index"].tolist())


def test_a_loader_without_a_plan_has_a_new_order_each_epoch_and_continues_exactly():
    def make():
        return AllocatedLoader(list(range(10)), batch_size=3)

    def indices(batches):
        return [batch["index"].tolist() for batch in batches]

    loader = make()
    epochs = [indices(loader) for _ in range(12)]
    assert len({str(epoch) for epoch in epochs}) == 12
    assert {i for epoch in epochs for batch in epoch for i in batch} == set(range(10))  # no example is always left out
    for start in range(5):
        loader, again = make(), make()
        batches = [batch for _ in range(2) for batch in epochs[_]]
        drawn = 0
        while drawn < start:
            for _ in loader:
                drawn += 1
                if drawn == start:
                    break
        again.load_state_dict(loader.state_dict())
        got = []
        while len(got) < 6 - start:
            got += indices(again)
        assert got == batches[start:], start


def test_strata_that_cannot_be_served_are_refused():
    with pytest.raises(ValueError, match="`strata` must be integers >= 0, got -2"):
        AllocatedLoader(list(range(3)), strata=[0, -2, 1])
    loader = AllocatedLoader(list(range(10)), batch_size=8, strata=range(10))
    with pytest.raises(ValueError, match="gives 8 examples for 10 strata"):
        ScoreHistory(loader, "strata", 0.5, 0.1, 0.9, 0)


def test_a_loader_of_the_users_own_keeps_its_number_of_steps():
    class Own(pl.LightningDataModule):
        def __init__(self):
            super().__init__()
            self.loader = RolloutLoader([1, 2, 3], steps_per_iteration=2)

        def train_dataloader(self):
            return self.loader

    with pytest.raises(MisconfigurationException, match="steps_per_iteration=2, DynamicSampleAllocation 4"):
        fit(data=Own())


def test_a_decay_that_nothing_reads_is_said():
    with pytest.warns(UserWarning, match="history_decay=0.9 has no effect with pilot_mode='discard'"):
        DynamicSampleAllocation(history_decay=0.9, pilot_mode="discard")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DynamicSampleAllocation(history_decay=0.9, pilot_mode="history")
        DynamicSampleAllocation(history_decay=0.9, objective="importance")
        DynamicSampleAllocation()


def test_it_can_be_sent_to_another_process():
    pickle.loads(pickle.dumps(DynamicSampleAllocation()))
