"""The queries in a completion of DataGemma RIG, in the published form."""

import pytest

from beam_gemma.tasks.generate import find_statistics

POPULATION = "what was the population of california in 2020?"
ENERGY = "what percentage of energy in the US comes from petroleum in 2022?"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("No statistic at all, [1] nor [DC].", []),
        (f'about [__DC__("{POPULATION}") --> "39 million"] people.', [(POPULATION, "39 million")]),
        (
            f'([__DC__("{ENERGY}") --> "35.8%"]), then [__DC__("{POPULATION}") --> ""].',
            [(ENERGY, "35.8%"), (POPULATION, "")],
        ),
        # A completion that ended at max_tokens, before the bracket or inside the query.
        (f'about [__DC__("{POPULATION}") --> "39"', [(POPULATION, "39")]),
        ('about [__DC__("what was the', []),
    ],
)
def test_queries_and_values_stand_beside_each_other(completion, expected):
    queries, values = find_statistics(completion)
    assert list(zip(queries, values, strict=True)) == expected
