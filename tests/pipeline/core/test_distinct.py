"""Different values of arrays, as `numpy.unique` finds them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.distinct import distinct


@given(st.lists(st.integers(0, 9)))
def test_the_values_ascending_each_once(values):
    assert distinct(np.array(values, np.int64)).tolist() == sorted(set(values))
