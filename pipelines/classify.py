"""Scores labels, or safety policies, for every row of a table with a Gemma model.

python -m pipelines.classify --help
"""

import sys

from beam_gemma.cli.classify_flags import classify_parser, classify_settings
from beam_gemma.cli.plan import plan
from beam_gemma.cli.run import command, run
from beam_gemma.inference.handlers import GemmaClassifyModelHandler


def main() -> int:
    """Run the command line and return the exit code."""
    job = plan(sys.argv[1:], classify_parser(), classify_settings, GemmaClassifyModelHandler)
    return run(job, "Classify")


if __name__ == "__main__":
    sys.exit(command(main))
