"""Embeds a text from every row of a table with a Gemma model.

python -m pipelines.embed --help
"""

import sys

from beam_gemma.cli.embed_flags import embed_parser, embed_settings
from beam_gemma.cli.plan import plan
from beam_gemma.cli.run import command, run
from beam_gemma.inference.handlers import GemmaEmbedModelHandler


def main() -> int:
    """Run the command line and return the exit code."""
    job = plan(sys.argv[1:], embed_parser(), embed_settings, GemmaEmbedModelHandler)
    return run(job, "Embed")


if __name__ == "__main__":
    sys.exit(command(main))
