"""``python -m kvbench``: the command line."""

from kvbench.cli import main

main()
