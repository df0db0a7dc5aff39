"""From tables to named values, LaTeX and PDF."""
