"""From records to tables, intervals and verdicts; no torch, no plotting."""
