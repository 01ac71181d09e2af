"""Our run against the authors' own functions, run once on our signs and stored (oracles 9 and 10).

``spsa_reference.json`` says which functions of which commit were run and how; see its key ``origin``.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.spsa_helpers import flat, loss_of, make_session, tiny_model

STORED = json.loads((Path(__file__).parent / "spsa_reference.json").read_text())
DATA = list(zip(torch.tensor(STORED["X"]), torch.tensor(STORED["Y"]), strict=True))


def start(name, **options):
    model = tiny_model()
    assert torch.allclose(flat(model), torch.tensor(STORED["base"]), atol=1e-7)
    with torch.no_grad():  # the generator of initial weights may differ between torch versions
        values = iter(torch.tensor(STORED["base"]).split([p.numel() for p in model.parameters()]))
        for p in model.parameters():
            p.copy_(next(values).view(p.shape))
    stored = STORED[name]
    return make_session(model, seed=stored["seed"], eps=2.0 ** stored["eps_log2"], codec="f32", **options), stored


def test_one_worker_is_mezo():
    session, stored = start("mezo")
    same = True
    for step, (g, weights) in enumerate(zip(stored["projected"], stored["weights"], strict=True)):
        session.measure(0, lambda s=step: loss_of(session.module, DATA[s]))
        # a loss of about 2 has an ulp of 2.4e-7; two of them over 2 eps = 2**-9
        assert session.pending[0] == pytest.approx(g, abs=4 * 2.0**-22 * 2**9)
        same = same and session.pending[0] == g  # one last bit of a loss is 2e-6 in a weight
        session.commit(session.record(session.payload(), stored["lr"], (0,)))
        assert (flat(session.module) - torch.tensor(weights)).abs().max() < (6e-8 if same else 2e-5)


def test_two_workers_with_two_samples_are_just_one_byte():
    session, stored = start("justonebyte", reduction="rsqrt", slots=4)
    same = True
    for step, (row, weights) in enumerate(zip(stored["projected"], stored["weights"], strict=True)):
        for j, g in enumerate(row):  # worker k, sample s: direction 2 k + s, batch 4 t + 2 k + s
            session.measure(0, lambda b=4 * step + j: loss_of(session.module, DATA[b]))
            assert session.pending[j] == pytest.approx(g, abs=4 * 2.0**-22 * 2**9)
        same = same and session.pending == row
        session.commit(session.record(session.payload(), stored["lr"], (0,)))
        # the authors take exp(log(eps))
        assert (flat(session.module) - torch.tensor(weights)).abs().max() < (6e-6 if same else 6e-5)
