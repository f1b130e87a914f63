"""Completes a prompt for every row of a table with a Gemma model.

python -m pipelines.generate --help
"""

import sys

from beam_gemma.cli.generate_flags import generate_parser, generate_settings
from beam_gemma.cli.plan import plan
from beam_gemma.cli.run import command, run
from beam_gemma.inference.handlers import GemmaGenerateModelHandler


def main() -> int:
    """Run the command line and return the exit code."""
    job = plan(sys.argv[1:], generate_parser(), generate_settings, GemmaGenerateModelHandler)
    return run(job, "Generate")


if __name__ == "__main__":
    sys.exit(command(main))
