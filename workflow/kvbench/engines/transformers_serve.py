"""``transformers serve`` without optional packages that it has no use for: it starts in half the time."""

from __future__ import annotations

from kvbench.measurement import startup


def main() -> None:
    """Run the command line of transformers with the arguments of this process."""
    startup.skip_unused_imports()
    from transformers.cli.transformers import main as transformers

    transformers()


if __name__ == "__main__":
    main()
