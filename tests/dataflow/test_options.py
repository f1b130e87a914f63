"""Dataflow: jobs get what they need, and what cannot work is refused in one sentence."""

import dataclasses
import logging

import pytest
from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    WorkerOptions,
)

from beam_gemma.cli.flags import parse
from beam_gemma.cli.generate_flags import generate_parser
from beam_gemma.dataflow.options import on_dataflow, resource_hints, worker_device, worker_options
from beam_gemma.errors import OptionsError
from beam_gemma.model.artifact import FileEntry
from tests.doubles.registry import LABELS, serving

FILES = ["--model=gs://b/m", "--input=gs://b/a.parquet", "--output=bq://p.d.t", "--prompt=x"]
PLACES = ["--project=p", "--region=us-central1", "--temp_location=gs://b/tmp"]
DATAFLOW = [*FILES, "--runner=DataflowRunner", *PLACES]
L4 = ["--gpu_type=nvidia-l4", "--sdk_container_image=i"]


@pytest.fixture
def model_of(tiny_gemma3):
    """An artifact that says it is of some size and precision."""

    def model(num_bytes=10**9, precision="bf16"):
        files = {"weights/w.safetensors": FileEntry(num_bytes=num_bytes, sha256=None)}
        return dataclasses.replace(tiny_gemma3.artifact, files=files, precision=precision)

    return model


@pytest.fixture
def complete(model_of):
    """Complete the options of a command line, for a model of 1 GB unless told otherwise."""

    def completed(*argv, **model):
        flags, options = parse(generate_parser(), argv)
        return worker_options(flags, options, model_of(**model))

    return completed


def experiments(options):
    return options.view_as(DebugOptions).experiments or []


def test_one_process_has_threads_and_room_for_the_model(complete):
    options = complete(*DATAFLOW, num_bytes=2_100_000_000)
    assert experiments(options) == ["no_use_multiple_sdk_containers"]
    assert options.view_as(DebugOptions).number_of_worker_harness_threads == 8
    assert options.view_as(WorkerOptions).disk_size_gb == 33
    assert options.view_as(WorkerOptions).machine_type is None
    with_gpu = complete(*DATAFLOW, *L4, num_bytes=2_100_000_000)
    assert with_gpu.view_as(WorkerOptions).disk_size_gb == 53


def test_options_that_the_user_sets_stay(complete):
    asked = [
        "--number_of_worker_harness_threads=24", "--disk_size_gb=400", "--experiments=a",
        "--experiments=no_use_multiple_sdk_containers", "--machine_type=g2-standard-16",
    ]  # fmt: skip
    options = complete(*DATAFLOW, *L4, *asked)
    assert experiments(options) == ["a", "no_use_multiple_sdk_containers"]
    assert options.view_as(DebugOptions).number_of_worker_harness_threads == 24
    assert options.view_as(WorkerOptions).disk_size_gb == 400
    assert options.view_as(WorkerOptions).machine_type == "g2-standard-16"


def test_completed_options_are_a_copy(model_of):
    flags, options = parse(generate_parser(), DATAFLOW)
    worker_options(flags, options, model_of())
    assert options.view_as(DebugOptions).experiments is None


def test_options_of_other_runners_stay_as_they_are(model_of):
    flags, options = parse(generate_parser(), FILES)
    assert worker_options(flags, options, model_of()) is options


@pytest.mark.parametrize(
    ("runner", "is_dataflow"),
    [
        ("DataflowRunner", True),
        ("dataflow", True),
        ("apache_beam.runners.dataflow.dataflow_runner.DataflowRunner", True),
        ("DirectRunner", False),
        (None, False),
    ],
)
def test_dataflow_is_known_by_each_name_of_its_runner(runner, is_dataflow):
    assert on_dataflow(PipelineOptions(runner=runner)) is is_dataflow


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (
            ["--gpu_type=nvidia-l4"],
            "type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver:latest",
        ),
        (
            ["--gpu_type=nvidia-l4", "--gpu_count=2", "--gpu_driver=install-nvidia-driver:x;y"],
            "type:nvidia-l4;count:2;machine_type:g2-standard-24;install-nvidia-driver:x;y",
        ),
        (
            ["--gpu_type=nvidia-l4", "--machine_type=g2-standard-4"],
            "type:nvidia-l4;count:1;machine_type:g2-standard-4;install-nvidia-driver:latest",
        ),
    ],
)
def test_hints_ask_for_a_gpu_its_machine_and_its_driver(argv, hint):
    assert resource_hints(*parse(generate_parser(), [*DATAFLOW, *argv])) == {"accelerator": hint}


def test_without_a_gpu_there_are_no_hints():
    assert resource_hints(*parse(generate_parser(), DATAFLOW)) == {}


@pytest.mark.parametrize(
    ("argv", "device"),
    [([], "cpu"), (["--device=cpu"], "cpu"), (L4, "cuda"), ([*L4, "--device=cuda"], "cuda")],
)
def test_workers_run_the_model_on_what_they_have(argv, device):
    assert worker_device(parse(generate_parser(), [*DATAFLOW, *argv])[0]) == device


def test_gpus_that_would_be_idle_are_warned_of(complete, caplog):
    with caplog.at_level(logging.WARNING):
        complete(*DATAFLOW, *L4, "--gpu_count=1")
        assert "--gpu_count" not in caplog.text
        complete(*DATAFLOW, *L4, "--gpu_count=4")
    assert "--gpu_count 4: the engine of a worker uses one GPU" in caplog.text


@pytest.mark.parametrize(("gpu", "device"), [([], "cpu"), (L4[:1], "gpu")])
def test_images_are_compared_and_named_by_digest(complete, gpu, device):
    with serving() as registry:
        digest = registry.push("1", {**LABELS, "beam-gemma.device": device})
        flags = [*DATAFLOW, *gpu, f"--sdk_container_image={registry.host}/team/worker:1"]
        image = complete(*flags).view_as(WorkerOptions).sdk_container_image
        assert image == f"{registry.host}/team/worker@{digest}"
        registry.push("1", {**LABELS, "beam-gemma.device": device, "beam-gemma.beam": "2.0.0"})
        with pytest.raises(OptionsError, match=r"worker:1: expected .*got .*Beam 2\.0\.0"):
            complete(*flags)


def test_an_image_for_the_cpu_is_refused_beside_a_gpu(complete):
    with serving() as registry:
        registry.push("1", {**LABELS, "beam-gemma.device": "cpu"})
        with pytest.raises(OptionsError, match="expected an image for the gpu, got one for cpu"):
            complete(*DATAFLOW, L4[0], f"--sdk_container_image={registry.host}/team/worker:1")


@pytest.mark.parametrize(
    ("argv", "workers", "precision"),
    [
        (L4, {"worker_zone": "mars-north1-a"}, "bf16"),
        (L4, {"worker_region": "us-east4"}, "bf16"),
        (["--gpu_type=nvidia-tesla-t4", L4[1]], {}, "fp32"),
    ],
    ids=["beside a zone", "beside a region of workers", "for a GPU whose regions are unknown"],
)
def test_unknown_regions_are_left_to_dataflow(complete, argv, workers, precision):
    flags = [f"--{name}={place}" for name, place in workers.items()]
    options = complete(*DATAFLOW, *argv, "--region=mars-north1", *flags, precision=precision)
    assert options.view_as(GoogleCloudOptions).region == "mars-north1"
    found = options.view_as(WorkerOptions)
    assert found.worker_region == workers.get("worker_region")
    assert found.worker_zone == workers.get("worker_zone")


REFUSED = {
    "a flag of this group on another runner": (
        [*FILES, "--gpu_type=nvidia-l4"],
        "--gpu_type nvidia-l4: expected --runner DataflowRunner beside it, got no --runner",
    ),
    "a driver on another runner": (
        [*FILES, "--gpu_driver=d", "--runner=DirectRunner"],
        "--gpu_driver d: expected --runner DataflowRunner beside it, got DirectRunner",
    ),
    "no project": (
        [*FILES, "--runner=DataflowRunner", *PLACES[1:]],
        "--project: expected the project that pays for the job, got none",
    ),
    "no region": (
        [*FILES, "--runner=DataflowRunner", PLACES[0], PLACES[2]],
        "--region: expected the region that runs the job, got none",
    ),
    "no folder for what is not finished": (
        [*FILES, "--runner=DataflowRunner", *PLACES[:2]],
        "--temp_location: expected a folder on gs:// for what is not finished, got none",
    ),
    "a local folder for what is not finished": (
        [*DATAFLOW, "--temp_location=tmp"],
        "--temp_location: expected a folder on gs:// for what is not finished, got tmp",
    ),
    "a local model": (
        [*DATAFLOW, "--model=m"],
        "--model m: expected a place on gs:// that workers of Dataflow reach, got a path of this "
        "machine; copy it there with gcloud storage cp -r",
    ),
    "a local input": (
        [*DATAFLOW, "--input=a.parquet"],
        "--input a.parquet: expected a place on gs:// or bq:// that workers of Dataflow reach, "
        "got a path of this machine; copy it there with gcloud storage cp -r",
    ),
    "a local output": (
        [*DATAFLOW, "--output=o.parquet"],
        "--output o.parquet: expected a place on gs:// or bq:// that workers of Dataflow reach, "
        "got a path of this machine",
    ),
    "local errors": ([*DATAFLOW, "--errors=e.parquet"], "--errors e.parquet: expected a place on"),
    "a local report": (
        [*DATAFLOW, "--report=r.html"],
        "--report r.html: expected a place on gs:// that workers",
    ),
    "a stream": (
        [*DATAFLOW, "--streaming"],
        "--streaming: expected a batch job, as a table has an end; leave it out",
    ),
    "a saved session": (
        [*DATAFLOW, "--save_main_session"],
        "--save_main_session: expected to be left out, as workers import beam_gemma",
    ),
    "a process for each core": (
        [*DATAFLOW, "--experiments=use_multiple_sdk_containers"],
        "--experiments use_multiple_sdk_containers: expected one process on each worker, whose "
        "engine serves all of its threads; leave it out",
    ),
    "an accelerator as a service option": (
        [*DATAFLOW, *L4, "--dataflow_service_options=worker_accelerator=type:nvidia-l4;count:1"],
        "worker_accelerator=type:nvidia-l4;count:1: expected --gpu_type and --gpu_count in its "
        "place",
    ),
    "an accelerator as an experiment": (
        [*DATAFLOW, "--experiments=worker_accelerator=type:nvidia-l4"],
        "worker_accelerator=type:nvidia-l4: expected --gpu_type",
    ),
    "a number of no GPU": (
        [*DATAFLOW, "--gpu_count=1"],
        "--gpu_count 1: expected --gpu_type beside it, got none",
    ),
    "a driver of no GPU": (
        [*DATAFLOW, "--gpu_driver=d"],
        "--gpu_driver d: expected --gpu_type beside it, got none",
    ),
    "FlexRS": (
        [*DATAFLOW, *L4, "--flexrs_goal=COST_OPTIMIZED"],
        "--flexrs_goal: expected none beside --gpu_type, as FlexRS has no GPUs",
    ),
    "a GPU without an image": (
        [*DATAFLOW, L4[0]],
        "--sdk_container_image: expected an image with CUDA beside --gpu_type, got none; "
        "docs/dataflow.md says how to build it",
    ),
    "a machine without that GPU": (
        [*DATAFLOW, *L4, "--machine_type=n2-standard-8"],
        "--machine_type n2-standard-8: expected one with 1 nvidia-l4, g2-standard-8 or "
        "g2-standard-4 or g2-standard-12 or g2-standard-16 or g2-standard-32; leave it out for "
        "g2-standard-8",
    ),
    "a machine with another number of GPUs": (
        [*DATAFLOW, *L4, "--gpu_count=2", "--machine_type=g2-standard-8"],
        "--machine_type g2-standard-8: expected one with 2 nvidia-l4, g2-standard-24; leave",
    ),
    "a number that no machine has": (
        [*DATAFLOW, *L4, "--gpu_count=3"],
        "--gpu_count 3: expected as many nvidia-l4 as there are machines with, 1, 2, 4, 8",
    ),
    "a region without that GPU": (
        [*DATAFLOW, "--gpu_type=nvidia-a100-80gb", L4[1], "--region=europe-west1"],
        "--region europe-west1: expected one that is known to have nvidia-a100-80gb, "
        "asia-southeast1, europe-west4, us-central1, us-east4, us-east5; where you know of a "
        "zone, pass --worker_zone",
    ),
    "CUDA without a GPU": (
        [*DATAFLOW, "--device=cuda"],
        "--device cuda: expected workers that have it, got --gpu_type none; pass --gpu_type as "
        "well",
    ),
    "a GPU for the CPU": (
        [*DATAFLOW, *L4, "--device=cpu"],
        "--device cpu: expected workers that have it, got --gpu_type nvidia-l4; leave one of "
        "them out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_work_are_refused(complete, case):
    argv, sentence = REFUSED[case]
    with pytest.raises(OptionsError) as caught:
        complete(*argv)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            {"num_bytes": 54 * 2**30},
            "--gpu_type nvidia-l4: expected a GPU with room for 54.0 GiB of weights and for "
            "caches, got 24 GiB; take nvidia-a100-80gb",
        ),
        (
            {"num_bytes": 24 * 2**30},
            "--gpu_type nvidia-l4: expected a GPU with room for 24.0 GiB of weights and for "
            "caches, got 24 GiB; take nvidia-tesla-a100",
        ),
        (
            {"num_bytes": 400 * 2**30},
            "--gpu_type nvidia-l4: expected a GPU with room for 400.0 GiB of weights and for "
            "caches, got 24 GiB; take a smaller model, no type has as much",
        ),
    ],
)
def test_models_that_no_such_gpu_holds(complete, model, sentence):
    with pytest.raises(OptionsError) as caught:
        complete(*DATAFLOW, *L4, **model)
    assert str(caught.value) == sentence


def test_models_whose_numbers_a_gpu_cannot_compute_with(complete):
    with pytest.raises(OptionsError) as caught:
        complete(*DATAFLOW, L4[1], "--gpu_type=nvidia-tesla-t4")
    assert str(caught.value) == (
        "--gpu_type nvidia-tesla-t4: expected a GPU that computes in the model's bfloat16, got one "
        "that does not; export it with --precision fp16, or take nvidia-l4"
    )
