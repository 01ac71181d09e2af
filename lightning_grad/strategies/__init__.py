"""Strategies: how a step is computed and shared. Importing this package registers ``"spsa"``."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_grad.strategies._spsa_common import SPSAConfigError
from lightning_grad.strategies.elastic_spsa import ElasticSPSAStrategy
from lightning_grad.strategies.shared_seed_spsa import SharedSeedSPSAStrategy

__all__ = ["ElasticSPSAStrategy", "SPSAConfigError", "SharedSeedSPSAStrategy"]

# The class name too, in lower case: Lightning looks up here any string it is given as `strategy`, lowered.
for _name in (SharedSeedSPSAStrategy.strategy_name, SharedSeedSPSAStrategy.__name__.lower()):
    if _name not in StrategyRegistry:
        StrategyRegistry.register(
            _name,
            SharedSeedSPSAStrategy,
            description="Forward passes only; one byte per direction; replicas bitwise equal.",
        )
