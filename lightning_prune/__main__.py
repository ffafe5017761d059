"""``python -m lightning_prune``: the command line."""

from lightning_prune.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
