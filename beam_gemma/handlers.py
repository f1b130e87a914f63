"""Gemma as a Beam model handler: what RunInference needs to know of the generate task."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import pyarrow as pa
from apache_beam.metrics.metric import Metrics
from apache_beam.ml.inference.base import ModelHandler, PredictionResult
from apache_beam.pvalue import Row

from beam_gemma.artifact import Artifact
from beam_gemma.engine import Engine, EngineConfig
from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.generate import GenerateSettings, Generator
from beam_gemma.progress import METER, METRICS_NAMESPACE
from beam_gemma.prompt_encoder import PromptEncoder
from beam_gemma.prompt_encoder import Row as Columns
from beam_gemma.session import Session, require_device
from beam_gemma.signature import Device
from beam_gemma.tokenizer import Tokenizer

Example: TypeAlias = str | Mapping[str, Any] | Row | tuple[Any, ...] | pa.RecordBatch
"""A Row that has been between two steps comes as a named tuple."""
DeviceChoice = Literal["auto", "cpu", "cuda"]
ENGINE = EngineConfig()
BATCH_ROWS = 4096
"""Rows that go to the engine together: enough that few steps run with slots left empty."""


class GemmaModelHandler(ModelHandler[Example, PredictionResult, Generator]):
    """Completes examples with a Gemma model.

    An example is a prompt (a string), a row (a mapping or a Beam Row) or several rows (an Arrow
    record batch). Its inference holds the result columns in the same form: a dict for one row, a
    record batch for several. All threads of a process share one engine.
    """

    def __init__(
        self,
        model: str,
        settings: GenerateSettings | None = None,
        *,
        device: DeviceChoice = "auto",
        max_num_seqs: int = ENGINE.max_num_seqs,
        max_num_batched_tokens: int = ENGINE.max_num_batched_tokens,
    ) -> None:
        """Describe a model and what to ask of it; nothing is loaded yet.

        Args:
            model: Folder that `python -m export` wrote.
            settings: What to ask.
            device: `auto` is CUDA where the model and the machine have it, else the CPU.
            max_num_seqs: Sequences that run at once.
            max_num_batched_tokens: New tokens of one step.
        """
        super().__init__(
            min_batch_size=BATCH_ROWS, max_batch_size=BATCH_ROWS, element_size_fn=num_rows
        )
        self.settings = settings or GenerateSettings()
        self._model = model
        self._device = device
        self._engine_config = EngineConfig(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(model={self._model!r}, device={self._device!r}, "
            f"max_num_seqs={self._engine_config.max_num_seqs}, "
            f"max_num_batched_tokens={self._engine_config.max_num_batched_tokens})"
        )

    def load_model(self) -> Generator:
        """Open the model folder and start an engine.

        Raises:
            ArtifactError: the folder is missing or damaged.
            OptionsError: the model cannot be asked so, or the device is absent.
        """
        artifact = Artifact.open(self._model)
        artifact.verify()
        encoder = prompt_encoder(artifact, self.settings)
        config = EngineConfig(
            max_num_seqs=self._engine_config.max_num_seqs,
            max_num_batched_tokens=self._engine_config.max_num_batched_tokens,
            eos_token_ids=artifact.eos_token_ids,
        )
        session = Session.of(
            artifact,
            device=choose_device(artifact, self._device),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        engine = Engine(session, config, on_step=METER.add)
        return Generator(engine, encoder, self.settings, on_result=METER.add)

    def run_inference(
        self,
        batch: Sequence[Example],
        model: Generator,
        inference_args: dict[str, Any] | None = None,
    ) -> list[PredictionResult]:
        """Return one result for each example, in order."""
        self.validate_inference_args(inference_args)
        rows = [row for example in batch for row in _rows(example)]
        results = model(rows)
        _report(results)
        remaining = iter(results)
        return [PredictionResult(example, self._inference(example, remaining)) for example in batch]

    def get_num_bytes(self, batch: Sequence[Example]) -> int:
        """Return the bytes of the examples themselves."""
        return sum(map(_num_bytes, batch))

    def get_metrics_namespace(self) -> str:
        """Return the namespace of RunInference's own metrics, the same as of ours."""
        return METRICS_NAMESPACE

    def validate_inference_args(self, inference_args: dict[str, Any] | None) -> None:
        """Refuse arguments that would change nothing.

        Raises:
            OptionsError: there are some.
        """
        if inference_args:
            raise OptionsError(
                f"inference_args: expected none, got {', '.join(inference_args)}; "
                "use GenerateSettings"
            )

    def _inference(
        self, example: Example, results: Iterator[dict[str, Any]]
    ) -> dict[str, Any] | pa.RecordBatch:
        if not isinstance(example, pa.RecordBatch):
            return next(results)
        own = [next(results) for _ in range(example.num_rows)]
        return pa.RecordBatch.from_pylist(own, schema=self.settings.result_schema)


class BatchRow(Mapping[str, Any]):
    """One row of a record batch; a value becomes a Python object when it is asked for."""

    def __init__(self, batch: pa.RecordBatch, index: int) -> None:
        self._batch = batch
        self._index = index

    def __getitem__(self, column: str) -> Any:
        position = self._batch.schema.get_field_index(column)
        if position < 0:
            raise KeyError(column)
        try:
            return self._batch.column(position)[self._index].as_py()
        except (ValueError, OverflowError) as error:
            raise RecordError(
                f"column {column!r}: expected a value that Python can hold, got an error: {error}"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch.schema.names)

    def __len__(self) -> int:
        return self._batch.num_columns

    def __contains__(self, column: object) -> bool:
        return column in self._batch.schema.names


def prompt_encoder(artifact: Artifact, settings: GenerateSettings) -> PromptEncoder:
    """Return what makes prompts for a model; no weights are loaded.

    Raises:
        ArtifactError: the tokenizer is missing or damaged.
        OptionsError: the model cannot be asked so.
    """
    return PromptEncoder(
        Tokenizer.from_file(artifact.tokenizer_path),
        settings,
        chat_template=artifact.chat_template,
        max_tokens=settings.max_prompt(artifact.config.max_position_embeddings),
    )


def choose_device(artifact: Artifact, device: DeviceChoice) -> Device:
    """Return the device that a model runs on, on this machine.

    Raises:
        ArtifactError: the model has no graph for the device that was asked for.
        OptionsError: the machine does not have that device.
    """
    if device != "auto":
        artifact.signature("generate", device)
        require_device(device)
        return device
    if "cuda" in artifact.devices:
        try:
            require_device("cuda")
        except OptionsError:
            return "cpu"
        return "cuda"
    return "cpu"


def num_rows(example: Any) -> int:
    """Return the rows of an example; KeyedModelHandler puts its key before it."""
    if isinstance(example, tuple) and len(example) == 2 and not hasattr(example, "_fields"):
        example = example[1]
    return example.num_rows if isinstance(example, pa.RecordBatch) else 1


def as_mapping(row: Any) -> Any:
    """Return a Beam Row, or the named tuple that its coder makes of it, as a mapping."""
    if isinstance(row, Row):
        return row.as_dict()
    return row._asdict() if hasattr(row, "_asdict") else row


def _rows(example: Example) -> list[Columns]:
    if isinstance(example, pa.RecordBatch):
        return [BatchRow(example, index) for index in range(example.num_rows)]
    return [as_mapping(example)]


def _num_bytes(value: Any) -> int:
    """Return the bytes of a value's content; a number counts as eight."""
    match as_mapping(value):
        case pa.RecordBatch():
            return value.nbytes
        case str():
            return len(value.encode(errors="surrogatepass"))
        case bytes():
            return len(value)
        case Mapping() as mapping:
            return sum(map(_num_bytes, mapping.values()))
        case list() | tuple() as items:
            return sum(map(_num_bytes, items))
        case None:
            return 0
        case _:
            return 8


def _report(results: Sequence[Mapping[str, Any]]) -> None:
    """Add a batch's counts to Beam's metrics."""
    failed = sum(result["error"] is not None for result in results)
    counts = {"rows_in": len(results), "rows_ok": len(results) - failed, "rows_failed": failed}
    for name, count in counts.items():
        Metrics.counter(METRICS_NAMESPACE, name).inc(count)
    for kind in ("prompt", "completion"):
        column = f"num_{kind}_tokens"
        counter = Metrics.counter(METRICS_NAMESPACE, f"{kind}_tokens")
        distribution = Metrics.distribution(METRICS_NAMESPACE, column)
        for result in results:
            counter.inc(result[column] or 0)
            distribution.update(result[column] or 0)
