"""``python -m lightning_grad`` is the command ``lightning-grad``."""

from lightning_grad._command import main

if __name__ == "__main__":
    raise SystemExit(main())
