"""SIGKILL at random points, restart, and compare the final weights bit for bit."""

import random

import pytest

from tests.reliability.kills import Run, train, train_with_kills
from tests.reliability.runs import CASES, case_named, differing


def check(run, folder, num_kills, rng):
    straight = train(Run(**run, folder=folder / "straight"))
    killed = train_with_kills(Run(**run, folder=folder / "killed"), num_kills, rng)
    assert len(killed.kills) == num_kills
    assert len(set(killed.kills)) == num_kills, killed.kills  # a kill that fired twice at one point is half a test
    assert not differing(straight.weights, killed.weights), killed.kills
    return killed.kills


def test_three_kills(tmp_path):
    kills = check({"case": CASES[0]}, tmp_path, 3, random.Random(0))
    assert len({step for step, _, _ in kills}) == 3


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
def test_one_kill(case, tmp_path):
    check({"case": case, "steps": 20}, tmp_path, 1, random.Random(1))


@pytest.mark.parametrize("name", ["adamw", "adaptive_batch"])
def test_one_kill_of_two_processes(name, tmp_path):
    check({"case": case_named(name), "steps": 12, "world_size": 2}, tmp_path, 1, random.Random(0))


@pytest.mark.reliability_full
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_twenty_kills(case, seed, tmp_path):
    """Four seeds of five kills for every case, two of them with loader workers."""
    check({"case": case, "seed": seed, "num_workers": 2 * (seed % 2)}, tmp_path, 5, random.Random(seed))


@pytest.mark.reliability_full
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["adamw", "adaptive_batch", "adaptive_batch_both_ways", "adaptive_batch_accumulate"])
def test_kills_of_two_processes(name, seed, tmp_path):
    check({"case": case_named(name), "seed": seed, "world_size": 2}, tmp_path, 3, random.Random(seed))
