import math
import shlex

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_grad.demos import LimitThreads, PrintSummary, RecordMetrics, SourceText, TinyGPT


def fit(tmp_path, callbacks, max_steps=6, **kwargs):
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        enable_model_summary=False,
        callbacks=callbacks,
        max_steps=max_steps,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **kwargs},
    )
    data = SourceText(block_size=16, batch_size=4, max_bytes=50_000, num_val_blocks=8)
    trainer.fit(TinyGPT(num_layers=1, dim=16, num_heads=1, block_size=16), datamodule=data)
    return trainer


def test_the_summary_says_what_was_reached_and_what_to_open(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: name if name == "tensorboard" else None)
    callbacks = [
        PrintSummary(references={"AdamW, same length": 1.5}, reference_steps=6, prompt="def "),
        ModelCheckpoint(every_n_train_steps=3, save_last=True),
        RichProgressBar(),
    ]
    logger = TensorBoardLogger("runs", name="my demo")
    trainer = fit(tmp_path, callbacks, logger=logger, enable_checkpointing=True, enable_progress_bar=True)
    out = capsys.readouterr().out
    lines = {line[:20].strip(): line[20:] for line in out.splitlines()}
    assert lines["val/loss"] == f"{trainer.callback_metrics['val/loss']:.4f}"
    assert lines["AdamW, same length"] == "1.5000"
    assert lines["trained"].startswith("6 steps in ")
    assert lines["it writes"].startswith("def ")
    checkpoint, opened = shlex.split(lines["checkpoint"]), shlex.split(lines["open next"])
    assert checkpoint == [str(tmp_path / "runs/my demo/version_0/checkpoints/last.ckpt")]
    assert opened[-2:] == ["--logdir", str(tmp_path / "runs/my demo")]
    assert out.rindex("val/loss") < out.rindex("open next")
    under = out[out.index("open next") :].replace(str(tmp_path), "")  # a folder may be called pytest-276/
    assert "6/" not in under, "the progress bar was drawn again under the summary"
    accumulator = EventAccumulator(logger.log_dir).Reload()
    assert "custom_scalars__config__" in accumulator.Tags()["tensors"]


def test_a_run_without_validation_or_logger_still_has_a_summary(tmp_path, capsys):
    fit(tmp_path, [PrintSummary(references={"long run": 1.5}, reference_steps=2)], max_steps=1, num_sanity_val_steps=0)
    out = capsys.readouterr().out
    assert "not logged: the run ended before a validation" in out
    assert "open next" not in out
    assert "long run" not in out, "the value of a run of another length says nothing"


def test_recorded_curves_are_the_logged_values(tmp_path):
    class Losses(pl.Callback):
        values = ()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.values += (outputs["loss"].item(),)

    losses, every, second = Losses(), RecordMetrics(), RecordMetrics(every_n_steps=2)
    trainer = fit(tmp_path, [losses, every, second])
    assert every.curves["train/loss"] == list(zip(range(1, 7), losses.values, strict=True))
    assert second.curves["train/loss"] == every.curves["train/loss"][1::2]
    assert [step for step, _ in every.curves["val/loss"]] == [3, 6]  # no sanity check among them
    assert every.last("val/loss") == trainer.callback_metrics["val/loss"].item()
    assert math.isnan(every.last("val/acc"))


@pytest.mark.parametrize("fails", [False, True])
def test_threads_are_limited_during_fit_only(tmp_path, fails):
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen = torch.get_num_threads()
            if fails:
                raise RuntimeError("planned")

    torch.set_num_threads(2)
    look = Look()
    if fails:
        with pytest.raises(RuntimeError, match="planned"):
            fit(tmp_path, [LimitThreads(1), look], max_steps=1)
    else:
        fit(tmp_path, [LimitThreads(1), look], max_steps=1)
    assert look.seen == 1
    assert torch.get_num_threads() == 2
