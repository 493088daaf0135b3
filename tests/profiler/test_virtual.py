"""The stand-ins other tests believe in."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from tests.profiler.virtual import LAWS


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_law_draws_from_the_distribution_whose_quantiles_it_tells(law):
    """As one call of each of many processes, and as many calls of them."""
    drawn = np.array([list(islice(law.sample(number), 50)) for number in range(2000)])
    for level in (0.5, 0.9, 0.95):
        share = np.mean(drawn <= law.quantile(level), axis=0)
        assert np.abs(share - level).max() < 5 * (level * (1 - level) / 2000) ** 0.5
    assert law.median == law.quantile(0.5)
    assert list(islice(law.sample(7), 50)) == drawn[7].tolist()


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_calls_of_a_law_depend_on_each_other_as_it_says(law):
    ranks = np.array([list(islice(law.sample(number), 200)) for number in range(300)]).argsort(axis=None).argsort()
    chains = ranks.reshape(300, 200)
    between = np.corrcoef(chains[:, 0], chains[:, -1])[0, 1]
    following = np.corrcoef(chains[:, :-1].ravel(), chains[:, 1:].ravel())[0, 1]
    assert between == pytest.approx(law.share, abs=0.2)
    assert following == pytest.approx(law.share + (1 - law.share) * law.phi, abs=0.1)
