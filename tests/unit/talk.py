"""One conversation of two turns, and its prompts, for the tests of cells and of blocks."""

from __future__ import annotations

import json
from pathlib import Path

from kvbench.inputs import tokens
from kvbench.inputs.scenarios import Scenario, Turn

TALK = Scenario(
    id="talk",
    kind="conversation",
    title="Talk",
    system="You are the assistant of Acme.",
    turns=(
        Turn("How do I open an account?", "With two documents."),
        Turn("And online?", "Yes."),
    ),
)


def write_prompts(path: Path, model: Path) -> Path:
    """Write the conversation's token ids for a model's folder; return the path."""
    path.write_text(json.dumps(tokens.prompts(model, TALK)))
    return path
