"""The guards of the semantic cache, in English and Portuguese, and the second opinion."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kvbench.caching import guards, held_out
from kvbench.caching import second_opinion as opinions
from kvbench.errors import InputError, Unsupported

PAIRS = Path(__file__).parents[1] / "data" / "guard_pairs.yaml"


def agree(asked, stored):
    return all(guard(asked, stored) for guard in guards.GUARDS.values())


# --- what has to be a miss ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guard", "asked", "stored"),
    [
        ("polarity", "How to turn on dark mode?", "How to turn off dark mode?"),
        ("polarity", "How do I subscribe to it?", "How do I unsubscribe from it?"),
        ("polarity", "How to upgrade my plan?", "How to downgrade my plan?"),
        ("polarity", "How to mute a chat?", "How to unmute a chat?"),
        ("polarity", "How do I approve a request?", "How do I deny a request?"),
        ("polarity", "How do I show hidden files?", "How do I hide hidden files?"),
        ("polarity", "How do I log in?", "How do I log out?"),
        ("polarity", "How do I sign in to the app?", "How do I sign out of the app?"),
        ("polarity", "What does a single room cost?", "What does a double room cost?"),
        ("polarity", "When is my inbound flight?", "When is my outbound flight?"),
        ("polarity", "Quanto é o quarto duplo?", "Quanto é o quarto triplo?"),
        ("polarity", "How do I deposit cash?", "How do I withdraw cash?"),
        ("polarity", "How do I pause my plan?", "How do I cancel my plan?"),
        ("polarity", "Como ativar o modo escuro?", "Como desativar o modo escuro?"),
        ("polarity", "Ative o modo escuro para mim", "Desativar o modo escuro para mim"),
        ("polarity", "Posso viajar com visto?", "Posso viajar sem visto?"),
        ("polarity", "Devo tomar antes do almoço?", "Devo tomar depois do almoço?"),
        ("polarity", "Este remédio é seguro?", "Este remédio não é seguro?"),
        ("polarity", "este remedio e seguro", "este remedio nao e seguro"),
        ("numbers", "Python 3.1", "Python 3.10"),
        ("numbers", "R$ 1.000", "R$ 1"),
        ("numbers", "1.2.3", "12.3"),
        ("numbers", "What does 5 MB cost?", "What does 5 GB cost?"),
        ("numbers", "Quanto são R$ 10?", "Quanto são US$ 10?"),
        ("numbers", "dois dias de férias", "três dias de férias"),
        ("numbers", "Can I carry 1.000 kg?", "Can I carry 1000 kg?"),
        ("numbers", "1.500 kg", "1,500 kg"),
        ("numbers", "NZ$ 50", "$ 50"),
        ("names", "Quem é minha avó?", "Quem é meu avô?"),
        ("names", "What does 😀 mean?", "What does 😢 mean?"),
        ("names", "Vou de Natal para Recife", "Vou de Recife para Natal"),
    ],
)
def test_two_questions_that_differ_in_one_word_are_two(guard, asked, stored):
    assert not guards.GUARDS[guard](asked, stored)
    assert not guards.GUARDS[guard](stored, asked)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Quanto custa R$ 1.000?", "quanto custa 1000 reais"),
        ("Quanto custa R$ 1.000,50?", "Quanto custa R$ 1000,5?"),
        ("What do 1,000 dollars buy?", "what do a thousand dollars buy"),
        ("What do $2.50 buy?", "What do 2.5 dollars buy?"),
        ("O que mudou na 3.10?", "o que mudou na versão 3.10"),
        ("duas mil e quinhentas pessoas", "2.500 pessoas do Brasil"),
        ("vinte e um dias", "21 dias"),
        ("It takes twenty-one days", "it takes 21 days"),
        ("5 mil reais", "R$ 5.000"),
        ("USD 1,000.00", "USD 1000"),
        ("US$ 1.000,00", "1000 dólares"),
        ("EUR 0,50", "0.5 €"),
        ("BRL 2 500", "R$ 2.500,00"),
        ("What do 1,000.0 kg cost?", "What do 1000 kg cost?"),
    ],
)
def test_one_amount_has_many_formats(first, second):
    assert guards.numbers_agree(first, second)
    assert guards.numbers_agree(second, first)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("What is 1.000 for?", 1.0),
        ("Para que serve 1.000?", 1000.0),
        ("What is 1,000 for?", 1000.0),
    ],
)
def test_the_language_says_whether_a_mark_groups_or_divides(text, value):
    assert guards.numbers(text) == [value]


def test_the_held_out_pairs_are_fifty_and_none_of_them_is_one_that_lists_were_mended_by():
    pairs = held_out.load()
    assert [len(pairs[language]) for language in ("en", "pt")] == [25, 25]
    mended = yaml.safe_load(PAIRS.read_text(encoding="utf-8"))
    known = {pair["asked"] for language in mended.values() for pair in language}
    assert not known & {pair.asked for language in pairs.values() for pair in language}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds no languages"),
        ("en: x", "en is no list of pairs"),
        ("en: [{asked: a, stored: b}]", r"en\[0\] needs exactly the keys"),
        ("en: [{asked: a, stored: b, same: maybe}]", r"en\[0\]: two questions, and same"),
    ],
)
def test_wrong_held_out_pairs_end_in_one_line(tmp_path, text, message):
    path = tmp_path / "pairs.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        held_out.load(path)
    assert str(path) in str(error.value)


def test_a_pair_is_judged_rightly_if_it_passes_exactly_when_one_answer_serves_both():
    refusing = {"never": lambda asked, stored: False}
    assert held_out.judged_rightly(held_out.Pair("a", "b", same=False), refusing)
    assert not held_out.judged_rightly(held_out.Pair("a", "b", same=True), refusing)
    assert held_out.judged_rightly(held_out.Pair("a", "b", same=True), {})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Onde compro coco?", "Onde compro cocô?"),
        ("Meu bebê pode comer coco?", "Meu bebê pode comer cocô?"),
        ("Onde fica a secretaria?", "Onde fica a secretária?"),
        ("Onde vejo o cálculo da área?", "Como calculo a área?"),
        ("Which rose goes with fish?", "Which rosé goes with fish?"),
    ],
)
def test_an_accent_tells_two_words_apart(first, second):
    assert not guards.names_agree(first, second)
    assert not guards.names_agree(second, first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("nao consigo entrar no cartorio", "Não consigo entrar no cartório"),
        ("Quem é aluno tem desconto?", "Os alunos têm desconto, e quem não é?"),
        ("Isto e certo, não?", "Isto é certo, não?"),
    ],
)
def test_an_accent_that_is_left_out_or_grammar_tells_nothing_apart(first, second):
    assert guards._accents_agree(first, second)
    assert guards._accents_agree(second, first)


@pytest.mark.parametrize(
    "pair",
    [p for side in yaml.safe_load(PAIRS.read_text(encoding="utf-8")).values() for p in side],
    ids=lambda pair: pair["asked"],
)
def test_pairs_of_every_kind_are_told_apart(pair):
    assert agree(pair["asked"], pair["stored"]) is pair["same"]
    assert agree(pair["stored"], pair["asked"]) is pair["same"]


# --- languages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the capital of France?", "en"),
        ("A conta no banco está aberta", "pt"),
        ("nao consigo entrar na minha conta", "pt"),
        ("Qual é a capital da França?", "pt"),
    ],
)
def test_the_language_of_a_question_is_told_by_its_frequent_words(text, language):
    (found,) = guards.languages_of(text)
    assert found.name == language


def test_a_word_that_negates_in_another_language_does_not_count():
    assert guards.polarity_agrees("Tenho conta no banco", "Tenho conta em um banco")


def test_questions_in_two_languages_are_two_questions():
    assert not guards.polarity_agrees("Where is my order?", "Onde está o meu pedido?")


def test_markers_belong_to_one_language():
    first, second = guards.languages()
    assert not first.markers & second.markers


@pytest.mark.parametrize("language", guards.languages(), ids=lambda language: language.name)
def test_no_side_of_a_group_meets_another_by_itself(language):
    for group in language.exclusive:
        for number, side in enumerate(group):
            for word in side.words:
                met = [n for n, other in enumerate(group) if other.meets([word])]
                assert met == [number], (word, group)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negators": None}, "list of words"),
        ({"decimal": ";"}, "decimal"),
        ({"exclusive": [["on"]]}, r"exclusive\[0\] has no two sides"),
        ({"exclusive": [[True, False]]}, r"exclusive\[0\]: put"),
        ({"made_up": 1}, "exactly the keys"),
    ],
)
def test_a_wrong_list_ends_in_one_line(tmp_path, change, message):
    lists = yaml.safe_load((guards.FOLDER / "en.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "en.yaml"
    path.write_text(yaml.safe_dump(lists | change), encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        guards.load(path)
    assert "\n" not in str(error.value)


@given(st.text(max_size=60), st.text(max_size=60))
def test_guards_are_symmetric_and_accept_the_same_text(first, second):
    for guard in guards.GUARDS.values():
        assert guard(first, first)
        assert guard(first, second) == guard(second, first)


WORDS = st.sampled_from(
    """
    não no on off ativar desativar avó avô 1.000 R$ 3.10 mil dois sem com 😀 To from Porto é
    """.split()  # noqa: SIM905
)


@given(st.lists(WORDS, max_size=8).map(" ".join), st.lists(WORDS, max_size=8).map(" ".join))
def test_guards_are_symmetric_on_words_that_matter(first, second):
    for guard in guards.GUARDS.values():
        assert guard(first, first)
        assert guard(first, second) == guard(second, first)


# --- the second opinion ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Return a function that saves a tiny random cross-encoder with some labels."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("sentence_transformers")

    def save(labels, bias=None):
        folder = tmp_path_factory.mktemp("second-opinion")
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "how", "long", "is", "the"]
        (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
        config = transformers.BertConfig(
            vocab_size=len(words),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            max_position_embeddings=64,
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
        )
        model = transformers.BertForSequenceClassification(config)
        model.classifier.weight.data.zero_()
        model.classifier.bias.data[:] = 0.0
        for number, value in (bias or {}).items():
            model.classifier.bias.data[number] = value
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize(("bias", "agrees"), [(3.0, True), (-3.0, False)])
def test_a_score_above_the_threshold_agrees(bert, bias, agrees):
    opinion = opinions.SecondOpinion(bert(["LABEL_0"], {0: bias}))
    assert opinion("how long", "how long is") is agrees


@pytest.mark.parametrize(("label", "agrees"), [("entailment", True), ("contradiction", False)])
def test_inference_has_to_find_entailment(bert, label, agrees):
    labels = ["contradiction", "entailment", "neutral"]
    opinion = opinions.SecondOpinion(bert(labels, {labels.index(label): 5.0}))
    assert opinion("how long", "how long is") is agrees


def test_a_model_that_fails_says_no(bert, monkeypatch):
    opinion = opinions.SecondOpinion(bert(["LABEL_0"], {0: 3.0}))

    def fail(*_arguments, **_options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(opinion._model, "predict", fail)
    assert opinion("how long", "how long is") is False


def test_a_score_that_is_no_number_says_no(bert, monkeypatch):
    opinion = opinions.SecondOpinion(bert(["LABEL_0"], {0: 3.0}))
    monkeypatch.setattr(opinion._model, "predict", lambda *_a, **_o: [float("nan")] * 2)
    assert opinion("how long", "how long is") is False


def test_a_folder_that_holds_no_such_model_is_refused_in_one_line(bert, tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        opinions.SecondOpinion(tmp_path / "nowhere")
    with pytest.raises((InputError, Unsupported), match="--second-opinion") as error:
        opinions.SecondOpinion(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no label named entailment"):
        opinions.SecondOpinion(bert(["a", "b", "c"]))


def test_a_failing_second_opinion_is_a_miss_of_the_proxy(start, upstream):
    question = "how long is the warranty on a lamp"
    client = start(threshold=0.8, second_opinion=lambda _asked, _stored: False)
    client.ask(question)
    reply = client.ask(question.replace(" a ", " the "))
    assert (reply.cache, reply.reason) == ("miss", "guard second opinion")
