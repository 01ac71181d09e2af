"""``python -m lightning_grad.spsa`` is ``lightning-grad spsa``."""

from lightning_grad.spsa.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
