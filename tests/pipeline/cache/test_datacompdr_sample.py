"""DataCompDR's members with vectors: code in a pickle does not run, damage and bombs are named."""

import gzip
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from pipeline.cache.datacompdr_sample import BAD_VECTORS, TOO_LARGE, UNREADABLE, UNSAFE, read_npz, read_pth_gz
from shards_spec.files import DataError


class Payload:
    """A pickle of it runs a command when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def torch_archive(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return gzip.compress(file.getvalue(), mtime=0)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    mark = tmp_path / "it_ran"
    array = np.empty(1, object)
    array[0] = Payload(str(mark))
    file = io.BytesIO()
    np.savez(file, image_emb=array, text_emb=np.zeros((1, 4), np.float32))
    hidden = {"image_emb": torch.zeros(1, 4), "text_emb": Payload(str(mark))}
    for read, data in ((read_npz, file.getvalue()), (read_pth_gz, torch_archive(hidden))):
        with pytest.raises(DataError, match=UNSAFE):
            read(data)
    with pytest.raises(DataError, match=UNREADABLE):
        read_pth_gz(gzip.compress(pickle.dumps(Payload(str(mark)))))  # of before torch 1.6
    assert not mark.exists()
    torch.load(io.BytesIO(gzip.decompress(torch_archive(hidden))), weights_only=False)
    assert mark.exists()  # the payload is a real one


def archive_of(names: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    return file.getvalue()


def claimed(shape: tuple[int, ...]) -> bytes:
    """An array of 16 bytes whose header claims another shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(16)


@pytest.mark.parametrize(
    ("read", "data", "reason"),
    [
        (read_npz, b"", UNREADABLE),
        (read_npz, b"PK\x03\x04" + bytes(40), UNREADABLE),
        (read_npz, archive_of({"image_emb.npy": bytes(1 << 25)}), TOO_LARGE),
        (read_npz, archive_of({"image_emb.npy": claimed((10**9, 10**9))}), UNREADABLE),
        (read_npz, archive_of({"image_emb.npy": claimed((4, 4))}), UNREADABLE),
        (read_npz, archive_of({"image_emb.npy": b"x"}), UNREADABLE),
        (read_pth_gz, b"", UNREADABLE),
        (read_pth_gz, gzip.compress(b"PK", mtime=0), UNREADABLE),
        (read_pth_gz, gzip.compress(bytes(1 << 25), mtime=0), TOO_LARGE),
        (read_pth_gz, gzip.compress(archive_of({"a/data/0": bytes(1 << 25)}), mtime=0), TOO_LARGE),
        (read_pth_gz, gzip.compress(archive_of({"a/data.pkl": bytes(1 << 17)}), mtime=0), UNSAFE),
        (read_pth_gz, torch_archive([1, 2]), BAD_VECTORS),
        (read_pth_gz, torch_archive({"image_emb": 1}), BAD_VECTORS),
        (read_pth_gz, torch_archive({"image_emb": torch.zeros(1).expand(10**6, 10**6)}), TOO_LARGE),
        (read_pth_gz, torch_archive({"image_emb": torch.zeros(3, 4)})[:-20], UNREADABLE),
    ],
)
def test_damage_and_bombs_are_named(read, data, reason):
    with pytest.raises(DataError, match=reason):
        read(data)
