import re
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from lightning_grad import (
    AdaptiveBatchSize,
    BatchSizeLRScaler,
    LanczosLearningRate,
    NormTest,
    NVFP4Monitor,
    NVFP4Precision,
    OptimizerStats,
    SGDTemperatureMonitor,
    SharedSeedSPSAStrategy,
    StabilityMonitor,
)
from lightning_grad._tensorboard import (
    TensorBoardCharts,
    log_figure,
    log_histogram,
    log_scalars,
    merge_charts,
    tensorboard_writers,
)
from lightning_grad.demos import SourceText, TinyGPT


class Charts(TensorBoardCharts):
    def __init__(self, charts):
        self.charts = charts

    def tensorboard_charts(self, trainer):
        assert trainer.optimizers  # promised by the base class
        return self.charts


def fit(tmp_path, callbacks, max_steps=3, loggers=None):
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=loggers or TensorBoardLogger(tmp_path, name="tb", version=""),
        callbacks=callbacks,
        max_steps=max_steps,
        limit_val_batches=0,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(BoringModel())
    return trainer


def events(path):
    accumulator = EventAccumulator(str(path), size_guidance={"tensors": 0, "histograms": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def layouts(path):
    accumulator = events(path)
    if "custom_scalars__config__" not in accumulator.Tags()["tensors"]:
        return []
    found = []
    for event in accumulator.Tensors("custom_scalars__config__"):
        layout = Layout.FromString(event.tensor_proto.string_val[0])
        charts = {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in layout.category}
        found.append(charts)
    return found


def test_charts_of_all_callbacks_are_one_layout_for_each_logger(tmp_path):
    first = Charts({"a": {"x": ["a/x", "a/y"]}, "both": {"z": ["a/z"]}})
    second = Charts({"b": {"x": ["b/x"]}, "both": {"z": ["b/z", "a/z"], "w": ["b/w"]}})
    loggers = [TensorBoardLogger(tmp_path, name=n, version="") for n in ("one", "two")]
    fit(tmp_path, [first, pl.Callback(), second], loggers=[loggers[0], CSVLogger(tmp_path, name="csv"), loggers[1]])
    expected = {
        "a": {"x": ["a/x$", "a/y$"]},
        "both": {"z": ["a/z$", "b/z$"], "w": ["b/w$"]},
        "b": {"x": ["b/x$"]},
    }
    assert layouts(tmp_path / "one") == [expected]
    assert layouts(tmp_path / "two") == [expected]


def test_no_charts_no_layout(tmp_path):
    fit(tmp_path, [pl.Callback()])
    assert layouts(tmp_path / "tb") == []


@pytest.mark.parametrize(
    ("tag", "shown", "hidden"),
    [
        ("train/loss", ["train/loss"], ["train/loss_epoch", "xtrain/loss", "train_loss"]),
        ("a.b/c+d", ["a.b/c+d"], ["aXb/c+d", "a.b/ccd"]),
        ("optim/*/norm", ["optim/SGD/norm", "optim/AdamW_2/norm"], ["optim/norm", "optim/a/b/norm", "optim/SGD/norms"]),
    ],
)
def test_patterns_show_what_they_say(tag, shown, hidden):
    _, (pattern,) = merge_charts([{"p": {"t": [tag]}}])["p"]["t"]
    # as TensorBoard's custom_scalars plugin does it
    assert all(re.compile(pattern).match(name) for name in shown)
    assert not any(re.compile(pattern).match(name) for name in hidden)


class LogAll(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("own/value", float(batch_idx))
        log_scalars(trainer, {"direct/value": float(batch_idx)})
        values = torch.tensor([1.0, 2.0, float("nan"), float("inf"), 3.0])
        log_histogram(trainer, "some/histogram", values.bfloat16())
        log_histogram(trainer, "no/histogram", torch.full((2,), float("nan")))
        log_figure(trainer, "some/figure", self.draw)

    def draw(self):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(1, 1))
        figure.subplots().plot([0, 1])
        return figure


def test_everything_is_on_one_step_axis(tmp_path):
    fit(tmp_path, [LogAll()])
    log = events(tmp_path / "tb")
    own = [(e.step, e.value) for e in log.Scalars("own/value")]
    assert own == [(e.step, e.value) for e in log.Scalars("direct/value")] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    histograms = log.Histograms("some/histogram")
    assert [e.step for e in histograms] == [0, 1, 2]
    assert histograms[0].histogram_value.num == 3
    assert histograms[0].histogram_value.sum == 6.0
    assert "no/histogram" not in log.Tags()["histograms"]
    assert [e.step for e in log.Images("some/figure")] == [0, 1, 2]
    assert log.Images("some/figure")[0].encoded_image_string.startswith(b"\x89PNG")


def test_figures_are_not_drawn_without_a_tensorboard_logger(tmp_path):
    class Refuse(LogAll):
        def draw(self):
            raise AssertionError("drawn for nobody")

    fit(tmp_path, [Refuse()], loggers=[CSVLogger(tmp_path)])


def test_other_processes_write_nothing(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    assert len(tensorboard_writers(SimpleNamespace(is_global_zero=True, loggers=[logger]))) == 1
    assert tensorboard_writers(SimpleNamespace(is_global_zero=False, loggers=[logger])) == []


PLUGINS = {
    "OptimizerStats": lambda: {"callbacks": [OptimizerStats(every_n_steps=1)]},
    "AdaptiveBatchSize": lambda: {
        "callbacks": [AdaptiveBatchSize(64, NormTest(), test_interval=1, lr_scaler=BatchSizeLRScaler("sqrt"))]
    },
    "StabilityMonitor": lambda: {"callbacks": [StabilityMonitor(every_n_steps=1, k=2, num_probes=1)]},
    "StabilityMonitor, all": lambda: {
        "callbacks": [StabilityMonitor(every_n_steps=2, k=2, oscillation_steps=1, distance_from_init=True)]
    },
    "LanczosLearningRate": lambda: {"callbacks": [LanczosLearningRate(every_n_steps=1, k=2, spectrum=False)]},
    "SGDTemperatureMonitor": lambda: {"callbacks": [SGDTemperatureMonitor(every_n_steps=1)]},
    "NVFP4Monitor": lambda: {
        "callbacks": [NVFP4Monitor(every_n_steps=1, histograms=False)],
        "plugins": [NVFP4Precision(keep_last=0)],
    },
    "SharedSeedSPSAStrategy": lambda: {"strategy": SharedSeedSPSAStrategy(eps=1e-3)},
    "SPSA and a callback": lambda: {
        "strategy": SharedSeedSPSAStrategy(eps=1e-3),
        "callbacks": [Charts({"spsa": {"workers": ["spsa/directions"]}})],
    },
}


class Model(TinyGPT):
    def __init__(self):
        super().__init__(num_layers=1, dim=32, num_heads=2, block_size=16, attention="math")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


@pytest.mark.parametrize("name", PLUGINS)
def test_every_chart_has_a_curve(tmp_path, name):
    """A plugin lays out its section, and no chart of the layout is empty after a run of three steps."""
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=3, log_every_n_steps=1, limit_val_batches=0, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, logger=TensorBoardLogger(tmp_path, name="", version=""),
        **PLUGINS[name](),
    )  # fmt: skip
    trainer.fit(Model(), SourceText(block_size=16, batch_size=8, num_val_blocks=8))
    (layout,) = layouts(tmp_path)
    scalars = events(tmp_path).Tags()["scalars"]
    charts = {title: tags for category in layout.values() for title, tags in category.items()}
    assert charts
    assert [t for t, tags in charts.items() if not any(re.match(p, scalar) for p in tags for scalar in scalars)] == []
