"""The terminal's view of a TensorBoard log."""

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_grad.demos.report import Curve, curves, main, report


@pytest.fixture
def log_dir(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(20_000):  # more points than TensorBoard's own default keeps
            writer.add_scalar("train/loss", 4.0 - step / 10_000, step)
        writer.add_scalar("val/loss", 2.0, 19_999)
        writer.add_scalar("epoch", 0, 0)
    return tmp_path


def test_end_points(log_dir):
    found = curves(log_dir)
    assert found["val/loss"] == Curve(19_999, 2.0, 19_999, 2.0)
    assert found["train/loss"] == pytest.approx((0, 4.0, 19_999, 2.0001))


def test_the_validation_loss_is_said(log_dir, capsys):
    assert main([str(log_dir)]) == 0
    out = capsys.readouterr().out
    assert out.strip().splitlines()[-1] == "Validation loss: 2.0000 nats (2.885 bits)"
    assert "epoch" not in out


def test_an_empty_folder_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no TensorBoard event file"):
        report(tmp_path)
