"""Scaling laws: what to try before the run, and fits to the runs there are. Functions of numbers; needs only numpy."""

from lightning_grad.scaling.chinchilla import Chinchilla, fit_chinchilla
from lightning_grad.scaling.isoflop import IsoflopParabola, fit_isoflop_parabola, parabola_vertex_shift
from lightning_grad.scaling.overtraining import Downstream, Overtraining, fit_downstream, fit_overtraining
from lightning_grad.scaling.power_law import PowerLaw, fit_power_law
from lightning_grad.scaling.step_law import StepLaw, count_non_embedding, step_law

__all__ = [
    "Chinchilla",
    "Downstream",
    "IsoflopParabola",
    "Overtraining",
    "PowerLaw",
    "StepLaw",
    "count_non_embedding",
    "fit_chinchilla",
    "fit_downstream",
    "fit_isoflop_parabola",
    "fit_overtraining",
    "fit_power_law",
    "parabola_vertex_shift",
    "step_law",
]
