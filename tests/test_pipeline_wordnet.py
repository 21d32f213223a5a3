"""Labels by the released rule: the testable facts of CatLIP's label function."""

import random

import pytest
from conftest import skip_or_fail

from pipeline.wordnet import clean, find_wordnet, load_wordnet, tokenise
from shards_spec.files import UserError


@pytest.fixture(scope="module")
def net():
    try:
        return load_wordnet()
    except UserError as error:
        skip_or_fail(str(error))


def short(wnids):
    """CatLIP's unpadded keys."""
    return [f"n{int(wnid[1:])}" for wnid in wnids]


def test_keys(net):
    expected = {
        "dog": "n2084071", "cat": "n2121620", "woman": "n10787470", "computer": "n3082979", "car": "n2958343",
        "person": "n7846", "city": "n8524735", "restaurant": "n4081281", "kitchen": "n3619890", "image": "n5928118",
        "black": "n4960277",
    }  # fmt: skip
    assert {word: short(net.synsets(word))[0] for word in expected} == expected
    assert net.synsets("dog") == ["n02084071"]  # ImageNet's form


def test_every_token_is_tried_as_a_noun(net):
    assert set(short(net.synsets("An image of black dog."))) == {"n5928118", "n4960277", "n2084071"}
    assert short(net.synsets("dog catching frisbee")) == ["n2084071", "n126886", "n3397947"]
    assert short(net.synsets("The White House")) == ["n9638875", "n3544360"]


def test_plurals(net):
    assert short(net.synsets("mice geese children women knives feet leaves buses strawberries")) == [
        "n2330245", "n1855672", "n9917593", "n10787470", "n3623556", "n5563266", "n13152742", "n2924116", "n7745940",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "word",
    [
        "bike",
        "photo",
        "toys",
        "tv",
        "plate",
        "chips",
        "t-shirt",
        "men",
        "a",
        "in",
        "he",
        "it",
        "i",
        "dog/cat",
        "dog_cat",
    ],
)
def test_dropped(net, word):
    assert net.synsets(word) == []


def test_kept_and_odd_lemmas(net):
    assert short(net.synsets("can are white free crane")) == [
        "n2946921",
        "n13613862",
        "n9638875",
        "n7947958",
        "n10914447",
    ]
    assert short(net.synsets("glasses")) == ["n14881303"]
    assert short(net.synsets("pants")) == ["n7388706"]
    assert short(net.synsets("boss")) == ["n2401661"]


def test_suffixes_are_stripped_repeatedly_as_in_the_pinned_nltk(net):
    assert short(net.synsets("catss")) == ["n2121620"]
    assert short(net.synsets("possesses")) == ["n8405490"]


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("%20a+dog%20", "a dog"),
        ("<a href='x'>dog</a>", "dog"),
        ("dog &amp; cat", "dog & cat"),
        ("DOG", "dog"),
        ("\n a   dog \n", "a dog"),
        ("%3Cb%3Edog%3C/b%3E", "dog"),
    ],
)
def test_cleaning(raw, cleaned):
    assert clean(raw) == cleaned


def test_sentences_are_split_before_words(net):
    assert set(short(net.synsets("a dog. a cat."))) == {"n2084071", "n2121620"}
    assert tokenise("a dog. a cat.") == ["a", "dog", ".", "a", "cat", "."]


def test_sizes_and_repeats(net):
    assert len(net.first_sense) == 117_798
    assert len(net.heads) == 82_115
    assert net.synsets("dog dog DOG") == ["n02084071"] * 3


def test_the_memo_changes_nothing(net):
    words = random.Random(0).sample(sorted(net.first_sense), 2000)
    plain = [net.synset(word) for word in words]
    net.memo.clear()
    assert [net.synset(word) for word in reversed(words)] == plain[::-1]


def test_lemmatising_agrees_with_nltk_where_nltk_strips_once(net):
    """NLTK 3.10 strips suffixes once; on words that need no second strip both agree."""
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    rules = WordNetCorpusReader.MORPHOLOGICAL_SUBSTITUTIONS["n"]
    words = [w + s for w in random.Random(1).sample(sorted(net.first_sense), 3000) for s in ("", "s", "es", "ies")]
    for word in words:
        forms = [word, *net.exceptions.get(word, [word[: -len(o)] + n for o, n in rules if word.endswith(o)])]
        known = [form for form in forms if form in net.first_sense]
        if known:
            assert net.lemmatise(word) == min(known, key=len)


def test_wordnet_that_is_absent_or_of_another_version_is_refused(tmp_path, net):
    with pytest.raises(UserError, match=r"WordNet 3\.0 is not in .*apt-get install wordnet-base"):
        find_wordnet(str(tmp_path))
    for name in ("index.noun", "data.noun", "noun.exc"):
        (tmp_path / name).write_bytes((find_wordnet() / name).read_bytes().replace(b"02084071", b"02086723"))
    with pytest.raises(UserError, match=r"is not WordNet 3\.0: dog is n02086723"):
        load_wordnet(str(tmp_path))
