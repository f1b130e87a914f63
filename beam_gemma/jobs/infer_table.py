"""Turn rows into results: equal requests are computed once, durable results are reused.

Each row is encoded once, and its request is sent to the model. Requests are grouped by ranges of
their keys, so that equal ones meet on one worker wherever their rows are in the table.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics.metric import Metrics
from apache_beam.ml.inference.base import PredictionResult, RunInference
from apache_beam.pvalue import PBegin, PCollection, TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from beam_gemma.batches import Grouped, Located, Tagged, by_group
from beam_gemma.inference import saved_results
from beam_gemma.inference.media_files import MediaReading
from beam_gemma.inference.media_rows import kinds_of, messages_column
from beam_gemma.inference.task_handler import TaskHandler, check_bounded
from beam_gemma.inputs.row import MediaKind
from beam_gemma.jobs.deduplicate import (
    distinct,
    key_ranges,
    keyed,
    split_durable,
    spread,
    with_their_files,
    without_files,
)
from beam_gemma.jobs.fetch_media import fetched, in_slices
from beam_gemma.monitoring.progress import METER, METRICS_NAMESPACE, Count
from beam_gemma.tasks.row_keys import FILES, POSITIONS, REQUEST_KEY

ROWS, PIECES = 0, 1
"""Tags of the batches of a key range: rows of the table, and pieces of durable results."""
REQUESTS_PER_BATCH = 64
LEDGER, DURABLE = "ledger", "durable"
MAX_RANGES = 1024


def num_ranges(num_rows: int | None, *, with_files: bool = False) -> int:
    """Return the number of key ranges to group a table's requests by.

    There are enough for all workers, but few enough that the batches of a range are not tiny.
    Requests with files are large, so that their ranges have few.
    """
    if num_rows is None:
        return MAX_RANGES // 4
    if with_files:
        return min(MAX_RANGES, max(1, num_rows // REQUESTS_PER_BATCH))
    return min(MAX_RANGES, max(1, min(num_rows // 64, 64), num_rows // 4096))


class Answers(NamedTuple):
    """The results of a task."""

    results: tuple[PCollection[pa.RecordBatch], ...]
    """Positions and result columns: results of an earlier run, and new ones."""
    ledger: PCollection[dict[str, Any]]
    """Counts of requests and samples of the engine."""


class InferTable(beam.PTransform[PCollection[Located], Answers]):
    """Runs a task on every row of a table.

    Takes the rows of a `ReadTable` and returns what `WriteTable` joins with them again. Rows that
    make equal requests are computed once. Files that rows name by path or URI are fetched, as the
    handler's `image_reading` and `audio_reading` allow.

    Args:
        handler: The handler of the task, with its model.
        num_rows: The number of rows in the table; None if unknown.
        durable: Folder with results of an interrupted run; None to start from scratch.

    Example:
        >>> table = ReadTable("examples/articles.parquet")
        >>> handler = GemmaEmbedModelHandler(MODEL, EmbedSettings(text_column="title"))
        >>> pipeline = beam.Pipeline(runner="FnApiRunner")
        >>> answers = pipeline | table | InferTable(handler, num_rows=table.source.num_rows)
    """

    def __init__(
        self, handler: TaskHandler, *, num_rows: int | None = None, durable: str | None = None
    ) -> None:
        super().__init__()
        self._handler = handler
        self._num_ranges = num_ranges(num_rows, with_files=bool(handler.settings.file_columns))
        self._durable = durable

    @no_annotations  # type: ignore[untyped-decorator]
    def expand(self, rows: PCollection[Located]) -> Answers:
        """Apply the transform."""
        check_bounded(rows)
        seen = rows
        if columns := kinds_of(self._handler.settings):
            seen = rows | "Media" >> beam.ParDo(
                _FetchMedia(columns, self._handler.reading)
            ).with_output_types(tuple[int, pa.RecordBatch])
        requests = seen | "Key" >> beam.ParDo(
            _Key(self._handler, self._num_ranges)
        ).with_output_types(Grouped)
        if self._durable is not None:
            durable = rows.pipeline | "Durable" >> _ReadPieces(self._durable, self._num_ranges)
            requests = (requests, durable) | "Join" >> beam.Flatten()
        unique = (
            requests
            | "Group" >> beam.GroupByKey()
            | "Unique"
            >> beam.ParDo(_Unique(self._handler.settings.result_schema)).with_outputs(
                DURABLE, LEDGER, main="requests"
            )
        )
        asked = (
            unique["requests"]
            | "Typed" >> beam.Map(lambda batch: batch).with_output_types(pa.RecordBatch)
            | "Infer" >> RunInference(self._handler.with_samples())
            | "Results" >> beam.ParDo(_answer).with_outputs(LEDGER, main="results")
        )
        ledger = (unique[LEDGER], asked[LEDGER]) | "Ledger" >> beam.Flatten()
        return Answers((unique[DURABLE], asked["results"]), ledger)


class _FetchMedia(beam.DoFn):
    """Fetches the pictures and sounds of rows, and yields rows in batches that are small."""

    def __init__(self, columns: Mapping[str, MediaKind], reading: MediaReading) -> None:
        self._columns = columns
        self._reading = reading

    def process(self, located: Located) -> Iterator[Located]:
        yield from fetched(located, self._columns, self._reading)


class _Key(beam.DoFn):
    """Encodes each row to its request, once, and groups requests by ranges of their keys."""

    def __init__(self, handler: TaskHandler, num_ranges: int) -> None:
        self._handler = handler
        self._num_ranges = num_ranges

    def display_data(self) -> dict[str, str]:
        # Runners show display data of single steps; composites lose theirs on Dataflow.
        return self._handler.facts()

    def setup(self) -> None:
        self._encode = self._handler.request_encoder(self._handler.artifact())

    def process(self, located: Located) -> Iterator[Grouped]:
        settings, reading = self._handler.settings, self._handler.reading
        for position, rows in in_slices(located, messages_column(settings)):
            requests = keyed(position, rows, settings, self._encode, reading)
            for group, some in by_group(key_ranges(requests, self._num_ranges), requests):
                yield group, (ROWS, 0, some)


class _ReadPieces(beam.PTransform[PBegin, PCollection[Grouped]]):
    """Reads the durable results of an earlier run."""

    def __init__(self, folder: str, num_ranges: int) -> None:
        super().__init__()
        self._folder = folder
        self._num_ranges = num_ranges

    def expand(self, pbegin: PBegin) -> PCollection[Grouped]:
        return (
            pbegin
            | "Folder" >> beam.Create([self._folder], reshuffle=False)
            | "List" >> beam.FlatMap(saved_results.list_pieces)
            | "Spread" >> beam.Reshuffle()
            | "Read" >> beam.FlatMap(_piece, self._num_ranges).with_output_types(Grouped)
        )


class _Unique(beam.DoFn):
    """Merges equal requests into one, and answers those whose results are durable.

    Batches of requests with files are read twice, and one at a time: first their keys, then the
    files of the requests that are left.
    """

    def __init__(self, results: pa.Schema) -> None:
        self._results = results

    def process(self, group: tuple[int, Iterable[Tagged]]) -> Iterator[Any]:
        batches = defaultdict(list)
        have_files = False
        for tag, _, batch in group[1]:
            have_files |= FILES in batch.schema.names
            batches[tag].append(without_files(batch))
        if not batches[ROWS]:
            return
        requests = distinct(batches[ROWS])
        known, left = split_durable(requests, durable := saved_results.merge(batches[PIECES]))
        if known.num_rows:
            results = [durable[key] for key in known.column(REQUEST_KEY).to_pylist()]
            found = pa.RecordBatch.from_pylist(results, self._results)
            yield TaggedOutput(DURABLE, spread(known, found))
        if have_files:
            rows = (batch for tag, _, batch in group[1] if tag == ROWS)
            yield from with_their_files(left, rows)
        else:
            for start in range(0, left.num_rows, REQUESTS_PER_BATCH):
                yield left.slice(start, REQUESTS_PER_BATCH)
        yield TaggedOutput(LEDGER, {"counts": _counted(known, left)})


def _counted(known: pa.RecordBatch, left: pa.RecordBatch) -> dict[str, int]:
    """Return counts of requests and of rows that need none, and add the latter to the metrics."""
    asked = len(left.column(POSITIONS).flatten())
    counts = {
        "requests": left.num_rows,
        "duplicate_rows": asked - left.num_rows,
        "resumed_rows": len(known.column(POSITIONS).flatten()),
    }
    METER.add(Count(rows=counts["duplicate_rows"] + counts["resumed_rows"]))
    for name in ("duplicate_rows", "resumed_rows"):
        Metrics.counter(METRICS_NAMESPACE, name).inc(counts[name])
    return counts


def _answer(prediction: PredictionResult) -> Iterator[Any]:
    """Return the results of requests at the positions of their rows."""
    requests: Any = prediction.example
    sampled: Any = prediction.inference
    if sampled.pulse is not None:
        yield TaggedOutput(LEDGER, {"pulse": sampled.pulse})
    yield spread(requests, sampled.results)


def _piece(path: str, num_ranges: int) -> Iterator[Grouped]:
    batch = saved_results.read_piece(path)
    for group, some in by_group(key_ranges(batch, num_ranges), batch):
        yield group, (PIECES, 0, some)
