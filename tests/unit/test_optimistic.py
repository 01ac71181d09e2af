"""Oracles of the optimistic optimizers and NormalizedGD that the conformance suite does not cover."""

import math

import pytest
import torch

from lightning_grad.optim import AdaGradNorm, NormalizedGD, OptimisticAdam, OptimisticFTRL, OptimisticOMD


def play(make):
    """Distance from the solution of the game ``xy``, from (1, 1), after 1000 steps."""
    x, y = (torch.ones((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    players = [make([x], False), make([y], True)]
    for _ in range(1000):
        x.grad, y.grad = y.detach().clone(), x.detach().clone()
        for player in players:
            player.step()
    return math.hypot(x.item(), y.item())


def test_bilinear_game_converges_where_plain_gradients_diverge():
    def optimistic(params, up):
        return OptimisticOMD(params, lr=0.1, step_rule="constant", maximize=up)

    def plain(params, up):
        return torch.optim.SGD(params, lr=0.1, maximize=up)

    assert play(optimistic) == pytest.approx(0.008961623801130482, rel=1e-10)
    assert play(plain) == pytest.approx(204.73961823649915, rel=1e-10)


def test_optimistic_adam_ends_nearer_to_the_solution_of_the_game_than_adam():
    def player(cls):
        return lambda params, up: cls(params, lr=0.01, betas=(0.5, 0.9), maximize=up)

    # an orbit, whose place at the last step rounding may change; not its size
    assert play(player(OptimisticAdam)) == pytest.approx(0.0933, abs=0.005)
    assert play(player(torch.optim.Adam)) == pytest.approx(0.1621, abs=0.005)


def sequences(bound, dim, rounds):
    """Gradient sequences of norm at most ``bound``, the third playing against the point."""
    torch.manual_seed(0)
    yield "random", lambda t, x: torch.nn.functional.normalize(torch.randn(dim, dtype=torch.float64), dim=0) * bound
    yield "alternating", lambda t, x: torch.eye(dim, dtype=torch.float64)[0] * bound * (-1) ** t
    yield "against", lambda t, x: x / x.norm().clamp_min(1e-12) * bound if t else torch.eye(dim).double()[0] * bound
    yield "rotating", lambda t, x: bound * torch.tensor([math.cos(t), math.sin(t)] + [0.0] * (dim - 2)).double()


@pytest.mark.parametrize("kind", ["ftrl", "omd"])
def test_regret_is_bounded_for_every_sequence(kind):
    bound, diameter, rounds, dim = 2.0, 3.0, 300, 4
    for name, gradient in sequences(bound, dim, rounds):
        x = torch.zeros(dim, dtype=torch.float64, requires_grad=True)
        if kind == "ftrl":
            optimizer = OptimisticFTRL([x], diameter=diameter, lipschitz=bound)
        else:
            optimizer = OptimisticOMD([x], diameter=diameter, lipschitz=bound, project=True)
        paid, total = 0.0, torch.zeros(dim, dtype=torch.float64)
        for t in range(rounds):
            g = gradient(t, x.detach())
            paid += (g * x.detach()).sum().item()
            total += g
            x.grad = g.clone()
            optimizer.step()
            assert x.norm() <= diameter / 2 + 1e-9
        regret = paid + diameter / 2 * total.norm().item()  # the best fixed point is -D/2 along the sum
        if kind == "ftrl":
            limit = 3 * math.sqrt(2) * diameter * bound * math.sqrt(rounds) + 4 * diameter * bound
        else:
            limit = 1.5 * diameter * math.sqrt(4 * bound**2 + optimizer.stats()["variation"].item() ** 2)
        assert regret <= limit, name


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (OptimisticOMD, {"lipschitz": 2.0, "diameter": 3.0, "project": True}),
        (OptimisticOMD, {"delta": 0.5}),
        (OptimisticFTRL, {"diameter": 3.0}),
        (OptimisticFTRL, {"diameter": 3.0, "project": False}),
    ],
)
def test_groups_have_a_learning_rate_of_their_own_and_share_the_rest(cls, kwargs):
    torch.manual_seed(1)
    parts = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (3, 2)]
    rates = torch.tensor([0.5] * 3 + [2.0] * 2, dtype=torch.float64)
    optimizer = cls([{"params": parts[:1], "lr": 0.5}, {"params": parts[1:], "lr": 2.0}], **kwargs)
    diameter, start = kwargs.get("diameter", 1.0), torch.cat([p.detach() for p in parts])

    def inside(x):
        projects, y = kwargs.get("project", cls is OptimisticFTRL), x - start
        return start + y * min(1.0, diameter / 2 / float(y.norm())) if projects else x

    xhat, previous, total = start, torch.zeros(5).double(), torch.zeros(5).double()
    scale, variation, penalty = kwargs.get("delta", 1e-8) + 4 * kwargs.get("lipschitz", 0.0) ** 2, 0.0, 0.0
    for step in range(8):
        rates = rates * 0.5 if step == 4 else rates  # a schedule
        for group in optimizer.param_groups:
            group["lr"] *= 0.5 if step == 4 else 1.0
        g = torch.randn(5, dtype=torch.float64)
        change = float((g - previous).square().sum())
        total = total + g
        for p, part in zip(parts, g.split([3, 2]), strict=True):
            p.grad = part.clone()
        optimizer.step()
        if cls is OptimisticFTRL:
            penalty += diameter**2 / (1.0 + penalty) * change
            want = inside(start - rates * diameter**2 / (1.0 + penalty) / 2 * (total + g))
        else:
            if step == 0:
                eta = rates * diameter / math.sqrt(scale)
            xhat = inside(xhat - eta * g)  # with the step size that the point was made with
            variation += change
            eta = rates * diameter / math.sqrt(scale + variation)
            want = inside(xhat - eta * g)
        previous = g
        assert (torch.cat([p.detach() for p in parts]) - want).abs().max() <= 1e-13, step


def test_what_all_parameters_share_cannot_differ_between_groups():
    x, y = (torch.zeros(2, requires_grad=True) for _ in range(2))
    other = {"step_rule": "constant", "diameter": 2.0, "project": True, "lipschitz": 1.0, "smoothness": 1.0,
             "strong_convexity": 1.0, "delta": 1.0}  # fmt: skip
    for cls, values in (
        (OptimisticOMD, other),
        (OptimisticFTRL, {"diameter": 2.0, "project": False, "lipschitz": 1.0, "nu": 2.0}),
        (AdaGradNorm, {"scope": "group"}),
    ):
        for name, value in values.items():
            with pytest.raises(ValueError, match=f"{name} must be the same in all parameter groups, .* and {value}"):
                cls([{"params": [x]}, {"params": [y], name: value}])


def test_constant_gradient_has_no_variation_after_the_first():
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = OptimisticOMD([x])
    assert optimizer.stats() == OptimisticFTRL([x]).stats() == {}
    for _ in range(5):
        x.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
        optimizer.step()
    assert optimizer.stats()["variation"] == pytest.approx(5.0)
    assert x.norm() < 100  # without a scale the first step uses the first gradient, not delta = 1e-8


@pytest.mark.parametrize(("lr", "expected"), [(0.1, 286), (1.0, 104), (10.0, 2), (100.0, 2)])
def test_normalized_gd_separates_the_toy_set(lr, expected):
    # nine copies of (1, 0) and one (-0.9, 0.1); labels folded in; steps until all margins are positive
    data = torch.tensor([[1.0, 0.0]] * 9 + [[-0.9, 0.1]], dtype=torch.float64)
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = NormalizedGD([w], lr=lr)
    steps = 0
    while steps < 400 and not (data @ w.detach() > 0).all():
        steps += 1
        optimizer.zero_grad()
        torch.nn.functional.softplus(-data @ w).mean().backward()
        optimizer.step()
    assert steps == expected


@pytest.mark.parametrize("switches", [{}, {"foreach": False}, {"capturable": True}, {"differentiable": True}])
@pytest.mark.parametrize("kwargs", [{}, {"step_rule": "constant"}, {"weight_decay": 0.1}])
def test_a_hint_is_taken_back_with_the_step_size_it_was_played_with(kwargs, switches):
    """The form with two sequences, where gradients come and go and a schedule changes the learning rate."""
    torch.manual_seed(2)
    params = [torch.randn(3, dtype=torch.float64) for _ in range(4)]
    optimizer = OptimisticOMD(params, lr=0.5, **kwargs, **switches)
    xhat, previous = [p.clone() for p in params], [torch.zeros(3).double() for _ in params]
    variation, eta = 0.0, None
    # the second and the third come back together, after as many steps, with hints of different step sizes
    present = [range(12), (0, 1, 4, 5, 9), (0, 2, 4, 6, 9), (3, 8, 9, 11)]
    for step in range(12):
        if step == 7:  # a checkpoint, with parameters away
            state = optimizer.state_dict()
            optimizer = OptimisticOMD(params, lr=0.5, **kwargs, **switches)
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = 0.5 * 0.9**step
        change = 0.0
        for index, p in enumerate(params):
            here = step in present[index]
            p.grad = torch.randn(3, dtype=torch.float64) if here else None
            if here:
                g = p.grad + kwargs.get("weight_decay", 0.0) * p.detach()
                change += float((g - previous[index]).square().sum())
                previous[index] = g.detach().clone()
        grown = variation + change

        def size(v, step=step):
            return 0.5 * 0.9**step / (1.0 if "step_rule" in kwargs else math.sqrt(1e-8 + v))

        eta = size(grown) if eta is None else eta
        following, variation = size(grown), grown
        optimizer.step()
        for index, p in enumerate(params):
            if p.grad is not None:
                xhat[index] = xhat[index] - eta * previous[index]
                want = xhat[index] - following * previous[index]
                assert (p.detach() - want).abs().max() <= 1e-12, (step, index)
        eta = following
    assert any("played_eta" in optimizer.state[p] for p in params)
