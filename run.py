#!/usr/bin/env python3
"""Run anything in this repository on a fresh machine: `python3 run.py demo`, `python3 run.py test`.

The first call makes the environment `.venv` beside this file; later calls touch it only when pyproject.toml or
constraints.txt changed. Standard library only, and in the syntax of Python 3.6, so that an old interpreter gets a
sentence and not a SyntaxError.
"""

import argparse
import glob
import hashlib
import importlib.util
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile

MINIMUM = (3, 11)
ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(ROOT, ".venv")
STAMP = os.path.join(VENV, "lightning-grad.json")
LOG = os.path.join(VENV, "install.log")
QUICKSTART = os.path.join("examples", "quickstart", "config.yaml")
# `demo` installs only what it needs: a newcomer should not wait for test tools.
EXTRAS = {
    "demo": {"demo"},
    "bench": {"demo", "test"},
    "docs": {"docs"},
    "gallery": {"demo", "docs", "minilm"},
    "test": {"demo", "docs", "hf", "minilm", "test", "triton"},
}
AFTER_THE_DEMO = """
settings: {settings}; change a value and run the demo again. Documentation: python3 run.py docs

Next, your own project. Measure first, which changes nothing: in the folder of your my_model.py,
  {command} fit --model my_model.MyModel --data my_model.MyData --trainer.callbacks StabilityMonitor
logs how near your learning rate is to its limit (TensorBoard, page Custom Scalars). The table in README.md says
which method is for what. In an environment of your own: pip install -e {root}"""
NETWORK_SIGNS = (
    "Failed to establish a new connection",
    "Temporary failure in name resolution",
    "NameResolutionError",
    "NewConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ProxyError",
    "Network is unreachable",
    "Connection refused",
)


class UserError(Exception):
    """Ends the program with one message and no traceback."""


def say(text=""):
    print(text, flush=True)


def in_venv(name, venv=None):
    folder, suffix = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")
    return os.path.join(venv or VENV, folder, name + suffix)


# -- the environment ---------------------------------------------------------------------------------------------------


def check_python(version, which=shutil.which):
    """Refuse an interpreter that is too old, and name one on this machine that is not."""
    if tuple(version[:2]) >= MINIMUM:
        return
    newer = [name for name in ("python3.13", "python3.12", "python3.11") if which(name)]
    todo = "Install a newer one (https://www.python.org/downloads/ or your package manager), then run it with run.py."
    if newer:
        todo = f"This machine has {newer[0]}: use `{newer[0]} run.py` instead."
    raise UserError(f"lightning-grad needs Python 3.11 or newer; this is Python {version[0]}.{version[1]}. {todo}")


def check_venv_module(find=importlib.util.find_spec):
    """Refuse an interpreter that cannot make a virtual environment (Debian ships venv as a package of its own)."""
    missing = [name for name in ("venv", "ensurepip") if find(name) is None]
    if missing:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise UserError(
            f"This Python cannot make a virtual environment: its module `{missing[0]}` is missing. On Debian or Ubuntu:"
            f" sudo apt-get install python{version}-venv. Then run the same command again."
        )


def explain_install_failure(output):
    """Turn pip's output into one message: what happened and what to do."""
    sign = next((sign for sign in NETWORK_SIGNS if sign in output), None)
    if sign:
        return (
            f"No network: pip could not reach the package index ({sign}). Check the connection, and HTTPS_PROXY if you"
            " are behind a proxy; then run the same command again. What was downloaded already is kept."
        )
    if "No space left on device" in output:
        return "The disk is full. The environment needs about 2 GB; free some space and run the same command again."
    for line in output.splitlines():
        if "No matching distribution found for" in line:
            package = line.rpartition(" for ")[2].strip()
            version = f"{sys.version_info[0]}.{sys.version_info[1]}"
            return (
                f"pip found no build of {package} for Python {version} on this platform. Python 3.11 to 3.13 are"
                " supported; if that is what you have, look at constraints.txt."
            )
    tail = "\n    ".join(output.strip().splitlines()[-12:])
    return f"pip could not install the package. Its last lines:\n    {tail}\n  All of its output: {LOG}"


def fingerprint():
    digest = hashlib.sha256(ROOT.encode())  # a checkout that was moved is installed again
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def read_stamp():
    try:
        with open(STAMP, encoding="utf-8") as file:
            stamp = json.load(file)
        return stamp["fingerprint"], set(stamp["extras"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, set()


def venv_defect():
    """Say why `.venv` cannot be used, or return None."""
    question = f"import sys, pip; sys.exit(0 if sys.version_info >= {MINIMUM} else 3)"
    try:
        done = subprocess.run([in_venv("python"), "-c", question], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        return f"its Python does not start: {error.strerror}"
    if done.returncode == 3:
        return "its Python is older than 3.11"
    if done.returncode:
        return "it has no working pip"
    return None


def make_venv():
    check_venv_module()
    if os.path.lexists(VENV):
        defect = venv_defect()
        if defect is None:
            return
        if not os.path.exists(os.path.join(VENV, "pyvenv.cfg")):
            raise UserError(
                f"{VENV} is not a virtual environment ({defect}). Move it away and run the same command again."
            )
        say(f"The environment in .venv is broken ({defect}). Making it anew.")
        shutil.rmtree(VENV)
    say(f"Making the environment {VENV}")
    done = subprocess.run([sys.executable, "-m", "venv", VENV], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise UserError("Python could not make the environment:\n" + done.stdout.decode(errors="replace"))


def environment(wanted):
    """Make `.venv` hold the package and the extras; return at once if it does already."""
    start = time.time()
    present, extras = read_stamp()
    current = fingerprint()
    if present == current and wanted <= extras and os.path.exists(in_venv("python")) and venv_defect() is None:
        return
    make_venv()
    if os.path.exists(STAMP):
        os.remove(STAMP)  # an install that is cut short must not look finished
    extras = sorted(wanted | extras)
    say(f"Installing lightning-grad with the extras {', '.join(extras)} (first time: some minutes)")
    target = ".[" + ",".join(extras) + "]"
    pip = [in_venv("python"), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    pip.append("--no-compile")  # Python compiles what is imported; most of it never is
    status, output = follow([*pip, "-c", "constraints.txt", "-e", target])
    with open(LOG, "w", encoding="utf-8") as file:
        file.write(output)
    if status:
        raise UserError(explain_install_failure(output))
    with open(STAMP, "w", encoding="utf-8") as file:
        json.dump({"fingerprint": current, "extras": extras}, file)
    say(f"Environment ready after {time.time() - start:.0f} s")


def follow(command):
    """Run a command; show its newest line and the time on one line of a terminal, else a line every 15 seconds."""
    start = shown = time.time()
    terminal = sys.stdout.isatty()
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    output, newest = [], "starting"
    try:
        while True:
            try:
                line = lines.get(timeout=1)
                if line is None:
                    break
                output.append(line.decode(errors="replace"))
                if output[-1].lstrip().startswith(("Collecting", "Downloading", "Installing", "Building", "Preparing")):
                    newest = output[-1].strip()
            except queue.Empty:
                pass
            now = time.time()
            if terminal:
                width = shutil.get_terminal_size().columns
                sys.stdout.write("\r\033[K" + f"  {now - start:4.0f} s  {newest}"[: width - 1])
                sys.stdout.flush()
            elif now - shown > 15:
                say(f"  {now - start:4.0f} s  {newest[:110]}")
                shown = now
    except KeyboardInterrupt:
        process.terminate()
        raise
    if terminal:
        sys.stdout.write("\r\033[K")
    return process.wait(), "".join(output)


# -- the commands ------------------------------------------------------------------------------------------------------


def call(*command, cwd=None):
    """Run a command, by default in the repository root, and return its exit status."""
    say("$ " + " ".join(os.path.relpath(part, ROOT) if part.startswith(ROOT) else part for part in command))
    # two libraries' notes that a reader of this output can do nothing about
    environment = dict(os.environ, NO_MKDOCS_2_WARNING="1")
    environment.setdefault("PYTHONWARNINGS", "ignore:`isinstance(treespec")
    status = subprocess.run(list(command), cwd=cwd or ROOT, env=environment).returncode
    if status < 0:
        say(f"The command was ended by signal {-status}.")
        return 128 - status
    return status


def demo(options, rest):
    environment(EXTRAS["demo"])
    say("\nTraining a small GPT on the source text of Python's standard library, on one CPU core.")
    status = call(in_venv("python"), "-m", "lightning_grad", "fit", "-c", QUICKSTART, *rest)
    if not status:  # the run itself has printed the validation loss and how to open its curves
        say(AFTER_THE_DEMO.format(settings=QUICKSTART, command=in_venv("lightning-grad"), root=ROOT))
    return status


def lint(rest):
    python = in_venv("python")
    return call(python, "-m", "ruff", "check", ".") or call(python, "-m", "ruff", "format", "--check", ".")


def types(rest):
    return call(in_venv("python"), "-m", "mypy")


def tests(rest):
    workers = str(min(4, os.cpu_count() or 1))
    return call(in_venv("python"), "-m", "pytest", "-n", workers, "--dist", "worksteal", "--durations", "15", *rest)


def package(rest):
    """Build sdist and wheel, install the wheel in an environment that sees our dependencies but not our sources."""
    python = in_venv("python")
    with tempfile.TemporaryDirectory() as folder:
        dist, clean = os.path.join(folder, "dist"), os.path.join(folder, "clean")
        if call(python, "-m", "build", "--no-isolation", "--outdir", dist):  # the wheel is built from the sdist
            return 1
        (wheel,) = glob.glob(os.path.join(dist, "*.whl"))
        stray = [name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("lightning_grad")]
        if stray:
            say(f"The wheel holds files outside the package: {stray[:5]}")
            return 1
        clean_python = in_venv("python", clean)
        if call(python, "-m", "venv", "--without-pip", clean) or call(
            python, "-m", "pip", "--python", clean_python, "install", "--quiet", "--no-deps", wheel
        ):
            return 1
        # Folders named in a .pth file come after the environment's own and are not searched for further .pth files,
        # so the editable install of this checkout stays invisible.
        dependencies, own = (answer(p, "sysconfig.get_path('purelib')") for p in (python, clean_python))
        with open(os.path.join(own, "dependencies.pth"), "w", encoding="utf-8") as file:
            file.write(dependencies + "\n")
        origin = answer(clean_python, "importlib.util.find_spec('lightning_grad').origin", cwd=folder)
        if not origin.startswith(own):
            say(f"The clean environment would import {origin}, not the wheel.")
            return 1
        # `--version` answers without loading the classes
        loads = call(clean_python, "-c", "import lightning_grad.cli", cwd=folder)
        return loads or call(in_venv("lightning-grad", clean), "--version", cwd=folder)


def answer(python, expression, cwd=None):
    """Evaluate an expression in another interpreter."""
    code = "import importlib.util, sysconfig; print(" + expression + ")"
    return subprocess.check_output([python, "-c", code], cwd=cwd or ROOT).decode().strip()


def pages(rest):
    # without --quiet, which also hides the warnings from --strict
    with tempfile.TemporaryDirectory() as folder:
        return call(in_venv("python"), "-m", "mkdocs", "build", "--strict", "--site-dir", folder)


STAGES = {
    "lint": (lint, "style and formatting (ruff)"),
    "types": (types, "types of the package (mypy --strict)"),
    "tests": (tests, "tests in random order, every example in short mode, every code block of the docs"),
    "package": (package, "the built wheel, installed alone, imports and answers --version"),
    "docs": (pages, "documentation builds without a warning"),
}


def test(options, rest):
    """Run the stages one after another, all of them even after a failure; return 1 if any failed."""
    chosen = options.only.split(",") if options.only else ["tests"] if rest else list(STAGES)
    unknown = [name for name in chosen if name not in STAGES]
    if unknown:
        raise UserError(f"--only takes {', '.join(STAGES)}, separated by commas; got {', '.join(unknown)}.")
    if options.quick:
        rest = ["-m", "not slow and not bench", *rest]
    start = time.time()
    environment(EXTRAS["test"])
    results = [("environment", time.time() - start, 0)]
    for number, name in enumerate(chosen, 1):
        run, purpose = STAGES[name]
        say(f"\n== {number}/{len(chosen)} {name}: {purpose}")
        began = time.time()
        status = run(rest)
        results.append((name, time.time() - began, status))
        say(f"== {name} {'FAILED' if status else 'passed'} after {results[-1][1]:.0f} s")
    failed = [name for name, _, status in results if status]
    say()
    for name, seconds, status in results:
        say(f"  {name:<12}{seconds:6.0f} s  {'FAILED' if status else 'passed'}")
    total = time.time() - start
    say(f"{'FAILED: ' + ', '.join(failed) if failed else 'All passed'} ({total:.0f} s)")
    return 1 if failed else 0


def bench(options, rest):
    environment(EXTRAS["bench"])
    files = sorted(glob.glob(os.path.join(ROOT, "benchmarks", "bench_*.py")))
    names = [os.path.basename(path)[len("bench_") : -len(".py")] for path in files]
    if not rest or rest[0].startswith("-"):
        raise UserError(
            f"Say which: python3 run.py bench NAME [its options]. There are: {', '.join(names) or 'none yet'}."
        )
    if rest[0] not in names:
        raise UserError(f"There is no benchmark {rest[0]!r}. There are: {', '.join(names) or 'none yet'}.")
    return call(in_venv("python"), "-m", f"benchmarks.bench_{rest[0]}", *rest[1:])


def docs(options, rest):
    environment(EXTRAS["docs"])
    if options.serve:
        return call(in_venv("python"), "-m", "mkdocs", "serve", *rest)
    status = call(in_venv("python"), "-m", "mkdocs", "build", "--strict", *rest)
    if not status:
        say(f"Open {os.path.join(ROOT, 'site', 'index.html')}")
    return status


def gallery(options, rest):
    environment(EXTRAS["gallery"])
    return call(in_venv("python"), os.path.join("examples", "gallery", "run.py"), *rest)


def parse(arguments):
    parser = argparse.ArgumentParser(prog="run.py", description="lightning-grad: try it, test it, measure it, read it.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add = commands.add_parser
    add("demo", allow_abbrev=False, help="train a small GPT on CPU, then say what to open; options go to the trainer")
    one = add(
        "test", allow_abbrev=False, help="all a merge must pass; other arguments go to pytest, which then runs alone"
    )
    one.add_argument("--only", metavar="STAGES", help="comma-separated: " + ", ".join(STAGES))
    one.add_argument("--quick", action="store_true", help="leave out tests marked slow")
    add("bench", allow_abbrev=False, help="one benchmark, by name")
    add(
        "gallery",
        allow_abbrev=False,
        help="run every example at full length and write a report; --only NAMES, --short",
    )
    add("docs", allow_abbrev=False, help="build the documentation").add_argument("--serve", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    if options.command is None:
        parser.print_help()
        raise SystemExit(0)
    return options, [part for part in rest if part != "--"]


def main(arguments):
    try:
        check_python(sys.version_info)
        options, rest = parse(arguments)
        return {"demo": demo, "test": test, "bench": bench, "gallery": gallery, "docs": docs}[options.command](
            options, rest
        )
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
