"""One line for one mistake: the parser's reports reduced to the key, what was given, and what to do."""

from __future__ import annotations

import ast
import difflib
import dis
import importlib
import inspect
import re
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class ConfigError(ValueError):
    """The user's configuration is wrong; the text makes sense without a traceback."""


@dataclass(frozen=True)
class _Finding:
    """One line of a report with what surrounds it."""

    text: str
    key: str
    class_path: str | None
    subtypes: str
    given: str


# Lines that repeat the input or list what else the parser tried
_NOISE = (
    "Does not validate against any",
    "Errors:",
    "Given value type:",
    "Given value:",
    "Expected a path but",
    "Expected a <class 'NoneType'>",
    "Not a valid subclass of",
    "Subclass types expect one of:",
    "a class path (str)",
    "a dict with",
    "a dict without",
)
_NOT_A_SUBCLASS = "does not correspond to a subclass of"


def one_line(message: str, known_keys: Collection[str] = (), config_file: str = "") -> str:
    """Reduce a parser's message to one line that names the key.

    Args:
        message: Text of the parser, possibly a tree of attempts over many lines.
        known_keys: Keys and options that exist, for "did you mean".
        config_file: The config that was read last, if any.
    """
    unknown = re.search(r"does not accept option '([^']+)'|[Uu]nrecognized arguments: (?:--)?([^\s=]+)", message)
    if unknown:
        name = unknown[1] or unknown[2]
        if name.endswith((".yaml", ".yml", ".json")):
            return f"`{name}` is not an option. A config file comes after `-c`: -c {name}."
        return f"`{name}` is not an option.{_misspelt_key(name, known_keys)}"
    if match := re.fullmatch(r"the following arguments are required: (?:\w+\.)?(\w+)", message):
        return f"`{match[1]}` is required: set it in a config (-c FILE)" + (
            "." if match[1] == "subcommand" else f" or with --{match[1]}."
        )
    if message.startswith("Problems parsing config"):
        fault = message.partition(":")[2].replace('"<unicode string>"', repr(config_file))
        tab = " A line is indented with a tab; YAML takes spaces only." if _has_tabs(config_file) else ""
        return f"The config file is not valid YAML: {_joined(fault)}.{tab}"
    if message.startswith("Unexpected config"):
        found = _joined(message.partition(":")[2]) or "nothing"
        return f"The config file {config_file} must hold lines `key: value`; it has {found}."
    if match := re.match(r'expected "subcommand" to be one of \{(.*)\}, but it was not provided', message):
        names = match[1].replace(",", ", ")
        return f"the command is missing: `lightning-grad fit -c {config_file or 'CONFIG'}`. There are {names}."
    if match := re.match(r"(--\S+\.help): Expected a dot import path string: (\S+)", message):
        return f"`{match[1]}`: no class named {match[2]!r} is known here.{_where_it_goes(match[2])}"
    if match := re.search(r"invalid strategy name: `strategy='([^']+)'`", message):
        named = [cls for cls in _with_subclasses([Strategy]) if cls.__name__.lower() == match[1]]
        if named:  # Lightning builds a strategy from its name alone
            name = named[0].__name__
            see = f"--trainer.strategy.help={name}"
            return f"{name} has arguments to set: add --trainer.strategy.ARGUMENT=VALUE, see {see}."
    if not re.search(r"Parser key|Does not validate against|Problem with given class_path", message):
        return _joined(message)
    findings = list(_findings(message))
    typed = [f for f in findings if f.text.startswith(("Expected a <", "Expected a typing"))]
    telling = [f for f in findings if f not in typed and _NOT_A_SUBCLASS not in f.text]
    # a union of plain types is tried as a class path too: there the expected types say more
    plain = [f for f in typed if re.match(r"Expected a (<class '(int|float|str)'>|typing\.Literal)", f.text)]
    if telling and not (plain and plain[0].key == telling[0].key):
        return _quoted(telling[0].key) + _explain(telling[0])
    given = re.search(r"(?:Given value|Got value): (.*)", message)
    got = given[1] if given else "something else"
    if not (wanted := plain or typed):
        if wrong := next((f for f in findings if _NOT_A_SUBCLASS in f.text), None):
            base = wrong.text.rpartition(" ")[2]
            return f"{_quoted(wrong.key)}{got} is no {base}.{_where_it_goes(_short(got))}"
        return _joined(message)
    expected = " or ".join(dict.fromkeys(_type_name(f.text) for f in wanted))
    return f"{_quoted(wanted[0].key)}expected {expected}, got {got!r}.{_where_it_goes(got)}"


def locate(error: BaseException, config: Mapping[str, Any]) -> str:
    """The one line for an error out of a constructor, with the place in the config where its class was named.

    Args:
        error: What a constructor raised; it may be wrapped in the parser's own errors.
        config: The nested config that was being instantiated.
    """
    while not raised_by_us(error) and isinstance(cause := _cause(error), ValueError):
        error = cause
    text = one_line(str(error))
    owners = [
        type(frame.f_locals["self"])
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "__init__" and "self" in frame.f_locals
    ]
    for owner in reversed(owners):
        for key, class_path in _class_paths(config):
            if _import(class_path) is owner:
                return f"`{key}` ({owner.__name__}): {text}"
        if owner.__name__ == "Trainer":
            return f"`trainer`: {text}"
    return text


def _cause(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def raised_by_us(error: BaseException) -> bool:
    """Whether a ``raise`` statement of this package made the error. Its text then says what to do.

    An operation in our code that failed in torch or Python is no such error: it keeps its traceback.
    """
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or not place.tb_frame.f_globals.get("__name__", "").startswith("lightning_grad."):
        return False
    return place.tb_frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _findings(message: str) -> Iterator[_Finding]:
    value = re.search(r"Given value: (.*)", message)
    given = value[1] if value else ""
    scopes: list[tuple[int, str, str]] = []  # indent, kind, value
    pending: list[str] = []
    for raw in message.splitlines():
        line = raw.strip()
        # nested parsers put their report under a bullet: the bullet's own indent does not open a scope
        bare = line.removeprefix("- ")
        indent = len(raw) - len(raw.lstrip()) + (2 if bare != line else 0)
        if not bare:
            continue
        while scopes and scopes[-1][0] >= indent and not bare.startswith(("Given", "Subtypes")):
            scopes.pop()
        if match := re.fullmatch(r"Parser key \"([^\"]+)\":(.*)", bare):
            scopes.append((indent, "key", match[1]))
            bare = match[2].strip()
        elif match := re.fullmatch(r"Problem with given class_path '([^']+)':", bare):
            scopes.append((indent, "class", match[1]))
            continue
        elif bare.startswith("Subtypes:"):
            pending = [bare]
            continue
        if bare and not bare.startswith(_NOISE):
            key = ".".join(value for _, kind, value in scopes if kind == "key")
            classes = [value for _, kind, value in scopes if kind == "class"]
            yield _Finding(bare, key, classes[-1] if classes else None, pending[0] if pending else "", given)


def _explain(finding: _Finding) -> str:
    text, owner = finding.text, finding.class_path
    if match := re.match(r"Option '([^']+)' is not accepted", text):
        name = match[1]
        if name == "class_path":  # the class was not even looked up
            return "beside `class_path` there may be `init_args` only, and the arguments of the class go under it."
        if owner is not None and _import(owner) in _bases(finding.subtypes):
            return f"name the class before its argument `{name}`: --{finding.key} CLASS, or `class_path:` in YAML."
        accepted = _arguments(owner)
        hint = _did_you_mean(name, accepted) or (f" It takes {', '.join(accepted)}." if accepted else "")
        return f"{_short(owner)} has no argument `{name}`.{hint}"
    if match := re.match(r"Expected a dot import path string: (.*)", text):
        names = sorted({cls.__name__ for cls in _subclasses(finding.subtypes)})
        hint = _where_it_goes(match[1]) or _did_you_mean(match[1], names)
        hint = hint or f" Give its import path, e.g. my_file.{match[1]} for a class in my_file.py."
        return f"no class named {match[1]!r} is known.{hint}"
    if match := re.match(r"the following arguments are required: (.*)", text):
        return f"{_short(owner)} needs a value for {match[1]}."
    if owner is not None and (text.startswith("No module named") or "has no attribute" in text):
        module, _, name = owner.rpartition(".")
        siblings = [n for n, value in vars(_import(module) or object).items() if isinstance(value, type)]
        return f"cannot import {owner!r}: {text}.{_did_you_mean(name, siblings)}"
    if match := re.match(r"Multiple subclasses with name (.*)", text):
        return f"several classes are named {match[1]}"
    text = text if text.endswith((".", "!", "?")) else text + "."
    if re.fullmatch(r"\w+(\.\w+)+", finding.given) and _import(finding.given) is None:
        return f"cannot import {finding.given!r}: {text}"
    return text


def _arguments(class_path: str | None) -> list[str]:
    cls = _import(class_path or "")
    if not isinstance(cls, type):
        return []
    names = [n for base in cls.__mro__ if "__init__" in vars(base) for n in _parameters(base)]
    hidden = {"self", "args", "kwargs", *(("params",) if issubclass(cls, Optimizer) else ())}
    return [n for n in dict.fromkeys(names) if n not in hidden]


def _parameters(cls: type) -> list[str]:
    try:
        return list(inspect.signature(cls.__init__).parameters)  # type: ignore[misc]
    except (TypeError, ValueError):  # built in C
        return []


def _subclasses(subtypes: str) -> Iterator[type]:
    """Classes that would have been accepted, from the base classes the parser lists."""
    return _with_subclasses(_bases(subtypes))


def _with_subclasses(bases: Iterable[type]) -> Iterator[type]:
    queue = list(bases)
    seen: set[type] = set()
    while queue:
        cls = queue.pop()
        if cls in seen:
            continue
        seen.add(cls)
        queue.extend(type.__subclasses__(cls))
        if not cls.__name__.startswith("_"):
            yield cls


def _bases(subtypes: str) -> list[type]:
    return [cls for path in re.findall(r"[\w.]+\.\w+", subtypes) if isinstance(cls := _import(path), type)]


def _class_paths(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every ``class_path`` in a nested config with its key; the keys ``init_args`` go without saying."""
    if isinstance(config, list | tuple):
        for index, item in enumerate(config):
            yield from _class_paths(item, f"{prefix}[{index}]")
    elif isinstance(config, Mapping):
        if isinstance(path := config.get("class_path"), str):
            yield prefix, path
        for name, value in config.items():
            key = prefix if name == "init_args" else f"{prefix}.{name}".lstrip(".")
            yield from _class_paths(value, key)


def _import(path: str) -> Any:
    """The object at a dotted path, or None. Imports only modules that the parser has tried to import before."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name) if module else importlib.import_module(path)
    except Exception:  # a module under construction by the user may fail with anything
        try:
            return importlib.import_module(path)
        except Exception:
            return None


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    lowered = {option.lower(): option for option in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return f" Did you mean `{lowered[near[0]]}`?" if near else ""


def _misspelt_key(name: str, known_keys: Collection[str]) -> str:
    """A hint for the first part of a dotted key that does not exist."""
    paths = [key.split(".") for key in known_keys]
    parts = name.split(".")
    if inner := next((key for key in known_keys if key.endswith(f".{name}")), None):
        return f" Did you mean `{inner}`?"
    for depth in range(1, len(parts) + 1):
        known = {".".join(path[:depth]) for path in paths if path[: depth - 1] == parts[: depth - 1]}
        if ".".join(parts[:depth]) not in known:
            return _did_you_mean(".".join(parts[:depth]), known)
    return ""


def _where_it_goes(name: str) -> str:
    """A hint for a class that exists but was given to the wrong key, and how to read about it."""
    for base, key, kind in (
        (Callback, "trainer.callbacks", "a callback"),
        (Precision, "trainer.plugins", "a precision plugin"),
        (CheckpointIO, "trainer.plugins", "a checkpoint plugin"),
        (Strategy, "trainer.strategy", "a strategy"),
        (Optimizer, "optimizer", "an optimizer"),
        (LRScheduler, "lr_scheduler", "a learning-rate schedule"),
    ):
        if any(cls.__name__ == name for cls in _with_subclasses([base])):
            return f" {name} is {kind}: --{key}={name}, and --{key}.help={name} for its arguments."
    return ""


def _has_tabs(path: str) -> bool:
    try:
        return re.search(r"^ *\t", Path(path).read_text(encoding="utf-8"), re.MULTILINE) is not None
    except (OSError, UnicodeDecodeError):
        return False


def _type_name(text: str) -> str:
    text = re.sub(r"\.? Got value:.*", "", text.removeprefix("Expected a ").removeprefix("Expected an "))
    if match := re.search(r"Literal(\[.*\])", text):
        return " or ".join(repr(value) for value in ast.literal_eval(match[1]))
    match = re.fullmatch(r"<class '([^']+)'>", text)
    return match[1].rpartition(".")[2] if match else text


def _short(class_path: str | None) -> str:
    return (class_path or "it").rpartition(".")[2]


def _quoted(key: str) -> str:
    return f"`{key}`: " if key else ""


def _joined(text: str) -> str:
    return " ".join(text.split())
