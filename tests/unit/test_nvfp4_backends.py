"""Choice of the backend, and the Transformer Engine adapter driven with a stand-in for what no machine here runs."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from contextlib import contextmanager

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_grad import NVFP4Monitor, NVFP4Precision
from lightning_grad.nvfp4 import NVFP4Linear, NVFP4Recipe, backend_info
from lightning_grad.nvfp4.backends import check_triton, resolve
from lightning_grad.nvfp4.linear import Session

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU of some compute capability."""

    def pretend(major, minor, name="NVIDIA Test"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)

    return pretend


class FakeLinear(nn.Module):
    made: list[FakeLinear] = []  # noqa: RUF012

    def __init__(self, in_features, out_features, bias, params_dtype, device):
        super().__init__()
        assert device == "meta"
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=params_dtype, device=device))
        self.calls = []
        FakeLinear.made.append(self)

    def forward(self, x, is_first_microbatch=None):
        self.calls.append((x.shape, x.dtype, is_first_microbatch, FakeTE.recipe))
        return F.linear(x, self.weight.bfloat16(), self.bias.bfloat16() if hasattr(self, "bias") else None)


class FakeTE:
    recipe = None

    @staticmethod
    @contextmanager
    def autocast(enabled, recipe):
        FakeTE.recipe = recipe if enabled else None
        yield
        FakeTE.recipe = None


@pytest.fixture
def te(monkeypatch):
    """A Transformer Engine that says it can, of a chosen version."""

    def pretend(version="2.20.0", available=(True, "")):
        root = types.ModuleType("transformer_engine")
        root.__version__ = version
        pytorch = types.ModuleType("transformer_engine.pytorch")
        pytorch.Linear, pytorch.autocast = FakeLinear, FakeTE.autocast
        pytorch.is_nvfp4_available = lambda return_reason: available
        recipe = types.ModuleType("transformer_engine.common.recipe")
        recipe.NVFP4BlockScaling = lambda **switches: switches
        for name, module in {
            "transformer_engine": root,
            "transformer_engine.pytorch": pytorch,
            "transformer_engine.common": types.ModuleType("transformer_engine.common"),
            "transformer_engine.common.recipe": recipe,
        }.items():
            monkeypatch.setitem(sys.modules, name, module)
        FakeLinear.made.clear()

    return pretend


@pytest.mark.parametrize(
    ("capability", "chosen"), [((10, 0), "transformer_engine"), ((10, 3), "transformer_engine"), ((9, 0), "triton"),
                               ((8, 0), "triton"), ((12, 0), "triton"), ((11, 0), "triton"), ((7, 5), "torch")],
)  # fmt: skip
def test_auto_by_compute_capability(gpu, te, capability, chosen):
    pytest.importorskip("triton")
    gpu(*capability)
    te()
    name, why = resolve("auto", GPU)
    assert name == chosen
    assert f"compute capability {capability[0]}.{capability[1]}" in why
    assert ("native FP4" in why) == (chosen == "transformer_engine")
    assert ("no speed-up" in why) == (chosen != "transformer_engine")


@pytest.mark.parametrize(
    ("version", "available", "reason"),
    [("2.8.0", (True, ""), "older than 2.9"), ("2.20.0", (False, "CUDA 12.6"), "CUDA 12.6")],
)
def test_unusable_transformer_engine_falls_back_or_fails(gpu, te, version, available, reason):
    pytest.importorskip("triton")
    gpu(10, 0)
    te(version, available)
    name, why = resolve("auto", GPU)
    assert name == "triton"
    assert reason in why
    with pytest.raises(RuntimeError, match=reason):
        resolve("transformer_engine", GPU)


def test_consumer_blackwell_needs_a_release_with_the_fix(gpu, te):
    gpu(12, 0)
    te("2.18.0")
    with pytest.raises(RuntimeError, match=r"transformer-engine >= 2.19 or stochastic_rounding=False"):
        resolve("transformer_engine", GPU)
    assert resolve("transformer_engine", GPU, stochastic_rounding=False)[0] == "transformer_engine"
    te("2.19.0")
    assert resolve("transformer_engine", GPU)[0] == "transformer_engine"


def test_triton_needs_a_product_with_an_fp32_result(gpu, monkeypatch):
    pytest.importorskip("triton")
    gpu(9, 0)
    monkeypatch.setattr(torch, "mm", lambda a, b, *, out=None: None)
    assert "torch.mm(..., out_dtype=...)" in check_triton(GPU)
    assert resolve("auto", GPU)[0] == "torch"


def test_the_plain_wheel_is_not_taken_for_transformer_engine(gpu):
    """It is installed, and its import raises RuntimeError."""
    pytest.importorskip("triton")
    try:
        importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the plain wheel is not installed: pip install transformer-engine")
    gpu(10, 0)
    name, why = resolve("auto", GPU)
    assert name == "triton"
    assert "cannot be used (" in why


def test_backend_info_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    info = backend_info()
    assert info["torch"] == (True, "ok")
    assert not info["transformer_engine"][0]
    assert not info["triton"][0]


def layer(session, **kwargs):
    torch.manual_seed(0)
    return NVFP4Linear.convert(nn.Linear(64, 32, **kwargs), session, 0, "layer")


def test_adapter_runs_on_the_layers_own_tensors(te):
    te()
    recipe = NVFP4Recipe(rht=False, weight_2d=False)
    module = layer(Session(recipe, backend="transformer_engine", epoch=1))
    keys = list(module.state_dict())
    x = torch.randn(3, 7, 64, requires_grad=True)
    y = module(x)
    shadow = FakeLinear.made[0]
    assert shadow.calls[0][:3] == (torch.Size([64, 64]), torch.bfloat16, True)
    switches = {"disable_rht": True, "disable_stochastic_rounding": False, "disable_2d_quantization": True}
    assert shadow.calls[0][3] == switches
    assert shadow.weight is module.weight
    assert shadow.bias is module.bias
    assert y.shape == (3, 7, 32)
    assert y.dtype == torch.float32
    want = F.linear(x.bfloat16(), module.weight.bfloat16(), module.bias.bfloat16()).float()
    assert torch.equal(y, want)
    y.sum().backward()
    assert module.weight.grad is not None
    assert x.grad.shape == x.shape
    assert list(module.state_dict()) == keys, "the shadow must not show in a checkpoint"
    assert len(list(module.modules())) == 1
    module(x)
    module._nvfp4.session.epoch += 1
    module(x)
    assert [call[2] for call in shadow.calls] == [True, False, True]
    module.weight = nn.Parameter(module.weight.detach().clone())  # as sharding strategies do
    module.eval()(x[:, :1])
    assert shadow.weight is module.weight
    assert shadow.calls[-1][0] == torch.Size([32, 64])
    assert not shadow.training


def test_adapter_quantizes_every_call_when_the_cache_is_off(te):
    te()
    module = layer(Session(backend="transformer_engine"), bias=False)
    module(torch.randn(5, 64))
    assert FakeLinear.made[0].calls[0][2] is None


@pytest.mark.parametrize("change", ["in place", "epoch", "eval", "none"])
def test_adapter_quantizes_a_weight_anew_when_it_may_have_changed(te, change):
    te()
    module, x = layer(Session(backend="transformer_engine", epoch=1)), torch.randn(5, 64)
    module(x)
    if change == "in place":
        with torch.no_grad():
            module.weight.mul_(2.0)
    elif change == "epoch":  # optimizers that write behind autograd's back
        module._nvfp4.session.epoch += 1
    elif change == "eval":  # averaged weights may have been swapped in
        module.eval()
    module(x)
    assert FakeLinear.made[0].calls[-1][2] is (change != "none")


def test_the_monitor_says_that_it_sees_nothing_of_transformer_engine(te, monkeypatch, tmp_path):
    te()
    monkeypatch.setattr("lightning_grad.precision.nvfp4.resolve", lambda *a: ("transformer_engine", "native."))
    plugin = NVFP4Precision(keep_last=0)
    plugin.convert_module(nn.Sequential(nn.Linear(64, 64)))
    trainer = pl.Trainer(
        accelerator="cpu", plugins=[plugin], logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.warns(UserWarning, match="NVFP4Monitor sees no tensors of backend 'transformer_engine'"):
        NVFP4Monitor().on_fit_start(trainer, pl.LightningModule())


def test_plugin_on_transformer_engine(te, gpu, monkeypatch):
    te()
    monkeypatch.setattr("lightning_grad.precision.nvfp4.resolve", lambda *a: ("transformer_engine", "native."))
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48))
    plugin = NVFP4Precision(keep_last=0)
    plugin.convert_module(model)
    assert plugin.report == {"0": "nvfp4", "1": "in_features 64 or out_features 48 is not a multiple of 32"}
    with pytest.warns(UserWarning, match="no BF16 forward with an FP4 backward"):
        plugin.set_mode("bf16_forward")
    assert plugin.mode == "bf16"
    for arguments in ({"sr_scale": "up"}, {"hadamard_signs": [1] * 16}):
        with pytest.raises(RuntimeError, match="fixed sign vector"):
            NVFP4Precision(**arguments).convert_module(nn.Linear(64, 64))


def test_a_models_own_te_modules_run_in_the_recipe(te, gpu, monkeypatch):
    te()
    monkeypatch.setattr("lightning_grad.precision.nvfp4.resolve", lambda *a: ("transformer_engine", "native."))
    own = type("LayerNorm", (nn.LayerNorm,), {"__module__": "transformer_engine.pytorch.module.layernorm"})
    plugin = NVFP4Precision(keep_last=0, stochastic_rounding=False)
    plugin.convert_module(nn.Sequential(nn.Linear(64, 64), own(64)))
    with plugin.forward_context():
        assert FakeTE.recipe["disable_stochastic_rounding"]
    assert FakeTE.recipe is None
    plugin.set_mode("bf16")
    with plugin.forward_context():
        assert FakeTE.recipe is None
    plain = NVFP4Precision(keep_last=0)
    plain.convert_module(nn.Sequential(nn.Linear(64, 64)))
    with plain.forward_context():
        assert FakeTE.recipe is None, "converted layers bring their own"
