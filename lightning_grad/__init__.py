"""The research frontier of stochastic-gradient methods as PyTorch Lightning plugins.

Importing this package makes the bare class names below usable in LightningCLI YAML.
"""

__version__ = "0.1.0.dev0"

__all__ = [
    "__version__",
]
