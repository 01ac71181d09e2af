"""Which layers of a model are converted, and the conversion: a class swap in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

from torch import Tensor, nn

from lightning_grad.nvfp4.format import BLOCK
from lightning_grad.nvfp4.linear import NVFP4Linear, Session

DEFAULT_EXCLUDE = ("*lm_head", "*head", "*output_layer", "*classifier", "*embed*", "*router", "*gate", "*score")
CONVERTED = "nvfp4"
_SMALLEST_CONTAINER = 3


@dataclass
class Selection:
    """The layers to convert, and why each of the others is not.

    Attributes:
        layers: Name -> layer, in conversion order.
        report: Name of every ``nn.Linear`` -> ``"nvfp4"`` or the reason it stays.
        kept: Names of the blocks left in high precision.
        unmatched: ``include`` patterns that match no layer.
    """

    layers: dict[str, nn.Linear] = field(default_factory=dict)
    report: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)


def select(
    model: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    blocks: str | None = None,
    keep_first: int | float = 0,
    keep_last: int | float = 0.15,
    multiple: int = BLOCK,
) -> Selection:
    """Choose the layers to convert.

    Args:
        model: Any module; names are relative to it.
        include: fnmatch patterns on the dotted name; ``None`` takes all.
        exclude: Patterns of layers that stay; ``None`` is :data:`DEFAULT_EXCLUDE`.
        blocks: Dotted name of the container whose children are the blocks; ``None`` finds it.
        keep_first: Blocks at the start that stay: a count, or a fraction in [0, 1), rounded up.
        keep_last: The same at the end.
        multiple: Both dimensions of a layer must be a multiple of this.

    Raises:
        ValueError: ``blocks`` names nothing, or every block would stay.
        NotImplementedError: A chosen layer has a weight split over a tensor-parallel group.
    """
    patterns = DEFAULT_EXCLUDE if exclude is None else tuple(exclude)
    found = Selection()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    shared = _weights_used_elsewhere(model, multiple)
    for name, module in linears.items():
        reason = _reason(module, multiple, shared) or _name_reason(name, include, patterns)
        found.report[name] = reason or CONVERTED
    eligible = [name for name, reason in found.report.items() if reason == CONVERTED]
    groups = _blocks(model, blocks, set(eligible))
    if not groups:
        groups = {name: [name] for name in eligible}
    names = list(groups)
    first, last = _count("keep_first", keep_first, len(names)), _count("keep_last", keep_last, len(names))
    if names and first + last >= len(names):
        raise ValueError(
            f"`keep_first` {keep_first} and `keep_last` {keep_last} keep {first} + {last} of {len(names)} blocks in"
            " high precision, so nothing is left to convert; lower one of them."
        )
    found.kept = names[:first] + names[len(names) - last :]
    in_kept = {layer for block in found.kept for layer in groups[block]}
    in_blocks = {layer for block in groups.values() for layer in block}
    for name in eligible:
        if name in in_kept:
            found.report[name] = "in a block kept in high precision"
        elif name not in in_blocks and include is None:
            found.report[name] = "outside the blocks; name it in `include` to convert it"
        else:
            _refuse_tensor_parallel(name, linears[name].weight)
            found.layers[name] = linears[name]
    found.unmatched = [p for p in include or () if not any(fnmatch(name, p) for name in linears)]
    return found


def convert(selection: Selection, session: Session) -> list[NVFP4Linear]:
    """Swap the class of the selected layers; ``layer_id`` is the position in the selection."""
    return [
        NVFP4Linear.convert(layer, session, layer_id, name)
        for layer_id, (name, layer) in enumerate(selection.layers.items())
    ]


def _reason(module: nn.Linear, multiple: int, shared: set[int]) -> str:
    """Why the layer itself cannot be converted; empty if it can."""
    if type(module) not in (nn.Linear, NVFP4Linear):
        return f"{type(module).__name__} is a subclass of nn.Linear that may bypass `forward`"
    if module.in_features % multiple or module.out_features % multiple:
        return f"in_features {module.in_features} or out_features {module.out_features} is not a multiple of {multiple}"
    if not module.weight.is_floating_point():
        return f"weight has dtype {module.weight.dtype}"
    if id(module.weight) in shared:
        return "weight is shared with a module that is not converted"
    return ""


def _name_reason(name: str, include: Sequence[str] | None, exclude: Sequence[str]) -> str:
    if include is not None and not any(fnmatch(name, p) for p in include):
        return "not in `include`"
    hit = next((p for p in exclude if fnmatch(name, p)), None)
    return f"excluded by {hit!r}" if hit else ""


def _weights_used_elsewhere(model: nn.Module, multiple: int) -> set[int]:
    """Ids of parameters owned by a module that is not a plain, divisible linear layer."""
    return {
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
        and not (
            type(module) in (nn.Linear, NVFP4Linear)
            and module.in_features % multiple == 0  # type: ignore[operator]
            and module.out_features % multiple == 0  # type: ignore[operator]
        )
    }


def _refuse_tensor_parallel(name: str, weight: Tensor) -> None:
    """The amax of a weight split over a tensor-parallel group would need a reduction over that group."""
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        return
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    for dim, placement in zip(names, weight.placements, strict=True):  # type: ignore[attr-defined]
        if placement.is_shard() and not dim.startswith(("data", "dp", "fsdp", "replicate", "shard")) and dim:
            raise NotImplementedError(
                f"NVFP4Precision cannot convert {name}: its weight is sharded over the mesh dimension {dim!r}."
                " Use a data-parallel mesh only, or name the layer in `exclude`."
            )


def _blocks(model: nn.Module, container: str | None, eligible: set[str]) -> dict[str, list[str]]:
    """Name of a block -> its eligible layers, in registration order."""

    def inside(prefix: str) -> list[str]:
        return [name for name in eligible if name == prefix or name.startswith(prefix + ".")]

    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    if container is not None:
        modules = dict(model.named_modules())
        if container not in modules:
            raise ValueError(f"`blocks` {container!r} is not a module of {type(model).__name__}.")
        prefixes = [container]
    else:
        prefixes = []
        for name, module in model.named_modules():
            if any(name == p or name.startswith(p + ".") or p == "" for p in prefixes):
                continue  # inside a container already taken
            if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) >= _SMALLEST_CONTAINER:
                full = sum(bool(inside(f"{name}.{child}" if name else child)) for child in module._modules)
                if 3 * full >= 2 * len(module):
                    prefixes.append(name)
    out: dict[str, list[str]] = {}
    for prefix in prefixes:
        for child in model.get_submodule(prefix)._modules:
            block = f"{prefix}.{child}" if prefix else child
            out[block] = sorted(inside(block), key=order.__getitem__)
    return out


def _count(name: str, keep: int | float, total: int) -> int:
    if isinstance(keep, int):
        return keep
    # 0.1 * 30 is a little above 3
    return min(math.ceil(keep * total - 1e-9), max(total - 1, 0))


def check_keep(name: str, value: int | float) -> int | float:
    """Return ``value`` if it is a count >= 0 or a fraction in [0, 1), else raise ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(f"`{name}` must be a count >= 0 or a fraction in [0, 1), got {value!r}.")
    if isinstance(value, float) and value >= 1:
        raise ValueError(f"`{name}` must be an integer count or a fraction below 1, got {value!r}.")
    return value


def check_patterns(name: str, value: Sequence[str] | None) -> list[str] | None:
    """Return the patterns as a list, or ``None``; refuse empty entries."""
    if value is None:
        return None
    if isinstance(value, str) or any(not isinstance(p, str) or not p for p in value):
        raise ValueError(f"`{name}` must be a list of non-empty patterns, got {value!r}.")
    return list(value)
