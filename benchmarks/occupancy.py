"""Measures the occupancy of the engine's steps in whole jobs, for several bundle sizes and runners.

    python -m benchmarks.occupancy

Every job completes the same rows on 64 slots with a tiny Gemma of random weights, which the script
exports. Rows end unevenly: tokens are drawn almost uniformly from 300, of which ten end a row, so
lengths are geometric, cut at 64: one row in nine reaches 64, one in three ends before the twelfth
token.

A Beam batch never spans bundles, so batches of at most 100 rows simulate bundles of 100 rows: each
thread or process has one batch at the engine and waits for its slowest row. The local runners
process at most as many bundles at once as they have workers, and cut a step's input into no more
bundles.

`full` is the share of slots in use over all decode steps, including the end of the job, when fewer
rows than slots are left. `full, rows waiting` counts only steps during which rows waited for a
slot. Both come from Beam's counters, like the closing line of a job. Rates cover the time from the
first call of the model to its last answer, without process start and reading.
"""

import argparse
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics.cells import DistributionResult
from apache_beam.metrics.metric import Metrics, MetricsFilter
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.runners.runner import PipelineResult

from beam_gemma.beam_internals import without_prism
from beam_gemma.cli.run import counters
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.inference.handlers import GemmaGenerateModelHandler, Model
from beam_gemma.inference.rows import Example
from beam_gemma.inference.task_handler import BATCH_ROWS
from beam_gemma.inference.transforms import Generate
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device
from beam_gemma.runtime.limits import EngineConfig
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.interface import StreamingModel
from benchmarks.table import table
from export.__main__ import export
from tests.doubles.reference import save_checkpoint, tiny_model

SLOTS = EngineConfig().max_num_seqs
BUNDLE_ROWS = 100
ROWS_PER_BATCH = 16
"""Rows per input record batch, small so that Beam batches come close to their maximum."""
JOBS = [
    ("in_memory", 1, BATCH_ROWS),
    ("in_memory", 1, BUNDLE_ROWS),
    ("multi_threading", 2, BUNDLE_ROWS),
    ("multi_threading", 4, BUNDLE_ROWS),
    ("multi_threading", 12, BUNDLE_ROWS),
    ("multi_processing", 4, BUNDLE_ROWS),
]
SETTINGS = GenerateSettings(
    prompt_column="text",
    key_column="number",
    sampling=SamplingParams(
        max_tokens=64,
        temperature=30.0,
        ignore_eos=True,
        stop_token_ids=tuple(range(20, 300, 28)),
    ),
)
CLOCK = Metrics.distribution("occupancy", "clock_ms")


class BundledHandler(GemmaGenerateModelHandler):
    """A handler whose Beam batches are as small as a bundle, and whose calls are timed."""

    def __init__(self, model: str, batch_rows: int, loads: Path, *, large_model: bool) -> None:
        """Describe a model, the number of rows per Beam batch, and a folder to count loads in."""
        super().__init__(model, SETTINGS, large_model=large_model)
        self._batch_rows = batch_rows
        self._loads = loads

    def _load(self, artifact: Artifact, device: Device) -> StreamingModel:
        (self._loads / uuid.uuid4().hex).touch()
        return super()._load(artifact, device)

    def batch_elements_kwargs(self) -> Mapping[str, Any]:
        """Return the arguments for Beam's batching."""
        sizes = {"min_batch_size": self._batch_rows, "max_batch_size": self._batch_rows}
        return {**super().batch_elements_kwargs(), **sizes}

    def run_inference(
        self,
        batch: Sequence[Example],
        model: Model,
        inference_args: dict[str, Any] | None = None,
    ) -> list[PredictionResult]:
        """Complete a batch, and record its start and end time."""
        CLOCK.update(round(time.time() * 1000))
        results = super().run_inference(batch, model, inference_args)
        CLOCK.update(round(time.time() * 1000))
        return results


def run(model: Path, rows: pa.Table, mode: str, num_workers: int, batch_rows: int) -> list[str]:
    """Run a job and return its line of the table."""
    loads = Path(tempfile.mkdtemp(dir=model.parent))
    options = without_prism(
        [
            "--runner=DirectRunner",
            f"--direct_running_mode={mode}",
            f"--direct_num_workers={num_workers}",
        ]
    )
    large_model = mode == "multi_processing"
    handler = BundledHandler(str(model), batch_rows, loads, large_model=large_model)
    pipeline = beam.Pipeline(options=options)
    batches = rows.to_batches(max_chunksize=ROWS_PER_BATCH)
    _ = pipeline | beam.Create(batches).with_output_types(pa.RecordBatch) | Generate(handler)
    result = pipeline.run()
    result.wait_until_finish()
    counts = counters(result)
    clock = distribution(result, CLOCK.metric_name.name)
    num_loads = len(list(loads.iterdir()))
    secs = (clock.max - clock.min) / 1000
    return [
        mode,
        str(num_workers),
        f"{batch_rows:,}",
        str(num_loads),
        _share(counts["decode_rows"], counts["decode_slots"]),
        _share(counts["backlog_decode_rows"], counts["backlog_decode_slots"]),
        f"{counts['decode_slots'] // SLOTS:,}",
        f"{counts['rows_ok'] / secs:,.1f}",
    ]


def distribution(result: PipelineResult, name: str) -> DistributionResult:
    """Return the job's only distribution with this name."""
    (metric,) = result.metrics().query(MetricsFilter().with_name(name))["distributions"]
    return metric.result


def main() -> None:
    """Run the jobs and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2400, help="rows of the file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(save_checkpoint(tiny_model("gemma_mha"), folder / "checkpoint"), folder / "model")
        texts = [f"row {i} " + "the hat " * (i % 7) for i in range(args.rows)]
        rows = pa.table({"number": range(args.rows), "text": texts})
        lines = [run(folder / "model", rows, *job) for job in JOBS]
    header = ["mode", "workers", "batch rows", "loads", "full", "full, rows waiting"]
    print(table([*header, "decode steps", "rows/s"], lines))


def _share(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.3f}"


if __name__ == "__main__":
    main()
