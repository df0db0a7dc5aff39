"""Engines that generate beside transformers: vLLM in an environment of its own, any HTTP endpoint."""
