"""Words of others in what is shown: escape sequences, passwords, signatures."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards_spec.display import LogFormatter, hide_secrets, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[31mred\x07", "a\\x1b[31mred\\x07"),
        ("over\rwritten", "over\\rwritten"),
        ("\x9b2J", "\\x9b2J"),
        ("gpj.\u202eexe", "gpj.\\u202eexe"),
        ("b\udcff", "b\\udcff"),
        ("two\n\tlines, naïve 猫 🐈", "two\n\tlines, naïve 猫 🐈"),
    ],
)
def test_control_characters_are_written_out(text, expected):
    assert shown(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:password@h/x.tsv", "https://***@h/x.tsv"),
        ("ftp://user:p@ss@h:21/x", "ftp://***@h:21/x"),
        ("https://TOKEN@h", "https://***@h"),
        ("zip://a.tsv::https://u:p@h/x.zip", "zip://a.tsv::https://***@h/x.zip"),
        (
            "s3://bucket/x?X-Amz-Credential=AKIA%2F1&X-Amz-Date=2&X-Amz-Signature=ab12#f",
            "s3://bucket/x?X-Amz-Credential=***&X-Amz-Date=2&X-Amz-Signature=***#f",
        ),
        ("https://h/x?sv=1&sig=a%2Bb=: HTTP 403", "https://h/x?sv=1&sig=***: HTTP 403"),
        ("(https://h/x?access_token=abc)", "(https://h/x?access_token=***)"),
        ("'https://h/x?a=1;Token=abc', then", "'https://h/x?a=1;Token=***', then"),
        ("https://h/x?a=1&amp;sig=abc&amp;b=2", "https://h/x?a=1&amp;sig=***&amp;b=2"),
        ("https://h/x#access_token=abc", "https://h/x#access_token=***"),
        (
            "https://h/x?APIKEY=1&password=2&AWSAccessKeyId=3&Expires=4",
            "https://h/x?APIKEY=***&password=***&AWSAccessKeyId=***&Expires=4",
        ),
        ("https://medium.com/@me/x?page=2", "https://medium.com/@me/x?page=2"),
        ("mail me@h; key=value; /data/a?sig=1", "mail me@h; key=value; /data/a?sig=1"),
    ],
)
def test_secrets_of_addresses_are_hidden(text, expected):
    assert hide_secrets(text) == expected
    assert shown(text) == expected
    assert hide_secrets(expected) == expected


@given(st.text())
def test_what_is_shown_is_text_that_a_terminal_only_prints(text):
    out = shown(text)
    assert all(c in "\n\t" or not (c < " " or "\x7f" <= c <= "\x9f") for c in out)
    assert out.encode() is not None
    assert shown(out) == out


def test_logs_are_shown_so():
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s: %s", ("\x1b[2J", "http://u:p@h"), None)
    assert LogFormatter().format(record) == "W \\x1b[2J: http://***@h"
