"""Classes are numbers of lines: nothing may shift them."""

import numpy as np
import pytest
from small_catlip import write_bench

from shards_spec.class_names import parse_label, read_class_names, read_shard_count
from shards_spec.files import DataError, UserError
from training.data.labelled_images import open_images


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b"cat\ndog\n", ["cat", "dog"]),
        (b"\xef\xbb\xbfcat\ndog", ["cat", "dog"]),
        (b"cat\r\ndog\r\n\r\n", ["cat", "dog"]),
        (b"cat\rdog\r", ["cat", "dog"]),
        (b"cat\ndog\n\n  \n\t\n", ["cat", "dog"]),
        (b"  cat \n\tdog\t\n", ["cat", "dog"]),
        (b"crane\ncrane\n", ["crane", "crane"]),  # ImageNet has two
        ("caf\u2028é\nx\x85y\n\x1cz".encode(), ["caf\u2028é", "x\x85y", "\x1cz".strip()]),
        ("²\n東京".encode(), ["²", "東京"]),
    ],
)
def test_lines_are_classes(tmp_path, data, names):
    (tmp_path / "classnames.txt").write_bytes(data)
    assert read_class_names(str(tmp_path / "classnames.txt")) == names


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"cat\n\ndog\n", "line 2 is empty, and labels are numbers of lines"),
        (b"\ncat\n", "line 1 is empty"),
        (b"\xef\xbb\xbf\ncat\n", "line 1 is empty"),
        (b"a\r\nb\r\n  \r\nc", "line 3 is empty"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        ("cat\ncafé\n".encode("latin-1"), r"line 2 is not UTF-8 \(byte 0xe9\); if it is latin-1"),
        ("cat\n".encode("utf-16"), "is UTF-16"),
    ],
)
def test_what_would_shift_classes_is_refused_by_line(tmp_path, data, said):
    path = tmp_path / "classnames.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=said) as found:
        read_class_names(str(path))
    assert str(path) in str(found.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="is not there: it holds one class name per line"):
        read_class_names(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="cannot be read"):
        read_class_names(str(tmp_path))


@pytest.mark.parametrize("data", [b"0", b" 7\n", b"\xef\xbb\xbf1", b"007"])
def test_labels(data):
    assert parse_label(data, 8, "x") == int(data.decode("utf-8-sig"))


@pytest.mark.parametrize(
    "data", ["²".encode(), "٣".encode(), b"-1", b"+1", b"1.0", b"1e0", b"", b"8", b"9" * 5000, b"\xe9", b"1 2"]
)
def test_what_is_no_label_is_refused(data):
    with pytest.raises(DataError, match=r"x: key 1 has class .*, not a number below 8") as found:
        parse_label(data, 8, "x: key 1")
    assert len(str(found.value)) < 300


@pytest.mark.parametrize("text", ["²", "x", "1.0", "9" * 5000])
def test_numbers_of_shards(tmp_path, text):
    (tmp_path / "nshards.txt").write_text(text)
    with pytest.raises(UserError, match="it must be a number"):
        read_shard_count(str(tmp_path / "nshards.txt"))


def test_probe_and_eval_read_the_same_classes(tmp_path):
    """An empty line is refused by the reader of `probe`, too, and a BOM or a blank end shift nothing."""
    root = write_bench(tmp_path / "bench")
    before = open_images(root, False)
    (tmp_path / "bench" / "classnames.txt").write_bytes(
        b"\xef\xbb\xbf" + "\n".join(before.classes).encode() + b"\n\n\n"
    )
    assert open_images(root, False).classes == before.classes
    assert np.array_equal(open_images(root, False).labels, before.labels)
    (tmp_path / "bench" / "classnames.txt").write_text("\n" + "\n".join(before.classes))
    with pytest.raises(UserError, match="line 1 is empty"):
        open_images(root, False)
    (tmp_path / "bench" / "classnames.txt").unlink()
    with pytest.raises(UserError, match=r"classnames\.txt is not there"):
        open_images(root, False)
