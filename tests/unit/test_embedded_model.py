"""The embedded checkpoint that ships: whole, refused when damaged, and knowing its replies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from kvbench import documents, physics
from kvbench.errors import InputError
from kvbench.inputs import embedded, models, scenarios, training
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "resources" / "embedded-llama"
END = embedded.SPECIAL.index("<|end|>")
#: Share of the ninety replies that the project promises.
PROMISED = 0.95


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sums() -> dict[str, str]:
    lines = (SHIPPED / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return {name: value for value, name in (line.split("  ") for line in lines)}


def test_the_shipped_tokenizer_is_what_the_scenarios_make(tmp_path):
    rewordings = documents.read_yaml(SHIPPED / "training" / "rewordings.yaml")
    every = scenarios.load_all(ROOT / "config" / "scenarios")
    known = {name: every[name] for name in rewordings}
    embedded.build_tokenizer(embedded.corpus(known, rewordings), tmp_path)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == [
        "chat_template.jinja",
        "special_ids.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in made:
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes(), name


@pytest.fixture(scope="module")
def loaded() -> models.LoadedModel:
    return models.load(SHIPPED, "cpu", "float32")


@pytest.fixture(scope="module")
def corpus() -> list[training.Dialogue]:
    """What it was trained on; a conversation that a user adds is none of it."""
    rewordings = documents.read_yaml(SHIPPED / "training" / "rewordings.yaml")
    every = scenarios.load_all(ROOT / "config" / "scenarios")
    return training.dialogues(
        Tokenizer.from_file(str(SHIPPED / "tokenizer.json")),
        {name: every[name] for name in rewordings},
        rewordings,
    )


def copy_of_shipped(folder: Path, sums: dict[str, str]) -> dict[str, object]:
    """A model document that points to a copy."""
    shutil.copytree(SHIPPED, folder)
    return {"name": "embedded", "source": "shipped", "path": str(folder), "sha256": sums}


# The files ------------------------------------------------------------------------------------


def test_every_file_has_the_checksum_that_is_listed(sums):
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(sums)
    assert sums == {name: documents.sha256_of_file(SHIPPED / name) for name in sums}


def test_the_model_file_names_these_checksums(sums):
    document = documents.read_yaml(ROOT / "config" / "models" / "embedded.yaml")
    assert document["source"] == "shipped"
    assert document["sha256"]["model.safetensors"] == sums["model.safetensors"]
    assert document["sha256"].items() <= sums.items()


def test_the_folder_stays_under_ten_megabytes():
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 10e6


def test_the_checkpoint_has_the_shape_that_training_builds(loaded):
    config = json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))
    assert {key: config[key] for key in training.ARCHITECTURE} == dict(training.ARCHITECTURE)
    expected = physics.parameters(physics.Architecture.from_config(config))
    assert sum(weight.numel() for weight in loaded.model.parameters()) == expected
    assert loaded.parameter_bytes == 4 * expected


def test_a_whole_copy_is_accepted(tmp_path, sums):
    models.prepare(copy_of_shipped(tmp_path / "copy", sums), tmp_path / "model", ROOT)
    assert (
        documents.sha256_of_file(tmp_path / "model" / "model.safetensors")
        == (sums["model.safetensors"])
    )


def test_a_truncated_checkpoint_is_refused(tmp_path, sums):
    document = copy_of_shipped(tmp_path / "copy", sums)
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"model\.safetensors: not a whole safetensors file"):
        models.prepare(document, tmp_path / "model", ROOT)
    assert not (tmp_path / "model").exists()


def test_a_checkpoint_with_one_bit_changed_is_refused(tmp_path, sums):
    document = copy_of_shipped(tmp_path / "copy", sums)
    weights = tmp_path / "copy" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors: SHA-256 is"):
        models.prepare(document, tmp_path / "model", ROOT)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja"])
def test_an_altered_file_beside_the_weights_is_refused(tmp_path, sums, name):
    document = copy_of_shipped(tmp_path / "copy", sums)
    path = tmp_path / "copy" / name
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(InputError, match=rf"{name}: SHA-256 is"):
        models.prepare(document, tmp_path / "model", ROOT)


def test_the_losses_that_ship_are_those_of_a_finished_run():
    import pandas as pd

    table = pd.read_csv(SHIPPED / "training" / "loss.csv")
    assert table["step"].tolist() == list(range(1, len(table) + 1))
    assert table["loss"].iloc[-50:].mean() < 0.05 < 5 < table["loss"].iloc[0]
    assert table[["exact_share_150", "exact_share_32"]].iloc[-1].min() >= PROMISED


# What it answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("new_tokens", [150, 32])
def test_the_promised_share_of_ninety_replies_is_exact_in_conversation(loaded, corpus, new_tokens):
    exact = [
        one
        for dialogue in corpus
        for one in training.exact_turns(loaded.model, dialogue, new_tokens, END)
    ]
    assert len(exact) == 90
    assert sum(exact) / 90 >= PROMISED


def test_a_conversation_decoded_step_by_step_recites_its_replies(loaded, corpus):
    exact = training.decoded_turns(loaded.model, corpus[0], 150, END)
    assert sum(exact) / len(exact) >= PROMISED


def test_the_reply_that_is_shown_is_the_reference_and_nothing_behind_it(loaded, corpus):
    dialogue = corpus[0]
    prompt = torch.tensor([[*dialogue.opening, *dialogue.questions[0][0]]])
    out = loaded.model.generate(prompt, max_new_tokens=150, attention_mask=torch.ones_like(prompt))
    said = out[0, prompt.shape[1] :].tolist()
    assert len(said) == 150
    scenario = scenarios.load(ROOT / "config" / "scenarios" / f"{dialogue.name}.yaml")
    assert loaded.decode(said) == scenario.turns[0].reference
    assert set(said[len(dialogue.replies[0]) :]) == {END}
