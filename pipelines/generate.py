"""Completes a prompt for every row of a table with a Gemma model.

python -m pipelines.generate --help
"""

import sys

import apache_beam as beam

from beam_gemma import launch
from beam_gemma.generate_options import generate_parser, generate_settings
from beam_gemma.handlers import GemmaModelHandler


def main() -> int:
    """Run the command line; return the exit code."""
    job = launch.plan(sys.argv[1:], generate_parser(), generate_settings, GemmaModelHandler)
    if job.preview is not None:
        sys.stdout.write(job.preview)
        return launch.SUCCESS
    pipeline = beam.Pipeline(options=job.options)
    rows = pipeline | "Read" >> job.read()
    answers = rows | "Generate" >> job.ask()
    _ = (rows, *answers) | "Write" >> job.write()
    return launch.run(pipeline, job)


if __name__ == "__main__":
    sys.exit(launch.exit_code(main))
