"""Journal and replay: round trips, 300 flipped bits, every truncation, replay from any prefix (oracle 12)."""

import itertools
import math
import os
import random
import struct
import sys
import warnings
from dataclasses import replace

import pytest
import torch

from lightning_grad._checksum import chained_crc32
from lightning_grad.spsa import Header, Journal, JournalError, Record, ReplicaMismatchError, digest64, replay
from lightning_grad.spsa.replayer import make_plan
from tests.spsa_helpers import batches, loss_of, make_session, run_alone, tiny_model


def live_run(steps=12, path=None, **options):
    """A run with a changing learning rate, a changing roster, an abstention and digests at every step."""
    session = make_session(**options)
    if path is not None:
        session.journal.open_append(path)
    digests = []
    for step, batch in enumerate(batches(steps)):
        session.measure(0, lambda b=batch: loss_of(session.module, b))
        mine = session.payload()
        if step == 4:
            mine = session.rule.codec.abstain
        roster = (0,) if step < 6 else (0, 3)
        codes = mine * len(roster)
        record = session.record(codes, 2.0**-6 if step < 8 else 2.0**-7, roster, stop=step == steps - 1)
        session.commit(record, digests.append)
    session.journal.close()
    return session, digests


def test_round_trip_through_memory_and_file(tmp_path):
    session, _ = live_run(path=tmp_path / "run.spsa")
    again = Journal.load(tmp_path / "run.spsa")
    assert again.header == session.header
    assert list(again) == list(session.journal)
    assert again.to_bytes() == session.journal.to_bytes() == (tmp_path / "run.spsa").read_bytes()
    assert list(again)[-1].stop
    again.save(tmp_path / "copy.spsa")
    assert (tmp_path / "copy.spsa").read_bytes() == again.to_bytes()


def test_a_plain_record_is_flags_codes_and_check():
    session, _ = live_run(check_interval=0)
    journal = Journal(session.header)
    journal.append(Record(b"\x38" * 3, 0.1, (0, 1, 2)))
    before = journal.num_bytes
    for _ in range(1000):
        journal.append(Record(b"\x38" * 3))
    assert journal.num_bytes - before == 1000 * (1 + 3 + 4)


def test_replay_equals_the_live_run_from_any_prefix():
    session, digests = live_run(normalize=True, momentum=0.5, clip=5.0)
    for upto in (0, 1, 5, 9, 12, None):
        base = tiny_model()
        engine = replay(base.named_parameters(), session.journal, upto)
        if upto != 0:
            assert engine.digest64() == digests[(upto or 12) - 1]
        assert digest64(base.parameters()) == engine.digest64()
    state = {k: v.clone() for k, v in tiny_model().state_dict().items()}
    replay(state, session.journal)
    assert digest64(state.values()) == digests[-1]


def test_a_plan_leaves_the_state_it_starts_from():
    session, _ = live_run(momentum=0.5)
    rule = make_plan(session.journal, upto=5).rule
    plan = make_plan(session.journal, after=rule)
    assert (rule.step, plan.first, plan.rule.step, len(plan.updates)) == (5, 5, 12, 7)
    assert make_plan(session.journal, after=rule).updates == plan.updates


def test_replay_in_ranges_equals_replay_in_one_piece(monkeypatch):
    session, digests = live_run()
    torch.manual_seed(0)
    monkeypatch.setattr("lightning_grad.spsa.replayer.CHUNK", 64)  # 256 elements a range
    seen = []
    base = tiny_model().named_parameters()
    engine = replay(base, session.journal, progress=lambda done, total: seen.append((done, total)))
    assert engine.digest64() == digests[-1]
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    assert len(seen) > 1


def test_replay_refuses_other_weights_and_other_parameters():
    session, _ = live_run()
    with pytest.raises(JournalError, match="starts from other weights"):
        replay(tiny_model(seed=6).named_parameters(), session.journal)
    with pytest.raises(JournalError, match=r"lack parameters of the journal: 2.weight, 2.bias"):
        replay(list(tiny_model().named_parameters())[:2], session.journal)
    with pytest.raises(JournalError, match=r"these differ: 0.bias, 0.weight, 2.weight"):
        replay(tiny_model(hidden=6).named_parameters(), session.journal)


def test_a_changed_code_is_reported_at_its_step():
    """A change that keeps the file's checks right (rewritten records): only the digests can tell."""
    session, _ = live_run()
    forged = Journal(session.header)
    for number, record in enumerate(session.journal):
        codes = bytes([record.codes[0] ^ 0x10, *record.codes[1:]]) if number == 7 else record.codes
        forged.append(Record(codes, record.lr, record.roster, record.digest, record.stop))
    with pytest.raises(ReplicaMismatchError, match="after step 7") as caught:
        replay(tiny_model().named_parameters(), forged)
    assert caught.value.step == 7
    replay(tiny_model().named_parameters(), forged, upto=7)
    replay(tiny_model().named_parameters(), forged, verify=False)


def offsets(journal):
    ends, reader = [journal.header_bytes], journal._new_reader()
    for _ in range(len(journal)):
        _, end = reader.read(journal._data, ends[-1])
        ends.append(end + 4)
    return ends


def test_three_hundred_flipped_bits_are_all_found(tmp_path):
    """Each is reported with its record and byte offset, and the records before it replay."""
    session, _digests = live_run(steps=40, check_interval=5)
    data, starts = session.journal.to_bytes(), offsets(session.journal)
    generator = random.Random(20)
    fired = in_header = 0
    for _ in range(300):
        position, bit = generator.randrange(len(data)), generator.randrange(8)
        damaged = bytearray(data)
        damaged[position] ^= 1 << bit
        number = sum(start <= position for start in starts[1:])
        fired += 1
        with warnings.catch_warnings():
            # a damaged length may look like a torn append: a warning, with the same words
            warnings.simplefilter("error")
            with pytest.raises((JournalError, UserWarning)) as caught:
                Journal.from_bytes(bytes(damaged))
        text = str(caught.value)
        if position < starts[0]:
            in_header += 1
            assert "header" in text or "not an SPSA journal" in text
            continue
        assert f"record {number} at byte offset {starts[number]}" in text
        assert f"{number} " in text.split(";")[1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                intact = Journal.from_bytes(bytes(damaged))
            except JournalError as error:
                intact = error.intact
        assert list(intact) == list(session.journal)[:number]
    assert fired == 300
    assert 30 < in_header < 270  # both parts were hit


def test_every_truncation_keeps_the_whole_records():
    session, digests = live_run()
    data, starts = session.journal.to_bytes(), offsets(session.journal)
    for length in range(len(data)):
        if length < starts[0]:
            with pytest.raises(JournalError, match=r"header|not an SPSA journal"):
                Journal.from_bytes(data[:length])
            continue
        number = sum(start <= length for start in starts[1:])
        texts = []
        journal = Journal.from_bytes(data[:length], on_torn=texts.append)
        assert list(journal) == list(session.journal)[:number]
        assert len(texts) == (length != starts[number])
        if texts:
            assert f"record {number} at byte offset {starts[number]} is incomplete" in texts[0]
    engine = replay(tiny_model().named_parameters(), Journal.from_bytes(data[: starts[9]]))
    assert engine.digest64() == digests[8]


def test_lost_swapped_and_repeated_records_are_found():
    session, _ = live_run(check_interval=0)
    data, s = session.journal.to_bytes(), offsets(session.journal)
    parts = [data[a:b] for a, b in itertools.pairwise(s)]
    for order in ([0, 2], [0, 2, 1, 3], [0, 1, 1, 2]):
        with pytest.raises(JournalError, match="fails its check"):
            Journal.from_bytes(data[: s[0]] + b"".join(parts[i] for i in order))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"extra": 1}, "unknown keys"),
        ({"seed": -1}, "`seed`"),
        ({"codec": "int8"}, "`codec`"),
        ({"rho": 1.0}, "`rho`"),
        ({"directions": 0}, "`directions`"),
        ({"params": 3}, "not valid"),
        ({"format": 1}, "`format`"),
    ],
)
def test_bad_headers_are_refused(change, text):
    import json

    session, _ = live_run(steps=1)
    raw = {**json.loads(session.header.to_json()), **change}
    with pytest.raises(JournalError, match=text):
        Header.from_json(json.dumps(raw).encode())


def test_append_goes_on_in_the_same_file_after_a_torn_record(tmp_path):
    path = tmp_path / "run.spsa"
    session, _ = live_run(path=path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])  # a crash while appending
    with pytest.warns(UserWarning, match="record 11 at byte offset"):
        journal = Journal.load(path)
    journal.open_append(path)
    journal.append(list(session.journal)[-1])
    journal.close()
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["run.spsa"]


def test_a_file_that_is_a_beginning_is_completed(tmp_path):
    session, _ = live_run()
    whole = session.journal.to_bytes()
    for length in (0, 5, session.journal.header_bytes - 1, session.journal.header_bytes + 3, len(whole)):
        path = tmp_path / f"{length}.spsa"
        path.write_bytes(whole[:length])
        session.journal.open_append(path)
        session.journal.close()
        assert path.read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 5  # nothing to keep


def test_records_that_the_run_does_not_have_are_kept_in_a_copy_and_said(tmp_path):
    """A run that goes on from an older checkpoint, twice."""
    path = tmp_path / "run.spsa"
    session, _ = live_run(path=path)
    whole = path.read_bytes()
    older = session.journal.prefix(5)
    for name in ("run.spsa.torn", "run.spsa.torn1"):
        path.write_bytes(whole)
        with pytest.warns(
            UserWarning, match=rf"held 12 records; .* after the first 5 of them\. .* kept as .*{name}\.$"
        ):
            older.open_append(path)
        older.close()
        assert path.read_bytes() == older.to_bytes()
        assert (tmp_path / name).read_bytes() == whole
    path.write_bytes(whole[:-40] + b"!" + whole[-39:])  # damaged, and so not what it should be
    with pytest.warns(UserWarning, match="kept as .*torn2"):
        session.journal.open_append(path)
    session.journal.close()
    assert path.read_bytes() == whole


def test_a_file_of_another_run_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "run.spsa"
    live_run(path=path)
    whole = path.read_bytes()
    other = Journal(replace(make_session(seed=9).header, run_id="another"))
    text = r"is the journal of run '0123456789abcdef', not of run 'another' \(.*seed: 9 != 0.*move that file away"
    with pytest.raises(JournalError, match=text):
        other.open_append(path)
    assert path.read_bytes() == whole
    path.write_text("notes")
    with pytest.raises(JournalError, match=r"run\.spsa: not an SPSA journal"):
        other.open_append(path)
    assert path.read_text() == "notes"
    assert [p.name for p in tmp_path.iterdir()] == ["run.spsa"]
    other.open_append(tmp_path / "mine.spsa")  # a refusal leaves nothing locked or half open
    other.close()


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_a_file_has_one_writer(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_grad.spsa.locked_file._PATIENCE_S", 0.0)
    path = tmp_path / "run.spsa"
    first, second = live_run()[0].journal, live_run()[0].journal
    first.open_append(path)
    with pytest.raises(
        JournalError, match=r"another process writes to .*run.spsa: give every .* \(`journal_path`, --j"
    ):
        second.open_append(path)
    inherited = os.dup(first._file.fileno())  # what a data loader's process has, too
    first.close()
    second.open_append(path)
    second.close()
    os.close(inherited)
    assert path.read_bytes() == second.to_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    import fcntl

    def refuse(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    session, _ = live_run()
    with pytest.warns(UserWarning, match=r"cannot be locked \(.*not supported\); let no other process write to it"):
        session.journal.open_append(tmp_path / "run.spsa")
    session.journal.close()
    assert (tmp_path / "run.spsa").read_bytes() == session.journal.to_bytes()


@pytest.mark.parametrize("codes", [b"", b"\x00\x00", b"\x00" * 4])
def test_an_unfit_record_is_refused(codes):
    session, _ = live_run(steps=1)
    before = session.journal.to_bytes()
    for roster in (None, (0, 2, 3)):
        with pytest.raises(JournalError, match="do not fit the roster"):
            session.journal.append(Record(codes, roster=roster))
    assert session.journal.to_bytes() == before
    session.journal.append(Record(b"\x00"))  # the roster is still that of one worker


def test_the_first_record_has_a_rate_and_a_roster():
    journal = Journal(make_session().header)
    with pytest.raises(ValueError, match="no learning rate or no roster"):
        journal.append(Record(b"\x00"))


@pytest.mark.parametrize("lr", [math.nan, math.inf, -0.5])
def test_a_learning_rate_that_is_none_is_refused_also_in_a_file_with_right_checks(lr):
    with pytest.raises(ValueError, match="`lr` must be"):
        Record(b"\x38", lr)
    session, _ = live_run(steps=10)
    starts = offsets(session.journal)
    data = bytearray(session.journal.to_bytes()[: starts[9]])
    assert data[starts[8]] & 1  # the rate changes at step 8
    data[starts[8] + 1 : starts[8] + 9] = struct.pack("<d", lr)
    (before,) = struct.unpack("<I", data[starts[8] - 4 : starts[8]])
    data[-4:] = struct.pack("<I", chained_crc32(bytes(data[starts[8] : -4]), before))
    with pytest.raises(
        JournalError, match=rf"record 8 at byte offset {starts[8]} is malformed \(`lr` must be"
    ) as caught:
        Journal.from_bytes(bytes(data))
    assert len(caught.value.intact) == 8


def test_twenty_thousand_steps_take_120_kilobytes_and_replay_in_seconds():
    session = make_session(check_interval=0)
    journal = Journal(session.header)
    journal.append(Record(b"\x38", 1e-6, (0,)))
    for t in range(19_999):
        journal.append(Record(bytes([0x30 + t % 16])))
    assert journal.num_bytes - journal.header_bytes < 6 * 20_000 + 40
    engine = replay(tiny_model().named_parameters(), journal, upto=3000)
    assert engine.digest64() == replay(tiny_model().named_parameters(), journal, upto=3000).digest64()


def test_run_alone_helper_matches_itself():
    data = batches(6)
    assert run_alone(make_session(slots=2), data) == run_alone(make_session(slots=2), data)
