"""A second opinion on two questions: a cross-encoder or NLI model that reads both at once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from kvbench.errors import InputError, Unsupported

_LOG = logging.getLogger("kvbench.second_opinion")


class SecondOpinion:
    """A guard backed by a model in a local folder; whatever fails in it is a no.

    A model with one output gives a score, higher for questions that ask the same; it has to be at
    least ``threshold``. A model with several outputs is read as natural language inference: the
    label ``entailment`` must have at least that probability in both directions, because one
    question may say everything that the other says, and more.

    Parameters
    ----------
    folder:
        What :class:`sentence_transformers.CrossEncoder` saves. Nothing is downloaded, and no code
        from the folder is run.
    threshold:
        Least score or probability, within [0, 1].

    Raises
    ------
    InputError
        If the folder is missing, or a model with several outputs names none ``entailment``.
    Unsupported
        If the model cannot be loaded.
    """

    def __init__(self, folder: str | Path, threshold: float = 0.5) -> None:
        if not Path(folder).is_dir():
            raise InputError(f"--second-opinion {folder}: not a folder")
        try:
            from sentence_transformers import CrossEncoder

            self._model: Any = CrossEncoder(
                str(folder), device="cpu", local_files_only=True, trust_remote_code=False
            )
        except ImportError as error:
            raise Unsupported("--second-opinion: install sentence-transformers") from error
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Unsupported(f"--second-opinion {folder}: cannot be loaded: {reason}") from error
        self._threshold = threshold
        labels = self._model.config.id2label
        self._entailment = None
        if len(labels) > 1:
            found = [int(n) for n, name in labels.items() if str(name).lower() == "entailment"]
            if not found:
                raise InputError(f"--second-opinion {folder}: no label named entailment")
            self._entailment = found[0]

    def __call__(self, asked: str, stored: str) -> bool:
        """Whether the model agrees that one answer serves both questions."""
        try:
            scores = np.asarray(
                self._model.predict([(asked, stored), (stored, asked)], show_progress_bar=False),
                dtype=float,
            )
            if self._entailment is not None:
                powers = np.exp(scores - scores.max(axis=1, keepdims=True))
                scores = (powers / powers.sum(axis=1, keepdims=True))[:, self._entailment]
            return bool(np.all(np.isfinite(scores)) and scores.min() >= self._threshold)
        except Exception as error:
            # Whatever goes wrong here must cost a generation, never a wrong answer.
            _LOG.warning("second opinion: %s", type(error).__name__)
            return False
