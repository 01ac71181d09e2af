"""Elastic SPSA under kills, pauses, departures and a lost store: the survivors equal the replay (oracle 18)."""

import random
import time

import pytest

from lightning_grad.spsa import Journal, replay
from lightning_grad.spsa.auth import Authenticator
from lightning_grad.spsa.observer import preload
from lightning_grad.spsa.store import Store
from tests.spsa_elastic import RUN, Plan, Run, start_store_command
from tests.spsa_helpers import tiny_model
from tests.unit.test_spsa_elastic import check_equal

pytestmark = pytest.mark.slow
POINTS = ("measuring", "measured", "posted", "built", "proposed", "decided")


@pytest.mark.parametrize("seed", range(5))
def test_two_kills_at_random_points(tmp_path, seed):
    """Five runs of four workers, two killed in each: ten SIGKILLs; a late joiner in each run."""
    generator = random.Random(seed)
    run = Run(tmp_path, total_steps=60, options={"min_workers": 4, "step_timeout": 0.4, "max_missed": 2})
    run.serve()
    for first, last in ((3, 15), (20, 35)):
        run.start(Plan(kill=(generator.choice(POINTS), generator.randrange(first, last))))
    run.start()
    run.start()
    run.start(Plan(start_at=25))
    results = run.finish(50)
    assert run.num_fired() == 2
    assert sorted(results) == [2, 3, 4]
    assert all(result["stopped"] for result in results.values())
    assert len(check_equal(results)) == 60


@pytest.mark.parametrize("point", ["built", "proposed"])
def test_three_proposers_are_killed(tmp_path, point):
    """Each dies at its own turn; the last one leaves the run to a worker that came late."""
    run = Run(tmp_path, total_steps=60, options={"min_workers": 3, "step_timeout": 0.4, "max_missed": 2})
    run.serve()
    for step in (9, 13, 17):
        run.start(Plan(kill=(point, step)))
    survivor = run.start(Plan(start_at=3))
    results = run.finish(50)
    assert run.num_fired() == 3
    assert list(results) == [survivor]
    assert len(check_equal(results)) == 60


def test_a_straggler_is_dropped_and_comes_back(tmp_path):
    run = Run(tmp_path, total_steps=200, options={"min_workers": 3, "step_timeout": 0.3, "max_missed": 2}, step_s=0.02)
    run.serve()
    run.start(Plan(pause=(10, 4.0)))
    run.start()
    run.start()
    results = run.finish(50)
    journal = check_equal(results)
    assert run.num_fired() == 1
    assert results[0]["stopped"]
    assert results[0]["worker"] == 3  # a new id
    assert results[0]["replayed"] > 5
    assert any(record.roster and len(record.roster) == 2 for record in journal)


def test_nan_leave_and_late_join_together(tmp_path):
    run = Run(
        tmp_path, total_steps=100, options={"min_workers": 2}, key=b"k" * 16, settings={"codec": "f32", "clip": 5.0}
    )
    run.serve()
    run.start(Plan(nan=frozenset(range(10, 20))))
    run.start(Plan(leave=60))
    run.start(Plan(start_at=30))
    run.start(Plan(start_at=50))
    results = run.finish(50)
    assert len(check_equal(results)) == 100
    assert run.num_fired() == 11
    assert all(results[i]["stopped"] for i in (0, 2, 3))


def test_the_store_dies_and_starts_again_from_the_journal(tmp_path):
    key = b"k" * 16
    first = Run(tmp_path / "a", total_steps=80, options={"min_workers": 2}, key=key)
    first.folder.mkdir()
    first.serve()
    first.start()
    first.start()
    first.wait_for_step(20)
    first.store = None  # the server goes away
    lost = first.finish(50)
    assert len(lost) == 2
    for result in lost.values():
        assert "lost the store" in result["lost"]
        assert "restart the store with --journal" in result["lost"]
    saved = [Journal.load(path) for path in sorted(first.folder.glob("rescue*.spsa"))]
    assert len(saved) == 2
    longest = max(saved, key=len)
    assert len(longest) >= 20
    assert list(min(saved, key=len)) == list(longest)[: min(map(len, saved))]
    second = Run(tmp_path / "b", total_steps=80, options={"min_workers": 2, "step_timeout": 0.5}, key=key)
    second.folder.mkdir()
    preload(second.serve(), longest, Authenticator(RUN, key))
    second.start()
    time.sleep(0.1)
    second.start()
    results = second.finish(50)
    journal = check_equal(results)
    assert list(journal)[: len(longest)] == list(longest)
    assert len(journal) == 80
    assert replay(tiny_model().named_parameters(), journal).digest64() == results[0]["digest"]


def test_the_store_command_is_killed_and_started_again_with_all_files(tmp_path):
    """Its own file may be behind the workers' by what it had not read; with theirs, no decided record is lost."""
    path = tmp_path / "run.spsa"
    rescued = [tmp_path / "a" / f"rescue{i}.spsa" for i in range(2)]
    for part in ("a", "b"):
        run = Run(tmp_path / part, total_steps=80, options={"min_workers": 2, "step_timeout": 0.5})
        run.folder.mkdir()
        server = start_store_command(run.port, path, rescued if part == "b" else ())
        watching = Store(f"127.0.0.1:{run.port}", RUN)
        run.start()
        run.start()
        if part == "a":
            assert watching.wait(["r/20"], 30)
            server.kill()
        results = run.finish(50)
        server.join(20)
        if part == "a":
            assert server.exitcode == -9
            assert all("lost the store" in result["lost"] for result in results.values())
            kept = list(Journal.load(path))
            assert len(kept) >= 15
            cut = Journal.load(path).prefix(len(kept) - 4)  # further behind than it was, so that there is what to mend
            cut.save(path)
            first = list(max(map(Journal.load, rescued), key=len))
            assert len(first) >= len(kept)
    journal = check_equal(results)
    assert len(journal) == 80
    assert list(journal)[: len(first)] == first
    assert Journal.load(path).to_bytes() == journal.to_bytes()


def test_all_members_die_and_a_newcomer_goes_on(tmp_path):
    run = Run(tmp_path, total_steps=30, options={"min_workers": 2, "step_timeout": 0.3, "max_missed": 2})
    run.serve()
    run.start(Plan(kill=("measured", 10)))
    run.start(Plan(kill=("measured", 10)))
    run.start(Plan(start_at=9))
    results = run.finish(50)
    assert run.num_fired() == 2
    assert len(check_equal(results)) == 30
