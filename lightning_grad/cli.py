"""The command ``lightning-grad``: LightningCLI with lazy optimizers, parameter groups and one-line errors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, LRSchedulerTypeTuple
from lightning.pytorch.cli import SaveConfigCallback as _SaveConfigCallback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

import lightning_grad
from lightning_grad._cli_errors import ConfigError, locate, one_line, raised_by_us
from lightning_grad._cli_optimizers import Interval, OptimizerPlan
from lightning_grad._command import PROG, SUMMARY, main, refuse, version_text
from lightning_grad.callbacks import BindDataSize, RandomStateCheckpoint
from lightning_grad.checkpoint_io import ChecksumCheckpointIO, checkpoint_fault
from lightning_grad.optim.groups import OptimizerGroup
from lightning_grad.spsa.errors import SPSAError

__all__ = ["GradArgumentParser", "LightningGradCLI", "SaveConfig", "main"]


_BAD_INPUT = (ValueError, MisconfigurationException, ModuleNotFoundError, FileNotFoundError)


class GradArgumentParser(LightningArgumentParser):
    """Reports a mistake as one line on stderr and exits with status 2.

    ``JSONARGPARSE_DEBUG=true`` in the environment brings the traceback back.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # `--trainer.max_epoch` must be an error, not an abbreviation that breaks when a second option fits it
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.automatic: dict[str, dict[str, Any]] = {"optimizer": {}, "lr_scheduler": {}}
        self.family: list[GradArgumentParser] = [self]
        self._config_file = ""

    def add_optimizer_args(
        self, optimizer_class: Any = (Optimizer,), nested_key: str = "optimizer", link_to: str = "AUTOMATIC"
    ) -> None:
        """Add the arguments of an optimizer, as in the stock command."""
        super().add_optimizer_args(optimizer_class, nested_key, link_to)
        if link_to == "AUTOMATIC":
            self.automatic["optimizer"][nested_key] = optimizer_class

    def add_lr_scheduler_args(
        self,
        lr_scheduler_class: Any = LRSchedulerTypeTuple,
        nested_key: str = "lr_scheduler",
        link_to: str = "AUTOMATIC",
    ) -> None:
        """Add the arguments of a scheduler, as in the stock command."""
        super().add_lr_scheduler_args(lr_scheduler_class, nested_key, link_to)
        if link_to == "AUTOMATIC":
            self.automatic["lr_scheduler"][nested_key] = lr_scheduler_class

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Parse a config file and remember its name for :meth:`error`."""
        self._config_file = str(cfg_path)
        parsed: Namespace = super().parse_path(cfg_path, *args, **kwargs)
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with status 2."""
        if not self.exit_on_error or _debugging():
            super().error(message, ex)
        known = [key for parser in self.family for key in parser.get_defaults().keys()]  # noqa: SIM118 nested keys
        refuse(self.prog, one_line(message, known, self._config_file))


class SaveConfig(_SaveConfigCallback):
    """Save the config next to the logs, and never overwrite or refuse: a different one is ``config-1.yaml`` and so on.

    A run without a logger and without ``default_root_dir`` has no directory of its own, and saves none.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the file's name, then save as the stock callback does."""
        if trainer.logger is None and os.path.realpath(trainer.default_root_dir) == os.path.realpath(os.getcwd()):
            return
        directory = trainer.log_dir  # a collective call: every rank makes it
        if not self.already_saved and directory is not None and "://" not in directory:
            self.config_filename = self._free_name(Path(directory))
            self.overwrite = True
        super().setup(trainer, pl_module, stage)

    def _free_name(self, directory: Path) -> str:
        text = self.parser.dump(self.config, skip_none=False)
        stem, suffix = os.path.splitext(self.config_filename)
        name, number = self.config_filename, 0
        while (directory / name).exists() and (directory / name).read_text(encoding="utf-8") != text:
            number += 1
            name = f"{stem}-{number}{suffix}"
        return name


class _SetupErrors(Callback):
    """Marks what was refused before the first batch as bad input, not a crash.

    That is a ``MisconfigurationException``, and whatever a ``raise`` of this package made.
    """

    def __init__(self) -> None:
        self.running = False

    def _begin(self, *args: Any, **kwargs: Any) -> None:
        self.running = True

    def _end(self, *args: Any, **kwargs: Any) -> None:
        self.running = False

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _begin
    on_sanity_check_end = _end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not self.running and (isinstance(exception, MisconfigurationException) or raised_by_us(exception)):
            exception.bad_input = True  # type: ignore[attr-defined]


class LightningGradCLI(LightningCLI):
    """LightningCLI whose optimizers are built inside ``configure_optimizers``.

    Differs from the stock class: the optimizer sees the parameters the model really trains; ``optimizer_groups`` and
    ``no_decay`` give parameters settings of their own; a mistake is one line on stderr and exit status 2; runs save
    random states and write checksummed checkpoints (``exact_resume``); saving the config never stops a run.

    Args:
        args: Arguments, as a list of words, a dict, or ``None`` for those of the process.
        auto_configure_optimizers: As in the stock class: offer ``optimizer`` and ``lr_scheduler``.
        **kwargs: Everything else the stock class takes.
    """

    def __init__(self, *, args: ArgsType = None, auto_configure_optimizers: bool = True, **kwargs: Any) -> None:
        self._offers_optimizers = auto_configure_optimizers
        self._parsers: list[GradArgumentParser] = []
        kwargs.setdefault("parser_class", GradArgumentParser)
        kwargs.setdefault("save_config_callback", SaveConfig)
        # the stock class builds optimizers when the command line is read; ours adds and builds them itself
        super().__init__(args=args, auto_configure_optimizers=False, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser that knows its siblings, for "did you mean"."""
        kwargs.setdefault(
            "dump_header",
            [f"lightning-grad=={lightning_grad.__version__}", f"lightning.pytorch=={lightning.__version__}"],
        )
        parser = super().init_parser(**kwargs)
        if isinstance(parser, GradArgumentParser):
            self._parsers.append(parser)
            parser.family = self._parsers
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys that are not arguments of a class."""
        super().add_default_arguments_to_parser(parser)
        parser.add_argument(
            "--exact_resume",
            type=bool,
            default=True,
            help="Save random states and checksums in checkpoints, so that a resumed run equals an uninterrupted one.",
        )
        if not self._offers_optimizers:
            return
        parser.add_argument(
            "--optimizer_groups",
            type=list[OptimizerGroup],
            default=[],
            help="Parameters with optimizer settings of their own, chosen by name; the first match counts.",
        )
        parser.add_argument(
            "--no_decay",
            type=list[str],
            default=[],
            help="Set weight_decay to 0 for biases, 1-d parameters and modules whose class name has one of these "
            "words, e.g. [bias, norm, embedding].",
        )
        parser.add_argument(
            "--lr_scheduler_interval",
            type=Interval,
            default="auto",
            help="When the lr_scheduler steps; auto: each step for schedules that count steps, else each epoch.",
        )

    def link_optimizers_and_lr_schedulers(self, parser: LightningArgumentParser) -> None:  # type: ignore[override]
        """Add ``optimizer`` and ``lr_scheduler`` unless the user's subclass added its own, then link."""
        if self._offers_optimizers and isinstance(parser, GradArgumentParser):
            if not parser.automatic["optimizer"]:
                parser.add_optimizer_args()
            if not parser.automatic["lr_scheduler"]:
                parser.add_lr_scheduler_args()
        super().link_optimizers_and_lr_schedulers(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse ``args``; they may be given while the process has arguments of its own."""
        self.config = parser.parse_object(args) if isinstance(args, dict | Namespace) else parser.parse_args(args)
        # now, because the stock class goes on to read hyperparameters from the file
        checkpoint = self._section(self.config).get("ckpt_path")
        fault = checkpoint_fault(str(checkpoint)) if checkpoint else None
        if fault:
            self._refuse(f"`ckpt_path`: {fault}")

    def instantiate_classes(self) -> None:
        """Instantiate model, data and Trainer; a value that a constructor refuses is one line and exit status 2."""
        try:
            super().instantiate_classes()
            plan = self._optimizer_plan()
            if plan is not None:
                plan.check(self.model)
                plan.attach(self.model)
        except _BAD_INPUT as error:
            if isinstance(self.parser, GradArgumentParser) and not _debugging():
                self._refuse(locate(error, self._section(self.config).as_dict()))
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Instantiate the Trainer with what an exact resume needs, unless the config has it already."""
        section = self._section(self.config_init)
        configured = section.get("trainer") or {}
        if not isinstance(configured, Namespace | dict):
            raise ConfigError(f"`trainer` takes settings like max_epochs, got {configured!r}.")
        callbacks = _listed(kwargs.pop("callbacks", None) or configured.get("callbacks"))
        # the stock class adds these itself; two of a kind that has state are an error
        keys = {key for parser in self._parsers for key in parser.callback_keys}
        given = [*callbacks, *_listed(self.trainer_defaults.get("callbacks")), *map(section.get, keys)]
        callbacks.append(_SetupErrors())
        exact = bool(section.get("exact_resume"))
        if exact and not any(isinstance(c, RandomStateCheckpoint) for c in given):
            callbacks.append(RandomStateCheckpoint())
        if not any(isinstance(c, BindDataSize) for c in given):
            callbacks.append(BindDataSize())  # idle unless an optimizer asks for the size of the training set
        trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        if exact:
            _use_checksums(trainer, configured.get("plugins"))
        return trainer

    def _optimizer_plan(self) -> OptimizerPlan | None:
        section = self._section(self.config_init)
        parser = next((p for p in self._parsers if p.automatic["optimizer"]), None)
        if parser is None:
            return None
        optimizers, schedulers = parser.automatic["optimizer"], parser.automatic["lr_scheduler"]
        if len(optimizers) > 1 or len(schedulers) > 1:
            raise MisconfigurationException(
                f"At most one optimizer and one lr_scheduler can be 'AUTOMATIC', got {[*optimizers, *schedulers]}. "
                "Give the others a `link_to` and write `configure_optimizers`."
            )
        optimizer, scheduler = _chosen(section, optimizers), _chosen(section, schedulers)
        if optimizer is None:
            for key in ("optimizer_groups", "no_decay", "lr_scheduler"):
                if section.get(key):
                    raise ConfigError(f"`{key}` needs an `optimizer` in the config; the model's own cannot be split.")
            if self.config_init.get("subcommand") == "fit" and not is_overridden("configure_optimizers", self.model):
                name = type(self.model).__name__
                raise ConfigError(
                    f"{name} has no `configure_optimizers` and the config no `optimizer`. Name one, e.g."
                    " --optimizer=AdamW --optimizer.lr=1e-3."
                )
            return None
        return OptimizerPlan(
            optimizer=optimizer,
            lr_scheduler=scheduler,
            interval=section.get("lr_scheduler_interval", "auto"),
            combine=self.configure_optimizers,
            groups=section.get("optimizer_groups") or [],
            no_decay=section.get("no_decay") or [],
        )

    def _section(self, config: Namespace) -> Namespace:
        """The part of a config that belongs to the chosen subcommand."""
        section: Namespace = config.get(str(config.get("subcommand")), config)
        return section

    def _refuse(self, text: str) -> NoReturn:
        refuse(self.parser.prog, text)


def _chosen(section: Namespace, offered: Mapping[str, Any]) -> dict[str, Any] | None:
    """The class and arguments the config gives for the one key that is offered, if it gives any."""
    for key, offer in offered.items():
        init = section.get(key)
        if isinstance(offer, type):  # the user's subclass fixed the class: the config has its arguments only
            return {"class_path": f"{offer.__module__}.{offer.__qualname__}", "init_args": init.as_dict()}
        if init:
            chosen: dict[str, Any] = init.as_dict()
            return chosen
    return None


def _listed(value: Any) -> list[Any]:
    """What the Trainer takes as one object, several or ``None``, as a list of its own."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _use_checksums(trainer: Trainer, plugins: Any) -> None:
    """Give the strategy our checksummed CheckpointIO where it writes single files and nobody chose another one."""
    strategy = trainer.strategy
    if (
        isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
        and type(strategy.checkpoint_io) is TorchCheckpointIO
        and not any(isinstance(plugin, CheckpointIO) for plugin in _listed(plugins))
    ):
        strategy.checkpoint_io = ChecksumCheckpointIO()


def _debugging() -> bool:
    return os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true"


def run_trainer_command(words: Sequence[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Mistakes in the input are one line and exit status 2; what ends an SPSA run later is one line and status 1.
    """
    if any(word.startswith("--print_completion") for word in words):
        set_parsing_settings(add_print_completion_argument=True)
    about = {"prog": PROG, "description": SUMMARY, "version": version_text()}
    try:
        LightningGradCLI(args=list(words), parser_kwargs=about)
    except Exception as error:
        bad_input = isinstance(error, ConfigError) or hasattr(error, "bad_input")
        if _debugging() or not (bad_input or isinstance(error, SPSAError)):
            raise
        refuse(PROG, one_line(str(error)), status=2 if bad_input else 1)
