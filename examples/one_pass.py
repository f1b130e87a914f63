"""Three jobs in one pass: a completion, a label and an embedding of each article, in one table.

    python -m examples.one_pass --model DIR --input examples/articles.parquet --output out/x.parquet

The table is read once and written once; a row is there when it has the results of all three, whose
columns have the name of their job before their own. Any transform of Beam may stand between.
"""

import argparse
import sys
from collections.abc import Sequence

import apache_beam as beam
import pyarrow as pa

from beam_gemma.cli.flags import NO_PRISM
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import OptionsError
from beam_gemma.inference.handlers import (
    GemmaClassifyModelHandler,
    GemmaEmbedModelHandler,
    GemmaModelHandler,
)
from beam_gemma.inference.task_handler import TaskHandler
from beam_gemma.jobs.infer_table import Ask, together
from beam_gemma.jobs.run_record import facts_of
from beam_gemma.jobs.shards import Layout
from beam_gemma.jobs.write_table import Columns, Output, WriteTable
from beam_gemma.tables.file_sink import open_sink
from beam_gemma.tables.open_table import ReadTable, open_source
from beam_gemma.tasks.columns import check_columns
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.questions import ClassifySettings
from beam_gemma.tasks.text_encoder import EmbedSettings

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
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag in ("--model", "--input", "--output"):
        parser.add_argument(flag, required=True)
    flags, options = parser.parse_known_args(argv)
    with beam.Pipeline(argv=[NO_PRISM, *options]) as pipeline:
        one_pass(pipeline, flags.model, flags.input, flags.output)


def one_pass(pipeline: beam.Pipeline, model: str, source_uri: str, sink_uri: str) -> None:
    """Add the jobs to a pipeline that runs in this process.

    Args:
        pipeline: What to add them to.
        model: Folder of a model that was exported for all three tasks.
        source_uri: Table with the columns title and body.
        sink_uri: Table to write.

    Raises:
        BeamGemmaError: the model, the table or the output is not as it must be.
    """
    handlers: dict[str, TaskHandler] = {
        "gist": GemmaModelHandler(model, GIST, large_model=False),
        "subject": GemmaClassifyModelHandler(model, SUBJECT, large_model=False),
        "embedding": GemmaEmbedModelHandler(model, BODY, large_model=False),
    }
    source = open_source(source_uri)
    for handler in handlers.values():
        check_columns(handler.settings, source.schema)
    tasks = tuple(Columns(f"{n}_", h.settings.result_schema) for n, h in handlers.items())
    results = pa.schema([field for task in tasks for field in task.in_files])
    output = Output(
        sink=open_sink(sink_uri),
        layout=Layout.of(source, results),
        schema=pa.schema([*source.schema, *results], source.schema.metadata),
        tasks=tasks,
        facts=facts_of(
            ["python", *sys.orig_argv[1:]],
            source=source_uri,
            sink=sink_uri,
            tasks=[(model, h.artifact(), h.settings) for h in handlers.values()],
        ),
    )
    if earlier := output.sink.earlier():
        raise OptionsError(f"{sink_uri}: expected no earlier output, got {earlier[0]}; remove it")
    rows = pipeline | "Read" >> ReadTable(source)
    answers = [
        rows | name >> Ask(handler, output.layout, num_rows=source.num_rows, tag=tag)
        for tag, (name, handler) in enumerate(handlers.items())
    ]
    _ = (rows, *together(answers)) | "Write" >> WriteTable(output)


if __name__ == "__main__":
    main()
