"""Three jobs in one pass: a completion, a label and an embedding of each article, in one table.

    python -m examples.one_pass --model DIR --input examples/articles.parquet --output out/x.parquet

The table is read once and written once. Each result column begins with the name of its job, such as
`gist_completion`. Any Beam transform may stand between the reading and the jobs.
"""

import argparse
from collections.abc import Sequence

import apache_beam as beam

from beam_gemma import (
    ClassifySettings,
    EmbedSettings,
    GemmaClassifyModelHandler,
    GemmaEmbedModelHandler,
    GemmaGenerateModelHandler,
    GenerateSettings,
    InferTable,
    ReadTable,
    SamplingParams,
    WriteTable,
)

GIST = GenerateSettings(
    prompt="{title}\n{body}\nIn short, this article is about",
    stop=(".", "\n"),
    sampling=SamplingParams(max_tokens=24),
)
SUBJECT = ClassifySettings(
    prompt="{body}\nThis article is about",
    labels=(" science", " sports", " politics", " culture"),
)
BODY = EmbedSettings(text_column="body")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; flags that are not known here are Beam's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag in ("--model", "--input", "--output"):
        parser.add_argument(flag, required=True)
    flags, options = parser.parse_known_args(argv)
    articles = ReadTable(flags.input)
    jobs = {
        "gist": GemmaGenerateModelHandler(flags.model, GIST),
        "subject": GemmaClassifyModelHandler(flags.model, SUBJECT),
        "embedding": GemmaEmbedModelHandler(flags.model, BODY),
    }
    # Beam's runner for one machine, unless --runner names another.
    with beam.Pipeline(argv=["--runner=FnApiRunner", *options]) as pipeline:
        rows = pipeline | "Read" >> articles
        answers = {name: rows | name >> InferTable(handler) for name, handler in jobs.items()}
        _ = (rows, answers) | "Write" >> WriteTable(flags.output, articles, jobs)


if __name__ == "__main__":
    main()
