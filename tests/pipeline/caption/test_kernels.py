"""The Triton kernels, by Triton's interpreter; tests/gpu has the compiled ones."""

import os
import subprocess
import sys

import pytest
import torch

from pipeline.caption.kernels import attention_kernel, log_totals_kernel, norm_kernel, nucleus_kernel

pytestmark = pytest.mark.integration
ATTENTION = """
import torch
from torch.nn import functional as F
from pipeline.caption.attention_kernel import attend

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

NUCLEUS = """
import torch
from pipeline.caption.decoding import Decoding
from pipeline.caption.sampling_kernels import sample_incomplete
from pipeline.caption.sampling import sample_token

generator = torch.Generator().manual_seed(0)
for spread, top_p in ((0.01, 0.9), (1.0, 0.3), (1.0, 0.999), (4.0, 0.9), (4.0, 1.0)):
    scores = spread * torch.randn(4, 2500, generator=generator)
    scores[:, 3] = -torch.inf
    seeds = torch.randint(-(2**62), 2**62, (4,), generator=generator)
    chosen = torch.full((4,), -1)
    complete = torch.tensor([False, True, False, False])
    sample_incomplete(scores, seeds, top_p, chosen, complete)
    expected = torch.where(complete, -1, sample_token(scores, Decoding(top_p=top_p), seeds))
    assert torch.equal(chosen, expected), (spread, top_p)
"""

TOTALS = """
import torch
from pipeline.caption.sampling_kernels import log_totals

logits = 20 * torch.randn(5, 4500, generator=torch.Generator().manual_seed(0))
logits[0, :4499] = -torch.inf
logits[1, 7] = -torch.inf
logits[2] += 1000
torch.testing.assert_close(log_totals(logits), logits.logsumexp(-1), rtol=1e-6, atol=1e-5)
"""

NORM = """
import torch
from torch.nn import functional as F
from pipeline.caption.norm_kernel import add_norm

generator = torch.Generator().manual_seed(0)
for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
    for width in (768, 48):
        x, delta = torch.randn(2, 5, 1, width, generator=generator).to(dtype)
        weight, bias = torch.randn(2, width, generator=generator).to(dtype)
        total = x + delta
        expected = F.layer_norm(total, (width,), weight, bias, 1e-5)
        found = add_norm(x, delta, weight, bias, 1e-5)
        torch.testing.assert_close(x, total, rtol=bound, atol=bound)
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
"""


def run_interpreted(code: str) -> None:
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_kernel_for_attention_equals_torchs_and_fills_the_cache():
    run_interpreted(ATTENTION)


def test_the_kernel_for_large_nuclei_equals_a_full_sort():
    run_interpreted(NUCLEUS)


def test_the_kernel_for_sums_of_exponentials_equals_torchs():
    run_interpreted(TOTALS)


def test_the_kernel_for_layer_norms_equals_torchs():
    run_interpreted(NORM)


def test_where_kernels_cannot_be_used_torch_is(caplog):
    assert attention_kernel(64, torch.float32, torch.device("cpu")) is None
    assert attention_kernel(48, torch.float32, torch.device("cuda")) is None
    assert nucleus_kernel(torch.device("cpu")) is None
    assert not caplog.records
    if not torch.cuda.is_available():
        for _ in range(2):
            assert attention_kernel(64, torch.float32, torch.device("cuda")) is None
            assert nucleus_kernel(torch.device("cuda")) is None
            assert log_totals_kernel(torch.device("cuda")) is None
            assert norm_kernel(torch.device("cuda")) is None
        assert [record.message.partition(":")[0] for record in caplog.records] == [
            "Triton does not work here, so captions take longer"
        ]
