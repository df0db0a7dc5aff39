"""Models: built, copied, fetched and loaded; and scenarios as token ids."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from kvbench import physics
from kvbench.errors import InputError
from kvbench.inputs import embedded, models, scenarios, tokens
from kvbench.inputs.scenarios import Scenario, Step, Turn

ROOT = Path(__file__).resolve().parents[2]
TALK = Scenario(
    id="talk",
    kind="conversation",
    title="Talk",
    system="You are the assistant of Acme. Be brief.",
    turns=(
        Turn("How do I open an account?", "With two documents, at any branch."),
        Turn("And online?", "Yes; it takes ten minutes."),
        Turn("Is there a fee?", "No fee in the first year."),
    ),
)
HUB = {
    "name": "distant",
    "source": "hub",
    "repo": "owner/model",
    "revision": "0" * 40,
    "gated": False,
}


def local(folder: Path, **more: object) -> dict:
    return {"name": "mine", "source": "local", "path": str(folder), **more}


@pytest.fixture
def copied(tiny_folder, tmp_path) -> Path:
    """A checkpoint folder that a test may damage."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_folder, folder)
    (folder / models.RECIPE).unlink()
    return folder


def refused(document: dict, target: Path) -> str:
    """Message of the error; nothing may be left where the model would have been."""
    target.parent.mkdir(parents=True, exist_ok=True)
    before = sorted(target.parent.iterdir())
    with pytest.raises(InputError) as error:
        models.prepare(document, target, ROOT)
    assert sorted(target.parent.iterdir()) == before
    text = str(error.value)
    assert "\n" not in text
    return text


def state(folder: Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
    return dict(models.load(folder, "cpu", dtype).model.state_dict())


# Built ----------------------------------------------------------------------------------------


def test_a_model_built_twice_has_the_same_bytes(tiny_document, tiny_folder, tmp_path):
    models.prepare(tiny_document, tmp_path / "tiny", ROOT)
    again, first = (p / "model.safetensors" for p in (tmp_path / "tiny", tiny_folder))
    assert again.read_bytes() == first.read_bytes()


def test_another_seed_gives_other_weights(tiny_document, tiny_folder, tmp_path):
    models.prepare(tiny_document | {"seed": 8}, tmp_path / "tiny", ROOT)
    name = "model.embed_tokens.weight"
    assert not torch.equal(state(tmp_path / "tiny")[name], state(tiny_folder)[name])


def test_weights_from_the_recipe_are_the_written_ones_and_rounded_only(tiny_folder, tmp_path):
    recipe = tmp_path / "recipe"
    shutil.copytree(tiny_folder, recipe, ignore=shutil.ignore_patterns("*.safetensors"))
    full, half = state(recipe), state(recipe, "bfloat16")
    written = state(tiny_folder)
    for name, weight in full.items():
        assert torch.equal(weight, written[name]), name
        assert torch.equal(weight.to(torch.bfloat16), half[name]), name


def test_random_weights_have_the_asked_for_spread(tiny):
    weight = tiny.model.model.embed_tokens.weight
    assert weight.std().item() == pytest.approx(0.1, rel=0.01)
    assert weight.mean().item() == pytest.approx(0.0, abs=0.001)


def test_tied_embeddings_stay_tied_and_count_once(tiny_document, tmp_path):
    tiny_document["architecture"]["tie_word_embeddings"] = True
    folder = tmp_path / "tied"
    models.prepare(tiny_document, folder, ROOT)
    loaded = models.load(folder, "cpu", "float32")
    model = loaded.model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    architecture = physics.Architecture.from_config(loaded.architecture)
    assert loaded.parameter_bytes == 4 * physics.parameters(architecture)


def test_the_one_billion_geometry_is_exactly_that_of_llama_3_2(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    text = (ROOT / "config/models/llama-3.2-1b-geometry.yaml").read_text()
    config = LlamaConfig(**yaml.safe_load(text)["architecture"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        model.tie_weights()
    assert sum(weight.numel() for weight in model.parameters()) == 1_235_814_400


def test_the_hub_model_and_its_geometry_have_one_shape():
    shapes = []
    for name in ("llama-3.2-1b", "llama-3.2-1b-geometry"):
        document = yaml.safe_load((ROOT / f"config/models/{name}.yaml").read_text())
        shapes.append(physics.Architecture.from_config(document["architecture"]))
    assert shapes[0] == shapes[1]


def test_a_model_type_that_cannot_be_built_is_refused(tiny_document, tmp_path):
    tiny_document["architecture"]["model_type"] = "bart-like"
    text = refused(tiny_document, tmp_path / "out" / "tiny")
    assert "config/models/tiny.yaml: architecture.model_type is 'bart-like'" in text
    assert "no causal language model of that type" in text


def test_a_size_that_a_family_needs_is_named_with_the_model_file(tiny_document, tmp_path):
    tiny_document["architecture"]["model_type"] = "mamba"
    text = refused(tiny_document, tmp_path / "out" / "tiny")
    assert text.startswith("config/models/tiny.yaml: architecture: state_size is missing")


# Local ----------------------------------------------------------------------------------------


def test_a_local_folder_is_linked_and_gives_the_same_weights(copied, tiny, tmp_path):
    models.prepare(local(copied), tmp_path / "out" / "mine", ROOT)
    assert (tmp_path / "out" / "mine" / "model.safetensors").is_symlink()
    found = state(tmp_path / "out" / "mine")
    assert all(torch.equal(value, found[k]) for k, value in tiny.model.state_dict().items())


def test_code_and_pickles_of_a_local_folder_are_left_where_they_are(copied, tmp_path):
    for name in ("modeling_mine.py", "pytorch_model.bin", ".gitattributes"):
        (copied / name).write_bytes(b"")
    (copied / "merges.txt").write_text("")
    models.prepare(local(copied), tmp_path / "out" / "mine", ROOT)
    names = {path.name for path in (tmp_path / "out" / "mine").iterdir()}
    assert "merges.txt" in names
    assert not names & {"modeling_mine.py", "pytorch_model.bin", ".gitattributes"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sharded_checkpoint_of_any_dtype_is_loaded_in_the_asked_one(
    tiny, copied, tmp_path, dtype
):
    (copied / "model.safetensors").unlink()
    copy.deepcopy(tiny.model).to(dtype).save_pretrained(copied, max_shard_size="300KB")
    assert len(list(copied.glob("*.safetensors"))) > 1
    models.prepare(local(copied), tmp_path / "out" / "mine", ROOT)
    loaded = models.load(tmp_path / "out" / "mine", "cpu", "float32")
    assert loaded.model.dtype == torch.float32
    for key, value in tiny.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value.to(dtype).float())


def test_sampling_flags_of_a_checkpoint_do_not_change_greedy_decoding(tiny, copied):
    from kvbench import strategies

    flags = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 5,
        "top_p": 0.5,
        "repetition_penalty": 3.0,
        "no_repeat_ngram_size": 1,
        "bad_words_ids": [[9]],
        "eos_token_id": [2, 9],
        "max_length": 12,
    }
    (copied / "generation_config.json").write_text(json.dumps(flags))
    flagged = models.load(copied, "cpu", "float32")
    assert flagged.end_ids >= {2, 9}
    replies = [
        strategies.get("dynamic")
        .session(model, 80)
        .generate(list(range(300, 330)), 40, lambda: None)
        .tokens
        for model in (tiny, flagged)
    ]
    assert replies[0] == replies[1]


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(0, 7, {0}), (None, 0, {0}), ([0, 5], 7, {0, 5}), (None, None, set())],
)
def test_end_ids_are_those_said_first_and_zero_is_one(generation, config, expected):
    import families
    from transformers import AutoConfig, AutoModelForCausalLM

    values = AutoConfig.for_model("llama", **families.CONFIGS["llama"] | {"eos_token_id": config})
    model = AutoModelForCausalLM.from_config(values)
    model.generation_config.eos_token_id = generation
    loaded = models.adopt(model, families.NoTokenizer())
    assert loaded.end_ids == expected
    assert loaded.reply([4, 0, 3]) == ([4] if 0 in expected else [4, 0, 3])


def test_ids_that_no_token_has_are_not_shown(tiny):
    assert tiny.decode([300, 2559, 10**6]) == tiny.decode([300, 2559])


def test_a_missing_folder_names_file_and_key(tmp_path):
    text = refused(local(tmp_path / "absent"), tmp_path / "out" / "mine")
    assert text.startswith("config/models/mine.yaml: path ")
    assert "absent" in text


def test_a_folder_without_configuration_is_refused(copied, tmp_path):
    (copied / "config.json").unlink()
    assert "no config.json" in refused(local(copied), tmp_path / "out" / "mine")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", 0.5),
        ("architectures", [True]),
        ("rope_parameters", {"rope_theta": [[]], "rope_type": "default"}),
        ("rope_parameters", {"rope_theta": -1, "rope_type": "default"}),
        ("rope_scaling", "linear"),
    ],
)
def test_a_configuration_of_which_no_model_can_be_made_is_refused(copied, tmp_path, key, value):
    path = copied / "config.json"
    config = json.loads(path.read_text())
    if key == "rope_scaling":
        config.pop("rope_parameters", None)
    path.write_text(json.dumps(config | {key: value}))
    text = refused(local(copied), tmp_path / "out" / "mine")
    assert "config.json" in text
    assert "must be" in text
    assert "\n" not in text


def test_pickled_weights_are_refused_with_the_way_to_convert_them(copied, tmp_path):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    text = refused(local(copied), tmp_path / "out" / "mine")
    assert "only pytorch_model.bin" in text
    assert "save_pretrained" in text


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_truncated_checkpoint_is_named(copied, tmp_path, kept):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    text = refused(local(copied), tmp_path / "out" / "mine")
    assert str(weights) in text
    assert "not a whole safetensors file" in text


def test_a_shard_that_the_index_lists_and_the_folder_lacks_is_named(copied, tmp_path):
    names = {"model.embed_tokens.weight": "model-00002-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": names}
    (copied / "model.safetensors").rename(copied / "model-00001-of-00002.safetensors")
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002" in refused(local(copied), tmp_path / "out" / "mine")


def test_a_file_that_differs_from_its_checksum_is_refused(copied, tmp_path):
    document = local(copied, sha256={"tokenizer.json": "0" * 64})
    text = refused(document, tmp_path / "out" / "mine")
    assert str(copied / "tokenizer.json") in text
    assert "sha256" in text


def test_a_failed_preparation_keeps_the_model_that_was_there(copied, tmp_path):
    target = tmp_path / "out" / "mine"
    document = local(copied, source="shipped")
    models.prepare(document, target, ROOT)
    (copied / "model.safetensors").write_bytes(b"")
    refused(document, target)
    assert models.load(target, "cpu", "float32").parameter_bytes > 0


# Hub ------------------------------------------------------------------------------------------


def test_a_gated_model_without_a_token_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    text = refused(HUB | {"gated": True}, tmp_path / "out" / "distant")
    assert text.startswith("config/models/distant.yaml: owner/model is gated")
    assert "export HF_TOKEN" in text


@pytest.mark.parametrize("kind", ["LocalEntryNotFoundError", "OfflineModeIsEnabled", "OSError"])
def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, tmp_path, kind):
    from huggingface_hub import errors

    def unreachable(*_: object, **__: object) -> None:
        raise getattr(errors, kind, OSError)("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    text = refused(HUB, tmp_path / "out" / "distant")
    assert "owner/model could not be downloaded" in text
    assert "check the network" in text


def test_only_the_pinned_revision_and_no_pickle_or_code_is_fetched(
    monkeypatch, tmp_path, tiny_folder
):
    asked = {}

    def download(repo: str, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            shutil.copyfile(tiny_folder / name, local_dir / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    models.prepare(HUB, tmp_path / "distant", ROOT)
    assert (asked["repo"], asked["revision"]) == ("owner/model", "0" * 40)
    assert not any(p.endswith((".bin", ".py", ".pt", "*")) for p in asked["patterns"])
    assert models.load(tmp_path / "distant", "cpu", "float32").parameter_bytes > 0


# Loading --------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none_is_one_line(tiny_folder):
    with pytest.raises(InputError, match=r"kv\.device is cuda but torch sees no GPU") as error:
        models.load(tiny_folder, "cuda", "bfloat16")
    assert "\n" not in str(error.value)


def test_a_loaded_model_never_stops_before_the_full_length(tiny):
    assert tiny.model.config.eos_token_id is None
    assert tiny.model.generation_config.eos_token_id is None
    assert not tiny.model.training


def test_the_parameters_bytes_are_those_of_the_architecture(tiny):
    architecture = physics.Architecture.from_config(tiny.architecture)
    assert tiny.parameter_bytes == 4 * physics.parameters(architecture)


def test_a_reply_is_shown_up_to_its_end_mark(tiny):
    end = embedded.SPECIAL.index("<|end|>")
    assert tiny.reply([300, 301, end, 302]) == [300, 301]
    assert tiny.decode([300, 301, end, 302]) == tiny.decode([300, 301])
    assert tiny.decode([300, 301]) != ""


# Token ids ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder, local_files_only=True)


def whole(tokenizer, scenario: Scenario) -> list[int]:
    """Ids of the complete conversation, tokenised at once."""
    messages = [{"role": "system", "content": scenario.system}]
    for turn in scenario.turns[:-1]:
        messages.append({"role": "user", "content": turn.user})
        messages.append({"role": "assistant", "content": turn.reference})
    messages.append({"role": "user", "content": scenario.turns[-1].user})
    return tokenizer(tokens.render(tokenizer, messages), add_special_tokens=False)["input_ids"]


def joined(document: dict) -> list[int]:
    ids = list(document["first"])
    for reference, between in zip(document["references"], document["next"], strict=False):
        ids += [*reference, *between]
    return ids


def test_the_pieces_of_a_conversation_are_the_tokens_of_the_whole_template(tokenizer):
    document = tokens.conversation_prompts(tokenizer, TALK)
    assert joined(document) == whole(tokenizer, TALK)


@pytest.mark.parametrize("name", ["insurance_claim_auto", "ecommerce_support"])
def test_so_are_those_of_the_shipped_conversations(tokenizer, name):
    scenario = scenarios.load(ROOT / f"config/scenarios/{name}.yaml")
    document = tokens.conversation_prompts(tokenizer, scenario)
    assert len(document["next"]) == 14
    assert joined(document) == whole(tokenizer, scenario)


def test_a_text_may_hold_the_mark_of_the_prompt_builder(tokenizer):
    """The marker that splits the chat template is data where a customer types it."""
    marker = tokens.MARK
    typed = replace(TALK, turns=(Turn(f"a {marker} b", "Yes."), Turn(f"{marker}?", "No.")))
    plain = replace(TALK, turns=(Turn("a MARK b", "Yes."), Turn("MARK?", "No.")))
    pieces = [tokens.conversation_prompts(tokenizer, talk) for talk in (typed, plain)]
    with_mark, without = (tokenizer.decode(piece["next"][0]) for piece in pieces)
    assert with_mark.replace(marker, "MARK") == without


def test_a_template_language_in_a_text_is_text(tokenizer):
    talk = replace(TALK, turns=(Turn("{{ 7 * 7 }}", "Yes."), Turn("{% if %}", "No.")))
    pieces = tokens.conversation_prompts(tokenizer, talk)
    assert "{{ 7 * 7 }}" in tokenizer.decode(pieces["first"])
    assert "{% if %}" in tokenizer.decode(pieces["next"][0])


def test_a_special_token_in_a_text_is_refused_with_its_key(tokenizer):
    talk = replace(TALK, turns=(TALK.turns[0], Turn("Stop <|end|> now", "Yes.")))
    with pytest.raises(InputError) as error:
        tokens.conversation_prompts(tokenizer, talk)
    assert "scenarios/talk.yaml: turns[1].user holds '<|end|>'" in str(error.value)


def test_a_base_model_without_template_gets_role_and_content_lines(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    document = tokens.prompts(tmp_path, TALK)
    text = tokenizer.decode(document["first"], skip_special_tokens=True)
    assert text == (
        "system: You are the assistant of Acme. Be brief.\n"
        "user: How do I open an account?\nassistant:"
    )
    assert tokenizer.decode(document["next"][0]) == "\nuser: And online?\nassistant:"


def test_fixed_prompts_have_exact_lengths_and_come_from_the_seed(tiny_folder):
    steps = (Step(152, 150), Step(7, 2))
    scenario = Scenario(id="f", kind="fixed", title="F", steps=steps, seed=5)
    first = tokens.prompts(tiny_folder, scenario)
    assert [len(step["prompt"]) for step in first["steps"]] == [152, 7]
    assert [step["new_tokens"] for step in first["steps"]] == [150, 2]
    assert first == tokens.prompts(tiny_folder, scenario)
    other = Scenario(id="f", kind="fixed", title="F", steps=steps, seed=6)
    assert first["steps"] != tokens.prompts(tiny_folder, other)["steps"]


def test_fixed_prompts_use_no_special_tokens(tiny_folder):
    scenario = Scenario(id="f", kind="fixed", title="F", steps=(Step(4000, 2),), seed=5)
    (step,) = tokens.prompts(tiny_folder, scenario)["steps"]
    assert min(step["prompt"]) >= len(embedded.SPECIAL)
    assert max(step["prompt"]) < 2560
    assert len(set(step["prompt"])) > 1000


@pytest.mark.parametrize(("turns", "expected"), [(1, 3 + 9), (2, 3 + 4 + 18), (None, 12 + 27)])
def test_the_longest_context_counts_questions_and_full_replies(turns, expected):
    document = {"kind": "conversation", "first": [1] * 3, "next": [[1] * 4, [1] * 5]}
    assert tokens.longest_context(document, turns, 9) == expected


def test_the_longest_context_of_fixed_lengths_is_the_longest_step():
    steps = [{"prompt": [1] * 8, "new_tokens": 4}, {"prompt": [1] * 9, "new_tokens": 2}]
    assert tokens.longest_context({"kind": "fixed", "steps": steps}, None, 99) == 12
