"""The rules of the house that a reader cannot check by eye: who imports whom, what an import costs."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import lightning
import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_grad"

# A module may import modules of its own layer and of those below. A new room joins by one line.
LAYERS = {
    # numbers, checks, files
    "random": 0,
    "_validate": 0,
    "_checksum": 0,
    # torch, no Lightning
    "optim": 1,
    "statistics": 1,
    "allocation": 1,
    "data": 1,
    "nvfp4": 1,
    "scaling": 1,
    "spsa": 1,
    # Lightning adapters
    "_lightning": 2,
    "_tensorboard": 2,
    "checkpoint_io": 2,
    "callbacks": 2,
    "precision": 2,
    "sampling": 2,
    "strategies": 2,
    "demos": 2,
    # the front
    "cli": 3,
    "_cli_errors": 3,
    "_cli_optimizers": 3,
    "_command": 3,
    "__init__": 3,
    "__main__": 3,
}
TORCH_LAYER = 1
OPTIONAL = ("sklearn", "matplotlib", "triton", "transformer_engine", "bitsandbytes", "transformers", "math_verify")

# (file, attribute): why it may be used outside _lightning.py. Everything else private goes through _lightning.py.
PRIVATE_ALLOWED = {
    ("callbacks", "_generate_state_key"): "Lightning's documented way to tell two callbacks of a class apart",
}


def modules() -> dict[str, Path]:
    """Dotted name -> file, for every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def layer(module: str) -> int:
    return LAYERS.get(room(module), 2)


def imports(name: str, *, only_at_import: bool = False) -> set[str]:
    """Dotted names that a module imports; of ``from a import b`` it is ``a.b`` where that is a module, else ``a``."""
    path = MODULES[name]
    nodes = [ast.parse(path.read_text(encoding="utf-8"))]
    found = set()
    while nodes:
        node = nodes.pop()
        if only_at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if only_at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            nodes.extend(node.orelse)
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return found


def test_every_room_has_a_layer():
    unknown = {room(name) for name in MODULES} - set(LAYERS)
    assert not unknown, f"add to LAYERS in {__name__}, and to the architecture page: {sorted(unknown)}"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    up = [
        target
        for target in imports(name)
        if target.partition(".")[0] == "lightning_grad" and layer(target) > layer(name)
    ]
    assert not up, f"{name} imports from a layer above it: {up}"


@pytest.mark.parametrize("name", [name for name in MODULES if layer(name) <= TORCH_LAYER])
def test_torch_layer_does_not_know_lightning(name):
    forbidden = {target for target in imports(name) if target.partition(".")[0] in ("lightning", "pytorch_lightning")}
    assert not forbidden, f"{name} belongs to the torch layer and imports {sorted(forbidden)}"


def test_no_circular_imports():
    graph = {name: {t for t in imports(name, only_at_import=True) if t in MODULES and t != name} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_one_of_the_lightning_twins():
    users = [name for name in MODULES if any(t.partition(".")[0] == "pytorch_lightning" for t in imports(name))]
    assert not users, f"import lightning.pytorch, not pytorch_lightning: {users}"


def lightning_private_names() -> set[str]:
    names: set[str] = set()
    root = Path(lightning.__file__).parent
    for folder in ("pytorch", "fabric"):
        for path in (root / folder).rglob("*.py"):
            names |= set(re.findall(r"(?:self\.|def |class )(_[a-zA-Z]\w+)", path.read_text(encoding="utf-8")))
    return names


def private_uses(private: set[str]) -> set[tuple[str, str]]:
    """(file, name) for every private name of Lightning that our files read, override or import."""
    ours: set[str] = set()
    overridden: set[tuple[str, str]] = set()
    used: set[tuple[str, str]] = set()
    for module, path in MODULES.items():
        if layer(module) <= TORCH_LAYER:  # has no Lightning object in hand
            continue
        place = path.relative_to(PACKAGE).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        foreign: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lightning":
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                used |= {(place, name) for name in names if name.startswith("_")}
                foreign |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                foreign |= {alias.asname or "lightning" for alias in node.names if alias.name.startswith("lightning.")}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                theirs = any(ast.unparse(base).partition(".")[0] in foreign for base in node.bases)
                for item in node.body:
                    if isinstance(item, ast.FunctionDef):
                        if theirs and item.name in private:
                            overridden.add((place, item.name))
                        else:
                            ours.add(item.name)
            elif isinstance(node, ast.Attribute):
                if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                    ours.add(node.attr)
                elif node.attr in private and not ast.unparse(node.value).startswith("torch"):
                    used.add((place, node.attr))
    return overridden | {(place, name) for place, name in used if name not in ours}


def test_private_lightning_attributes_stay_in_one_file():
    private = lightning_private_names()
    assert "_should_accumulate" in private, "the search for Lightning's private names finds nothing"
    problems = [
        f"{place}: {name}"
        for place, name in sorted(private_uses(private))
        if place != "_lightning.py" and not {(place, name), (place.partition("/")[0], name)} & set(PRIVATE_ALLOWED)
    ]
    assert not problems, f"move to lightning_grad/_lightning.py: {problems}"


IMPORT_COST = """
import json, os, sys, time
sys.dont_write_bytecode = False
start = time.process_time()
import lightning.pytorch
theirs = time.process_time() - start
before = set(sys.modules)
sys.pycache_prefix = sys.argv[1]
if os.fork() == 0:       # the first child compiles our files, so that the second measures what a user's second run pays
    import lightning_grad
    os._exit(0)
os.wait()
start = time.process_time()
import lightning_grad
share = (time.process_time() - start) / theirs
print(json.dumps({"share": share, "modules": sorted(set(sys.modules) - before)}))
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs os.fork")
def test_importing_the_package_is_cheap(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_COST, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    cost = json.loads(done.stdout.strip().splitlines()[-1])
    optional = [name for name in cost["modules"] if name.partition(".")[0] in OPTIONAL]
    assert not optional, f"`import lightning_grad` must not load extras: {optional[:5]}"
    assert "lightning.pytorch.cli" not in cost["modules"], "the command line belongs to lightning_grad.cli only"
    others = {name.partition(".")[0] for name in cost["modules"]} - {"lightning_grad"} - set(sys.stdlib_module_names)
    share = cost["share"]
    assert share < 0.06, f"{share:.2f} of the CPU time of Lightning's import; beside ours it loaded {sorted(others)}"


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [path for path in (ROOT / name for name in listing.stdout.split("\0") if name) if path.is_file()]


def test_no_path_of_somebodys_machine_in_the_tree():
    machine = re.compile(
        "|".join(["/wo" + "rk/", "/ro" + r"ot/\w", "/op" + "t/(pypi|wheels)", "/hom" + r"e/(?!user\b)\w"])
    )
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{text[: m.start()].count(chr(10)) + 1}: {m[0]}" for m in machine.finditer(text)
        ]
    assert not found, found
