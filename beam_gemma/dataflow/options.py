"""Fill in and check the options of Dataflow jobs before submission."""

import argparse
import copy
import logging
import math
from typing import Literal

from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
    WorkerOptions,
)

from beam_gemma.dataflow import image
from beam_gemma.dataflow.gpus import GPUS, Gpu, smallest_gpu
from beam_gemma.errors import OptionsError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.graph_tensors import Device
from beam_gemma.storage import CLOUD_STORAGE
from beam_gemma.tables.bigquery_client import SCHEME as BIGQUERY

LOGGER = logging.getLogger(__name__)
DRIVER = "install-nvidia-driver:latest"
"""GPU driver setting. ONNX Runtime's CUDA 13 needs driver 580 or newer; of Google's two settings,
`default` and `latest`, the latter selects the newer driver."""
ONE_PROCESS = "no_use_multiple_sdk_containers"
"""Experiment for one process per worker; without it, Beam starts a process, and so loads a model,
per core."""
HARNESS_THREADS = 8
"""Number of bundles that a worker process runs at once; four or more keep steps full."""
DISK_GB = {"cpu": 30, "cuda": 50}
"""Disk size per worker in GB for the system and the image, without the model."""


def on_dataflow(options: PipelineOptions) -> bool:
    """Return whether a job runs on Dataflow, under any of Beam's names for that runner."""
    runner = (options.view_as(StandardOptions).runner or "").rpartition(".")[2]
    return runner.lower() in ("dataflow", "dataflowrunner")


def worker_device(flags: argparse.Namespace) -> Device:
    """Return the device that Dataflow workers run the model on.

    Raises:
        OptionsError: --device contradicts --gpu_type.
    """
    device: Device = "cuda" if flags.gpu_type else "cpu"
    if flags.device not in ("auto", device):
        remedy = "pass --gpu_type as well" if device == "cpu" else "leave one of them out"
        raise OptionsError(
            f"--device {flags.device}: expected workers that have it, got --gpu_type "
            f"{flags.gpu_type or 'none'}; {remedy}"
        )
    return device


def resource_hints(flags: argparse.Namespace, options: PipelineOptions) -> dict[str, str]:
    """Return the resource hints of the step that runs the model.

    Other steps get none: they run on machines of --machine_type, or on those that Dataflow chooses.
    """
    if flags.gpu_type is None:
        return {}
    machine = options.view_as(WorkerOptions).machine_type or _machines(flags)[0]
    driver = DRIVER if flags.gpu_driver is None else flags.gpu_driver
    return {
        "accelerator": f"type:{flags.gpu_type};count:{flags.gpu_count or 1};"
        f"machine_type:{machine};{driver}"
    }


def worker_options(
    flags: argparse.Namespace, options: PipelineOptions, artifact: Artifact
) -> PipelineOptions:
    """Return the completed options of a Dataflow job; other runners' options are unchanged.

    Args:
        flags: The flags of this package.
        options: The options of Beam.
        artifact: The model.

    Raises:
        OptionsError: the job cannot run on Dataflow, or GPU flags are given for another runner.
    """
    if not on_dataflow(options):
        _refuse_idle_flags(flags, options)
        return options
    _check_places(flags, options)
    _check_mode(options)
    _check_gpu(flags, options, artifact)
    options = copy.deepcopy(options)
    debug, workers = options.view_as(DebugOptions), options.view_as(WorkerOptions)
    debug.add_experiment(ONE_PROCESS)
    if debug.number_of_worker_harness_threads is None:
        debug.number_of_worker_harness_threads = HARNESS_THREADS
    if workers.disk_size_gb is None:
        model_gb = math.ceil(_num_bytes(artifact) / 1e9)
        workers.disk_size_gb = DISK_GB[worker_device(flags)] + model_gb
    if workers.sdk_container_image is not None:
        device: Literal["cpu", "gpu"] = "gpu" if flags.gpu_type else "cpu"
        workers.sdk_container_image = image.check(workers.sdk_container_image, device=device)
    return options


def _refuse_idle_flags(flags: argparse.Namespace, options: PipelineOptions) -> None:
    for name in ("gpu_type", "gpu_count", "gpu_driver"):
        if (value := getattr(flags, name)) is not None:
            raise OptionsError(
                f"--{name} {value}: expected --runner DataflowRunner beside it, got "
                f"{options.view_as(StandardOptions).runner or 'no --runner'}"
            )


def _check_places(flags: argparse.Namespace, options: PipelineOptions) -> None:
    """Check that project and region are set, and that Dataflow and its workers reach all paths."""
    cloud = options.view_as(GoogleCloudOptions)
    for name, what in (("project", "pays for"), ("region", "runs")):
        if getattr(cloud, name) is None:
            raise OptionsError(f"--{name}: expected the {name} that {what} the job, got none")
    if not (cloud.temp_location or "").startswith(CLOUD_STORAGE):
        raise OptionsError(
            f"--temp_location: expected a folder on {CLOUD_STORAGE} for what is not finished, got "
            f"{cloud.temp_location or 'none'}"
        )
    tables = ("input", "output", "errors")
    for name in ("model", *tables, "report", "mask_decoder"):
        place = getattr(flags, name, None)
        schemes = (CLOUD_STORAGE, BIGQUERY) if name in tables else (CLOUD_STORAGE,)
        if place is not None and not place.startswith(schemes):
            has_to_be_copied = name in ("model", "input", "mask_decoder")
            remedy = "; copy it there with gcloud storage cp -r" if has_to_be_copied else ""
            raise OptionsError(
                f"--{name} {place}: expected a place on {' or '.join(schemes)} that workers of "
                f"Dataflow reach, got a path of this machine{remedy}"
            )


def _check_mode(options: PipelineOptions) -> None:
    """Check that the job is a batch job with one process and one engine per worker."""
    if options.view_as(StandardOptions).streaming:
        raise OptionsError("--streaming: expected a batch job, as a table has an end; leave it out")
    if options.view_as(SetupOptions).save_main_session:
        raise OptionsError(
            "--save_main_session: expected to be left out, as workers import beam_gemma and a "
            "saved session would carry this process's state to them"
        )
    experiments = options.view_as(DebugOptions).experiments or []
    if "use_multiple_sdk_containers" in experiments:
        raise OptionsError(
            "--experiments use_multiple_sdk_containers: expected one process on each worker, "
            "whose engine serves all of its threads; leave it out"
        )
    service = options.view_as(GoogleCloudOptions).dataflow_service_options or []
    for option in (*service, *experiments):
        if option.startswith("worker_accelerator"):
            raise OptionsError(
                f"{option}: expected --gpu_type and --gpu_count in its place, which ask for GPUs "
                "where the model runs and exclude it"
            )


def _check_gpu(flags: argparse.Namespace, options: PipelineOptions, artifact: Artifact) -> None:
    """Check that the requested GPUs exist and that the model can run on them."""
    worker_device(flags)
    if flags.gpu_type is None:
        for name in ("gpu_count", "gpu_driver"):
            if (value := getattr(flags, name)) is not None:
                raise OptionsError(f"--{name} {value}: expected --gpu_type beside it, got none")
        return
    gpu, workers = GPUS[flags.gpu_type], options.view_as(WorkerOptions)
    if options.view_as(GoogleCloudOptions).flexrs_goal is not None:
        raise OptionsError("--flexrs_goal: expected none beside --gpu_type, as FlexRS has no GPUs")
    if workers.sdk_container_image is None:
        raise OptionsError(
            "--sdk_container_image: expected an image with CUDA beside --gpu_type, got none; "
            "docs/dataflow.md says how to build it"
        )
    _check_machine(flags, workers)
    _check_region(gpu, options)
    _check_fit(gpu, artifact)
    if flags.gpu_count not in (None, 1):
        LOGGER.warning(
            "--gpu_count %d: the engine of a worker uses one GPU, the others are idle",
            flags.gpu_count,
        )


def _check_machine(flags: argparse.Namespace, workers: WorkerOptions) -> None:
    machines = _machines(flags)
    if workers.machine_type not in (None, *machines):
        raise OptionsError(
            f"--machine_type {workers.machine_type}: expected one with {flags.gpu_count or 1} "
            f"{flags.gpu_type}, {' or '.join(machines)}; leave it out for {machines[0]}"
        )


def _machines(flags: argparse.Namespace) -> tuple[str, ...]:
    """Return the machine types with the requested GPUs, the default one first."""
    gpu, count = GPUS[flags.gpu_type], flags.gpu_count or 1
    if count not in gpu.machines:
        raise OptionsError(
            f"--gpu_count {count}: expected as many {gpu.name} as there are machines with, "
            f"{', '.join(map(str, gpu.machines))}"
        )
    return gpu.machines[count]


def _check_region(gpu: Gpu, options: PipelineOptions) -> None:
    workers = options.view_as(WorkerOptions)
    if workers.worker_zone or workers.zone or not gpu.regions:
        return
    region = workers.worker_region or options.view_as(GoogleCloudOptions).region
    if region not in gpu.regions:
        raise OptionsError(
            f"--region {region}: expected one that is known to have {gpu.name}, "
            f"{', '.join(sorted(gpu.regions))}; where you know of a zone, pass --worker_zone"
        )


def _check_fit(gpu: Gpu, artifact: Artifact) -> None:
    if not gpu.computes(artifact.precision):
        raise OptionsError(
            f"--gpu_type {gpu.name}: expected a GPU that computes in the model's bfloat16, got one "
            f"that does not; export it with --precision fp16, or take {_smallest(artifact)}"
        )
    num_bytes = _num_bytes(artifact)
    if not gpu.holds(num_bytes, _table_bytes(artifact)):
        raise OptionsError(
            f"--gpu_type {gpu.name}: expected a GPU with room for {num_bytes / 2**30:,.1f} GiB of "
            f"weights and for caches, got {gpu.memory_gib} GiB; take {_smallest(artifact)}"
        )


def _smallest(artifact: Artifact) -> str:
    """Return the name of the GPU with the least memory that can run a model."""
    sizes = _num_bytes(artifact), _table_bytes(artifact)
    smallest = smallest_gpu(artifact.precision, *sizes)
    return smallest.name if smallest else "a smaller model, no type has as much"


def _table_bytes(artifact: Artifact) -> int:
    """Return the bytes of the weights that graphs take as tables, of which all have the same."""
    signatures = artifact.signatures.values()
    return max(sum(table.num_bytes for table in s.tables) for s in signatures)


def _num_bytes(artifact: Artifact) -> int:
    return sum(entry.num_bytes for entry in artifact.files.values())
