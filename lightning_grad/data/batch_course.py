"""The way of an adaptive loader through one epoch: plain arithmetic on counts, no data and no order.

The unit is the optimizer step: ``accumulate`` micro-batches on each of W processes, cut from one run of the epoch's
order. A change of plan waits for a step whose first micro-batch has an index that the new accumulation divides, which
is what an accumulation counter modulo ``accumulate`` needs; the samples left at the end are spread over one last step
of full length. So no micro-batch is empty, and no window is partial.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_grad._validate import check_int


@dataclass(frozen=True)
class MicroBatch:
    """Where a micro-batch stands in its epoch and in its optimizer step.

    Attributes:
        epoch: Epoch it belongs to.
        index: Position in the epoch, from 0; the ``batch_idx`` of Lightning. -1 before the first.
        part: Position in its optimizer step, from 0.
        accumulate: Micro-batches per process in its optimizer step.
        micro: Planned samples per micro-batch.
        size: Samples in it, on this process.
        step_start: Samples of the epoch before its optimizer step, over all processes.
        step_size: Samples in its optimizer step, over all processes.
    """

    epoch: int
    index: int
    part: int
    accumulate: int
    micro: int
    size: int
    step_start: int
    step_size: int

    @property
    def samples_after(self) -> int:
        """Samples of the epoch that are used once its optimizer step is done."""
        return self.step_start + self.step_size


def step_size(remaining: int, micro: int, accumulate: int, world: int, drop_last: bool = False) -> int:
    """Samples in the next optimizer step, all processes, when ``remaining`` are left; 0 at the end of the epoch."""
    full = micro * accumulate * world
    if remaining < full:
        return 0 if drop_last else remaining
    # fewer left over than one for each micro-batch: this step takes them along
    return remaining if not drop_last and remaining - full < accumulate * world else full


def _least(micro: int, accumulate: int, world: int, drop_last: bool) -> int:
    """Samples that are enough for one more step of a plan."""
    return accumulate * world * (micro if drop_last else 1)


def num_steps(remaining: int, micro: int, accumulate: int, world: int, drop_last: bool = False) -> int:
    """Optimizer steps until the end of the epoch if the plan stays."""
    full = micro * accumulate * world
    steps, rest = divmod(remaining, full)
    if drop_last or rest == 0:
        return steps
    return steps + 1 if steps == 0 or rest >= accumulate * world else steps


def check_power_of_two(name: str, value: int) -> int:
    """Return ``value`` if it is a power of two, else raise a ``ValueError`` with the nearest ones."""
    check_int(name, value, 1)
    if value & (value - 1):
        low = 1 << (value.bit_length() - 1)
        raise ValueError(f"`{name}` must be a power of two, got {value}: use {low} or {2 * low}.")
    return value


class Course:
    """The way through one epoch: what is dispatched, what is asked for, and how many micro-batches it will be.

    ``ahead`` holds changes ``(index, micro, accumulate)`` that a resumed epoch must repeat where they happened,
    ``request`` a change ``(micro, accumulate, first index)`` that still waits, ``changes`` those made.
    """

    def __init__(
        self, start: MicroBatch, ahead: list[tuple[int, int, int]], request: tuple[int, int, int] | None
    ) -> None:
        self.start, self.ahead, self.request = start, list(ahead), request
        self.changes: list[tuple[int, int, int]] = []
        self.micro, self.accumulate = start.micro, start.accumulate
        done = start.part + 1 == start.accumulate
        self.index = start.index + 1 if done else max(0, start.index - start.part)  # of the step to be formed next
        self.cursor = start.samples_after if done else start.step_start
        self.skip = 0 if done else start.part + 1  # micro-batches of that step which are done

    @property
    def final_plan(self) -> tuple[int, int]:
        """The plan once the changes that must be repeated are made."""
        return self.ahead[-1][1:] if self.ahead else (self.micro, self.accumulate)

    def fresh(self, epoch: int) -> Course:
        """The start of another epoch with the plan that is in force, or about to be."""
        micro, accumulate = self.final_plan
        request = None if self.request is None else (*self.request[:2], 0)
        return Course(MicroBatch(epoch, -1, -1, accumulate, micro, 0, 0, 0), [], request)

    def fit(self, total: int, world: int) -> None:
        """Accumulate less if there is no sample left for each micro-batch (after a resume on more processes)."""
        while 0 < total - self.cursor < self.accumulate * world and self.accumulate > 1 and not self.skip:
            self.accumulate //= 2

    def form(self, total: int, world: int, drop_last: bool) -> int:
        """Adopt what is due, and return the samples in the next step; 0 at the end."""
        left = total - self.cursor
        if self.skip:
            pass
        elif self.ahead:
            if self.ahead[0][0] == self.index:
                self._take(*self.ahead.pop(0)[1:])
        elif self.request is not None:
            micro, accumulate, first = self.request
            # the micro-batch that was announced as the last of the epoch must stay the last, and no other become it
            fits = left >= _least(micro, accumulate, world, drop_last)
            fits &= left >= _least(self.micro, self.accumulate, world, drop_last)
            if self.index >= first and self.index % accumulate == 0 and fits:
                self._take(micro, accumulate)
                self.request = None
        return 0 if left < world else step_size(left, self.micro, self.accumulate, world, drop_last)

    def _take(self, micro: int, accumulate: int) -> None:
        self.micro, self.accumulate = micro, accumulate
        self.changes.append((self.index, micro, accumulate))

    def length(self, total: int, world: int, drop_last: bool) -> int:
        """Micro-batches of the whole epoch, in time that does not depend on their number."""
        index, cursor, micro, accumulate = self.index, self.cursor, self.micro, self.accumulate
        if self.skip:
            size = step_size(total - cursor, micro, accumulate, world, drop_last)
            index, cursor = index + accumulate, cursor + size
        for at, new_micro, new_accumulate in self.ahead:
            cursor += (at - index) * micro * world
            index, micro, accumulate = at, new_micro, new_accumulate
        if self.request is not None:
            new_micro, new_accumulate, first = self.request
            steps = max(0, -(-(first - index) // accumulate))
            if new_accumulate > accumulate:
                steps += -(index + steps * accumulate) % new_accumulate // accumulate
            then = cursor + steps * micro * accumulate * world
            to_go = num_steps(total - cursor, micro, accumulate, world, drop_last)
            if steps < to_go and total - then >= _least(new_micro, new_accumulate, world, drop_last):
                index, cursor, micro, accumulate = index + steps * accumulate, then, new_micro, new_accumulate
        if total - cursor < world:
            return index
        return index + accumulate * num_steps(total - cursor, micro, accumulate, world, drop_last)


def bounds(part: int, parts: int, size: int) -> tuple[int, int]:
    """Slice of part ``part`` when ``size`` samples are cut into ``parts`` runs, the first ones longer by one."""
    each, longer = divmod(size, parts)
    low = part * each + min(part, longer)
    return low, low + each + (part < longer)
