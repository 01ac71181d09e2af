import math
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.func import functional_call, jvp
from torch.nn import functional as F

from lightning_grad.demos import DigitsCNN, DigitsData, DigitsMLP, DocstringData, SourceText, TinyGPT
from lightning_grad.demos._corpus import in_validation, read_corpus, source_files, standard_library
from lightning_grad.demos.source_text import ByteBlocks

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
}
SMALL = {"num_layers": 2, "dim": 32, "num_heads": 2, "block_size": 16}


def small_gpt(**kwargs):
    torch.manual_seed(0)
    return TinyGPT(**{**SMALL, **kwargs})


def random_bytes(batch=4, length=16):
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())
    return root


# ── the corpus ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_corpus_is_the_library_of_the_running_interpreter():
    assert standard_library().samefile(Path(os.__file__).parent)  # holds in a virtual environment, too
    names = source_files(standard_library())
    assert {"abc.py", "json/decoder.py", "threading.py"} <= set(names)
    assert names == sorted(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "site-packages", "__pycache__"}


def test_a_missing_standard_library_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(FileNotFoundError, match=r"python311\.zip.*`root`"):
        SourceText().setup("fit")


def test_tests_and_machine_files_are_left_out(tmp_path):
    wanted = {"b.py": "b", "a/z.py": "z", "a/b/c.py": "c"}
    others = {"test_b.py": "t", "a/tests/x.py": "x", "test/y.py": "y", "_sysconfigdata_x.py": "s", "a/b.txt": "n"}
    root = write_tree(tmp_path, wanted | others | {"site-packages/q.py": "q", ".venv/r.py": "r"})
    assert source_files(root) == sorted(wanted)


def test_every_byte_is_in_exactly_one_part_and_files_keep_their_side(tmp_path):
    files = {f"m{i}.py": chr(97 + i % 26) * (i + 1) for i in range(200)}
    train, val = read_corpus(write_tree(tmp_path, files), 10**6, 0.25)
    expected = {False: "", True: ""}
    for name in sorted(files):
        expected[in_validation(name, 0.25)] += files[name]
    assert bytes(train.tolist()).decode() == expected[False]
    assert bytes(val.tolist()).decode() == expected[True]
    # binomial(200, 1/4): 5 sigmas = 31; a wrong hash fraction would be off by more
    assert abs(sum(in_validation(name, 0.25) for name in files) - 50) < 31
    assert not any(in_validation(name, 0.25) and not in_validation(name, 0.5) for name in files)


def test_max_bytes_is_exact_in_both_parts(tmp_path):
    root = write_tree(tmp_path, {f"m{i}.py": "x" * 100 for i in range(40)})
    for cap in (1, 99, 100, 101, 950):
        train, val = read_corpus(root, cap, 0.3)
        assert (len(train), len(val)) == (cap - round(0.3 * cap), round(0.3 * cap))
    assert sum(map(len, read_corpus(root, 10**9, 0.3))) == 4000


@pytest.mark.parametrize("length", [0, 8, 9, 16, 17, 1000])
def test_blocks_cover_the_text_once(length):
    text = (torch.arange(length) % 251).to(torch.uint8)
    blocks = ByteBlocks(text, 8)
    assert len(blocks) == max(0, length - 1) // 8
    items = list(map(blocks.__getitem__, range(len(blocks))))
    covered = 8 * len(blocks)
    if items:
        assert torch.equal(torch.cat([x for x, _ in items]), text[:covered].long())
        assert torch.equal(torch.cat([y for _, y in items]), text[1 : covered + 1].long())
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_validation_blocks_are_spread_and_limited():
    data = SourceText(block_size=64, num_val_blocks=100, max_bytes=2_000_000)
    data.setup("fit")
    assert len(data.val_set) == 100
    last = (len(data.val_set) - 1) * data.val_set.stride
    assert last > 0.98 * (len(data.val_set.text) - 65)
    batch = next(iter(data.val_dataloader()))
    assert batch[0].shape == batch[1].shape == (16, 64)
    assert batch[0].dtype == torch.int64
    assert torch.equal(batch[0][:, 1:], batch[1][:, :-1])


def test_setup_reads_once_and_the_same_bytes_each_time():
    first, second = SourceText(max_bytes=300_000), SourceText(max_bytes=300_000, seed=1)
    for data in (first, second, second):
        data.setup("fit")
    assert torch.equal(first.train_set.text, second.train_set.text)
    assert torch.equal(first.val_set.text, second.val_set.text)
    kept = second.train_set
    second.setup("validate")
    assert second.train_set is kept


def test_too_small_a_corpus_is_refused(tmp_path):
    write_tree(tmp_path, {"a.py": "x" * 50})
    with pytest.raises(ValueError, match="`block_size`=128 needs at least 129"):
        SourceText(root=str(tmp_path)).setup("fit")
    with pytest.raises(FileNotFoundError, match="`root`"):
        SourceText(root=str(tmp_path / "no")).setup("fit")


@pytest.mark.parametrize("make", [lambda s: SourceText(seed=s, max_bytes=300_000), lambda s: DigitsData(seed=s)])
def test_the_order_depends_on_the_seed_alone(make):
    def first_batch(seed):
        data = make(seed)
        data.setup("fit")
        return next(iter(data.train_dataloader()))[0]

    before = torch.get_rng_state()
    reference = first_batch(0)
    assert torch.equal(torch.get_rng_state(), before), "the loader drew from the global generator"
    torch.manual_seed(1)
    assert torch.equal(first_batch(0), reference)
    assert not torch.equal(first_batch(1), reference)


# ── the language model ──────────────────────────────────────────────────────────────────────────────────────────────


def test_blocks_equal_torchs_own_pre_norm_layer():
    model = small_gpt().double()
    tokens = random_bytes()
    layers = []
    for block in model.blocks:
        for norm in (block.norm1, block.norm2):  # otherwise all ones and zeros, whatever uses them
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        layer = nn.TransformerEncoderLayer(
            32, 2, 128, 0.0, lambda x: F.gelu(x, approximate="tanh"), batch_first=True, norm_first=True
        ).double()
        pairs = {
            "self_attn.in_proj_weight": block.attention.qkv.weight,
            "self_attn.out_proj.weight": block.attention.out.weight,
            "linear1.weight": block.mlp.up.weight,
            "linear2.weight": block.mlp.down.weight,
            "norm1.weight": block.norm1.weight,
            "norm1.bias": block.norm1.bias,
            "norm2.weight": block.norm2.weight,
            "norm2.bias": block.norm2.bias,
        }
        state = {name: pairs.get(name, torch.zeros_like(p)) for name, p in layer.state_dict().items()}
        layer.load_state_dict(state)
        layers.append(layer)
    x = model.embedding(tokens) + model.position.weight
    mask = nn.Transformer.generate_square_subsequent_mask(16, dtype=torch.float64)
    for layer in layers:
        x = layer(x, src_mask=mask)
    expected = model.lm_head(model.norm(x))
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-12)


def test_a_byte_changes_only_what_follows_it():
    model = small_gpt()
    tokens = random_bytes(1)
    changed = tokens.clone()
    changed[0, 9] ^= 1
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert difference[:9].max() < 1e-6
    assert difference[9:].min() > 1e-6


def test_linear_layers_are_named_and_sized_for_block_formats():
    linears = {name: layer for name, layer in TinyGPT().named_modules() if isinstance(layer, nn.Linear)}
    leaves = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    assert set(linears) == {f"blocks.{i}.{leaf}" for i in range(4) for leaf in leaves} | {"lm_head"}
    assert all(size % 16 == 0 for layer in linears.values() for size in layer.weight.shape)


def test_an_untrained_model_knows_nothing_and_samples_are_independent():
    model = small_gpt()
    tokens = random_bytes()
    losses = model.sample_loss((tokens, tokens))
    assert losses.shape == (4,)
    assert losses.mean().item() == pytest.approx(math.log(256), abs=0.05)
    one = torch.stack([model.sample_loss((tokens[i : i + 1], tokens[i : i + 1]))[0] for i in range(4)])
    torch.testing.assert_close(losses, one)
    logits = model(tokens)
    expected = torch.stack([F.cross_entropy(logits[i], tokens[i]) for i in range(4)])
    torch.testing.assert_close(losses, expected)


def test_math_attention_gives_the_same_numbers_and_second_derivatives():
    fused, math_ = small_gpt(), small_gpt(attention="math")
    tokens = random_bytes()
    torch.testing.assert_close(fused(tokens), math_(tokens))
    parameters = dict(math_.named_parameters())
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    grads = torch.autograd.grad(math_.sample_loss((tokens, tokens)).mean(), parameters.values(), create_graph=True)
    directional = sum((g * t).sum() for g, t in zip(grads, tangents.values(), strict=True))
    assert all(h.isfinite().all() for h in torch.autograd.grad(directional, parameters.values()))

    def loss(p):
        logits = functional_call(math_, p, (tokens,))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    forward_mode = jvp(loss, (parameters,), (tangents,))[1]
    torch.testing.assert_close(forward_mode, directional.detach(), rtol=1e-4, atol=1e-4)


def test_tied_weights_are_one_parameter():
    tied, untied = small_gpt(tie_weights=True), small_gpt()
    assert tied.lm_head.weight is tied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 256 * 32
    other = small_gpt(tie_weights=True)
    other.load_state_dict(tied.state_dict())
    assert other.lm_head.weight is other.embedding.weight


def test_dropout_acts_in_training_only():
    model = small_gpt(dropout=0.5)
    tokens = random_bytes()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_generate_is_repeatable_and_leaves_no_trace():
    model = small_gpt(dropout=0.1)
    before = torch.get_rng_state()
    text = model.generate(b"def ", 40, seed=3)
    assert len(text) == 40
    assert text == model.generate(b"def ", 40, seed=3)
    assert text != model.generate(b"def ", 40, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    with pytest.raises(ValueError, match="`prompt`"):
        model.generate(b"", 3)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: TinyGPT(dim=30), "dim"),
        (lambda: TinyGPT(num_layers=0), "num_layers"),
        (lambda: TinyGPT(dropout=1.0), "dropout"),
        (lambda: TinyGPT(attention="flash"), "attention"),
        (lambda: TinyGPT(lr=math.nan), "lr"),
        (lambda: SourceText(batch_size=0), "batch_size"),
        (lambda: SourceText(val_fraction=0.0), "val_fraction"),
        (lambda: DigitsData(val_fraction=1.0), "val_fraction"),
        (lambda: DigitsCNN(channels=0), "channels"),
        (lambda: DigitsMLP(num_layers=0), "num_layers"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        make()


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match="block_size=16"):
        small_gpt()(random_bytes(1, 17))


# ── the digits ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_digits_are_split_once_whatever_the_order():
    first, second = DigitsData(seed=0), DigitsData(seed=7)
    first.setup("fit")
    second.setup("fit")
    assert (len(first.train_set), len(first.val_set)) == (1348, 449)
    for a, b in zip(first.val_set.tensors, second.val_set.tensors, strict=True):
        assert torch.equal(a, b)
    images, labels = first.train_set.tensors
    assert images.shape[1:] == (1, 8, 8)
    assert 0 <= images.min() < images.max() <= 1
    assert set(labels.tolist()) == set(range(10))
    together = torch.cat([first.train_set.tensors[0], first.val_set.tensors[0]]).flatten(1)
    assert len(torch.unique(together, dim=0)) == 1797  # no image twice: the parts are disjoint


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-grad\[demo\]"'):
        DigitsData().setup("fit")


@pytest.mark.parametrize("model", [DigitsCNN, DigitsMLP])
def test_digits_are_learnt_by_a_plain_trainer(model):
    torch.manual_seed(0)
    trainer = pl.Trainer(**QUIET, max_epochs=8)
    trainer.fit(model(lr=3e-3), datamodule=DigitsData())
    assert set(trainer.callback_metrics) == {"train/loss", "val/loss", "val/acc"}
    assert trainer.callback_metrics["val/acc"] > 0.9
    module = trainer.lightning_module.eval()
    images, labels = trainer.datamodule.val_set.tensors
    correct = (module(images).argmax(1) == labels).float().mean()
    assert trainer.callback_metrics["val/acc"].item() == pytest.approx(correct.item())
    loss = module.sample_loss((images, labels)).mean()
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(loss.item(), rel=1e-4)


# ── under the Trainer and the command line ──────────────────────────────────────────────────────────────────────────


def test_gpt_learns_under_a_plain_trainer_and_comes_back_from_its_checkpoint(tmp_path):
    data = SourceText(block_size=16, batch_size=8, max_bytes=300_000, num_val_blocks=16)
    trainer = pl.Trainer(**QUIET, max_steps=40, val_check_interval=20, check_val_every_n_epoch=None)
    trainer.fit(small_gpt(lr=1e-2), datamodule=data)
    assert set(trainer.callback_metrics) == {"train/loss", "val/loss"}
    assert trainer.callback_metrics["val/loss"] < 4.0  # from ln 256 = 5.5
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    again = TinyGPT.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.hparams["dim"] == 32
    assert torch.equal(again(random_bytes()), trainer.lightning_module(random_bytes()))
    # the test set is the validation set, and measured on the last weights
    tested = trainer.test(again, datamodule=data, verbose=False)[0]["test/loss"]
    assert tested == pytest.approx(trainer.callback_metrics["test/loss"].item())


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    def fit(ckpt_path=None):
        data = SourceText(block_size=16, batch_size=8, max_bytes=20_000, num_val_blocks=16)
        torch.manual_seed(0)
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
        settings = {**QUIET, "enable_checkpointing": True, "callbacks": [keep]}
        trainer = pl.Trainer(**settings, max_steps=24, val_check_interval=10, check_val_every_n_epoch=None)
        trainer.fit(small_gpt(lr=1e-2), datamodule=data, ckpt_path=ckpt_path)
        return trainer

    whole = fit()
    resumed = fit(tmp_path / "step=7.ckpt")
    for p, q in zip(whole.lightning_module.parameters(), resumed.lightning_module.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(whole.callback_metrics["val/loss"], resumed.callback_metrics["val/loss"])


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("lightning_grad.demos.DigitsCNN", "lightning_grad.demos.DigitsData"),
        ("lightning_grad.demos.TinyGPT", "lightning_grad.demos.SourceText"),
    ],
)
def test_the_command_line_replaces_the_optimizer(model, data, tmp_path, monkeypatch):
    args = ["fit", f"--model={model}", f"--data={data}", "--data.batch_size=4", "--optimizer=SGD"]
    args += ["--optimizer.lr=0.25", "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu"]
    monkeypatch.setattr(sys, "argv", ["lightning-grad"])
    monkeypatch.chdir(tmp_path)
    cli = LightningCLI(args=args)
    optimizer = cli.trainer.optimizers[0]
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert cli.datamodule.batch_size == 4


def test_default_optimizer_is_adamw_over_all_parameters():
    for model in (small_gpt(lr=0.5), DigitsCNN(lr=0.5), DigitsMLP(lr=0.5)):
        optimizer = model.configure_optimizers()
        assert type(optimizer) is torch.optim.AdamW
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
        assert optimizer.defaults["lr"] == 0.5


def test_docstring_data_says_how_many_sentences_there_are(monkeypatch):
    monkeypatch.setattr("lightning_grad.demos.docstrings.docstring_sentences", lambda: (("one two three", 0),) * 3)
    with pytest.raises(ValueError, match=r"ask for 5 sentences; this Python's library has 3\."):
        DocstringData(num_train=3, num_val=2).setup("fit")
