"""NVFP4Precision in a Trainer: conversion, checkpoints, resume, accumulation, switch, monitor."""

from __future__ import annotations

import copy
import csv
import sys
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from lightning_grad import NVFP4FSDPPrecision, NVFP4Monitor, NVFP4Precision, NVFP4PrecisionSwitch, ResumableDataLoader
from lightning_grad.demos import TinyGPT
from lightning_grad.nvfp4 import NVFP4Linear
from lightning_grad.nvfp4.conversion import select
from lightning_grad.nvfp4.probe import Recorder, tensor_statistics
from lightning_grad.nvfp4.recipe import Draw, NVFP4Recipe

TOKENS = torch.randint(0, 256, (40, 17), generator=torch.Generator().manual_seed(3))


def loader(batch_size=4):
    return ResumableDataLoader([(row[:-1], row[1:]) for row in TOKENS], batch_size=batch_size, shuffle=False)


def gpt(**kwargs):
    torch.manual_seed(11)
    return TinyGPT(num_layers=4, dim=32, num_heads=2, block_size=16, **kwargs)


def trainer(steps=5, plugin=None, callbacks=(), **kwargs):
    settings = {
        "max_steps": steps, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
    }  # fmt: skip
    plugins = [] if plugin is None else [plugin]
    return pl.Trainer(**(settings | kwargs), plugins=plugins, callbacks=list(callbacks))


def fit(model, steps=5, plugin=None, ckpt_path=None, batch_size=4, **kwargs):
    run = trainer(steps, plugin, **kwargs)
    run.fit(model, loader(batch_size), ckpt_path=ckpt_path)
    return run


class Spy(pl.Callback):
    """Keeps what exists only during a fit."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.types = {name: type(m).__name__ for name, m in pl_module.named_modules() if isinstance(m, nn.Linear)}
        self.mode = trainer.precision_plugin.mode
        self.losses = [*getattr(self, "losses", []), float(outputs["loss"])]
        self.modes = [*getattr(self, "modes", []), self.mode]


def test_conversion_and_teardown():
    plugin, spy, model = NVFP4Precision(), Spy(), gpt()
    parameters = list(model.parameters())
    fit(model, plugin=plugin, callbacks=[spy])
    assert plugin.backend == "torch"
    assert {n for n, t in spy.types.items() if t == "NVFP4Linear"} == {
        n for n, r in plugin.report.items() if r == "nvfp4"
    }
    assert sum(r == "nvfp4" for r in plugin.report.values()) == 12  # three of four blocks
    assert plugin.report["lm_head"] == "excluded by '*lm_head'"
    assert "kept in high precision" in plugin.report["blocks.3.mlp.up"]
    assert all(type(m) is not NVFP4Linear for m in model.modules())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_checkpoints_are_those_of_the_plain_model(tmp_path):
    saved = {}
    for name, plugin in (("nvfp4", NVFP4Precision(seed=5)), ("plain", None)):
        run = fit(gpt(), plugin=plugin, enable_checkpointing=False)
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
        saved[name] = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
    shapes = [{k: (v.shape, v.dtype) for k, v in s["state_dict"].items()} for s in saved.values()]
    assert shapes[0] == shapes[1]
    state = saved["nvfp4"]["NVFP4Precision"]
    assert state == {"version": 1, "seed": 5, "step": 5, "mode": "nvfp4", "backend": "torch"}
    gpt().load_state_dict(saved["nvfp4"]["state_dict"], strict=True)
    assert fit(gpt(), steps=7, ckpt_path=tmp_path / "nvfp4.ckpt").global_step == 7
    plugin = NVFP4Precision()
    assert fit(gpt(), steps=7, plugin=plugin, ckpt_path=tmp_path / "plain.ckpt").global_step == 7
    assert plugin.state_dict()["step"] == 2


def test_resume_is_bit_exact(tmp_path):
    whole, half, rest = gpt(), gpt(), gpt()
    fit(whole, 10, NVFP4Precision(seed=1))
    fit(
        half,
        5,
        NVFP4Precision(seed=1),
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(tmp_path, "half", every_n_train_steps=5)],
    )
    # another seed in the constructor: the checkpoint's wins
    fit(rest, 10, NVFP4Precision(seed=2), ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))
    other = gpt()
    fit(other, 10, NVFP4Precision(seed=2))
    assert not torch.equal(whole.blocks[0].mlp.up.weight, other.blocks[0].mlp.up.weight)


def test_global_seed_is_the_default():
    pl.seed_everything(77, verbose=False)
    plugin = NVFP4Precision()
    fit(gpt(), 1, plugin)
    assert plugin.state_dict()["seed"] == 77


def test_accumulated_gradient_is_the_sum_of_micro_batches():
    class Keep(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            self.grads = [*getattr(self, "grads", []), pl_module.blocks[0].mlp.up.weight.grad.clone()]

    keep, model = Keep(), gpt()
    fit(model, 1, NVFP4Precision(seed=0), callbacks=[keep], accumulate_grad_batches=4)
    start = gpt()
    plugin = NVFP4Precision(seed=0)
    plugin.convert_module(start)
    total = torch.zeros_like(keep.grads[-1])
    for inputs, targets in list(loader())[:4]:
        start.zero_grad()
        loss = nn.functional.cross_entropy(start(inputs).transpose(1, 2), targets) / 4
        loss.backward()
        plugin.session.step += 1
        total += start.blocks[0].mlp.up.weight.grad
    assert torch.equal(total, keep.grads[-1])


def test_tied_weights_stay_tied_and_high():
    plugin, model = NVFP4Precision(exclude=[]), gpt(tie_weights=True)
    fit(model, plugin=plugin)
    assert model.lm_head.weight is model.embedding.weight
    assert "shared" in plugin.report["lm_head"]


class Stack(nn.Module):
    def __init__(self, blocks=12, dim=32):
        super().__init__()
        self.inp = nn.Linear(dim, dim)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)) for _ in range(blocks)
        )
        self.head = nn.Linear(dim, 20)


@pytest.mark.parametrize(("blocks", "kept"), [(62, 10), (32, 5), (12, 2), (4, 1), (20, 3)])
def test_default_share_of_blocks(blocks, kept):
    found = select(Stack(blocks))
    assert found.kept == [f"layers.{i}" for i in range(blocks - kept, blocks)]
    assert len(found.layers) == 2 * (blocks - kept)


def test_selection_rules():
    model = Stack()
    assert select(model).report["inp"].startswith("outside the blocks")
    assert "inp" in select(model, include=["inp", "layers.*"]).layers
    assert "20 is not a multiple of 16" in select(model, exclude=[]).report["head"]
    found = select(model, include=["layers.0.*"], keep_last=0, exclude=[])
    assert list(found.layers) == ["layers.0.0", "layers.0.2"]
    assert select(model, include=["layers.*", "nothing"]).unmatched == ["nothing"]
    assert select(model, keep_first=2, keep_last=4).kept == [f"layers.{i}" for i in (0, 1, 8, 9, 10, 11)]
    assert select(model, blocks="layers", keep_last=1).kept == ["layers.11"]
    assert list(select(model, keep_last=0, multiple=64).layers) == []
    attention = nn.MultiheadAttention(32, 2)
    assert "NonDynamicallyQuantizableLinear" in select(attention).report["out_proj"]
    flat = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    assert len(select(flat, keep_last=0).layers) == 2
    with pytest.raises(ValueError, match="6 \\+ 6 of 12 blocks"):
        select(model, keep_first=6, keep_last=6)
    with pytest.raises(ValueError, match="`blocks` 'nope'"):
        select(model, blocks="nope")


def test_encoder_and_decoder_are_one_row_of_blocks():
    model = nn.ModuleDict({"encoder": Stack(4).layers, "decoder": Stack(4).layers})
    assert select(model, keep_last=2).kept == ["decoder.2", "decoder.3"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"backend": "cuda"}, "`backend`"),
        ({"keep_last": -1}, "`keep_last`"),
        ({"keep_first": 1.0}, "`keep_first`"),
        ({"keep_last": True}, "`keep_last`"),
        ({"include": ["a", ""]}, "`include`"),
        ({"exclude": "head"}, "`exclude`"),
        ({"hadamard_signs": [1] * 15}, "`hadamard_signs`"),
        ({"sr_scale": "down"}, "`sr_scale`"),
        ({"eval_precision": "bf16"}, "`eval_precision`"),
        ({"autocast": "fp16"}, "`autocast`"),
        ({"seed": -1}, "`seed`"),
    ],
)
@pytest.mark.parametrize("cls", [NVFP4Precision, NVFP4FSDPPrecision])
def test_arguments_are_checked_at_construction(cls, arguments, text):
    with pytest.raises(ValueError, match=text):
        cls(**arguments)


def test_backends_that_cannot_run_are_errors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend, needs in (("transformer_engine", "compute capability 10.x"), ("triton", "TRITON_INTERPRET=1")):
        with pytest.raises(RuntimeError, match=f"backend='{backend}'.*cannot run: .*{needs}.*backend='auto'"):
            fit(gpt(), plugin=NVFP4Precision(backend=backend))


def test_what_is_said(caplog):
    model = gpt()
    model.odd = nn.Linear(10, 10)
    with warnings.catch_warnings(record=True) as seen, caplog.at_level("INFO"):
        warnings.simplefilter("always")
        fit(model, plugin=NVFP4Precision(include=["blocks.*", "missing"]))
    text = caplog.text
    assert "NVFP4: backend 'torch' (CPU device; transformer_engine not used: " in text
    assert "same numerics, no speed-up" in text
    assert "Converted 12 of 18 Linear layers" in text
    assert "blocks.3" in text
    messages = [str(w.message) for w in seen]
    assert any("'missing' matches no Linear layer" in m for m in messages)
    assert any("`out_features` is not a multiple of 16: odd." in m for m in messages)


def test_nothing_to_convert():
    with pytest.raises(ValueError, match=r"converted no layer \(17 Linear layers found; first reasons: blocks.0"):
        fit(gpt(), plugin=NVFP4Precision(include=["nothing"]))


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "SingleDeviceXLAStrategy"])
def test_strategies_that_shard_by_other_means_are_refused(name):
    run = trainer(plugin=NVFP4Precision(), strategy=type(name, (SingleDeviceStrategy,), {})("cpu"))
    with pytest.raises(NotImplementedError, match=name):
        run.fit(gpt(), loader())


def test_weights_of_a_tensor_parallel_group_are_refused():
    class Mesh:
        ndim, mesh_dim_names = 2, ("data_parallel", "tensor_parallel")

    model = nn.Sequential(nn.Linear(16, 16))
    weight = model[0].weight
    weight.device_mesh, weight.placements = Mesh(), [Shard(0), Replicate()]
    assert list(select(model, keep_last=0).layers) == ["0"], "data-parallel shards are gathered before the layer runs"
    weight.placements = [Replicate(), Shard(1)]
    with pytest.raises(NotImplementedError, match="0: its weight is sharded over the mesh dimension 'tensor_parallel'"):
        select(model, keep_last=0)
    model.append(nn.Linear(16, 16))
    assert list(select(model, keep_last=0, exclude=["0"]).layers) == ["1"], "the advice of the error"
    assert list(select(model, keep_first=1, keep_last=0).layers) == ["1"]


def test_fit_test_fit_with_one_trainer():
    plugin, model = NVFP4Precision(), gpt()
    run = fit(model, plugin=plugin, steps=3)
    run.validate(model, loader(), verbose=False)
    run.fit_loop.epoch_loop.max_steps = 6
    run.fit(model, loader())
    assert plugin.state_dict()["step"] == 6


def test_eval_precision_high_is_the_plain_model():
    model = gpt()
    high, low = (
        trainer(plugin=NVFP4Precision(eval_precision=p), limit_val_batches=2).validate(model, loader(), verbose=False)
        for p in ("high", "nvfp4")
    )
    plain = trainer(limit_val_batches=2).validate(model, loader(), verbose=False)
    assert high == plain
    assert low != plain


def test_autocast():
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.dtype = pl_module.seen

    for autocast, dtype in (("auto", torch.float32), ("bf16", torch.bfloat16)):
        model = gpt()
        model.blocks[0].mlp.up.register_forward_hook(lambda m, i, out, model=model: setattr(model, "seen", out.dtype))
        look = Look()
        fit(model, 1, NVFP4Precision(autocast=autocast), callbacks=[look])
        assert look.dtype == dtype
        assert model.blocks[0].mlp.up.weight.dtype == torch.float32


def test_global_random_state_is_untouched_by_training():
    states = []
    for plugin in (None, NVFP4Precision()):
        model = gpt()
        torch.manual_seed(0)
        fit(model, plugin=plugin)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("at", [3, 0.5])
def test_switch_at_a_step_or_a_fraction(at, tmp_path):
    spy, model, rest = Spy(), gpt(), gpt()
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    fit(model, 6, NVFP4Precision(seed=0), callbacks=[NVFP4PrecisionSwitch(at), spy, saver], enable_checkpointing=True)
    assert spy.modes == ["nvfp4"] * 3 + ["bf16_forward"] * 3
    for step in (2, 4):
        again = Spy()
        fit(
            rest,
            6,
            NVFP4Precision(seed=0),
            callbacks=[NVFP4PrecisionSwitch(at), again],
            ckpt_path=tmp_path / f"step={step}.ckpt",
        )
        assert again.modes == spy.modes[step:]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), rest.parameters(), strict=True))


class TwoOptimizers(TinyGPT):
    """Takes two optimizer steps a batch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(block.parameters(), 1e-3) for block in self.blocks[:2]]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return loss


@pytest.mark.parametrize("limit", [{"max_epochs": 1, "steps": -1}, {"max_epochs": 1, "steps": 10}])
def test_a_fraction_of_a_run_with_several_optimizers(limit):
    """``global_step`` is 20 after the 10 batches of an epoch; ``max_steps`` counts the same way."""
    spy = Spy()
    model = TwoOptimizers(num_layers=4, dim=32, num_heads=2, block_size=16)
    fit(model, plugin=NVFP4Precision(), callbacks=[NVFP4PrecisionSwitch(0.6), spy], **limit)
    batches = 10 if limit["steps"] < 0 else 5
    assert spy.modes == ["nvfp4"] * (6 * batches // 10) + ["bf16_forward"] * (4 * batches // 10)


def test_the_switch_to_bf16_frees_the_packed_weights():
    plugin, model = NVFP4Precision(), gpt()
    plugin.convert_module(model)
    model(TOKENS[:1, :-1]).sum().backward()
    packed = [layer._nvfp4._packed for layer in plugin.layers]
    assert all(forward is not None for forward, _ in packed)
    plugin.set_mode("bf16")
    model(TOKENS[:1, :-1])
    assert all(layer._nvfp4._packed == (None, None) for layer in plugin.layers)


def test_lightning_names_the_plugin_that_excludes_a_precision():
    with pytest.raises(ValueError, match=r"plugins=NVFP4Precision\(backend='triton'\)"):
        trainer(plugin=NVFP4Precision(backend="triton"), precision="bf16-mixed")


def test_switch_to_bf16_is_plain_training():
    plain, switched = gpt(), gpt()
    fit(plain)
    fit(switched, plugin=NVFP4Precision(), callbacks=[NVFP4PrecisionSwitch(0, "bf16")])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), switched.parameters(), strict=True))


def test_callbacks_need_the_plugin():
    for callback in (NVFP4PrecisionSwitch(3), NVFP4Monitor()):
        with pytest.raises(MisconfigurationException, match="needs NVFP4Precision"):
            fit(gpt(), callbacks=[callback])
    with pytest.raises(MisconfigurationException, match="without an end"):
        fit(gpt(), -1, NVFP4Precision(), callbacks=[NVFP4PrecisionSwitch(0.5)], max_epochs=-1)
    for bad in (1.0, -0.5, -1, True):
        with pytest.raises(ValueError, match="`at`"):
            NVFP4PrecisionSwitch(bad)


def test_monitor_logs_and_changes_nothing(tmp_path):
    plain, watched = gpt(), gpt()
    fit(plain, plugin=NVFP4Precision(seed=0))
    logger = CSVLogger(tmp_path)
    monitor = NVFP4Monitor(every_n_steps=2, layers=["blocks.0.*"], max_layers=3, wgrad_error=True)
    fit(watched, plugin=NVFP4Precision(seed=0), callbacks=[monitor], logger=logger)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    logger.save()
    with open(logger.experiment.metrics_file_path, newline="") as file:
        table = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    rows = [row for row in table if "nvfp4/mode" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    layers = {key.split("/")[1] for key in rows[0] if key.endswith("snr_db")}
    assert layers == {"blocks.0.attention.qkv", "blocks.0.attention.out", "blocks.0.mlp.up"}
    assert rows[0]["nvfp4/blocks.0.mlp.up/w/snr_db"] == pytest.approx(19.1, abs=0.3)
    assert rows[0]["nvfp4/blocks.0.mlp.up/x_col/snr_db"] == pytest.approx(20.4, abs=0.5)
    assert rows[0]["nvfp4/blocks.0.mlp.up/dy_col/snr_db"] == pytest.approx(17.2, abs=0.7)
    assert 0.02 < rows[0]["nvfp4/wgrad_error/blocks.0.mlp.up"] < 0.4


def test_monitor_writes_histograms(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    fit(
        gpt(),
        1,
        NVFP4Precision(),
        callbacks=[NVFP4Monitor(every_n_steps=1, max_layers=1, tensors=("w",))],
        logger=logger,
    )
    events = EventAccumulator(logger.log_dir).Reload()
    assert events.Tags()["histograms"] == ["nvfp4/blocks.0.attention.qkv/w/block_scale_log2"]


def test_without_histograms_no_block_scales_are_kept():
    x = torch.randn(32, 32)
    for histograms in (True, False):
        recorder = Recorder(["layer"], ["x"], histograms=histograms)
        recorder.record("layer", "x", x, NVFP4Recipe())
        assert bool(recorder.histograms) == histograms
        assert "nvfp4/layer/x/mse" in recorder.values
    plugin = NVFP4Precision()
    monitor = NVFP4Monitor(every_n_steps=1, histograms=False)

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.kept = plugin.session.probe.keeps_histograms

    look = Look()
    fit(gpt(), 1, plugin, callbacks=[monitor, look])
    assert not look.kept


def test_statistics_of_normal_data():
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    values, _ = tensor_statistics("x", x, NVFP4Recipe())
    assert float(values["saturation"]) == pytest.approx(0.035, rel=0.1)
    assert float(values["underflow"]) == pytest.approx(0.068, rel=0.1)
    assert float(values["snr_db"]) == pytest.approx(20.4, abs=0.1)
    values, _ = tensor_statistics("dy", x, NVFP4Recipe(), Draw(0, (1, 0, 0)))
    assert float(values["snr_db"]) == pytest.approx(17.2, abs=0.1)
    x[:, 16:32] = 1e-7  # blocks whose scale underflows are not saturated
    x[:, 32:48] = 0.0
    values, _ = tensor_statistics("x", x, NVFP4Recipe())
    assert float(values["zero_scale_blocks"]) == pytest.approx(1 / 32)
    assert float(values["saturation"]) == pytest.approx(0.035 * 30 / 32, rel=0.1)


def test_model_deepcopy_during_training_is_a_working_copy():
    class Ema(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.copy = copy.deepcopy(pl_module.blocks)

    ema = Ema()
    fit(gpt(), plugin=NVFP4Precision(), callbacks=[ema])
    assert ema.copy[0](torch.randn(1, 4, 32)).isfinite().all()


def test_nothing_optional_is_imported():
    fit(gpt(), plugin=NVFP4Precision(backend="torch"))
    assert "bitsandbytes" not in sys.modules
