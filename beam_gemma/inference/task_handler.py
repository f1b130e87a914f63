"""Base of the Beam model handlers of all tasks: rows, errors, counts, one shared model."""

import copy
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
from apache_beam.metrics.metric import Metrics
from apache_beam.ml.inference.base import ModelHandler, PredictionResult
from apache_beam.pvalue import PCollection

from beam_gemma.errors import OptionsError
from beam_gemma.inference.carried_rows import RowCarrier
from beam_gemma.inference.media_files import MediaReading
from beam_gemma.inference.media_rows import in_parts
from beam_gemma.inference.rows import Example, num_bytes, num_rows, rows_of, weight
from beam_gemma.inference.shared_model import SharedModel
from beam_gemma.inference.supervised_model import SupervisedModel, Supervision
from beam_gemma.inputs.row import Row
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device, Head
from beam_gemma.monitoring.progress import METRICS_NAMESPACE
from beam_gemma.monitoring.startup_log import log_process, logged
from beam_gemma.monitoring.timeline import used_mib
from beam_gemma.runtime.devices import DeviceChoice, choose_device
from beam_gemma.runtime.download import open_description, open_model
from beam_gemma.runtime.limits import Limits
from beam_gemma.tasks.encoded_rows import request_of
from beam_gemma.tasks.interface import (
    Asked,
    Encoder,
    Model,
    Settings,
    StreamingModel,
    asked,
    task_name,
)
from beam_gemma.versions import check_versions, versions

BATCH_ROWS = 4096
"""Rows per batch for the engine: enough that few steps run with empty slots."""
BATCH_BYTES = 128 << 20
"""Bytes per batch of rows with files, however few rows these are. Pictures of 200 KB make 640
rows, more than run at once. Of larger ones, steps are as full as threads have batches at once."""


class SampledResults(NamedTuple):
    """The results of a batch of rows, with samples of the engine that computed them."""

    results: pa.RecordBatch
    pulse: dict[str, Any] | None
    """New samples; the last batch of a call has them, others have None."""


class TaskHandler(ABC, ModelHandler[Example, PredictionResult, Model]):
    """Runs a task on examples.

    An example is a prompt or text (a string), a row (a mapping or a Beam Row) or several rows (an
    Arrow record batch). Its inference holds the result columns in the same form: a dict for one
    row, a record batch for several. All threads and processes of a machine share one model, which
    lives in the process that first needs it.
    """

    token_counters: ClassVar[Mapping[str, str]] = {"num_prompt_tokens": "prompt_tokens"}
    """Name of the Beam counter for each result column with a number of tokens."""

    def __init__(
        self,
        model: str,
        settings: Settings,
        *,
        device: DeviceChoice,
        limits: Limits,
        large_model: bool,
        reading: MediaReading = MediaReading(),
    ) -> None:
        """Create a handler for a model and a task; nothing is loaded yet.

        Args:
            model: The folder that `python -m export` wrote, on this machine or on gs://.
            settings: The settings of the task.
            device: `auto` is CUDA if the model and the machine have it, else the CPU.
            limits: Step and memory limits.
            large_model: True if the processes of a machine share one model. If False, each
                process loads its own, which is right if there is only one.
            reading: Limits of reading the files that rows name by path or URI.
        """
        limits.check_choice(device)
        size = partial(weight, full=BATCH_ROWS, full_bytes=BATCH_BYTES)
        super().__init__(
            min_batch_size=BATCH_ROWS,
            max_batch_size=BATCH_ROWS,
            element_size_fn=size if settings.media_columns else num_rows,
        )
        self.reading = reading
        """Limits of reading the pictures and sounds that rows name by path or URI."""
        self._is_shared = large_model
        self._key = uuid.uuid4().hex
        self._supervision: Supervision | None = None
        self._samples = False
        self._resource_hints: Mapping[str, str] = {}
        self._versions = versions()
        self.settings = settings
        self._model = model
        self._device = device
        self._limits = limits

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(model={self._model!r}, device={self._device!r}, "
            f"{self._limits!r})"
        )

    @property
    @abstractmethod
    def head(self) -> Head:
        """The graph that the task runs."""

    def artifact(self) -> Artifact:
        """Open the model's description in its folder; no weights are loaded.

        Raises:
            ArtifactError: the folder is missing or damaged.
        """
        return open_description(self._model)

    @abstractmethod
    def encoder(self, artifact: Artifact) -> Encoder:
        """Return the encoder of rows; no weights are loaded.

        Raises:
            ArtifactError: the tokenizer is missing or damaged.
            OptionsError: the model does not support the settings.
        """

    def check(self, artifact: Artifact) -> None:
        """Check the settings against the model; no weights are loaded.

        Raises:
            ArtifactError: the tokenizer is missing or damaged.
            OptionsError: the model does not support the settings.
        """
        self.encoder(artifact)

    def asks(self, artifact: Artifact) -> Callable[[Row], Asked]:
        """Return a function from a row to the token ids to compute; no weights are loaded."""
        encode = self.encoder(artifact)

        def asks(row: Row) -> Asked:
            prompt = encode(row)
            return asked([prompt], [(prompt, prompt.start_token_ids)])

        return asks

    def supervise(self, supervision: Supervision) -> None:
        """Enable supervision of the model; rows must then contain their request keys."""
        self._supervision = supervision

    def with_samples(self) -> "TaskHandler":
        """Return a copy whose inferences are `SampledResults`; examples must be record batches."""
        handler = copy.copy(self)
        handler._samples = True
        return handler

    def facts(self) -> dict[str, str]:
        """Return facts to show to all viewers of a job; they reveal nothing of rows or prompts."""
        return {"task": task_name(self.settings), "model": self._model, **self._versions}

    def run_on(self, resource_hints: Mapping[str, str]) -> None:
        """Set Beam's resource hints for machines; only the inference step has them."""
        self._resource_hints = resource_hints

    @abstractmethod
    def _load(self, artifact: Artifact, device: Device) -> StreamingModel:
        """Load the graph and make it ready for rows."""

    def request_encoder(self, artifact: Artifact) -> Callable[[Row], bytes]:
        """Return a function that encodes a row to its request, or to the row's error, as JSON.

        Rows with equal requests have equal results, unless results are random; no weights are
        loaded.
        """
        return partial(request_of, identify=self._identify(artifact))

    def _identify(self, artifact: Artifact) -> Callable[[Row], Any]:
        """Return a function that gives a JSON-serializable identity of a row's request."""
        encode = self.encoder(artifact)
        return lambda row: encode(row).identity

    def load_model(self) -> Model:
        """Open the model folder and load the graph that the task needs.

        If the processes of the machine share the model, only the first of them loads it.

        Raises:
            ArtifactError: the folder is missing or damaged.
            EngineError: the process that runs the engine for this machine is silent.
            OptionsError: the model does not support the settings, or the device is absent.
            StorageError: the folder in which the processes meet is not this user's alone.
        """
        if not self._is_shared:
            return self._load_here()
        schema = self.settings.result_schema
        return SharedModel(self._key, self._load_here, self._carrier, schema)

    def share_model_across_processes(self) -> bool:
        """Return False, so that Beam opens no server; this class shares the model itself.

        Beam's server unpickles what any user of the machine sends to it.
        """
        return False

    def run_inference(
        self,
        batch: Sequence[Example],
        model: Model,
        inference_args: dict[str, Any] | None = None,
    ) -> list[PredictionResult]:
        """Return one result for each example, in order.

        Raises:
            EngineError: the engine stopped, or the process that runs it has died or is silent.
        """
        self.validate_inference_args(inference_args)
        rows = [row for example in batch for row in rows_of(example)]
        results = self._results(rows, model)
        counts, pulse = model.take_counts(), model.take_pulse()
        self._report(results, counts)
        if (memory := used_mib(pulse)) is not None:
            Metrics.distribution(METRICS_NAMESPACE, "gpu_used_mib").update(memory)
        remaining = iter(results)
        inferences: list[Any] = [self._inference(example, remaining) for example in batch]
        if self._samples:
            pulses = [None] * (len(batch) - 1) + [pulse]
            inferences = list(map(SampledResults, inferences, pulses))
        return [
            PredictionResult(example, inference)
            for example, inference in zip(batch, inferences, strict=True)
        ]

    def _results(self, rows: list[Row], model: Model) -> list[dict[str, Any]]:
        if not self.settings.media_columns:
            return model(rows)
        parts = in_parts(rows, self.settings, self.reading, BATCH_BYTES)
        return [result for part in parts for result in model(part)]

    def get_num_bytes(self, batch: Sequence[Example]) -> int:
        """Return the size of the examples in bytes."""
        return sum(map(num_bytes, batch))

    def get_metrics_namespace(self) -> str:
        """Return the namespace of RunInference's own metrics, which our metrics share."""
        return METRICS_NAMESPACE

    def get_resource_hints(self) -> dict[str, str]:
        """Return the resource hints of the inference step."""
        return dict(self._resource_hints)

    def validate_inference_args(self, inference_args: dict[str, Any] | None) -> None:
        """Reject inference arguments, which would have no effect.

        Raises:
            OptionsError: there are inference arguments.
        """
        if inference_args:
            raise OptionsError(
                f"inference_args: expected none, got {', '.join(inference_args)}; "
                f"use {type(self.settings).__name__}"
            )

    def _carrier(self) -> RowCarrier:
        """Return what makes rows ready to cross to another process; no weights are loaded."""
        return RowCarrier(self._identify(self.artifact()), self._draw_key, self.settings)

    def _draw_key(self, row: Row) -> str | None:
        """Return the key that seeds a row's random draws, or None if its request seeds them."""
        del row
        return None

    def _load_here(self) -> Model:
        """Load the model into this process."""
        model = self._start()
        if self._supervision is None:
            return model
        return SupervisedModel(model, self._supervision, self.settings.result_schema)

    def _start(self) -> StreamingModel:
        check_versions("the side that submitted the job", self._versions)
        log_process()
        artifact = open_model(self._model)
        device = choose_device(artifact, self.head, self._device)
        with logged(f"loaded {self.head} on {device}"):
            return self._load(artifact, device)

    def _report(self, results: Sequence[Mapping[str, Any]], counts: dict[str, int]) -> None:
        """Add the counts of a batch and of the model's latest steps to Beam's metrics."""
        failed = sum(result["error"] is not None for result in results)
        rows = {"rows_in": len(results), "rows_ok": len(results) - failed, "rows_failed": failed}
        for name, number in (rows | counts).items():
            Metrics.counter(METRICS_NAMESPACE, name).inc(number)
        columns = self.settings.result_schema.names
        for column, name in self.token_counters.items():
            if column not in columns:
                continue
            counter = Metrics.counter(METRICS_NAMESPACE, name)
            distribution = Metrics.distribution(METRICS_NAMESPACE, column)
            for result in results:
                counter.inc(result[column] or 0)
                distribution.update(result[column] or 0)

    def _inference(
        self, example: Example, results: Iterator[dict[str, Any]]
    ) -> dict[str, Any] | pa.RecordBatch:
        if not isinstance(example, pa.RecordBatch):
            return next(results)
        own = [next(results) for _ in range(example.num_rows)]
        return pa.RecordBatch.from_pylist(own, schema=self.settings.result_schema)


def check_bounded(rows: PCollection[Any]) -> None:
    """Reject an unbounded PCollection while the pipeline is built.

    Raises:
        OptionsError: the PCollection is unbounded.
    """
    if not rows.is_bounded:
        raise OptionsError(
            f"rows: expected a PCollection that ends, got the stream {rows}; have it written to a "
            "table, and read that"
        )
