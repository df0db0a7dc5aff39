"""The training of the embedded model: examples, learning, checks, and the files it writes."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from kvbench import documents
from kvbench.errors import InputError
from kvbench.figures import training_loss
from kvbench.inputs import embedded, models, scenarios, tokens, training
from kvbench.inputs.scenarios import Scenario, Turn
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "resources" / "embedded-llama"
END = 2
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
#: Two turns; the second question has two wordings.
TOY = training.Dialogue(
    "toy",
    opening=(1, 3, 10, 11),
    questions=(((2, 4, 12, 2, 5),), ((2, 4, 13, 2, 5), (2, 4, 14, 15, 2, 5))),
    replies=((20, 21, 22), (23, 24, 25, 26)),
)
SMALL = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
QUICK = training.Recipe(
    seed=7, steps=60, learning_rate=5e-3, warmup=5, check_every=20, filler_weight=0.3
)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums come in the same order whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def conversations(rewordings) -> dict[str, Scenario]:
    every = scenarios.load_all(ROOT / "config" / "scenarios")
    return {name: every[name] for name in rewordings}


@pytest.fixture(scope="module")
def rewordings() -> dict:
    return documents.read_yaml(SHIPPED / "training" / "rewordings.yaml")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))


@pytest.fixture(scope="module")
def trained() -> tuple[torch.nn.Module, list[dict]]:
    torch.set_num_threads(1)
    model = training.new_model(QUICK.seed, SPECIAL, **SMALL)
    recipe = dataclasses.replace(QUICK, steps=300)
    return model, training.train(model, [TOY, other_toy()], recipe, END)


def other_toy() -> training.Dialogue:
    return dataclasses.replace(
        TOY, name="other", opening=(1, 3, 16, 17), replies=((27, 28), (29, 30, 31))
    )


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


# Dialogues ------------------------------------------------------------------------------------


def test_pieces_of_a_dialogue_put_together_are_the_prompts_that_are_measured(
    tokenizer, conversations, rewordings
):
    from transformers import AutoTokenizer

    measured = AutoTokenizer.from_pretrained(SHIPPED, local_files_only=True)
    corpus = training.dialogues(tokenizer, conversations, rewordings)
    assert len(corpus) == 6
    for dialogue in corpus:
        wanted = tokens.conversation_prompts(measured, conversations[dialogue.name])
        own = [list(ways[0]) for ways in dialogue.questions]
        assert [*dialogue.opening, *own[0]] == wanted["first"]
        assert own[1:] == wanted["next"]
        assert [list(reply) for reply in dialogue.replies] == wanted["references"]


def test_every_question_has_its_rewordings_behind_its_own_words(
    tokenizer, conversations, rewordings
):
    for dialogue in training.dialogues(tokenizer, conversations, rewordings):
        assert all(len(ways) == 4 for ways in dialogue.questions)
        assert all(len(set(ways)) == 4 for ways in dialogue.questions)


def test_rewordings_of_an_unknown_scenario_are_refused(tokenizer):
    scenario = Scenario("a", "conversation", "A", "Be kind.", turns=(Turn("Hi?", "Hello."),))
    with pytest.raises(InputError, match=r"rewordings.yaml: b is no conversation"):
        training.dialogues(tokenizer, {"a": scenario}, {"b": [["Hey?"]]})


def test_rewordings_with_another_number_of_turns_are_refused(tokenizer):
    scenario = Scenario("a", "conversation", "A", "Be kind.", turns=(Turn("Hi?", "Hello."),))
    with pytest.raises(InputError, match=r"a has 2 turns but the scenario has 1"):
        training.dialogues(tokenizer, {"a": scenario}, {"a": [["Hey?"], ["Ho?"]]})


# Examples -------------------------------------------------------------------------------------


def test_a_short_reply_is_filled_with_end_marks():
    one = training.example(TOY, range(1), [6], [0, 0], END, 0.1)
    assert one.tokens.tolist() == [1, 3, 10, 11, 2, 4, 12, 2, 5, 20, 21, 22, END, END, END]


def test_a_long_reply_is_cut_and_the_next_question_follows_at_once():
    one = training.example(TOY, range(2), [2, 4], [0, 0], END, 0.1)
    behind = one.tokens.tolist()[len(TOY.opening) :]
    assert behind[5:12] == [20, 21, 2, 4, 13, 2, 5]


def test_without_a_length_the_next_question_follows_the_last_word():
    one = training.example(TOY, range(2), [None, None], [0, 0], END, 0.1)
    behind = one.tokens.tolist()[len(TOY.opening) :]
    assert behind[5:13] == [20, 21, 22, 2, 4, 13, 2, 5]


def test_only_replies_their_ends_and_fillers_are_targets():
    one = training.example(TOY, range(1), [5], [0, 0], END, 0.1)
    none = training.NO_TARGET
    assert one.targets.tolist() == [none] * 8 + [20, 21, 22, END, END, END]
    assert one.weights.tolist() == pytest.approx([0] * 8 + [1, 1, 1, 1, 0.1, 0.1])


def test_the_target_at_a_cut_is_how_the_reply_goes_on():
    one = training.example(TOY, range(2), [2, 2], [0, 0], END, 0.1)
    last_before_cut = len(TOY.opening) + 5 + 1
    assert one.tokens[last_before_cut] == 21
    assert one.targets[last_before_cut] == 22
    assert one.targets[last_before_cut + 1] == training.NO_TARGET


def test_turns_left_out_leave_a_gap_as_wide_as_they_are():
    whole = training.example(TOY, range(2), [6, 6], [0, 1], END, 0.1)
    part = training.example(TOY, range(1, 2), [6, 6], [0, 1], END, 0.1)
    assert whole.positions.tolist() == list(range(len(whole.tokens)))
    skipped = 5 + 6
    kept = np.r_[0 : len(TOY.opening), len(TOY.opening) + skipped : len(whole.tokens)]
    assert part.tokens.tolist() == whole.tokens[kept].tolist()
    assert part.positions.tolist() == whole.positions[kept].tolist()
    assert part.targets.tolist() == whole.targets[kept].tolist()


def test_a_gap_in_the_positions_does_not_hide_the_system_prompt():
    model = training.new_model(1, SPECIAL, **SMALL)
    part = training.example(TOY, range(1, 2), [6, 6], [0, 0], END, 0.1)
    tokens = part.tokens.copy()
    tokens[2] = 19
    other = dataclasses.replace(part, tokens=tokens)
    with torch.no_grad():
        assert training.loss_of(model, part, 1.0) != training.loss_of(model, other, 1.0)


def test_the_asked_share_of_questions_comes_in_other_words():
    asked = (TOY.questions[1][0], TOY.questions[1][1])
    seen = [0, 0]
    generator = np.random.default_rng(3)
    for _ in range(1000):
        one = training.draw(TOY, generator, True, END, 0.25, 0.1)
        text = " ".join(map(str, one.tokens))
        for way, question in enumerate(asked):
            seen[way] += " ".join(map(str, question)) in text
    assert seen[1] / sum(seen) == pytest.approx(0.25, abs=0.05)


def test_whole_conversations_start_at_their_first_turn_and_windows_anywhere(
    tokenizer, conversations, rewordings
):
    dialogue = training.dialogues(tokenizer, conversations, rewordings)[0]
    generator = np.random.default_rng(4)
    border = len(dialogue.opening)
    starts = {
        whole: {
            int(training.draw(dialogue, generator, whole, END, 0.0, 0.1).positions[border])
            for _ in range(40)
        }
        for whole in (True, False)
    }
    assert starts[True] == {border}
    assert len(starts[False]) > 10


def test_draws_cover_filled_cut_and_ended_replies(tokenizer, conversations, rewordings):
    dialogue = training.dialogues(tokenizer, conversations, rewordings)[0]
    generator = np.random.default_rng(5)
    kinds = set()
    for _ in range(200):
        one = training.draw(dialogue, generator, True, END, 0.0, 0.1)
        first = len(dialogue.opening) + len(dialogue.questions[0][0])
        said = one.tokens[first:]
        reply = list(dialogue.replies[0])
        if said[: len(reply)].tolist() != reply:
            kinds.add("cut")
        elif said[len(reply) : len(reply) + 2].tolist() == [END, END]:
            kinds.add("filled")
        else:
            kinds.add("ended")
    assert kinds == {"cut", "filled", "ended"}


def test_batches_are_the_same_for_the_same_seed_and_differ_for_another():
    def first(seed: int) -> list[list[int]]:
        recipe = dataclasses.replace(QUICK, seed=seed, steps=5)
        return [
            one.tokens.tolist()
            for _, examples in training.batches([TOY, other_toy()], recipe, END)
            for one in examples
        ]

    assert first(1) == first(1)
    assert first(1) != first(2)


# Learning -------------------------------------------------------------------------------------


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_hundredth():
    recipe = training.Recipe(steps=100, warmup=10, learning_rate=1.0)
    rates = [training.learning_rate(recipe, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.01)


def test_a_few_steps_lower_the_loss():
    model = training.new_model(QUICK.seed, SPECIAL, **SMALL)
    recipe = dataclasses.replace(QUICK, steps=20)
    losses = [row["loss"] for row in training.train(model, [TOY], recipe, END)]
    assert losses[0] == pytest.approx(np.log(SMALL["vocab_size"]), rel=0.1)
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_training_twice_gives_the_same_losses_and_weights():
    runs = []
    for _ in range(2):
        model = training.new_model(QUICK.seed, SPECIAL, **SMALL)
        rows = training.train(model, [TOY], dataclasses.replace(QUICK, steps=8), END)
        runs.append(([row["loss"] for row in rows], weights(model)))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


def test_the_loss_counts_targets_by_their_weights():
    model = training.new_model(1, SPECIAL, **SMALL)
    one = training.example(TOY, range(1), [3, 3], [0, 0], END, 1.0)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(one.tokens)[None]).logits[0]
        each = -logits.log_softmax(-1)
        expected = sum(float(each[8 + n, token]) for n, token in enumerate([20, 21, 22, END]))
        found = float(training.loss_of(model, one, 4.0))
    assert found == pytest.approx(expected / 4, rel=1e-5)


def test_training_ends_early_when_two_checks_reach_the_goal(trained):
    _, rows = trained
    checks = [row for row in rows if "exact_share_150" in row]
    assert len(rows) < 300
    assert [min(row["exact_share_150"], row["exact_share_32"]) for row in checks[-2:]] == [1, 1]


def test_the_one_pass_check_agrees_with_decoding_step_by_step(trained):
    model, _ = trained
    fresh = training.new_model(3, SPECIAL, **SMALL)
    for dialogue in (TOY, other_toy()):
        for new_tokens in (2, 3, 9):
            assert training.exact_turns(model, dialogue, new_tokens, END) == [True, True]
            assert training.decoded_turns(model, dialogue, new_tokens, END) == [True, True]
        assert training.exact_turns(fresh, dialogue, 9, END) == [False, False]
        assert training.decoded_turns(fresh, dialogue, 9, END) == [False, False]


def test_a_wrong_reply_is_counted_and_the_right_one_beside_it_kept(trained):
    model, _ = trained
    wrong = dataclasses.replace(TOY, replies=(TOY.replies[0], (23, 24, 25, 27)))
    assert training.exact_turns(model, wrong, 9, END) == [True, False]
    assert training.decoded_turns(model, wrong, 9, END) == [True, False]
    assert training.exact_share(model, [TOY, wrong], 9, END) == pytest.approx(0.75)


def test_a_reply_cut_before_the_difference_counts_as_exact(trained):
    model, _ = trained
    wrong = dataclasses.replace(TOY, replies=(TOY.replies[0], (23, 24, 25, 27)))
    assert training.exact_turns(model, wrong, 3, END) == [True, True]
    assert training.decoded_turns(model, wrong, 3, END) == [True, True]


# Files ----------------------------------------------------------------------------------------


def test_a_saved_checkpoint_loads_with_the_rounded_weights(tmp_path):
    model = training.new_model(5, SPECIAL)
    sums = training.save(model, SHIPPED, tmp_path)
    loaded = models.load(tmp_path, "cpu", "float32").model
    assert torch.equal(weights(loaded), weights(training.as_stored(model)))
    assert next(loaded.parameters()).dtype == torch.float32
    assert sums == {name: documents.sha256_of_file(tmp_path / name) for name in sums}
    listed = (tmp_path / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    assert dict(reversed(line.split("  ")) for line in listed) == sums


def test_rounding_leaves_the_trained_weights_alone():
    model = training.new_model(5, SPECIAL, **SMALL)
    before = weights(model).clone()
    training.as_stored(model)
    assert torch.equal(weights(model), before)


def test_the_table_of_losses_leaves_cells_between_checks_empty(tmp_path, trained):
    _, rows = trained
    training.write_losses(rows, tmp_path / "loss.csv")
    with (tmp_path / "loss.csv").open(encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream))
    assert [float(row["loss"]) for row in read] == [row["loss"] for row in rows]
    assert [row["step"] for row in read if row["exact_share_150"]] == [
        str(row["step"]) for row in rows if "exact_share_150" in row
    ]


def test_rebuilding_writes_all_files_and_a_card_with_its_own_figures(tmp_path):
    scenario = Scenario(
        "a", "conversation", "A", "Be kind.", turns=(Turn("Hi?", "Hello."), Turn("Bye?", "Bye."))
    )
    lines: list[str] = []
    exact = training.rebuild(
        {"a": scenario},
        {"a": [["Hey?"], ["Ciao?"]]},
        SHIPPED,
        tmp_path,
        training.Recipe(seed=9, steps=2, check_every=1),
        1,
        lines.append,
    )
    assert set(exact) == {150, 32}
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
        "training",
        *training.TOKENIZER_FILES,
    }
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Seed 9" in card
    assert f"| 150 | {exact[150]} of 2 (" in card
    assert "2 steps of at most 2" in card
    assert any("exact_share_150" in line for line in lines)


def test_the_vocabulary_of_the_architecture_is_the_tokenizers():
    assert training.ARCHITECTURE["vocab_size"] == embedded.VOCABULARY


# Figure ---------------------------------------------------------------------------------------


def test_the_figure_shows_every_loss_and_every_check():
    table = pd.DataFrame(
        {
            "step": range(1, 101),
            "loss": np.geomspace(8, 0.01, 100),
            "exact_share_150": [s / 100 if s % 50 == 0 else None for s in range(1, 101)],
            "exact_share_32": [s / 100 if s % 25 == 0 else None for s in range(1, 101)],
        }
    )
    above, below = training_loss.draw(table).axes
    raw, smooth = (line.get_ydata() for line in above.lines)
    assert raw.tolist() == table["loss"].tolist()
    # On a straight line in the logarithm a centred mean changes nothing away from the ends.
    assert smooth[30:70] == pytest.approx(raw[30:70])
    curves = {line.get_label(): list(line.get_ydata()) for line in below.lines}
    assert curves["150 new tokens a turn"] == [50, 100]
    assert curves["32 new tokens a turn"] == [25, 50, 75, 100]


def test_the_figure_of_an_empty_table_says_so():
    figure = training_loss.draw(pd.DataFrame({"step": [], "loss": []}))
    assert "no row" in " ".join(text.get_text() for text in figure.texts)
