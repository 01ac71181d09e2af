"""Elastic runs: the protocol's pieces, and short runs of real processes (oracle 18; more in tests/reliability)."""

import functools
import logging
import threading
import time
from types import SimpleNamespace

import pytest

from lightning_grad.spsa import Journal, JournalError, SPSAConfigError, StoreLostError, replay
from lightning_grad.spsa.auth import Authenticator
from lightning_grad.spsa.elastic import ElasticOptions, ElasticWorker, Schedule
from lightning_grad.spsa.journal import Record
from lightning_grad.spsa.membership import Contribution, Genesis, Membership, SharedRecord, next_members, vote
from lightning_grad.spsa.observer import Observer, longest, preload
from lightning_grad.spsa.store import Store, split_address
from tests.spsa_elastic import RUN, Plan, Run, free_port
from tests.spsa_helpers import batches, loss_of, make_session, run_alone, tiny_model

KEY = b"0123456789abcdef"


def check_equal(results, journal=None):
    """All who reached the end agree with each other and with the replay of every journal."""
    ends = [r for r in results.values() if r.get("stopped")]
    assert ends, results
    assert len({r["digest"] for r in ends}) == 1
    assert len({r["journal"] for r in ends}) == 1
    journal = Journal.from_bytes(ends[0]["journal"])
    engine = replay(tiny_model().named_parameters(), journal)
    assert engine.digest64() == ends[0]["digest"]
    return journal


# -- pieces ---------------------------------------------------------------------------------------------------------


def test_messages_are_bound_to_kind_run_step_and_sender():
    auth = Authenticator("a", KEY)
    sealed = auth.seal("c", 3, 1, b"xyz")
    assert len(sealed) == 3 + 16
    assert auth.open("c", 3, 1, sealed) == b"xyz"
    for kind, step, worker in (("r", 3, 1), ("c", 4, 1), ("c", 3, 2)):
        assert auth.open(kind, step, worker, sealed) is None
    assert Authenticator("b", KEY).open("c", 3, 1, sealed) is None
    assert Authenticator("a", KEY[::-1]).open("c", 3, 1, sealed) is None
    for damaged in (b"", sealed[:-1], sealed + b"!", bytes([sealed[0] ^ 1]) + sealed[1:], b"\0" * 5):
        assert auth.open("c", 3, 1, damaged) is None
    plain = Authenticator("a", None)
    assert plain.open("c", 0, 0, plain.seal("c", 0, 0, b"x")) == b"x"
    with pytest.raises(SPSAConfigError, match="the key for messages must have at least 16 bytes, got 3"):
        Authenticator("a", b"key")


def test_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("K", KEY.decode())
    assert len(Authenticator.from_environment("a", "K").seal("c", 0, 0, b"")) == 16
    monkeypatch.setenv("K", "short")
    with pytest.raises(SPSAConfigError, match=r"the key in K \(`auth_key_env`\) must have at least 16 bytes, got 5"):
        Authenticator.from_environment("a", "K")
    monkeypatch.delenv("K")
    assert Authenticator.from_environment("a", "K").seal("c", 0, 0, b"") == b""


def test_contributions_of_wrong_length_or_flags_are_nothing():
    assert Contribution.from_bytes(Contribution(b"ab", stop=True).to_bytes(), 2) == Contribution(b"ab", stop=True)
    for data in (b"", b"\0a", b"\0abc", b"\1ab", b"\4ab", b"\xffab"):
        assert Contribution.from_bytes(data, 2) is None


def test_shared_records_are_checked_before_use():
    header = make_session().header
    members = Membership({0: 0, 2: 1})
    good = SharedRecord(Record(b"\x38\x7f", 0.1, (0, 2)), {0: 0, 2: 2, 5: 0})
    assert members.parse(good.to_bytes(), header) == good
    data = good.to_bytes()
    bad = [
        b"", data[:3], data[:-1], data + b"\0", b"\xff\xff\xff\x7f" + data[4:], data[:4] + b"\x33" + data[5:],
        SharedRecord(Record(b"\x38\x7f", 0.1, (0, 3)), {0: 0}).to_bytes(), SharedRecord(good.record, {}).to_bytes(),
        SharedRecord(Record(b"\x38", 0.1, (0, 2)), {0: 0}).to_bytes(),
        SharedRecord(Record(b"\x38\x38"), {0: 0}).to_bytes(),
    ]  # fmt: skip
    for wrong in bad:
        with pytest.raises(ValueError):
            members.parse(wrong, header)
    members.advance(SharedRecord(good.record, {0: 0}))
    with pytest.raises(ValueError, match="brings back a member that had left"):
        members.parse(SharedRecord(Record(b"\x38", None, (0,)), {0: 0, 2: 0}).to_bytes(), header)


def test_members_are_dropped_admitted_and_never_readmitted():
    members = Membership({0: 0, 1: 1, 2: 0, 3: 0}, admitted={9})
    assert next_members(members, {0, 3}, gone={2, 3}, ready=[4, 9], max_missed=3) == {0: 0, 1: 2, 4: 0}
    assert next_members(members, {0, 3}, gone=set(), ready=[], max_missed=2) == {0: 0, 2: 1, 3: 0}


@pytest.mark.parametrize(("policy", "stops"), [("majority", 3), ("any", 1), ("all", 4)])
def test_votes(policy, stops):
    assert [vote(n, 4, policy) for n in range(5)] == [n >= stops for n in range(5)]


def test_schedules_are_functions_of_the_step():
    assert [Schedule(1.0, 8, "linear", 2).rate(t) for t in (0, 1, 2, 5, 8)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert Schedule(1.0, 8, "cosine").rate(4) == pytest.approx(0.5)
    assert {Schedule(0.3, 8).rate(t) for t in range(8)} == {0.3}
    for bad in ({"lr": 0.0}, {"total_steps": 0}, {"kind": "x"}, {"warmup_steps": 9}):
        with pytest.raises(ValueError, match="must"):
            Schedule(**{"lr": 1.0, "total_steps": 8, **bad})
    with pytest.raises(ValueError, match="`max_missed`"):
        ElasticOptions(max_missed=0)


def test_addresses():
    assert split_address("10.0.0.1:29777") == ("10.0.0.1", 29777)
    for bad in ("host", "host:", ":1", "h:0", "h:70000", "h:x"):
        with pytest.raises(ValueError, match="`store` must be"):
            split_address(bad)


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"\x80\x04.", b'{"header":"x","roster":[0],"schedule":null}', b'{"roster":[]}']
)
def test_a_genesis_that_is_none_is_refused(text):
    with pytest.raises(JournalError, match="start of the run is not valid"):
        Genesis.from_bytes(text)


# -- one process ------------------------------------------------------------------------------------------------------


class Alone:
    """A run of one or more workers in this process, stepped by hand."""

    def __init__(self, key=None, **options):
        self.address = f"127.0.0.1:{free_port()}"
        self.store = Store(self.address, RUN, serve=True)
        self.auth, self.options = Authenticator(RUN, key), options

    def worker(self, total_steps=6, auth=None, **settings):
        session = make_session(run_id=RUN, **{"check_interval": 2, **settings})
        options = ElasticOptions(**{"step_timeout": 0.3, "join_timeout": 2.0, **self.options})
        store = Store(self.address, RUN)
        return ElasticWorker(store, session, Schedule(2.0**-6, total_steps), options, auth or self.auth)


def step(worker):
    session = worker.session
    session.measure(worker.worker, lambda: loss_of(session.module, batches(1)[0]))
    return worker.finish()


def test_a_run_of_one_and_an_observer(tmp_path):
    run = Alone()
    worker = run.worker()
    worker.join()
    watching = Observer(run.store, run.auth, tmp_path / "run.spsa")
    while worker.prepare():
        step(worker)
    while not watching.finished:
        watching.poll(0.5)
    watching.close()
    journal = Journal.load(tmp_path / "run.spsa")
    assert journal.to_bytes() == worker.session.journal.to_bytes()
    assert len(journal) == 6
    assert [record.digest is not None for record in journal] == [False, True] * 3
    assert replay(tiny_model().named_parameters(), journal).digest64() == worker.session.engine.digest64()


def test_garbage_replayed_and_oversized_messages_are_ignored_and_logged(caplog):
    """Oracle of the security section: with a key, whatever an outsider writes counts as absent."""
    run = Alone(key=KEY, min_workers=1, max_missed=9)
    one, two = two_members(run)
    genuine = run.auth.seal("c", 0, 1, Contribution(b"\x38").to_bytes())
    messages = [b"garbage", genuine, b"\0" * 1_000_000, Authenticator(RUN, KEY[::-1]).seal("c", 4, 1, b"\0\x38")]
    caplog.set_level(logging.WARNING)
    for number, message in enumerate(messages):
        t = one.step
        run.store.put(f"c/{t}/1", message)
        run.store.put(f"r/{t}", b"\x80\x04garbage")  # an outsider was first at the record's key, too
        update = step(one)
        assert update.abstained == 1, number
        assert len(update.values) == 1
    assert one.rejected >= 2 * len(messages)
    assert caplog.text.count("of worker 1 is not valid and is ignored") == len(messages)
    assert "the record of step" in caplog.text
    two.prepare()
    assert two.session.engine.digest64() == one.session.engine.digest64()


WRONG_KEYS = {KEY[::-1]: "is not the sender's", None: "is not set here"}


@pytest.mark.parametrize("key", WRONG_KEYS)
def test_another_key_is_named_and_ends_neither_the_run_nor_its_store(key, caplog):
    run = Alone(key=KEY)
    one = run.worker()
    one.join()
    wrong = Authenticator(RUN, key, "MY_KEY")
    text = rf"the start of the run .* the key in MY_KEY \(`auth_key_env`\) {WRONG_KEYS[key]}\. Give the store and all"
    with pytest.raises(SPSAConfigError, match=text):
        run.worker(auth=wrong).join()
    store = Observer(run.store, wrong)
    assert [store.poll(0.01) for _ in range(3)] == [0, 0, 0]
    assert caplog.text.count(WRONG_KEYS[key]) == 1
    step(one)


def test_a_sealed_start_does_not_fit_an_unsealed_run():
    run = Alone()
    run.worker().join()
    with pytest.raises(SPSAConfigError, match="is not the sender's"):
        run.worker(auth=Authenticator(RUN, KEY)).join()


@pytest.mark.parametrize("key", WRONG_KEYS)
def test_workers_that_cannot_read_each_other_say_why_none_came(key):
    run = Alone(key=KEY, min_workers=2, join_timeout=0.3)
    run.worker()._say("j")
    with pytest.raises(TimeoutError, match=rf"1 of `min_workers` 2 .* Messages of 1 more .* {WRONG_KEYS[key]}"):
        run.worker(auth=Authenticator(RUN, key)).join()


def test_an_observer_waits_at_a_record_that_is_none(caplog):
    run = Alone()
    one = run.worker()
    one.join()
    watching = Observer(run.store, run.auth)
    watching.poll(0.0)
    run.store.put("r/0", b"garbage")
    reads, real = [], watching._store.get
    watching._store.get = lambda key: (reads.append(key), real(key))[1]
    start = time.monotonic()
    assert watching.poll(0.3) == 0
    assert time.monotonic() - start > 0.29
    assert reads.count("r/0") < 10
    assert caplog.text.count("the record of step 0 is not valid: its length is wrong") == 1
    step(one)  # puts a record in its place
    assert watching.poll(0.3) == 1


def test_a_worker_with_other_settings_cannot_join():
    run = Alone()
    run.worker().join()
    with pytest.raises(SPSAConfigError, match=r"differs from the run it joins: seed: 9 != 0; total_steps: 7 != 6"):
        run.worker(seed=9, total_steps=7).join()


def test_not_enough_workers_is_said():
    run = Alone(min_workers=2, join_timeout=0.3)
    worker = run.worker()
    with pytest.raises(TimeoutError, match=r"1 of `min_workers` 2 workers came within 0\.3 s\.$"):
        worker.join()


def test_an_address_that_does_not_work_is_said():
    address = f"127.0.0.1:{free_port()}"
    text = (
        rf"nobody answers at `store` {address} within 0\.5 s\. Start it with `lightning-grad spsa store --port \d+ --r"
    )
    with pytest.raises(StoreLostError, match=text):
        Store(address, RUN, connect_timeout_s=0.5)
    store = Store(address, RUN, serve=True)
    with pytest.raises(
        StoreLostError, match=rf"cannot serve at {address}: .*address already in use\. Does another store"
    ):
        Store(address, RUN, serve=True)
    del store


def test_a_key_that_is_deleted_while_it_is_read_is_absent():
    """Torch's own ``get`` would wait for it."""
    store = Store(f"127.0.0.1:{free_port()}", RUN, serve=True)
    keys = store._keys
    store._keys = SimpleNamespace(check=lambda names: True, get=keys.get)
    start = time.monotonic()
    assert store.get("gone") is None
    assert time.monotonic() - start < 5.0


def two_members(run):
    """Two workers after step 0, which let the second one in."""
    one = run.worker()
    one.join()
    two = run.worker()
    two._say("j")
    step(one)
    two.join()
    assert one.roster == two.roster == (0, 1)
    return one, two


def test_a_worker_that_dies_before_the_run_starts_holds_nobody_up():
    run = Alone(min_workers=2, join_timeout=20.0)
    dead, alive = run.worker(), run.worker()
    dead._say("j")
    start = time.monotonic()
    alive.join()
    assert time.monotonic() - start < 5.0
    assert alive.roster == (0, 1)
    step(alive)  # waits for the dead one until it is dropped
    assert alive.step == 1


def test_nobody_waits_for_a_member_that_leaves_in_its_own_turn():
    run = Alone(min_workers=1, step_timeout=20.0)
    one, two = two_members(run)
    leaves = threading.Timer(0.3, two.leave)  # step 1 is worker 1's; worker 0 waits already
    leaves.start()
    start = time.monotonic()
    update = step(one)
    assert 0.2 < time.monotonic() - start < 5.0
    assert (update.step, update.abstained) == (1, 1)
    assert one.roster == (0,)
    leaves.join()


def test_a_newcomer_that_meets_garbage_for_a_record_does_not_spin(caplog):
    run = Alone(step_timeout=0.3)
    one = run.worker()
    one.join()
    run.store.put("r/0", b"garbage")
    two = run.worker()
    reads, real = [], two._store.get
    two._store.get = lambda key: (reads.append(key), real(key))[1]
    caplog.set_level(logging.WARNING)
    two.join()  # the members are silent: it decides the step itself
    assert two.step > 0
    assert reads.count("r/0") < 20
    assert caplog.text.count("the record of step 0 is not valid") == 1


class Lost:
    """A connection that breaks when a record is asked for, once."""

    def __init__(self, store, step):
        self._store, self._key = store, f"r/{step}"

    def __getattr__(self, name):
        return getattr(self._store, name)

    def get(self, key):
        if key == self._key:
            self._key = ""
            raise StoreLostError("gone")
        return self._store.get(key)


def test_a_store_that_is_lost_while_catching_up_leaves_weights_and_journal_at_one_step(tmp_path):
    run = Alone()
    one = run.worker()
    one.join()
    for _ in range(5):
        step(one)
    two = run.worker()
    two.session.journal.open_append(tmp_path / "two.spsa")
    two._store = Lost(two._store, 3)
    with pytest.raises(StoreLostError, match=r"at step 3; journal saved to .*two\.spsa"):
        two.join()
    assert len(two.session.journal) == two.step == two.replayed == 3
    kept = Journal.load(tmp_path / "two.spsa")
    assert replay(tiny_model().named_parameters(), kept).digest64() == two.session.engine.digest64()
    step(one)  # the last
    two.prepare()  # the store is back
    assert two.session.journal.to_bytes() == one.session.journal.to_bytes()
    assert two.session.engine.digest64() == one.session.engine.digest64()


@pytest.mark.parametrize("heal", [False, True])
def test_a_replica_that_differs_says_so_or_heals(heal):
    from lightning_grad.spsa import ReplicaMismatchError

    run = Alone(heal=heal, min_workers=1)
    one, two = two_members(run)
    two.session.engine.params[0].detach()[0, 0] += 1.0
    run.store.put(f"c/{one.step}/1", Contribution(b"\x38").to_bytes())
    step(one)  # step 1 carries a digest
    if heal:
        two.prepare()
        assert two.session.engine.digest64() == one.session.engine.digest64()
    else:
        with pytest.raises(ReplicaMismatchError, match="after step 1"):
            two.prepare()


def test_of_two_records_proposed_at_once_the_first_holds():
    """Both members have built a record of step 3, different ones, before either writes it."""
    run = Alone(min_workers=1, step_timeout=0.2)
    one, two = two_members(run)
    both_built, built = threading.Barrier(2), []

    def build(inner, number):
        record = inner(number)
        if number == 3:
            built.append(record)
            run.store.drop("c/3/1")  # whoever builds later sees less
            both_built.wait(20)
        return record

    threads = []
    for worker in (one, two):
        worker._build = functools.partial(build, worker._build)
        threads.append(threading.Thread(target=finish_run, args=(worker,), daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert len(built) == 2
    assert built[0] != built[1]
    assert one.session.journal.to_bytes() == two.session.journal.to_bytes()
    assert len(one.session.journal) == 6
    assert one.session.engine.digest64() == two.session.engine.digest64()
    assert list(one.session.journal)[3].codes in [shared.record.codes for shared in built]


def finish_run(worker):
    while worker.prepare():
        step(worker)


def test_a_store_starts_again_from_a_journal(tmp_path):
    first = Alone(key=KEY)
    worker = first.worker(total_steps=6)
    worker.join()
    for _ in range(3):
        step(worker)
    path = tmp_path / "run.spsa"
    worker.session.journal.save(path)
    second = Alone(key=KEY, step_timeout=30.0)  # nobody waits for the old members: they are known to be gone
    preload(second.store, Journal.load(path), second.auth)
    again = second.worker(total_steps=6)
    again.join()
    assert again.worker == 1  # the old members count as gone
    assert again.step >= 3
    while again.prepare():
        step(again)
    journal = again.session.journal
    assert list(journal)[:3] == list(Journal.load(path))
    assert len(journal) == 6
    assert replay(tiny_model().named_parameters(), journal).digest64() == again.session.engine.digest64()
    with pytest.raises(JournalError, match="no record"):
        preload(Alone().store, Journal(journal.header), second.auth)


def test_the_longest_of_the_files_is_continued():
    session = make_session()
    run_alone(session, batches(8))
    whole = session.journal
    assert longest({}) is None
    assert longest({"a": whole.prefix(5), "b": whole, "c": whole.prefix(8)}) is whole
    other = whole.prefix(6)
    other.append(Record(b"\x01"))
    with pytest.raises(JournalError, match=r"x and w part ways at record 6, so they are not of one run"):
        longest({"w": whole, "x": other})
    stranger = make_session(seed=9).journal
    with pytest.raises(JournalError, match=r"y and w differ: seed: 9 != 0"):
        longest({"w": whole, "y": stranger})


# -- real processes ---------------------------------------------------------------------------------------------------


def test_three_processes_one_joins_late_one_leaves_one_abstains(tmp_path):
    run = Run(tmp_path, total_steps=40, options={"min_workers": 2}, key=KEY)
    run.serve()
    run.start(Plan(nan=frozenset({7, 8})))
    run.start(Plan(leave=30))
    run.start(Plan(start_at=10))
    results = run.finish()
    assert not [r for r in results.values() if "error" in r], results
    journal = check_equal(results)
    assert len(journal) == 40
    assert list(journal)[-1].stop
    rosters = [record.roster for record in journal if record.roster]
    assert rosters[0] == (0, 1)
    assert any(len(roster) == 3 for roster in rosters)
    assert results[2]["replayed"] >= 10
    assert run.num_fired() == 3  # two NaN steps and one departure


def test_one_process_is_killed_between_message_and_record(tmp_path):
    run = Run(tmp_path, total_steps=30, options={"min_workers": 3, "step_timeout": 0.5, "max_missed": 2})
    run.serve()
    run.start(Plan(kill=("posted", 10)))
    run.start()
    run.start()
    results = run.finish()
    journal = check_equal(results)
    assert len(results) == 2
    assert run.num_fired() == 1
    killed = next(w for w in (0, 1, 2) if w not in {r["worker"] for r in results.values()})
    records = list(journal)
    position = (0, 1, 2).index(killed)
    assert records[10].codes[position] != 0x7F  # what it had sent is used
    assert records[11].codes[position] == 0x7F
    assert next(r.roster for r in records[11:] if r.roster) == tuple(w for w in (0, 1, 2) if w != killed)
