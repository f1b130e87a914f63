"""Beam transforms that run a task on every row of a PCollection."""

import datetime
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.ml.inference.base import PredictionResult, RunInference
from apache_beam.pvalue import PCollection, Row
from apache_beam.typehints import Dict, List, Optional
from apache_beam.typehints.row_type import RowTypeConstraint

from beam_gemma.beam_internals import private_ports, row_fields, send_whole
from beam_gemma.errors import OptionsError
from beam_gemma.inference.handlers import (
    GemmaClassifyModelHandler,
    GemmaEmbedModelHandler,
    GemmaGenerateModelHandler,
)
from beam_gemma.inference.rows import as_mapping
from beam_gemma.inference.task_handler import TaskHandler, check_bounded

PYTHON_TYPES: dict[pa.DataType, type] = {
    pa.string(): str,
    pa.int64(): int,
    pa.float32(): float,
    pa.float64(): float,
    pa.bool_(): bool,
    pa.binary(): bytes,
    pa.date32(): datetime.date,
    pa.timestamp("us", "UTC"): datetime.datetime,
    pa.time64("us"): datetime.time,
}
"""Python type of each Arrow type in results, for the schema of Beam Rows."""


class _Task(beam.PTransform[PCollection[Any], PCollection[Any]]):
    """Runs a task on every row.

    Takes rows as dicts, Beam Rows or Arrow record batches, and returns the same kind with the
    result columns added. Every row comes back, with its `error` if it failed. Rows are first spread
    over the workers, and results are kept before they go on, so that a later step that fails does
    not repeat the computation.
    """

    def __init__(self, handler: TaskHandler) -> None:
        super().__init__()
        if not handler.settings.has_source:
            raise OptionsError(
                f"settings: expected one of {', '.join(handler.settings.SOURCES)}, got none"
            )
        self._handler = handler

    def expand(self, rows: PCollection[Any]) -> PCollection[Any]:
        """Apply the transform."""
        check_bounded(rows)
        send_whole()
        private_ports()
        schema = self._handler.settings.result_schema
        input_type, output_type = _types(rows.element_type, schema)
        return (
            rows
            | "Check" >> beam.ParDo(_Check(self._handler)).with_output_types(input_type)
            | "Spread" >> beam.Reshuffle()
            | "Infer" >> RunInference(self._handler)
            | "Merge" >> beam.Map(_merge, schema).with_output_types(output_type)
            | "Keep" >> beam.Reshuffle()
        )


class Generate(_Task):
    """Completes every row with a Gemma model.

    Args:
        handler: The handler of the model and its settings.
        schema: JSON Schema, or a class with `model_json_schema`, such as a Pydantic model. Each
            completion is JSON of this schema and becomes the typed column `extracted`.

    Raises:
        OptionsError: the settings define no prompt, or the schema cannot be used.

    Example:
        >>> settings = GenerateSettings(prompt="{title} is about")
        >>> handler = GemmaGenerateModelHandler(MODEL, settings, large_model=False)
        >>> with beam.Pipeline(runner="FnApiRunner") as pipeline:
        ...     rows = pipeline | beam.Create([{"title": "Bread"}])
        ...     texts = rows | Generate(handler) | beam.Map(lambda row: row["completion"])
    """

    def __init__(
        self, handler: GemmaGenerateModelHandler, *, schema: Mapping[str, Any] | type | None = None
    ) -> None:
        super().__init__(handler if schema is None else handler.with_schema(schema))


class Classify(_Task):
    """Classifies every row with a Gemma model.

    Args:
        handler: The handler of the model and its settings.

    Raises:
        OptionsError: the settings define no prompt.

    Example:
        >>> settings = ClassifySettings(prompt="{text} is", labels=(" good", " bad"))
        >>> handler = GemmaClassifyModelHandler(MODEL, settings, large_model=False)
        >>> with beam.Pipeline(runner="FnApiRunner") as pipeline:
        ...     rows = pipeline | beam.Create([{"text": "Bread"}])
        ...     labels = rows | Classify(handler) | beam.Map(lambda row: row["label"])
    """

    def __init__(self, handler: GemmaClassifyModelHandler) -> None:
        super().__init__(handler)


class Embed(_Task):
    """Embeds every row with a Gemma model.

    Args:
        handler: The handler of the model and its settings.

    Raises:
        OptionsError: the settings name no column of texts or pictures.

    Example:
        >>> handler = GemmaEmbedModelHandler(
        ...     MODEL, EmbedSettings(text_column="text"), large_model=False
        ... )
        >>> with beam.Pipeline(runner="FnApiRunner") as pipeline:
        ...     rows = pipeline | beam.Create([{"text": "Bread"}])
        ...     vectors = rows | Embed(handler) | beam.Map(lambda row: row["embedding"])
    """

    def __init__(self, handler: GemmaEmbedModelHandler) -> None:
        super().__init__(handler)


def _types(element_type: Any, results: pa.Schema) -> tuple[Any, Any]:
    """Return the input and output element types; Rows and batches have their own coders."""
    if element_type is pa.RecordBatch:
        return pa.RecordBatch, pa.RecordBatch
    own = row_fields(element_type)
    if own is None:
        return Any, Any
    for name, _ in own:
        _refuse_clash(name, results.names)
    fields = [*own, *((field.name, _python_type(field.type)) for field in results)]
    return element_type, RowTypeConstraint.from_fields(fields)


def _python_type(kind: pa.DataType) -> Any:
    """Return the type of a result column in the schema of Beam Rows."""
    if pa.types.is_struct(kind):
        fields = [(field.name, _python_type(field.type)) for field in kind]
        return Optional[RowTypeConstraint.from_fields(fields)]
    if pa.types.is_fixed_size_list(kind):
        # Embeddings, of either precision, have no nulls.
        return Optional[List[float]]
    if pa.types.is_list(kind):
        return Optional[List[_python_type(kind.value_type)]]
    if pa.types.is_map(kind):
        return Optional[Dict[_python_type(kind.key_type), _python_type(kind.item_type)]]
    return Optional[PYTHON_TYPES[kind]]


class _Check(beam.DoFn):
    """Rejects elements that are not rows or have a result's column, before any row runs."""

    def __init__(self, handler: TaskHandler) -> None:
        self._facts = handler.facts()
        self._result_names = frozenset(handler.settings.result_schema.names)

    def display_data(self) -> dict[str, str]:
        return self._facts

    def process(self, element: Any) -> Iterator[Any]:
        yield _check(element, self._result_names)


def _check(element: Any, result_names: frozenset[str]) -> Any:
    columns = element.schema.names if isinstance(element, pa.RecordBatch) else as_mapping(element)
    if isinstance(columns, str) or not hasattr(columns, "__iter__"):
        raise OptionsError(
            f"row: expected a dict, a Beam Row or an Arrow record batch, got "
            f"{type(element).__name__}; use RunInference with a GemmaGenerateModelHandler for "
            "others"
        )
    for name in columns:
        _refuse_clash(name, result_names)
    return element


def _refuse_clash(name: str, result_names: Collection[str]) -> None:
    if name in result_names:
        raise OptionsError(
            f"column {name!r}: expected rows without it, because a result has that name; "
            "rename it in the input"
        )


def _merge(prediction: PredictionResult, results: pa.Schema) -> Any:
    """Return an example with its result columns added, in the example's own form."""
    example: Any = prediction.example
    inference: Any = prediction.inference
    if isinstance(example, pa.RecordBatch):
        schema = pa.schema([*example.schema, *inference.schema], example.schema.metadata)
        return pa.RecordBatch.from_arrays([*example.columns, *inference.columns], schema=schema)
    if isinstance(example, Mapping):
        return {**example, **inference}
    own = {name: _as_rows(value, results.field(name).type) for name, value in inference.items()}
    return Row(**as_mapping(example), **own)


def _as_rows(value: Any, kind: pa.DataType) -> Any:
    """Return a value of an Arrow type with every struct in it as a Row; maps stay dicts."""
    if value is None:
        return None
    if pa.types.is_struct(kind):
        return Row(**{field.name: _as_rows(value[field.name], field.type) for field in kind})
    if pa.types.is_map(kind):
        return {name: _as_rows(item, kind.item_type) for name, item in value.items()}
    if pa.types.is_list(kind):
        return [_as_rows(item, kind.value_type) for item in value]
    return value
