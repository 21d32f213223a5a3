"""Rules for captions and sizes of images."""

import pytest

from pipeline.core.filters import caption_problem, image_problem


@pytest.mark.parametrize(
    ("caption", "problem"),
    [
        ("a dog on a beach", None),
        ("a", "caption too short"),
        ("", "caption too short"),
        (None, "caption too short"),
        ("   a   ", "caption too short"),
        ("word and " * 30, "caption too long"),
        ("12345 678", "caption has no letters"),
        ("!!! ???", "caption has no letters"),
        ("https://example.com/a/b.html?x=1", "caption is an address"),
        ("www.example.org/x", "caption is an address"),
        ("shop.example.com", "caption is an address"),
        ("someone@example.com", "caption is an address"),
        ("IMG_1234.jpg", "caption is an address"),
        ("IMG_1234", "caption is an address"),
        ("DSC00012", "caption is an address"),
        ("dsc 00012.JPG", "caption is an address"),
        ("my-holiday-2019.jpeg", "caption is an address"),
        ("IMG_20190512_101112", "caption is an address"),
        ("picture 0042.jpg", "caption is an address"),
        ("a photo of www.example.com on a screen", None),
        ("St.Petersburg", None),
        ("Photo of a dog", None),
        ("aaaaaaaaaaaaaaaaaaaa", "caption repeats itself"),
        ("so goooooooooood", "caption repeats itself"),
        ("buy buy Buy buy, buy now", "caption repeats itself"),
        ("very very very very good", None),
        ("a $$$ 100 % *** 12/12/2012 ###", "caption is mostly symbols"),
        ("iPhone 12 128 GB", None),
        ("一只狗在海滩上", None),
        ("كلب على الشاطئ", None),
        ("مُحَمَّدٌ رَسُولٌ", None),
        ("สุนัขบนชายหาด", None),
        ("समुद्र तट पर कुत्ता", None),
        ("собака на пляже", None),
        ("他说:好。", None),
    ],
)
def test_captions_that_say_nothing(caption, problem):
    assert caption_problem(caption, 2, 200) == problem


def test_limits_of_captions_and_images():
    assert caption_problem(None, 0, 100) is None
    assert caption_problem("x" * 9, 0, 0) is None
    assert caption_problem("DSC00012", 5, 100, sane=False) is None
    assert image_problem(100, 300, 100, 3.0) is None
    assert image_problem(99, 300, 100, 3.0) == "picture too small"
    assert image_problem(301, 100, 100, 3.0) == "aspect ratio too large"
    assert image_problem(100, 301, 100, 3.0) == "aspect ratio too large"
