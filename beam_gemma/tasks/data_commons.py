"""The statistics that DataGemma RIG writes into a completion, each as a query to Data Commons.

Such a completion reads: about [__DC__("what was the population of California in 2020?") -->
"39 million"] people. Source of the form: `data_gemma/rig.py` of datacommonsorg/llm-tools.
"""

import re

STATISTIC = re.compile(r'\[__DC__\("([^"]+)"\) --> "([^"]*)"\]?')


def find_statistics(completion: str) -> tuple[list[str], list[str]]:
    """Return the queries of a completion and, beside each, the value that the model believes."""
    found = STATISTIC.findall(completion)
    return [query for query, _ in found], [value for _, value in found]
