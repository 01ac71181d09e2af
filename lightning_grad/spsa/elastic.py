"""One member of an elastic run: joins, contributes, proposes, catches up, leaves.

Each step ends with one record, and the first compare-and-set on its key decides what it says, so any member may propose
and nobody needs to agree with anybody. The weights are a function of the records: a member that missed some applies
them and has the same bits as all the others.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lightning_grad._validate import check_choice, check_int, check_range
from lightning_grad.spsa.auth import Authenticator
from lightning_grad.spsa.errors import JoinTimeoutError, ReplicaMismatchError, StoreLostError
from lightning_grad.spsa.membership import Contribution, Genesis, Membership, SharedRecord, next_members, vote
from lightning_grad.spsa.observer import read_genesis, read_record
from lightning_grad.spsa.replayer import catch_up, make_plan
from lightning_grad.spsa.rule import StepUpdate, quantize
from lightning_grad.spsa.session import Session
from lightning_grad.spsa.store import Store

log = logging.getLogger(__name__)
_POLL_S = 0.2
_TRIES = 20


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a function of the step alone, so that a late joiner knows it too.

    Args:
        lr: Peak, > 0.
        total_steps: The run ends after this many steps.
        kind: ``"constant"``, ``"linear"`` or ``"cosine"`` decay to zero.
        warmup_steps: Steps of linear rise at the start.
    """

    lr: float
    total_steps: int
    kind: str = "constant"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        check_range("lr", self.lr, 0.0, 1e10, "(]")
        check_int("total_steps", self.total_steps, 1)
        check_choice("lr_schedule", self.kind, ("constant", "linear", "cosine"))
        check_int("warmup_steps", self.warmup_steps, 0, self.total_steps)

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        if self.kind == "linear":
            return self.lr * max(1.0 - done, 0.0)
        if self.kind == "cosine":
            return self.lr * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
        return self.lr


@dataclass(frozen=True)
class ElasticOptions:
    """Patience and votes; see the strategy for their meaning."""

    min_workers: int = 1
    join_timeout: float = 600.0
    step_timeout: float = 30.0
    max_missed: int = 3
    stop_policy: str = "majority"
    heal: bool = False

    def __post_init__(self) -> None:
        check_int("min_workers", self.min_workers, 1, 65535)
        check_range("join_timeout", self.join_timeout, 0.0, 1e7, "(]")
        check_range("step_timeout", self.step_timeout, 0.0, 1e6, "(]")
        check_int("max_missed", self.max_missed, 1, 255)
        check_choice("stop_policy", self.stop_policy, ("majority", "any", "all"))


class ElasticWorker:
    """A member. Calls block until the step is decided.

    Args:
        store: Connection of this worker.
        session: Engine and journal at the base weights; its header's ``run_id`` is the run's name.
        schedule: Learning rate.
        options: Patience and votes.
        auth: Authentication of messages.
        rescue: Where the journal is saved when the store is lost and no journal file is open.

    Attributes:
        worker: Id in the run; a new one after an eviction.
        stale: Contributions that came too late.
        missed: Contributions of others that were missing in records this worker proposed.
        rejected: Messages that were not what they should be.
        replayed: Records applied without having taken part.
        stopped: Whether the run has ended.
        waited_s: Seconds the last step waited for its record.
    """

    def __init__(
        self,
        store: Store,
        session: Session,
        schedule: Schedule,
        options: ElasticOptions,
        auth: Authenticator,
        rescue: Path | None = None,
    ) -> None:
        self._store, self.session, self._schedule, self._options, self._auth = store, session, schedule, options, auth
        self._rescue = rescue
        self._membership = Membership({})
        self._void: set[int] = set()  # left before they were let in
        self._base = [p.detach().clone() for p in session.engine.params] if options.heal else None
        self.stale = self.missed = self.rejected = self.replayed = 0
        self._last_rejection = ""
        self.stopped = False
        self.waited_s = 0.0
        self.at: Callable[[str, int], None] = lambda point, step: None  # a seam for fault injection
        with self._told():
            self.worker = store.count("n", 1) - 1

    @property
    def step(self) -> int:
        """Next journal step."""
        return self.session.step

    @property
    def roster(self) -> tuple[int, ...]:
        """Members of the next step."""
        return self._membership.roster

    # -- joining --------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Found the run or catch up with it, and become a member.

        Raises:
            SPSAConfigError: The run has other settings, other base weights or another key.
            JoinTimeoutError: Not enough workers came, or nobody let this one in.
        """
        with self._told():
            genesis = self._genesis()
            genesis.check_against(self.session.header, asdict(self._schedule))
            self._membership = Membership(dict.fromkeys(genesis.roster, 0))
            self._apply_committed()
            self._await_admission()

    def _genesis(self) -> Genesis:
        deadline = time.monotonic() + self._options.join_timeout
        while (genesis := read_genesis(self._store, self._auth)) is None:
            self._say("j")
            here = [w for w in range(self._store.count("n", 0)) if self._store.has([f"j/{w}"])]
            ready = [w for w in here if self._said("j", w) and not self._said("l", w)]
            if len(ready) >= self._options.min_workers:  # whoever sees it first: any of the ready ones may be dead
                mine = Genesis(self.session.header, tuple(ready), asdict(self._schedule))
                self._store.first("g", self._auth.seal("g", 0, 0, mine.to_bytes()))
            elif time.monotonic() > deadline:
                strange = [w for w in here if not self._said("j", w)]
                raise JoinTimeoutError(
                    f"SPSA: {len(ready)} of `min_workers` {self._options.min_workers} workers came within"
                    f" {self._options.join_timeout:g} s."
                    + (f" Messages of {len(strange)} more cannot be read: {self._auth.advice}" if strange else "")
                )
            else:
                self._store.wait(["g"], _POLL_S)
        return genesis

    def _await_admission(self) -> None:
        """Apply records until a roster holds this worker; if the members are dead, move the run on."""
        if self.stopped or self.worker in self._membership.missed:
            return
        if self.worker in self._membership.admitted:  # evicted: an id is used once
            self.worker = self._store.count("n", 1) - 1
        self._say("j")
        deadline = progress = time.monotonic()
        deadline += self._options.join_timeout
        while self.worker not in self._membership.missed and not self.stopped:
            now = time.monotonic()
            if now > deadline:
                raise JoinTimeoutError(f"SPSA: no member let this worker in within {self._options.join_timeout:g} s.")
            patience = (len(self.roster) + 1) * self._options.step_timeout
            if now - progress > patience or all(self._said("l", w) for w in self.roster):
                self._propose(self.step)
            found = self._store.wait([f"r/{self.step}"], _POLL_S)
            if self._apply_committed():
                progress = time.monotonic()
            elif found:
                time.sleep(_POLL_S)  # it is no record; a member will replace it

    # -- one step -------------------------------------------------------------------------------------------------

    def prepare(self) -> bool:
        """Catch up before measuring; ``False`` if the run has ended."""
        with self._told():
            self._apply_committed()
            self._await_admission()
        return not self.stopped

    def finish(self, stop: bool = False) -> StepUpdate | None:
        """Contribute what the session has measured and wait for the record of the step.

        Args:
            stop: Vote for the end of the run.

        Returns:
            The update, or ``None`` if the step was decided without this worker.

        Raises:
            As :meth:`Session.commit` does; ``StoreLostError``, with the place of the journal.
        """
        step = self.step
        with self._told():
            if self._read(step) is not None:
                self.stale += 1
                self.session.pending = []
                self._apply_committed()
                return None
            self.at("measured", step)
            mine = Contribution(self.session.payload(), stop=stop)
            self._store.put(f"c/{step}/{self.worker}", self._auth.seal("c", step, self.worker, mine.to_bytes()))
            self.at("posted", step)
            start = time.perf_counter()
            shared = self._decided(step)
            self.waited_s = time.perf_counter() - start
            self.at("decided", step)
            return self._apply(shared)

    def leave(self) -> None:
        """Say good-bye, so that nobody waits."""
        try:
            self._say("l")
        except StoreLostError:
            log.info("SPSA: the store was gone before worker %d could leave.", self.worker)

    def _decided(self, step: int) -> SharedRecord:
        """Wait for the record of a step; propose it if all whose turn comes first have left or kept silent."""
        roster = self.roster
        turn = step % len(roster)
        ahead = (roster[turn:] + roster[:turn])[: (roster.index(self.worker) - turn) % len(roster)]
        start = time.monotonic()
        while ahead and (left := start + (len(ahead) + 1) * self._options.step_timeout - time.monotonic()) > 0:
            if self._store.wait([f"r/{step}"], min(_POLL_S, left)):
                break
            ahead = tuple(w for w in ahead if not self._said("l", w))
        if not ahead:
            self._await_contributions(step)
        return self._read(step) or self._propose(step)

    def _await_contributions(self, step: int) -> None:
        deadline = time.monotonic() + self._options.step_timeout
        waiting = [w for w in self.roster if w != self.worker]
        while waiting and (left := deadline - time.monotonic()) > 0:
            if self._store.wait([f"c/{step}/{w}" for w in waiting], min(_POLL_S, left)):
                return
            if self._store.has([f"r/{step}"]):
                return
            waiting = [w for w in waiting if not self._store.has([f"c/{step}/{w}"]) and not self._said("l", w)]

    def _propose(self, step: int) -> SharedRecord:
        """Write the record of a step from what can be seen, unless somebody did; returns the one that holds."""
        key = f"r/{step}"
        for _ in range(_TRIES):
            wrong = self._store.get(key)
            if wrong is not None and (found := self._read(step)) is not None:
                return found
            shared = self._build(step)
            self.at("built", step)
            # a value that is no record of this step is nobody's decision and may be replaced
            self._store.first(key, self._auth.seal("r", step, 0, shared.to_bytes()), wrong or b"")
            self.at("proposed", step)
            if (found := self._read(step)) is not None:
                if found == shared:
                    for worker in self._membership.admitted:
                        self._store.drop(f"c/{step - 2}/{worker}")
                return found
        raise StoreLostError(f"SPSA: somebody keeps writing garbage to the store at {self._store.address}.")

    def _build(self, step: int) -> SharedRecord:
        session, members = self.session, self._membership
        size = session.header.directions * session.rule.codec.unit
        seen: dict[int, Contribution] = {}
        for worker in members.roster:
            data = self._store.get(f"c/{step}/{worker}")
            if data is None:
                continue
            payload = self._auth.open("c", step, worker, data)
            mine = None if payload is None else Contribution.from_bytes(payload, size)
            if mine is None:
                self._reject(f"the contribution to step {step}", worker)
            else:
                seen[worker] = mine
        self.missed += len(members.missed) - len(seen)
        silent = session.rule.codec.abstain * session.header.directions
        codes = b"".join(seen[w].codes if w in seen else silent for w in members.roster)
        last = step + 1 >= self._schedule.total_steps
        stop = last or vote(sum(c.stop for c in seen.values()), len(members.missed), self._options.stop_policy)
        record = session.record(codes, self._schedule.rate(step), members.roster, stop)
        if session.digest_due():
            terms = session.rule.copy().advance(record).terms
            record = replace(record, digest=session.engine.preview_digest(quantize(terms)))
        gone = {w for w in members.roster if self._said("l", w)}
        return SharedRecord(record, next_members(members, seen, gone, self._ready(), self._options.max_missed))

    def _ready(self) -> list[int]:
        """Newcomers that have caught up."""
        ready = []
        for worker in range(self._store.count("n", 0)):
            if worker in self._membership.admitted or worker in self._void:
                continue
            if self._said("l", worker):
                self._void.add(worker)
            elif self._said("j", worker):
                ready.append(worker)
        return ready

    # -- records --------------------------------------------------------------------------------------------------

    def _read(self, step: int) -> SharedRecord | None:
        """The valid record of a step, if it is decided."""
        try:
            return read_record(self._store, self._auth, self._membership, self.session.header, step)
        except ValueError as error:
            self._reject(f"the record of step {step}", None, str(error))
            return None

    def _apply(self, shared: SharedRecord) -> StepUpdate | None:
        update: StepUpdate | None = None
        try:
            update = self.session.commit(shared.record)
        except ReplicaMismatchError as error:
            if self._base is None:
                raise
            self.session.journal.append(shared.record)  # the record is right, this replica is not
            self._heal(error)
        self._membership.advance(shared)
        self.stopped = shared.record.stop
        return update

    def _apply_committed(self) -> int:
        """Apply all decided records from the current step on, element ranges at a time; returns how many."""
        rule, journal = self.session.rule, self.session.journal
        step = first = rule.step
        try:
            while not self.stopped and (shared := self._read(step)) is not None:
                journal.append(shared.record)
                self._membership.advance(shared)
                self.stopped = shared.record.stop
                step += 1
        finally:  # the weights follow the journal, also if the store is lost half-way
            if step > first:
                self.session.pending = []
                plan = make_plan(journal, after=rule)
                try:
                    catch_up(self.session.engine, plan)
                    self.session.rule = plan.rule
                except ReplicaMismatchError as error:
                    self._heal(error)
                self.replayed += step - first
        return step - first

    def _heal(self, error: ReplicaMismatchError) -> None:
        """Start over from the base weights and replay the journal; without a copy of them, give up."""
        if self._base is None:
            raise error
        log.warning("SPSA: worker %d differs after step %d; it replays from the base weights.", self.worker, error.step)
        plan = make_plan(self.session.journal)
        self.session.engine.reset(self._base)
        catch_up(self.session.engine, plan)
        self.session.rule = plan.rule

    # -- small things ---------------------------------------------------------------------------------------------

    def _say(self, kind: str) -> None:
        self._store.put(f"{kind}/{self.worker}", self._auth.seal(kind, 0, self.worker, b"1"))

    def _said(self, kind: str, worker: int) -> bool:
        data = self._store.get(f"{kind}/{worker}")
        return data is not None and self._auth.open(kind, 0, worker, data) == b"1"

    def _reject(self, what: str, worker: int | None, why: str = "") -> None:
        self.rejected += 1
        whose = "" if worker is None else f" of worker {worker}"
        text = f"SPSA: {what}{whose} is not valid and is ignored. {why}"
        if text != self._last_rejection:  # it may be read many times
            log.warning("%s", text)
        self._last_rejection = text

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Return to the exact point and save the journal if the store is lost, and say where it is."""
        try:
            yield
        except StoreLostError as error:
            self.session.engine.restore()
            path = self.session.journal.path
            if path is None and self._rescue is not None and len(self.session.journal):
                self._rescue.parent.mkdir(parents=True, exist_ok=True)
                self.session.journal.save(self._rescue)
                path = self._rescue
            saved = f"journal saved to {path}" if path else "there was no journal to save"
            raise StoreLostError(
                f"SPSA: lost the store at {self._store.address} at step {self.step}; {saved}; restart the store with"
                f" --journal {path or 'FILE'} and the workers with the same run_id."
            ) from error
