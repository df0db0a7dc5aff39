"""What is measured: scenarios, models and their tokenizers, the configuration and its plan."""
