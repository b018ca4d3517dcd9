"""What Hypothesis draws: raggedness, contents, padding and weights."""

from itertools import pairwise

from hypothesis import strategies as st

seeds = st.integers(0, 2**32 - 1)

# What has been seen to stand in padding; the last is for integers, the first but one
# is the sentinel style.
poisons = st.sampled_from(
    [(float("nan"), -100), (float("inf"), 2**31 - 1), (-1.0, -1), (1e30, 3), (0.0, 0)]
)

scales = st.integers(-20, 20).map(lambda exponent: 10.0**exponent)


def lengths(batch, size):
    """Lengths of ``batch`` samples that fit ``size``, empty ones among them."""
    return st.lists(st.integers(0, size), min_size=batch, max_size=batch)


def groupings(count):
    """Ways to cut ``count`` things into consecutive groups, as slices; some empty."""
    return st.lists(st.integers(0, count), max_size=count).map(
        lambda cuts: [slice(*ends) for ends in pairwise([0, *sorted(cuts), count])]
    )
