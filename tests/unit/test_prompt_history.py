"""Decayed sums per prompt against sums written by hand."""

import pytest
import torch

from lightning_grad.allocation.history import PromptHistory, visit_sums

INDEX = torch.tensor([0, 0, 0, 1, 2])
REWARD = torch.tensor([1.0, 0.0, float("nan"), 1.0, float("inf")])
LENGTH = torch.tensor([3, 1, 5, 2, 4])
NORM = torch.tensor([3.0, 2.0, 7.0, float("nan"), 1.0])


def test_one_visit():
    history = PromptHistory(4, decay=0.5)
    history.visit(torch.arange(4), visit_sums(INDEX, REWARD, LENGTH, 4, grad_norm=NORM))
    assert history["successes"].tolist() == [1, 1, 0, 0]
    assert history["trials"].tolist() == [2, 1, 0, 0]  # a reward that is not finite is no trial
    torch.testing.assert_close(history.acceptance(), torch.tensor([1.5 / 3, 1.5 / 2, 0.5, 0.5]).double())
    norm = history.grad_norm()
    assert norm[0] == 3
    assert bool(norm[1:].isnan().all())  # a norm that is not finite is not used; unseen prompts have none
    assert history.grad_norm_rejected()[0] == 2
    assert history.mean_length().tolist() == [3, 2, 4, 3]  # an unseen prompt gets the mean over all samples


def test_decay_of_visited_prompts_only():
    history = PromptHistory(3, decay=0.25)
    first = visit_sums(INDEX, REWARD, LENGTH, 3, grad_norm=NORM)
    history.visit(torch.arange(3), first)
    again = visit_sums(torch.tensor([0, 0]), torch.tensor([1.0, 1.0]), torch.tensor([1, 1]), 1)
    history.visit(torch.tensor([1]), again)
    assert torch.equal(history.sums[[0, 2]], first[[0, 2]])
    assert torch.equal(history.sums[1], 0.25 * first[1] + again[0])
    forget = PromptHistory(3, decay=0.0)
    forget.visit(torch.arange(3), first)
    forget.visit(torch.arange(3), 2 * first)
    assert torch.equal(forget.sums, 2 * first)


def test_moments():
    norms = torch.tensor([3.0, 4.0])
    for moment, expected in [("rms", 12.5**0.5), ("mean", 3.5)]:
        history = PromptHistory(1, moment=moment)
        sums = visit_sums(torch.zeros(2).long(), torch.ones(2), torch.ones(2), 1, grad_norm=norms, moment=moment)
        history.visit(torch.tensor([0]), sums)
        assert float(history.grad_norm()) == pytest.approx(expected)


def test_reward_variance_is_smoothed_towards_the_pooled_one():
    reward = torch.tensor([0.0, 2.0, 5.0, 5.0])
    history = PromptHistory(3)
    history.visit(torch.arange(3), visit_sums(torch.tensor([0, 0, 1, 1]), reward, torch.ones(4), 3))
    torch.testing.assert_close(history.reward_var(), torch.tensor([2.5 / 3, 0.5 / 3, 0.5]).double())


def test_parts_add_up_and_survive_a_checkpoint():
    whole = visit_sums(INDEX, REWARD, LENGTH, 3, grad_norm=NORM)
    parts = [visit_sums(INDEX[s], REWARD[s], LENGTH[s], 3, grad_norm=NORM[s]) for s in (slice(0, 2), slice(2, 5))]
    assert torch.equal(whole, parts[0] + parts[1])
    history, other = PromptHistory(3), PromptHistory(3)
    history.visit(torch.arange(3), whole)
    other.load_state_dict(history.state_dict())
    assert torch.equal(other.sums, history.sums)
    with pytest.raises(ValueError, match=r"history of 3 prompts, this run has 4"):
        PromptHistory(4).load_state_dict(history.state_dict())
