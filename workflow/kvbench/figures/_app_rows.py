"""Which rows of an app table a figure shows: those that stand for all machines in the prose too."""

from kvbench.analysis.selection import one_machine

__all__ = ["one_machine"]
