"""Samples along a run: which are kept, what they predict, that a resumed run keeps the same; averages; data size."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_grad import SGLD, BindDataSize, IterateAveraging, PosteriorSamples
from lightning_grad.statistics.chains import effective_sample_size, split_rhat


class Model(BoringModel):
    def configure_optimizers(self):
        return SGLD(self.parameters(), lr=0.05, seed=1)


def fit(steps, callbacks, ckpt=None, **kwargs):
    torch.manual_seed(0)
    model = Model()
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[BindDataSize(), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **kwargs,
    )
    trainer.fit(model, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return model, trainer


def test_data_size_is_filled_in():
    _, trainer = fit(2, [])
    assert trainer.optimizers[0].param_groups[0]["n_data"] == 64


def test_clipping_warns():
    with pytest.warns(UserWarning, match="gradient_clip_val changes the distribution"):
        fit(1, [], gradient_clip_val=1.0)


@pytest.mark.parametrize("storage", ["memory", "directory"])
def test_samples_are_taken_on_schedule_and_predict_restores(storage, tmp_path):
    where = "memory" if storage == "memory" else str(tmp_path)
    samples = PosteriorSamples(burn_in_steps=4, every_n_steps=3, max_samples=3, storage=where)
    model, _ = fit(20, [samples])
    assert samples._kept == [13, 16, 19]
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.randn(5, 32)
    outputs = samples.predict(model, lambda: model(x))
    assert outputs.shape == (3, 5, 2)
    weights = [s["layer.weight"] for s in samples.samples()]
    biases = [s["layer.bias"] for s in samples.samples()]
    want = torch.stack([x @ w.T + b for w, b in zip(weights, biases, strict=True)])
    assert torch.allclose(outputs, want, atol=1e-6)
    mean, std = samples.mean_std(model, lambda: model(x))
    assert torch.allclose(mean, outputs.mean(0))
    assert std.min() > 0
    with pytest.raises(ZeroDivisionError):
        samples.predict(model, lambda: 1 // 0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    if storage == "directory":
        assert sorted(p.name for p in tmp_path.iterdir()) == ["sample_13.pt", "sample_16.pt", "sample_19.pt"]
        merged = PosteriorSamples.merge([tmp_path, tmp_path])
        assert torch.equal(merged.predict(model, lambda: model(x))[:3], outputs)
        assert len(merged) == 6


def test_accumulation_takes_each_step_once():
    samples = PosteriorSamples(every_n_steps=1)
    fit(4, [samples], accumulate_grad_batches=3)
    assert samples._kept == [1, 2, 3, 4]


def test_reservoir_keeps_a_uniform_choice():
    module = torch.nn.Linear(1, 1)
    counts = torch.zeros(20)
    for seed in range(400):
        samples = PosteriorSamples(max_samples=5, policy="reservoir", seed=seed)
        for step in range(20):
            samples._take(step, module, True)
        counts[samples._kept] += 1
    # each of 20 is kept with probability 1/4: 100 of 400, standard deviation sqrt(400 * 3/16) = 8.7
    assert (counts - 100).abs().max() <= 5 * 8.7


def test_resume_keeps_the_same_samples(tmp_path):
    whole = PosteriorSamples(every_n_steps=2, max_samples=3, policy="reservoir")
    fit(20, [whole])
    first = PosteriorSamples(every_n_steps=2, max_samples=3, policy="reservoir")
    _, trainer = fit(9, [first])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second = PosteriorSamples(every_n_steps=2, max_samples=3, policy="reservoir")
    fit(20, [second], ckpt=tmp_path / "a.ckpt")
    assert second._kept == whole._kept
    assert second._seen == whole._seen == 10


def test_a_run_resumed_from_an_older_checkpoint_has_its_own_files_only(tmp_path):
    def new():
        return PosteriorSamples(every_n_steps=1, max_samples=3, storage=str(tmp_path / "samples"))

    _, trainer = fit(4, [new()])
    trainer.save_checkpoint(tmp_path / "a.ckpt")  # keeps 2, 3, 4
    with pytest.warns(UserWarning, match="3 samples in .* are not of this run"):
        fit(6, [new()])  # the same folder again, from the start: 4, 5, 6 stay
    assert len(PosteriorSamples.merge([tmp_path / "samples"])) == 3
    resumed = new()
    with pytest.warns(UserWarning, match="samples of steps") as said:
        model, _ = fit(5, [resumed], tmp_path / "a.ckpt")
    text = " ".join(str(warning.message) for warning in said)
    assert "samples of steps [2, 3]" in text
    assert "set_aside_2" in text
    assert resumed._kept == [4, 5]
    assert resumed.predict(model, lambda: torch.zeros(1)).shape == (2, 1)
    assert len(PosteriorSamples.merge([tmp_path / "samples"])) == 2
    aside = {path.parent.name + path.name for path in (tmp_path / "samples").rglob("set_aside_*/*")}
    assert aside == {f"set_aside_{k}sample_{n}.pt" for k, n in ((1, 2), (1, 3), (1, 4), (2, 5), (2, 6))}


def test_a_checkpoint_of_a_run_with_other_storage_is_said(tmp_path):
    _, trainer = fit(3, [PosteriorSamples(every_n_steps=1, storage=str(tmp_path / "samples"))])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    samples = PosteriorSamples(every_n_steps=1)
    with pytest.warns(UserWarning, match=r"samples of steps \[1, 2, 3\]"):
        fit(4, [samples], tmp_path / "a.ckpt")
    assert len(list(samples.samples())) == 1


def test_no_sample_is_an_error():
    with pytest.raises(RuntimeError, match="no sample yet"):
        PosteriorSamples().predict(torch.nn.Linear(1, 1), lambda: torch.ones(1))


def test_iterate_averaging_starts_late_and_keeps_norms():
    class Recorder(pl.Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.weights.append(pl_module.layer.weight.detach().clone())

    recorder = Recorder()
    model, _ = fit(12, [recorder, IterateAveraging(average_start=8)])
    mean = torch.stack(recorder.weights[-4:]).mean(0)
    assert torch.allclose(model.layer.weight, mean / mean.norm() * recorder.weights[-1].norm(), atol=1e-6)


class Validated(Model):
    """Notes the weights that each validation is given."""

    fail = False

    def __init__(self):
        super().__init__()
        self.validated = []

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.validated.append(self.layer.weight.detach().clone())
        if self.fail:
            raise OSError("disk full")


class Iterates(pl.Callback):
    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append(pl_module.layer.weight.detach().clone())


def averaging_fit(model, averaging, ckpt=None, steps=8, iterates=None):
    iterates = iterates or Iterates()
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[BindDataSize(), averaging, iterates], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=2, val_check_interval=4,
    )  # fmt: skip
    trainer.fit(model, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return iterates.weights, trainer


def test_before_the_average_starts_the_model_is_its_own(tmp_path, caplog):
    model = Validated()
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="average_start=100 was not reached in 8 steps"):
        weights, trainer = averaging_fit(model, IterateAveraging(average_start=100))
    assert caplog.text.count("the average starts at step 100") == 1
    assert torch.equal(model.layer.weight, weights[-1])
    assert [torch.equal(w, weights[at]) for w, at in zip(model.validated, (3, 7), strict=True)] == [True, True]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["layer.weight"], weights[-1])
    # and from there a run goes on to the average of the steps that count
    resumed = Validated()
    after, _ = averaging_fit(
        resumed, IterateAveraging(average_start=10, renormalize=False), tmp_path / "a.ckpt", steps=12
    )
    assert len(after) == 4
    assert torch.allclose(resumed.layer.weight, torch.stack(after[-2:]).mean(0), atol=1e-6)


def test_a_second_fit_begins_a_new_average():
    averaging, model = IterateAveraging(renormalize=False), Validated()
    averaging_fit(model, averaging)
    weights, trainer = averaging_fit(model, averaging)
    assert torch.allclose(model.layer.weight, torch.stack(weights).mean(0), atol=1e-6)
    # the same Trainer: micro-batches before the first new step are no iterates
    trainer.fit_loop.epoch_loop.max_steps = 10
    trainer.accumulate_grad_batches = 2
    first = len(trainer.callbacks[2].weights)
    trainer.fit(model)
    steps = trainer.callbacks[2].weights[first:][1::2]
    assert len(steps) == 2
    assert torch.allclose(model.layer.weight, torch.stack(steps).mean(0), atol=1e-6)


def test_validation_outside_fit_sees_the_model_that_it_is_given(tmp_path):
    model = Validated()
    _, trainer = averaging_fit(model, IterateAveraging())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    final = model.layer.weight.detach().clone()
    trainer.validate(model, verbose=False)
    assert torch.equal(model.validated[-1], final)
    trainer.validate(model, ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]["layer.weight"]
    assert torch.equal(model.validated[-1], saved)


def test_a_failed_validation_gives_the_models_own_parameters_back():
    model, averaging = Validated(), IterateAveraging()
    model.fail = True
    iterates = Iterates()
    with pytest.raises(OSError, match="disk full"):
        averaging_fit(model, averaging, iterates=iterates)
    assert len(iterates.weights) == 4
    assert not torch.equal(model.validated[-1], iterates.weights[-1])
    assert torch.equal(model.layer.weight, iterates.weights[-1])


def test_rhat_and_effective_size():
    torch.manual_seed(0)
    independent = torch.randn(4, 1000)
    assert split_rhat(independent) < 1.01
    assert effective_sample_size(independent) == pytest.approx(4000, rel=0.15)
    assert split_rhat(independent + torch.arange(4)[:, None]) > 1.5
    # AR(1) with coefficient 0.9: (1 - 0.9) / (1 + 0.9) of the draws count
    chain = torch.zeros(4, 20000)
    noise = torch.randn(4, 20000)
    for t in range(1, 20000):
        chain[:, t] = 0.9 * chain[:, t - 1] + noise[:, t]
    assert effective_sample_size(chain) == pytest.approx(80000 / 19, rel=0.15)


@pytest.mark.slow
def test_average_of_spherical_langevin_finds_the_planted_direction():
    # order-3 tensor PCA, d=30: the last iterate is noise, the mean of the iterates is not
    d, strength, steps = 30, 40.0, 4000
    last, mean = [], []
    for seed in range(6):
        torch.manual_seed(seed)
        v = torch.nn.functional.normalize(torch.randn(d), dim=0)
        observed = strength * torch.einsum("i,j,k->ijk", v, v, v) + torch.randn(d, d, d)
        # the gradient of sum_ijk T_ijk x_i x_j x_k, as one product
        turned = (observed + observed.permute(1, 0, 2) + observed.permute(2, 0, 1)).reshape(d, d * d)
        x = torch.nn.functional.normalize(torch.randn(d), dim=0).requires_grad_()
        optimizer = SGLD([x], lr=1 / d, n_data=1, seed=seed, sphere=True)
        total = torch.zeros(d)
        with torch.no_grad():
            for _ in range(steps):
                x.grad = -0.3 * (turned @ torch.outer(x, x).flatten())
                optimizer.step()
                total += x
        last.append(abs(float(x.detach() @ v)))
        mean.append(abs(float(torch.nn.functional.normalize(total, dim=0) @ v)))
    assert sum(mean) > 2 * sum(last)
