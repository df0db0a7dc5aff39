"""Measuring: clocks, memory, noise, the machine lock, and the conversation that is timed."""
