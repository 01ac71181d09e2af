"""Parameter groups by name: which parameters decay, and which get settings of their own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

NO_DECAY = ("bias", "norm", "embedding")

# torch.compile and the checkpoint and FSDP wrappers insert these; a user writes names of the plain model
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass
class OptimizerGroup:
    """Parameters, chosen by name, that get optimizer settings of their own.

    Args:
        params: Name patterns as in a file listing: ``*`` stands for any characters (dots too), ``?`` for one,
            ``[01]`` for one of these. They must match the whole parameter name, e.g. ``encoder.*``.
        overrides: Optimizer arguments for these parameters, e.g. ``{lr: 1.0e-4, weight_decay: 0}``.
    """

    params: list[str]
    overrides: dict[str, Any] = field(default_factory=dict)


def param_groups(module: Module, weight_decay: float, no_decay: Sequence[str] = NO_DECAY) -> list[dict[str, Any]]:
    """Split the trainable parameters of a module into those that decay and those that do not.

    A parameter does not decay if the class name of a module that holds it contains one of the words (upper and lower
    case are the same), if its own name ends in ``.bias``, or if it has at most one dimension. A parameter held by
    several modules, such as a tied embedding, appears once, and does not decay if this holds for any of its owners.

    Args:
        module: Module whose parameters are grouped. Frozen parameters (``requires_grad=False``) are left out.
        weight_decay: Decay of the group that decays, for the optimizer's argument of this name.
        no_decay: Words that mark a module class. An empty sequence turns the rule off: every parameter decays.

    Returns:
        Groups for an optimizer: ``params``, their names in ``param_names``, ``weight_decay``. Empty groups are left
        out. Within a group the order is that of ``module.named_parameters()``.
    """
    exempt = _exempt(module, no_decay)
    parameters = trainable(module)
    decayed = [name for name in parameters if name not in exempt]
    spared = [name for name in parameters if name in exempt]
    return [
        _group(parameters, chosen, {"weight_decay": decay})
        for chosen, decay in ((decayed, weight_decay), (spared, 0.0))
        if chosen
    ]


def named_groups(
    module: Module, groups: Sequence[OptimizerGroup], no_decay: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Build optimizer groups from name patterns; parameters no pattern names keep the optimizer's own settings.

    The first group that matches a parameter gets it. Parameters that :func:`param_groups` would spare get
    ``weight_decay=0`` unless their group sets ``weight_decay`` itself.

    Args:
        module: Module whose trainable parameters are grouped.
        groups: Patterns and overrides, in order of precedence.
        no_decay: Words as for :func:`param_groups`; empty: the rule is off.

    Raises:
        ValueError: A pattern matches no trainable parameter, or only such as earlier groups took.
    """
    parameters = trainable(module)
    exempt = _exempt(module, no_decay)
    owner: dict[str, int] = {}
    for index, group in enumerate(groups):
        for pattern in group.params:
            matches = [name for name in parameters if fnmatchcase(name, pattern)]
            new = [name for name in matches if owner.get(name, index) == index]
            if not new:
                raise ValueError(_unmatched(module, index, pattern, list(parameters), matches))
            owner.update(dict.fromkeys(new, index))
    result = []
    for index in [None, *range(len(groups))]:
        overrides: Mapping[str, Any] = {} if index is None else groups[index].overrides
        members = [name for name in parameters if owner.get(name) == index]
        spared = [name for name in members if name in exempt and "weight_decay" not in overrides]
        kept = [name for name in members if name not in set(spared)]
        if kept:
            result.append(_group(parameters, kept, overrides))
        if spared:
            result.append(_group(parameters, spared, {**overrides, "weight_decay": 0.0}))
    return result


def trainable(module: Module) -> dict[str, Parameter]:
    """Parameters that require a gradient by their names in the plain (not compiled, not wrapped) model."""
    return {_plain(name): p for name, p in module.named_parameters() if p.requires_grad}


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _group(parameters: Mapping[str, Tensor], names: list[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"params": [parameters[name] for name in names], "param_names": names, **settings}


def _exempt(module: Module, no_decay: Sequence[str]) -> set[str]:
    """Names of the trainable parameters that do not decay."""
    words = [word.lower() for word in no_decay]
    if not words:
        return set()
    marked = {
        id(parameter)
        for owner in module.modules()
        if any(word in type(owner).__name__.lower() for word in words)
        for parameter in owner.parameters(recurse=False)
    }
    return {
        name
        for name, parameter in trainable(module).items()
        if id(parameter) in marked or name.rpartition(".")[2] == "bias" or parameter.ndim <= 1
    }


def _unmatched(module: Module, index: int, pattern: str, names: list[str], matches: list[str]) -> str:
    where = f"`optimizer_groups[{index}].params`: "
    if matches:
        return f"{where}every parameter that matches {pattern!r} is already in an earlier group. Put this group first."
    if any(fnmatchcase(_plain(name), pattern) for name, _ in module.named_parameters()):
        return f"{where}{pattern!r} matches only frozen parameters (requires_grad=False)."
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
    return f"{where}no parameter matches {pattern!r}. There are {len(names)}, for example {', '.join(near)}."
