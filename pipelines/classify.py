"""Scores labels, or safety policies, for every row of a table with a Gemma model.

python -m pipelines.classify --help
"""

import sys

import apache_beam as beam

from beam_gemma.cli.classify_flags import classify_parser, classify_settings
from beam_gemma.cli.plan import plan
from beam_gemma.cli.run import SUCCESS, exit_code, run
from beam_gemma.inference.handlers import GemmaClassifyModelHandler


def main() -> int:
    """Run the command line and return the exit code."""
    job = plan(sys.argv[1:], classify_parser(), classify_settings, GemmaClassifyModelHandler)
    if job.preview is not None:
        sys.stdout.write(job.preview)
        return SUCCESS
    pipeline = beam.Pipeline(options=job.options)
    rows = pipeline | "Read" >> job.read()
    answers = rows | "Classify" >> job.infer()
    _ = (rows, (answers,)) | "Write" >> job.write()
    return run(pipeline, job)


if __name__ == "__main__":
    sys.exit(exit_code(main))
