"""The Triton kernels, by Triton's interpreter; tests/gpu has the compiled ones."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from pipeline.caption import kernels
from pipeline.caption.decoding import Decoding
from pipeline.caption.kernels import attention_kernel, log_totals_kernel, norm_kernel, nucleus_kernel
from pipeline.caption.sampling import sample_token

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


CPU = torch.device("cpu")


def torch_attend(new, keys, values, past, *, seen=1):
    rows, heads, _, width = keys.shape
    query, key, value = new.view(rows, 1, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    keys[:, :, past : past + 1] = key
    values[:, :, past : past + 1] = value
    read = slice(0, past + seen)
    return F.scaled_dot_product_attention(query, keys[:, :, read], values[:, :, read]).transpose(1, 2).flatten(2)


def torch_nucleus(scores, seeds, top_p, chosen, complete, *, take=sample_token):
    chosen[~complete] = take(scores, Decoding(top_p=top_p), seeds)[~complete]


def torch_norm(x, delta, weight, bias, eps):
    x += delta
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def test_a_kernel_with_torchs_results_passes_its_check():
    for dtype in (torch.float32, torch.bfloat16):
        kernels.check_attention(torch_attend, 64, dtype, CPU)
    kernels.check_norm(torch_norm, CPU)
    kernels.check_log_totals(lambda logits: logits.logsumexp(-1), CPU)
    kernels.check_nucleus(torch_nucleus, CPU)


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        (lambda kernel: kernels.check_attention(kernel, 64, torch.float32, CPU), partial(torch_attend, seen=2)),
        (
            lambda kernel: kernels.check_norm(kernel, CPU),
            lambda x, delta, weight, bias, eps: torch_norm(x, delta, weight, bias, 0.5),
        ),
        (lambda kernel: kernels.check_norm(kernel, CPU), lambda x, *others: torch_norm(x.clone(), *others)),
        (lambda kernel: kernels.check_log_totals(kernel, CPU), lambda logits: logits[:, :4096].logsumexp(-1)),
        (
            lambda kernel: kernels.check_nucleus(kernel, CPU),
            partial(torch_nucleus, take=lambda scores, *_: scores.argmin(-1)),
        ),
        (lambda kernel: kernels.check_nucleus(kernel, CPU), lambda *_: None),
    ],
)
def test_a_kernel_with_other_results_is_not_used(check, wrong, caplog):
    with pytest.raises(ArithmeticError, match="has another result than torch's"):
        check(wrong)
    kernels._warn.cache_clear()
    assert kernels._unless_it_fails(lambda: check(wrong)) is None
    assert "has another result than torch's" in caplog.text
    kernels._warn.cache_clear()


def test_a_check_leaves_the_random_stream_as_it_is():
    before = torch.get_rng_state()
    kernels.check_log_totals(lambda logits: logits.logsumexp(-1), CPU)
    assert torch.equal(torch.get_rng_state(), before)
