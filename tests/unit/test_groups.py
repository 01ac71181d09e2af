"""Which parameters decay, and which settings a name gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_grad
from lightning_grad.optim.groups import OptimizerGroup, named_groups


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(5, 4)
        self.mix = nn.Linear(4, 4)
        self.ln = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(4))  # one dimension, no telling name
        self.table = nn.Parameter(torch.ones(4, 4))
        self.gate = nn.Bilinear(4, 4, 2)


def names(groups: list[dict]) -> list[tuple[list[str], dict]]:
    return [(g["param_names"], {k: v for k, v in g.items() if k not in ("params", "param_names")}) for g in groups]


def test_the_rule_on_a_net_with_every_case():
    net = Net()
    assert names(lightning_grad.param_groups(net, 0.1)) == [
        (["table", "mix.weight", "conv.weight", "gate.weight"], {"weight_decay": 0.1}),
        (["scale", "wte.weight", "mix.bias", "ln.weight", "ln.bias", "gate.bias"], {"weight_decay": 0.0}),
    ]


def test_words_are_class_names_in_either_case():
    groups = lightning_grad.param_groups(Net(), 0.1, no_decay=("CONV",))
    assert groups[1]["param_names"] == ["scale", "mix.bias", "ln.weight", "ln.bias", "conv.weight", "gate.bias"]


def test_no_words_turn_the_rule_off():
    assert [len(g["params"]) for g in lightning_grad.param_groups(Net(), 0.1, no_decay=())] == [10]


def test_groups_partition_the_trainable_parameters_and_torch_takes_them():
    net = Net()
    net.mix.weight.requires_grad_(False)
    groups = lightning_grad.param_groups(net, 0.1)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    by_name = dict(net.named_parameters())
    for group in groups:
        assert all(by_name[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))
        order = [n for n in by_name if n in group["param_names"]]
        assert order == group["param_names"]


@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_tied_weight_appears_once_and_one_exempt_owner_is_enough(embedding_first: bool):
    wte, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = wte.weight
    net = nn.Sequential(*([wte, head] if embedding_first else [head, wte]))
    assert names(lightning_grad.param_groups(net, 0.1)) == [(["0.weight"], {"weight_decay": 0.0})]


def test_first_match_counts_and_the_rest_keeps_the_optimizers_settings():
    rules = [
        OptimizerGroup(["*.bias"], {"lr": 1.0}),
        OptimizerGroup(["mix.*", "l?.*"], {"lr": 2.0, "weight_decay": 0.5}),
    ]
    assert names(named_groups(Net(), rules)) == [
        (["scale", "table", "wte.weight", "conv.weight", "gate.weight"], {}),
        (["mix.bias", "ln.bias", "gate.bias"], {"lr": 1.0}),
        (["mix.weight", "ln.weight"], {"lr": 2.0, "weight_decay": 0.5}),
    ]


def test_no_decay_splits_a_group_unless_it_sets_its_own_decay():
    rules = [OptimizerGroup(["mix.*"], {"lr": 1.0}), OptimizerGroup(["ln.*"], {"weight_decay": 0.5})]
    assert names(named_groups(Net(), rules, no_decay=["norm", "embedding"])) == [
        (["table", "conv.weight", "gate.weight"], {}),
        (["scale", "wte.weight", "gate.bias"], {"weight_decay": 0.0}),
        (["mix.weight"], {"lr": 1.0}),
        (["mix.bias"], {"lr": 1.0, "weight_decay": 0.0}),
        (["ln.weight", "ln.bias"], {"weight_decay": 0.5}),
    ]


def test_names_are_those_of_the_plain_model_after_compile():
    net = nn.ModuleDict({"body": torch.compile(nn.Linear(2, 2))})
    assert named_groups(net, [OptimizerGroup(["body.*"])])[0]["param_names"] == ["body.weight", "body.bias"]


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ([OptimizerGroup(["mux.*"])], r"`optimizer_groups\[0\]\.params`: no parameter matches 'mux\.\*'.*mix\.bias"),
        ([OptimizerGroup(["table"])], r"'table' matches only frozen parameters"),
        ([OptimizerGroup(["*"]), OptimizerGroup(["mix.*"])], r"\[1\].*every parameter that matches 'mix\.\*' is alre"),
    ],
)
def test_a_pattern_without_parameters_is_an_error(rules, text):
    net = Net()
    net.table.requires_grad_(False)
    with pytest.raises(ValueError, match=text):
        named_groups(net, rules)
