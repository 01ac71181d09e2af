"""One worker of a run, without Lightning: measure projected gradients, encode them, take in records."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grad.spsa.engine import SPSAEngine
from lightning_grad.spsa.errors import JournalError, NoFiniteLossError, ReplicaMismatchError, SPSAConfigError
from lightning_grad.spsa.forward import Forwards
from lightning_grad.spsa.journal import Header, Journal, Record
from lightning_grad.spsa.options import Options
from lightning_grad.spsa.replayer import Progress, catch_up, check_base, make_plan
from lightning_grad.spsa.rule import StepUpdate, UpdateRule

_SAME_LOSS_WARNING = 20
_ADVICE = "Lower the learning rate, or `eps` if one side is finite; or look at the data."


@dataclass
class Measured:
    """Losses of the slots since the last step, for logging."""

    loss: float = math.nan
    spread: float = math.nan
    grad: float = math.nan


class Session:
    """Engine, rule and journal of one worker.

    Args:
        options: Settings of the run.
        module: The model; its parameters are trained in place.
        slots: Directions ``K`` of this worker per step.
        run_id: Name of the run; goes into the header. ``None``: the hash of the other settings.

    Raises:
        SPSAConfigError: The parameters cannot be trained.
    """

    def __init__(self, options: Options, module: nn.Module, slots: int, run_id: str | None = None) -> None:
        self.options = options
        self.module = module
        self.engine = SPSAEngine(
            module.named_parameters(),
            seed=options.seed,
            eps_log2=options.eps_log2,
            restore=options.restore,
            kernel=options.kernel,
        )
        self._begin(options.header(self.engine, slots, run_id))
        self._forwards = Forwards(module, options.forward_mode, self.engine.device)
        self.measured = Measured()
        self._same = 0
        self._bad = ""  # where the loss ceased to be finite
        self._warned = False

    def _begin(self, header: Header) -> None:
        self.header = header
        self.rule = UpdateRule(header)
        self.journal = Journal(header)
        self.pending: list[float] = []

    @property
    def step(self) -> int:
        """Next journal step."""
        return self.rule.step

    # -- measuring ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, worker: int, forward: Callable[[], Any]) -> Any:
        """Projected gradients of one micro-batch along this worker's next ``directions`` directions.

        Args:
            worker: Id of this worker in the roster.
            forward: Runs the training step on the batch; returns a loss, a mapping with ``"loss"``, or ``None``.

        Returns:
            The last output with a positive perturbation, its loss replaced by the mean of the losses (``None`` if the
            training step returned ``None``). The last direction stays outstanding until the update takes it back.
        """
        self.engine.rebind(self.module.named_parameters())
        if len(self.pending) + self.options.directions > self.header.directions:
            raise SPSAConfigError(
                f"more than {self.header.directions} directions in one step; K must stay constant, so"
                " `accumulate_grad_batches` must not change."
            )
        first = worker * self.header.directions + len(self.pending)
        directions = range(first, first + self.options.directions)
        try:
            return (
                self._two_sided(directions, forward)
                if self.options.sides == 2
                else self._one_sided(directions, forward)
            )
        except BaseException:
            self.engine.restore()
            raise

    def _two_sided(self, directions: range, forward: Callable[[], Any]) -> Any:
        output: Any = None
        for direction in directions:
            # both forwards of a direction see the same random numbers
            with self._forwards.slot(self.options.seed, self.rule.step, direction) as before:
                output, plus = self._loss_at(direction, +1, before, forward)
                _, minus = self._loss_at(direction, -1, before, forward)
            output = self._take(direction, output, plus, minus, (plus - minus) / (2.0 * self.engine.eps))
        return output

    def _one_sided(self, directions: range, forward: Callable[[], Any]) -> Any:
        output: Any = None
        # the centre is shared, and so are the random numbers of the whole micro-batch
        with self._forwards.slot(self.options.seed, self.rule.step, directions[0]) as before:
            _, centre = self._loss_at(directions[0], 0, before, forward)
            for direction in directions:
                output, plus = self._loss_at(direction, +1, before, forward)
                output = self._take(direction, output, plus, centre, (plus - centre) / self.engine.eps)
        return output

    def _loss_at(
        self, direction: int, offset: int, before: Callable[[], None], forward: Callable[[], Any]
    ) -> tuple[Any, float]:
        """Move from wherever the parameters are to ``offset`` steps along a direction, in one pass, and evaluate."""
        if offset:
            back = [(t, d, -multiple) for (t, d), multiple in self.engine.state.items()]
            self.engine.perturb([*back, (self.rule.step, direction, offset)])
        else:
            self.engine.restore()
        before()
        output = forward()
        return output, loss_value(output)

    def _take(self, direction: int, output: Any, plus: float, other: float, gradient: float) -> Any:
        self.pending.append(gradient)
        self.measured = Measured((plus + other) / 2.0, abs(plus - other), gradient)
        self._watch_sameness(plus == other)
        if output is not None:
            self._watch_finiteness(direction, plus, other)
        return with_loss(output, self.measured.loss, self.engine.device)

    def _watch_sameness(self, same: bool) -> None:
        self._same = self._same + 1 if same else 0
        if self._same == _SAME_LOSS_WARNING:
            warnings.warn(
                f"SPSA: the loss did not change in {_SAME_LOSS_WARNING} directions. Does it depend on the trainable"
                " parameters, or are features of trainable layers cached? An objective with steps needs a larger"
                " `eps`.",
                stacklevel=2,
            )

    def _watch_finiteness(self, direction: int, plus: float, other: float) -> None:
        if math.isfinite(plus - other):
            self._bad = ""
            return
        side = "both sides" if math.isnan(plus) and math.isnan(other) else "one side"
        self._bad = self._bad or f"at step {self.rule.step} along direction {direction}, on {side}"
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"SPSA: the loss is not finite {self._bad}; the direction abstains (`spsa/abstained` counts them)."
                f" {self.options.max_bad_steps} steps in a row without any finite loss end the run (`max_bad_steps`)."
                f" {_ADVICE}",
                stacklevel=2,
            )

    def payload(self) -> bytes:
        """Codes of the pending projected gradients; missing slots abstain. Clears them."""
        codes = [self.rule.encode(g) for g in self.pending]
        codes += [self.rule.codec.abstain] * (self.header.directions - len(codes))
        self.pending = []
        return b"".join(codes)

    # -- records --------------------------------------------------------------------------------------------------

    def digest_due(self) -> bool:
        """Whether replicas are compared after the current step."""
        interval = self.options.check_interval
        return interval > 0 and (self.rule.step + 1) % interval == 0

    def commit(self, record: Record, compare: Callable[[int], None] | None = None) -> StepUpdate:
        """Apply a record to the parameters and write it to the journal.

        Args:
            record: Of the current step.
            compare: If given, a digest is taken after the update, passed to it, and kept in the journal.

        Raises:
            JournalError: The record does not fit its roster; nothing has changed.
            UpdateOverflowError: The update is not finite or too large; only the perturbation is outstanding.
            ReplicaMismatchError: The record carries a digest and these parameters have another one.
            SPSAConfigError: A parameter has grown too large for ``eps``.
            NoFiniteLossError: Too many steps in a row in which everyone abstained.
        """
        step = self.rule.step
        update = self.rule.advance(record)
        self.engine.apply(update.terms)
        if record.digest is not None or compare is not None:
            found = self.engine.digest64()
            if record.digest is not None and found != record.digest:
                raise ReplicaMismatchError(
                    f"after step {step} this replica has digest {found:016x}, the record says {record.digest:016x}."
                    " Replay the journal from the base weights with `lightning-grad spsa verify` to see which is it.",
                    step,
                    record.digest,
                    found,
                )
            if compare is not None:
                compare(found)
                record = replace(record, digest=found)
        self.journal.append(record)  # weights and journal agree from here on, whatever is found
        if record.digest is not None:
            self.engine.check_limit()
        if self.rule.bad_steps >= self.options.max_bad_steps:
            began = f"; here it was lost {self._bad}" if self._bad else ""
            raise NoFiniteLossError(
                f"SPSA: no finite loss from any worker for {self.rule.bad_steps} steps (up to step {step}){began}."
                f" {_ADVICE}"
            )
        return update

    def record(self, codes: bytes, lr: float, roster: tuple[int, ...], stop: bool = False) -> Record:
        """Record of the current step; learning rate and roster are left out where they did not change."""
        first = self.rule.step == 0
        return Record(
            codes,
            lr if first or lr != self.rule.lr else None,
            roster if first or roster != self.rule.roster else None,
            stop=stop,
        )

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors; with the base weights, the journal alone is enough."""
        digest = self.engine.digest64()
        return {
            "step": self.rule.step,
            "m2": self.rule.tracker.m2,
            "sigma": self.rule.tracker.scale_log2,
            "roster": list(self.rule.roster),
            "header": self.header.to_json().decode(),
            "journal": torch.frombuffer(bytearray(self.journal.to_bytes()), dtype=torch.uint8),
            "digest64": digest,
        }

    def follow(self, journal: Journal, progress: Progress | None = None) -> None:
        """Start over as a continuation of ``journal``, whose base weights the engine holds, and replay it."""
        self.check_header(journal.header)
        check_base(self.engine, journal)
        plan = make_plan(journal)
        catch_up(self.engine, plan, progress=progress)
        self.header, self.rule, self.journal, self.pending = journal.header, plan.rule, journal, []

    def resume(self, state: Mapping[str, Any], extra: Mapping[str, Tensor] | None) -> None:
        """Continue from a checkpoint whose weights are in the parameters already.

        Raises:
            SPSAConfigError: The settings differ from those of the checkpoint.
            ReplicaMismatchError: The weights are not those of the checkpoint.
        """
        journal = journal_of(state)
        self.check_header(journal.header)
        rule = make_plan(journal).rule
        same = (rule.step, rule.tracker.m2, rule.tracker.scale_log2) == (state["step"], state["m2"], state["sigma"])
        if not same:
            raise JournalError(
                f"the checkpoint's journal leads to step {rule.step} and scale 2**{rule.tracker.scale_log2}, its state"
                f" is of step {state['step']} and scale 2**{state['sigma']}: it is damaged. Resume from another one."
            )
        self.engine.load_extra_state(dict(extra or {}))
        found = self.engine.digest64()
        if found != state["digest64"]:
            raise ReplicaMismatchError(
                f"the checkpoint of step {rule.step} has digest {state['digest64']:016x}, its weights give"
                f" {found:016x}.",
                rule.step,
                state["digest64"],
                found,
            )
        self.header, self.rule, self.journal, self.pending = journal.header, rule, journal, []

    def check_header(self, header: Header) -> None:
        """Raise ``SPSAConfigError`` if a run with ``header`` cannot be continued with these settings."""
        free = {"base", "run_id", "scale_log2"}
        wrong = [text for text in self.header.differences(header) if text.split(":")[0] not in free]
        if wrong:
            raise SPSAConfigError(
                "the settings differ from those of the run to be continued: " + "; ".join(wrong) + "."
            )


def journal_of(state: Mapping[str, Any]) -> Journal:
    """Journal inside a checkpoint's state."""
    return Journal.from_bytes(bytes(state["journal"].cpu().numpy().tobytes()), "the checkpoint's journal")


def loss_value(output: Any) -> float:
    """Scalar loss of a training step; NaN for ``None`` or one that is not finite.

    Raises:
        SPSAConfigError: It is not one real scalar.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None:
        return math.nan
    if isinstance(loss, Tensor):
        if loss.numel() != 1 or loss.is_complex():
            raise SPSAConfigError(
                f"training_step must return one scalar loss, got shape {tuple(loss.shape)} of {loss.dtype}."
            )
        value = float(loss)
    elif isinstance(loss, int | float):
        value = float(loss)
    else:
        raise SPSAConfigError(f"training_step must return one scalar loss, got a {type(loss).__name__}.")
    return value if math.isfinite(value) else math.nan


def with_loss(output: Any, loss: float, device: torch.device) -> Any:
    """The output of a training step with another loss."""
    if output is None:
        return None
    value = torch.tensor(loss, dtype=torch.float32, device=device)
    return {**output, "loss": value} if isinstance(output, Mapping) else value
