"""Texts that processes tokenise: the tokens of the model's own tokenizer, in order."""

import numpy as np
import pytest
from small_data import tiny_coca

from pipeline.cache.tokens import BLOCK, TokenPool, tokenise
from shards_spec.models import load_tokenizer


@pytest.mark.integration
def test_tokens_of_processes_are_the_tokenizers(tmp_path):
    model = tiny_coca(tmp_path / "coca")
    texts = [f"a red ball and {number} boxes" for number in range(2 * BLOCK + 3)]
    tokenizer = load_tokenizer(model)
    expected = tokenizer(texts).numpy()
    assert np.array_equal(np.stack(list(tokenise(tokenizer, iter(texts)))), expected)
    pool = TokenPool(2, model, trusted=False)
    assert np.array_equal(np.stack(list(pool.tokenise(texts))), expected)
    assert list(pool.tokenise([])) == []
    pool.shutdown()
