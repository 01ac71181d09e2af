"""SharedSeedSPSAStrategy under a Trainer: replicas, checkpoints, hooks, refusals (oracles 6, 7, 13, 14)."""

import math
import warnings
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import Precision, TorchCheckpointIO
from lightning.pytorch.strategies import StrategyRegistry

import lightning_grad
from lightning_grad import SharedSeedSPSAStrategy
from lightning_grad.cli import main
from lightning_grad.spsa import JournalError, NoFiniteLossError, ReplicaMismatchError, digest64, replay
from lightning_grad.strategies import SPSAConfigError
from tests.spsa_helpers import batches, make_session, run_alone
from tests.spsa_lightning import Toy, digests, fit, trainer


def test_the_name_is_registered_once():
    assert "spsa" in StrategyRegistry
    assert isinstance(trainer("spsa").strategy, SharedSeedSPSAStrategy)
    assert isinstance(trainer("SharedSeedSPSAStrategy").strategy, SharedSeedSPSAStrategy)
    import importlib

    importlib.reload(lightning_grad.strategies)


def test_trainer_run_equals_the_session_without_lightning(tmp_path):
    model = Toy()
    journal = fit(tmp_path / "j", model=model)
    session = make_session(Toy(), slots=4, seed=3)
    session.module.net.requires_grad_(True)
    want = run_alone_on_toy(session)
    assert digests(journal) == want
    assert all(p.grad is None for p in model.parameters())
    assert {grad for grad, _, _ in model.seen} == {False}
    assert {training for _, _, training in model.seen} == {False}
    assert model.training


def run_alone_on_toy(session):
    inner = session.module
    data = batches(32)
    found = []
    for step in range(8):
        for batch in data[4 * step : 4 * step + 4]:
            session.measure(0, lambda b=batch: torch.nn.functional.mse_loss(inner.net(b[0]), b[1]))
        session.commit(session.record(session.payload(), inner.lr, (0,)), found.append)
    return found


@pytest.mark.parametrize("workers", [2, 4])
def test_n_workers_are_one_worker_with_n_directions_and_stay_equal(tmp_path, workers):
    """Every step compares the replicas (check_interval 1): a difference would raise in all of them."""
    alone = fit(tmp_path / "one", model=Toy(steps=50))
    group = fit(tmp_path / "many", workers=workers, model=Toy(steps=50))
    assert len(group) == 50
    assert digests(group) == digests(alone)
    assert next(iter(group)).roster == tuple(range(workers))


def test_three_replicas_with_unequal_threads_and_momentum(tmp_path):
    class Uneven(Toy):
        def on_train_start(self):
            torch.set_num_threads(1 + self.trainer.global_rank)

    journal = fit(
        tmp_path / "j", workers=3, micro=3, model=Uneven(steps=50, micro=3), momentum=0.5, normalize=True, codec="sign"
    )
    assert len(digests(journal)) == 50


def test_a_replica_that_differs_is_named(tmp_path, monkeypatch):
    from lightning_grad.spsa.exchange import Exchange

    real = Exchange.all_gather

    def other(self, payload):
        parts = real(self, payload)
        return [*parts, b"\0" * 8] if len(payload) == 8 and payload != len(payload).to_bytes(8, "little") else parts

    monkeypatch.setattr(Exchange, "all_gather_any", lambda self, payload: [payload])
    monkeypatch.setattr(Exchange, "all_gather", other)
    with pytest.raises(
        ReplicaMismatchError, match=r"the replicas differ after step 0 \(rank 0: .*rank 1: 0000000000000000"
    ):
        fit(tmp_path / "j")


def test_ranks_with_other_settings_are_refused(tmp_path, monkeypatch):
    from lightning_grad.spsa.exchange import Exchange

    monkeypatch.setattr(
        Exchange, "all_gather_any", lambda self, payload: [payload, payload.replace(b'"seed":3', b'"seed":4')]
    )
    with pytest.raises(SPSAConfigError, match=r"rank 1 differs from rank 0: .*seed: 3 != 4"):
        fit(tmp_path / "j")


def test_scheduler_moves_the_learning_rate_in_the_journal(tmp_path):
    journal = fit(tmp_path / "j", model=Toy(scheduler=True))
    rates = [record.lr for record in journal]
    assert rates[:4] == pytest.approx([2.0**-6 * f for f in (1.0, 0.775, 0.55, 0.325)])
    assert rates[5:] == [None, None, None]


class Plateau(Toy):
    """The scheduler halves the rate when rank 0's value does not fall; rank 1's own value falls."""

    def __init__(self, sync):
        super().__init__(steps=4, micro=2)
        self.sync = sync

    def validation_step(self, batch, batch_idx):
        self.log("watched", -float(self.trainer.global_rank * self.trainer.global_step * (not self.sync)))

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "watched"}}


@pytest.mark.parametrize("sync", [True, False])
def test_a_scheduler_that_watches_a_value_must_see_the_same_on_all_ranks(tmp_path, monkeypatch, sync):
    def say(text):  # warnings of forked ranks do not reach this process
        (tmp_path / "said").write_text(text)

    monkeypatch.setattr("lightning_grad.strategies.shared_seed_spsa.rank_zero_warn", say)
    settings = {"max_epochs": 4, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    run = {"workers": 2, "micro": 2, "model": Plateau(sync), "trainer_settings": settings}
    if sync:
        journal = fit(tmp_path / "j", **run)
        assert [record.lr for record in journal if record.lr] == [2.0**-6, 2.0**-7, 2.0**-8]
        assert len(digests(journal)) == 16
    else:
        text = r"Their learning rates differ \(rank 0: 0.0078125, rank 1: 0.015625\): .* log it with sync_dist=True"
        with pytest.raises(Exception, match=text):
            fit(tmp_path / "j", **run)
    assert "ReduceLROnPlateau needs a monitored value that is equal on all ranks" in (tmp_path / "said").read_text()


def test_lr_argument_needs_no_configure_optimizers(tmp_path):
    model = Toy()
    model.configure_optimizers = lambda: 1 / 0
    journal = fit(tmp_path / "j", model=model, lr=2.0**-6)
    assert digests(journal) == digests(fit(tmp_path / "k"))


def test_patterns_choose_and_freeze(tmp_path):
    model = Toy()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    journal = fit(tmp_path / "j", model=model, trainable=["*.bias"])
    assert [name for name, _, _ in journal.header.params] == ["net.0.bias", "net.2.bias"]
    for name, p in model.named_parameters():
        assert p.requires_grad == name.endswith("bias")
        assert torch.equal(p, before[name]) != name.endswith("bias")


def test_replay_of_the_file_gives_the_trained_weights(tmp_path):
    model = Toy()
    journal = fit(tmp_path / "j", model=model)
    base = Toy()
    replay(base.named_parameters(), journal)
    assert digest64(base.parameters()) == digest64(model.parameters()) == digests(journal)[-1]


@pytest.mark.parametrize(
    "settings", [{"precision": "64-true"}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}], ids=str
)
@pytest.mark.parametrize("restore", ["exact", "copy"])
def test_precisions_train_and_replay(tmp_path, settings, restore):
    class Cast(Toy):
        def training_step(self, batch, batch_idx):
            dtype = torch.float32 if "mixed" in settings["precision"] else self.net[0].weight.dtype
            return super().training_step([b.to(dtype) for b in batch], batch_idx).float()

    model = Cast()
    journal = fit(tmp_path / "j", model=model, restore=restore, trainer_settings=settings)
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(settings["precision"], torch.float32)
    assert journal.header.params[0][2] == str(dtype).removeprefix("torch.")
    base = Cast().to(dtype)
    assert replay(base.named_parameters(), journal, restore=restore).digest64() == digests(journal)[-1]
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.parameters(), strict=True))


class Saver(pl.Callback):
    """Keep every checkpoint of a run, and what the weights were."""

    def __init__(self, folder):
        self.folder, self.weights = folder, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"{batch_idx}.ckpt")
        self.weights[batch_idx] = digest64(pl_module.parameters())


def test_checkpoint_in_the_middle_of_a_window_holds_the_exact_point(tmp_path):
    model, saver = Toy(steps=2), Saver(tmp_path)
    fit(tmp_path / "j", model=model, trainer_settings={"callbacks": [saver]})
    assert len(set(saver.weights.values())) == 3  # base, after step 0, after step 1: saving took the perturbation back
    state = torch.load(tmp_path / "5.ckpt", weights_only=True)
    assert (
        digest64(state["state_dict"].values()) == saver.weights[5] == state["optimizer_states"][0]["spsa"]["digest64"]
    )


def test_validation_in_the_middle_of_a_window_sees_the_exact_point(tmp_path):
    seen = []

    class Look(Toy):
        def on_validation_batch_start(self, *_):
            seen.append(digest64(self.parameters()))

    plain = digests(fit(tmp_path / "k", model=Toy(steps=2)))
    found = digests(fit(tmp_path / "j", model=Look(steps=2), trainer_settings={
        "val_check_interval": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}))  # fmt: skip
    assert found == plain  # looking changes nothing
    assert seen == [seen[0], plain[0], plain[0], plain[1]]


def test_checkpoint_without_weights_is_small_and_loads_by_replay(tmp_path):
    """Oracle 13: a thousand steps below 64 kB."""
    options = {"weights_in_checkpoint": False, "check_interval": 100}
    model = Toy(steps=1000, micro=1)
    saver = ModelCheckpoint(tmp_path / "c", save_last=True, save_top_k=0)
    fit(
        tmp_path / "j",
        micro=1,
        model=model,
        trainer_settings={"callbacks": [saver], "enable_checkpointing": True},
        **options,
    )
    path = tmp_path / "c" / "last.ckpt"
    assert path.stat().st_size < 64_000
    assert torch.load(path, weights_only=True)["state_dict"] == {}
    again = Toy(steps=1000, micro=1)
    runner = trainer(SharedSeedSPSAStrategy(weights_in_checkpoint=False), limit_val_batches=1)
    runner.validate(again, ckpt_path=path, weights_only=True)
    assert digest64(again.parameters()) == digest64(model.parameters())
    other = Toy(steps=1000, micro=1)
    other.net[0].weight.data.add_(1.0)
    runner = trainer(SharedSeedSPSAStrategy(weights_in_checkpoint=False))
    with pytest.raises(JournalError, match="starts from other weights"):
        runner.validate(other, ckpt_path=path, weights_only=True)


def test_resume_refuses_other_settings(tmp_path):
    fit(tmp_path / "j", model=Toy(steps=2), trainer_settings={"callbacks": [Saver(tmp_path)]})
    with pytest.raises(SPSAConfigError, match=r"differ from those of the run to be continued: seed: 4 != 3"):
        fit(tmp_path / "k", model=Toy(), seed=4, ckpt_path=tmp_path / "3.ckpt")


def test_a_damaged_weight_in_a_checkpoint_is_found(tmp_path):
    fit(tmp_path / "j", model=Toy(steps=2), trainer_settings={"callbacks": [Saver(tmp_path)]})
    state = torch.load(tmp_path / "3.ckpt", weights_only=True)
    state["state_dict"]["net.0.weight"].view(torch.int32)[0, 0] ^= 1
    torch.save(state, tmp_path / "bad.ckpt")
    with pytest.raises(ReplicaMismatchError, match="its weights give"):
        fit(tmp_path / "k", model=Toy(), ckpt_path=tmp_path / "bad.ckpt")


def test_the_checkpoint_of_a_run_that_ended_in_an_overflow_can_be_resumed(tmp_path):
    class Soars(Toy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (1e30 if batch_idx == 12 else 1.0)

    saved = {"callbacks": [OnExceptionCheckpoint(tmp_path, "end")], "enable_checkpointing": True}
    with pytest.raises(OverflowError, match=r"update overflow at step 3: .* Lower the learning rate"):
        fit(tmp_path / "j", model=Soars(), codec="f32", trainer_settings=saved)
    model, twice = Toy(), {"max_epochs": 2}
    journal = fit(tmp_path / "k", model=model, codec="f32", ckpt_path=tmp_path / "end.ckpt", trainer_settings=twice)
    assert len(journal) > 8
    assert replay(Toy().named_parameters(), journal).digest64() == digest64(model.parameters())


def test_weights_of_another_kind_of_run_are_a_new_base(tmp_path):
    model = Toy()
    runner = trainer("auto", max_steps=2)
    runner.fit(model)
    runner.save_checkpoint(tmp_path / "sgd.ckpt")
    with pytest.warns(UserWarning, match="not of an SPSA run"):
        journal = fit(tmp_path / "j", model=Toy(), ckpt_path=tmp_path / "sgd.ckpt", trainer_settings={"max_epochs": 3})
    assert journal.header.base == lightning_grad.spsa.fingerprint(model.parameters())


def test_journal_file_is_never_overwritten_and_can_be_continued(tmp_path):
    first = fit(tmp_path / "j")
    with pytest.raises(SPSAConfigError, match=r"exists\. Set `resume_journal`"):
        fit(tmp_path / "j")
    model = Toy()
    second = fit(tmp_path / "j", model=model, resume_journal=True)
    assert list(second)[:8] == list(first)
    assert len(second) == 16
    base = Toy()
    assert replay(base.named_parameters(), second).digest64() == digest64(model.parameters())


def test_a_second_fit_continues_no_journal_because_the_first_one_resumed(tmp_path):
    fit(tmp_path / "a", model=Toy(steps=2), trainer_settings={"callbacks": [Saver(tmp_path)]})
    mine = SharedSeedSPSAStrategy(journal_path=str(tmp_path / "j"), check_interval=1, seed=3)
    runner = trainer(mine, accumulate_grad_batches=4, max_epochs=2)
    runner.fit(Toy(steps=2), ckpt_path=tmp_path / "3.ckpt")
    assert (tmp_path / "j").exists()
    runner.fit_loop.max_epochs += 1
    with pytest.raises(SPSAConfigError, match=r"exists\. Set `resume_journal`"):
        runner.fit(Toy(steps=2))


def test_wire_and_log(tmp_path):
    logged = []

    class Log(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            logged.append(dict(trainer.logged_metrics))

    fit(tmp_path / "j", directions=3, trainer_settings={"callbacks": [Log()], "log_every_n_steps": 1})
    row = {k.removeprefix("spsa/"): float(v) for k, v in logged[-1].items() if k.startswith("spsa/")}
    assert row["bytes_sent"] == row["directions"] == 12  # K = 4 micro-batches x 3 directions
    assert row["bytes_received"] == 12
    assert row["workers"] == 1
    assert row["step"] == 7
    assert row["abstained"] == row["saturated"] == 0
    assert math.isclose(row["lr"], 2.0**-6)
    names = (
        "loss loss_spread grad_rms grad_last scale_log2 lr step_rms directions abstained saturated workers bytes_sent"
    )
    assert set(f"{names} bytes_received wait_s journal_bytes step".split()) == set(row)


def test_exception_in_a_trainer_leaves_the_exact_point(tmp_path):
    class Fails(Toy):
        def training_step(self, batch, batch_idx):
            if batch_idx == 6 and len(self.seen) % 2 == 1:
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    model = Fails()
    with pytest.raises(RuntimeError, match="boom"):
        fit(tmp_path / "j", model=model)
    journal = lightning_grad.spsa.Journal.load(tmp_path / "j")
    assert len(journal) == 1
    assert digest64(model.parameters()) == digests(journal)[-1]


def test_none_from_training_step_abstains_alone(tmp_path):
    class Skips(Toy):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        journal = fit(tmp_path / "j", model=Skips())
    assert [record.codes[1] == 0x7F for record in journal] == [True] + [False] * 7


def refused(text, tmp_path, model=None, error=SPSAConfigError, **options):
    with pytest.raises(error, match=text):
        fit(tmp_path / "j", model=model, **options)


def with_optimizer(make):
    model = Toy()
    model.configure_optimizers = lambda: make(model)
    return model


def two_groups(model, second):
    p = list(model.parameters())
    return torch.optim.SGD([{"params": p[:1]}, {"params": p[1:], **second}], lr=0.5)


def test_refusals(tmp_path):
    """Section 11 of the specification: what is said, and that Lightning knows the error."""
    assert issubclass(SPSAConfigError, MisconfigurationException)
    manual = Toy()
    manual.automatic_optimization = False
    refused("SPSA needs automatic optimization; set self.automatic_optimization = True", tmp_path, manual,
            error=MisconfigurationException, trainer_settings={"accumulate_grad_batches": 1})  # fmt: skip
    many = with_optimizer(lambda m: [torch.optim.SGD(m.parameters(), lr=1.0)] * 2)
    refused("multiple optimizers", tmp_path, many, error=RuntimeError)  # Lightning's own words come first
    refused(
        "`gradient_clip_val` has no effect without gradients", tmp_path, trainer_settings={"gradient_clip_val": 1.0}
    )
    refused("group 0: 0.5, group 1: 0.1", tmp_path, with_optimizer(lambda m: two_groups(m, {"lr": 0.1})))
    refused(
        "weight decay is not supported by SPSA", tmp_path, with_optimizer(lambda m: torch.optim.AdamW(m.parameters()))
    )
    refused("K must stay constant", tmp_path, trainer_settings={
        "callbacks": [GradientAccumulationScheduler({0: 2})], "accumulate_grad_batches": 1})  # fmt: skip
    refused("`lr` of SGD must be a number >= 0, got nan", tmp_path,
            with_optimizer(lambda m: torch.optim.SGD(m.parameters(), lr=math.nan)))  # fmt: skip
    refused(r"no parameter matches '\*nope'. The first names are: net.0.weight", tmp_path, trainable=["*nope"])
    frozen = Toy()
    frozen.requires_grad_(False)
    refused("no trainable parameter", tmp_path, frozen)

    class Backward(Toy):
        def backward(self, loss):
            pass

    refused("Backward.backward is never called under SPSA; remove the override", tmp_path, Backward())

    class Wide(Toy):
        def training_step(self, batch, batch_idx):
            return torch.zeros(3)

    refused(r"training_step must return one scalar loss, got shape \(3,\)", tmp_path, Wide())
    large = Toy()
    large.net[0].weight.data[0, 0] = 1.2e4
    refused("parameter net.0.weight holds 1.2e", tmp_path, large)


def test_a_parameter_that_grows_too_large_is_an_error_lightning_knows(tmp_path):
    refused(r"parameter net\.\S+ holds .* too large for eps", tmp_path, lr=1e6)


def test_what_is_said_without_refusing(tmp_path, caplog):
    class Clips(Toy):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            pass

    with pytest.warns(UserWarning, match="configure_gradient_clipping finds no gradients under SPSA"):
        fit(tmp_path / "a", model=Clips(steps=1))
    with pytest.warns(UserWarning, match=r"lr 0\.5 is large .* the typical range is 1e-7\.\.1e-4"):
        fit(tmp_path / "b", model=Toy(steps=1), lr=0.5)
    with caplog.at_level("INFO"):
        fit(tmp_path / "c", model=Toy(steps=1), eps=1e-3)
    assert "`eps` 0.001 is rounded to the power of two 0.000976562 (2**-10)" in caplog.text


def test_equal_groups_and_other_optimizers_are_accepted(tmp_path):
    want = digests(fit(tmp_path / "a"))
    grouped = with_optimizer(lambda m: torch.optim.Adam([{"params": [p]} for p in m.parameters()], lr=2.0**-6))
    assert digests(fit(tmp_path / "b", model=grouped)) == want


def test_an_optimizer_without_a_rate_and_one_with_more_than_a_rate(tmp_path, caplog):
    class Rateless(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            return closure()

    refused("Rateless has no learning rate; set `lr` of the strategy", tmp_path,
            with_optimizer(lambda m: Rateless(m.parameters())))  # fmt: skip
    with caplog.at_level("INFO"):
        fit(tmp_path / "k", model=with_optimizer(lambda m: torch.optim.Adam(m.parameters(), lr=2.0**-6)))
        assert "SPSA: only the learning rate of Adam is used" in caplog.text
        fit(tmp_path / "l", lr=2.0**-6, model=with_optimizer(lambda m: torch.optim.Adam(m.parameters(), lr=1.0)))
    assert "SPSA: `lr` (0.015625) is the strategy's; configure_optimizers is not called" in caplog.text


def test_what_belongs_to_ddp_reaches_it():
    checkpoint_io, precision = TorchCheckpointIO(), Precision()
    environment, devices = LightningEnvironment(), [torch.device("cpu")] * 2
    strategy = SharedSeedSPSAStrategy(
        accelerator=CPUAccelerator(), parallel_devices=devices, cluster_environment=environment,
        checkpoint_io=checkpoint_io, precision_plugin=precision, process_group_backend="gloo",
        timeout=timedelta(seconds=77), start_method="spawn",
    )  # fmt: skip
    assert isinstance(strategy.accelerator, CPUAccelerator)
    assert strategy.parallel_devices == devices
    assert strategy.cluster_environment is environment
    assert strategy.checkpoint_io is checkpoint_io
    assert strategy.precision_plugin is precision
    assert strategy.process_group_backend == "gloo"
    assert (strategy._timeout, strategy._start_method) == (timedelta(seconds=77), "spawn")


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "lr": (0.0, -1.0, math.nan, math.inf), "eps": (0.0, -1e-3, 1.0, math.nan), "directions": (0, 4097, 1.5),
        "sides": (0, 3), "seed": (-1, 2**64), "codec": ("int8",), "reduction": ("median",), "rho": (-0.1, 1.0),
        "clip": (0.0, -1.0), "momentum": (1.0, -0.5), "momentum_horizon": (0, 1025), "trainable": ("*.bias", []),
        "forward_mode": ("test",), "restore": ("no",), "check_interval": (-1,), "max_bad_steps": (0,), "kernel": ("c",),
    }.items(),
)  # fmt: skip
def test_arguments_out_of_range_name_themselves(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` must"):
            SharedSeedSPSAStrategy(**{name: value})


def test_a_journal_to_continue_must_be_named():
    with pytest.raises(ValueError, match="`resume_journal` needs `journal_path`"):
        SharedSeedSPSAStrategy(resume_journal=True)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes a config file of a run with this model, and gives its path."""

    def write(model):
        path = tmp_path / "c.yaml"
        path.write_text(f"""
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 9
  logger: false
  enable_progress_bar: false
  enable_checkpointing: false
  default_root_dir: {tmp_path}
  strategy:
    class_path: lightning_grad.SharedSeedSPSAStrategy
    init_args: {{lr: 1.0e-2, seed: 7, trainable: ["*.bias"], max_bad_steps: 2, journal_path: {tmp_path}/run.spsa}}
model: {model}
""")
        return str(path)

    monkeypatch.chdir(tmp_path)
    return write


def test_yaml_with_the_class_path_trains(config, tmp_path):
    assert main(["fit", "-c", config("{class_path: tests.spsa_lightning.Toy}"), "--trainer.max_steps=3"]) == 0
    assert len(lightning_grad.spsa.Journal.load(tmp_path / "run.spsa")) == 3


def test_a_run_that_diverges_ends_with_one_line_and_status_1(config, capsys, monkeypatch):
    path = config("{class_path: tests.spsa_lightning.Diverges, init_args: {batch: 4}}")
    with pytest.warns(UserWarning, match="not finite at step 4"), pytest.raises(SystemExit) as end:
        main(["fit", "-c", path])
    assert end.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(
        "lightning-grad: error: SPSA: no finite loss from any worker for 2 steps (up to step 5); here it"
    )
    assert "at step 4 along direction 0" in line
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    Path("run.spsa").unlink()
    with pytest.warns(UserWarning, match="not finite at step 4"), pytest.raises(NoFiniteLossError):
        main(["fit", "-c", path])


def test_helper_digests_differ_between_seeds():
    assert run_alone(make_session(seed=1), batches(4)) != run_alone(make_session(seed=2), batches(4))
