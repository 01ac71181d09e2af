"""Damaged checkpoints are refused before anything is unpickled; intact ones open everywhere."""

import json
import random
import subprocess
import warnings
import zipfile
import zlib

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO

from lightning_grad import ChecksumCheckpointIO
from lightning_grad._checksum import ChecksumError, chained_crc32, check_file, replace_file, seal_file
from lightning_grad.checkpoint_io import checkpoint_fault

CONTENT = {"state_dict": {"weight": torch.arange(600.0)}, "epoch": 3, "loops": {"a": [1, 2]}}


@pytest.fixture
def path(tmp_path):
    ChecksumCheckpointIO().save_checkpoint(CONTENT, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


@pytest.mark.parametrize(
    "word", ["best", "last", "hpc", "registry", "registry:my-model", "REGISTRY:a:version:2", "s3://a"]
)
def test_what_lightning_resolves_itself_is_not_looked_at(word):
    assert checkpoint_fault(word) is None


class JsonIO(CheckpointIO):
    """Somebody's own format, which refuses bytes after its end."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        with open(path, "w") as file:
            json.dump(checkpoint, file)

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        with open(path) as file:
            return json.load(file)

    def remove_checkpoint(self, path):
        raise NotImplementedError


class FolderIO(JsonIO):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        from pathlib import Path

        Path(path).mkdir()


def flip(data, bit):
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def test_300_random_bit_flips_are_300_errors(path):
    data, rng = path.read_bytes(), random.Random(0)
    stock_errors, io = 0, ChecksumCheckpointIO()
    for bit in rng.sample(range(8 * len(data)), 300):
        path.write_bytes(flip(data, bit))
        with pytest.raises(ChecksumError, match=r"a\.ckpt: the c.*Nothing was loaded.*restore the file from a copy"):
            io.load_checkpoint(path)
        try:
            TorchCheckpointIO().load_checkpoint(path)
        except Exception:
            stock_errors += 1
    assert stock_errors < 300  # the reason for all this


def test_every_bit_of_the_end_of_the_file(path):
    """The footer protects itself: its mark, its digest, and the end of the archive before it."""
    data = path.read_bytes()
    for bit in range(8 * (len(data) - 130), 8 * len(data)):
        path.write_bytes(flip(data, bit))
        with pytest.raises(ChecksumError):
            check_file(path)


def test_every_truncation(path):
    data = path.read_bytes()
    for size in range(4, len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ChecksumError):
            check_file(path)
    path.write_bytes(b"")
    with pytest.raises(ChecksumError, match="is empty"):
        check_file(path)


def test_overwritten_end_and_appended_bytes(path):
    data = path.read_bytes()
    for changed in (data[:-512] + bytes(512), data[:-85] + bytes(85), data + b"x", data + data[:200]):
        path.write_bytes(changed)
        with pytest.raises(ChecksumError):
            check_file(path)


def test_the_file_opens_everywhere_and_wherever_it_goes(path, tmp_path):
    moved = tmp_path / "elsewhere" / "other name"
    moved.parent.mkdir()
    path.rename(moved)
    assert check_file(moved) == "intact"
    for loaded in (
        torch.load(moved, weights_only=True),
        torch.load(moved, mmap=True, weights_only=True),
        TorchCheckpointIO().load_checkpoint(moved),
        ChecksumCheckpointIO(require_checksum=True).load_checkpoint(moved, weights_only=True),
    ):
        assert torch.equal(loaded["state_dict"]["weight"], CONTENT["state_dict"]["weight"])
    assert zipfile.ZipFile(moved).testzip() is None


def test_the_digest_is_that_of_sha256sum(path, tmp_path):
    data = path.read_bytes()
    (tmp_path / "body").write_bytes(data[:-64])
    out = subprocess.run(["sha256sum", tmp_path / "body"], capture_output=True, text=True, check=True).stdout
    assert out.split()[0].encode() == data[-64:]


def test_error_names_the_newest_intact_checkpoint(path):
    import os

    io = ChecksumCheckpointIO()
    for age, name in ((30, "old"), (20, "intact"), (10, "also_damaged")):
        other = path.with_name(f"{name}.ckpt")
        io.save_checkpoint(CONTENT, other)
        if name == "also_damaged":
            other.write_bytes(flip(other.read_bytes(), 4000))
        os.utime(other, (1e9 - age, 1e9 - age))
    path.write_bytes(flip(path.read_bytes(), 5000))
    with pytest.raises(ChecksumError, match=r"Resume from .*/intact\.ckpt, the newest intact") as error:
        io.load_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ")


def test_nothing_is_unpickled_from_a_damaged_file(path):
    class Never(TorchCheckpointIO):
        def load_checkpoint(self, *args, **kwargs):
            raise AssertionError("the inner IO was asked")

    path.write_bytes(flip(path.read_bytes(), 777))
    with pytest.raises(ChecksumError):
        ChecksumCheckpointIO(Never()).load_checkpoint(path)


def test_file_without_checksum(tmp_path):
    TorchCheckpointIO().save_checkpoint(CONTENT, tmp_path / "stock.ckpt")
    io = ChecksumCheckpointIO()
    with pytest.warns(UserWarning, match="has no checksum"):
        io.load_checkpoint(tmp_path / "stock.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert io.load_checkpoint(tmp_path / "stock.ckpt")["epoch"] == 3
    with pytest.raises(ChecksumError, match="require_checksum=False"):
        ChecksumCheckpointIO(require_checksum=True).load_checkpoint(tmp_path / "stock.ckpt")
    with pytest.raises(FileNotFoundError, match="missing"):
        io.load_checkpoint(tmp_path / "missing.ckpt")


def test_zip_with_somebody_elses_comment_has_no_checksum(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", "b")
        archive.comment = b"made by somebody"
    assert check_file(tmp_path / "a.zip") == "absent"
    with pytest.raises(ValueError, match="cannot add a checksum"):
        seal_file(tmp_path / "a.zip")


def test_other_formats_are_wrapped(tmp_path):
    io = ChecksumCheckpointIO(JsonIO())
    io.save_checkpoint({"epoch": 5}, tmp_path / "a.json")
    assert io.load_checkpoint(tmp_path / "a.json") == {"epoch": 5}
    data = (tmp_path / "a.json").read_bytes()
    for bit in range(8 * len(data)):
        (tmp_path / "a.json").write_bytes(flip(data, bit))
        with pytest.raises(ChecksumError):
            io.load_checkpoint(tmp_path / "a.json")


def test_refused_inner():
    with pytest.raises(TypeError, match="asynchronous saving use AsyncCheckpointIO"):
        ChecksumCheckpointIO(AsyncCheckpointIO())
    with pytest.raises(TypeError, match="`inner` must be a CheckpointIO, got int"):
        ChecksumCheckpointIO(3)


def test_directory_formats_are_refused(tmp_path):
    with pytest.raises(TypeError, match="FolderIO writes a directory"):
        ChecksumCheckpointIO(FolderIO()).save_checkpoint({}, tmp_path / "a.ckpt")


def test_failed_write_keeps_the_old_file(path):
    with pytest.raises(Exception, match=r"pickle|local object"):  # Python 3.13 words it anew
        ChecksumCheckpointIO().save_checkpoint({"bad": lambda: 0}, path)
    assert check_file(path) == "intact"
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]


def test_what_a_killed_write_left_behind_is_overwritten(path):
    (path.parent / ".a.ckpt.partial").write_bytes(b"half a checkpoi")
    ChecksumCheckpointIO().save_checkpoint(CONTENT, path)
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]


def test_replace_file(tmp_path):
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    replace_file(tmp_path / "new", tmp_path / "old")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["new"]


def test_remote_file_system(tmp_path):
    import fsspec

    io = ChecksumCheckpointIO()
    io.save_checkpoint(CONTENT, "memory://runs/a.ckpt")
    assert io.load_checkpoint("memory://runs/a.ckpt", weights_only=True)["epoch"] == 3
    memory = fsspec.filesystem("memory")
    memory.pipe("/runs/a.ckpt", flip(memory.cat("/runs/a.ckpt"), 999))
    with pytest.raises(ChecksumError, match=r"^memory://runs/a.ckpt: the contents"):
        io.load_checkpoint("memory://runs/a.ckpt")
    io.remove_checkpoint("memory://runs/a.ckpt")
    with pytest.raises(FileNotFoundError):
        io.load_checkpoint("memory://runs/a.ckpt")


@pytest.mark.parametrize("save_last", [True, "link"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_in_a_trainer(tmp_path, save_last, asynchronous):
    def fit(steps, ckpt_path=None):
        io = ChecksumCheckpointIO(require_checksum=True)
        trainer = pl.Trainer(
            logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1,
            limit_val_batches=0, max_steps=steps, plugins=[AsyncCheckpointIO(io) if asynchronous else io],
            callbacks=[ModelCheckpoint(tmp_path, "{step}", save_last=save_last, every_n_train_steps=2, save_top_k=1)],
        )  # fmt: skip
        trainer.fit(BoringModel(), ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
        return trainer

    fit(4)
    last = tmp_path / "last.ckpt"
    assert last.is_symlink() == (save_last == "link")
    assert check_file(last) == "intact"
    if not asynchronous:  # Lightning removes older files at once and writes newer ones later, so an old one may stay
        assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "step=4.ckpt"]
    assert fit(6, last).global_step == 6


def test_chained_crc32_is_that_of_the_whole():
    records, value = [b"abc", b"", b"defg"], 0
    for record in records:
        value = chained_crc32(record, value)
    assert value == zlib.crc32(b"abcdefg")
