"""The Triton kernel for attention, by Triton's interpreter; tests/gpu has the compiled one."""

import os
import subprocess
import sys

import pytest
import torch

from pipeline.caption.token_attention import kernel_for

pytestmark = pytest.mark.integration
CODE = """
import torch
from torch.nn import functional as F
from pipeline.caption.decode_attention import attend

CASES = ((3, 2, 8, 16, 0), (2, 2, 8, 16, 7), (2, 3, 40, 64, 32), (2, 1, 80, 64, 70))
generator = torch.Generator().manual_seed(0)
for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
    for rows, heads, length, width, past in CASES:
        shape = (rows, heads, length, width)
        keys = torch.randn(shape, generator=generator).to(dtype)
        values = torch.randn(shape, generator=generator).to(dtype)
        new = torch.randn(rows, 1, 3 * heads * width, generator=generator).to(dtype)
        query, key, value = new.view(rows, 1, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        filled_keys = torch.cat([keys[:, :, :past], key, keys[:, :, past + 1 :]], 2)
        filled_values = torch.cat([values[:, :, :past], value, values[:, :, past + 1 :]], 2)
        seen = slice(0, past + 1)
        expected = F.scaled_dot_product_attention(query, filled_keys[:, :, seen], filled_values[:, :, seen])
        found = attend(new, keys, values, past)
        torch.testing.assert_close(found, expected.transpose(1, 2).flatten(2), rtol=bound, atol=bound)
        assert torch.equal(keys, filled_keys) and torch.equal(values, filled_values)
"""


def test_the_kernel_equals_torchs_attention_and_fills_the_cache():
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torchs_attention_is_used_where_the_kernel_cannot_be(caplog):
    assert kernel_for(64, torch.float32, torch.device("cpu")) is None
    assert kernel_for(48, torch.float32, torch.device("cuda")) is None
    assert not caplog.records
    if not torch.cuda.is_available():
        for _ in range(2):
            assert kernel_for(64, torch.float32, torch.device("cuda")) is None
        assert [record.message[:31] for record in caplog.records] == ["no kernel for attention here, s"], "once"
