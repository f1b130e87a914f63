"""Flags for the estimate of a dry run, and lookup of the throughput and number of workers."""

import argparse

from apache_beam.options.pipeline_options import PipelineOptions, WorkerOptions

from beam_gemma.cli.flag_types import above_zero
from beam_gemma.cli.flags import is_local
from beam_gemma.errors import OptionsError
from beam_gemma.inference.task_handler import TaskHandler
from beam_gemma.jobs.estimate import Means, Throughput
from beam_gemma.jobs.profiles import find_profile, this_machine
from beam_gemma.model.artifact import Artifact
from beam_gemma.runtime.devices import DeviceChoice, choose_device

FLAGS = (
    "prompt_tokens_per_sec", "completion_tokens_per_sec", "expected_tokens", "worker_price"
)  # fmt: skip


def add_estimate(parser: argparse.ArgumentParser, *, completes: bool) -> None:
    """Add the flags for the estimate of a dry run.

    Args:
        parser: The parser of the task's flags.
        completes: Add the flags for completions too.
    """
    group = parser.add_argument_group("estimate", "Figures that the estimate of --dry_run assumes.")
    add = group.add_argument
    add(
        "--prompt_tokens_per_sec",
        type=above_zero,
        metavar="RATE",
        help="Number of prompt tokens that one worker computes per second. Set it if "
        "docs/benchmarks.md has no figure for the model and machine. "
        "(default: the measured figure)",
    )
    if completes:
        add(
            "--completion_tokens_per_sec",
            type=above_zero,
            metavar="RATE",
            help="Number of completion tokens that one worker computes per second, for all of its "
            "rows together. Set it if docs/benchmarks.md has no figure for the model and machine. "
            "(default: the measured figure)",
        )
        add(
            "--expected_tokens",
            type=above_zero,
            metavar="N",
            help="Number of tokens that the model writes for a row on average: at most "
            "--max_tokens, and --thinking_tokens beside them with --thinking on. "
            "(default: the most)",
        )
    add(
        "--worker_price",
        type=above_zero,
        metavar="USD",
        help="Price of one worker for an hour, with its disk and GPU, in US dollars. Without it, "
        "the estimate has no cost. (default: none)",
    )


def check_estimate(flags: argparse.Namespace, max_new_tokens: int) -> None:
    """Reject estimate flags that have no effect or contradict --max_tokens.

    Raises:
        OptionsError: a flag lacks --dry_run, or --expected_tokens exceeds --max_tokens.
    """
    given = {name: getattr(flags, name, None) for name in FLAGS}
    if not flags.dry_run and (idle := [name for name in FLAGS if given[name] is not None]):
        raise OptionsError(f"--{idle[0]}: expected --dry_run beside it, got none")
    if (given["expected_tokens"] or 0) > max_new_tokens:
        raise OptionsError(
            f"--expected_tokens: expected at most {_limits(flags)} {max_new_tokens:,}, got "
            f"{given['expected_tokens']:g}"
        )


def _limits(flags: argparse.Namespace) -> str:
    """Return the flags that limit what a model writes for a row."""
    thinks = getattr(flags, "thinking", None) == "on"
    return "--max_tokens and --thinking_tokens" if thinks else "--max_tokens"


def means_of(
    flags: argparse.Namespace,
    options: PipelineOptions,
    handler: TaskHandler,
    artifact: Artifact,
    device: DeviceChoice,
) -> Means:
    """Return the throughput, workers and price of a job, as far as they are known."""
    most = handler.settings.max_new_tokens
    expected = getattr(flags, "expected_tokens", None)
    workers = options.view_as(WorkerOptions)
    return Means(
        throughput=_throughput(flags, options, handler, artifact, device),
        num_workers=1 if is_local(options) else workers.max_num_workers or workers.num_workers,
        worker_price=flags.worker_price,
        completion_tokens=float(most) if expected is None else expected,
        completion_origin=(
            f"the most by {_limits(flags)}; what is expected is said by --expected_tokens"
            if expected is None
            else "by --expected_tokens"
        ),
    )


def _throughput(
    flags: argparse.Namespace,
    options: PipelineOptions,
    handler: TaskHandler,
    artifact: Artifact,
    device: DeviceChoice,
) -> Throughput:
    """Return the throughput from flags, or else from measured profiles."""
    needed = ["prompt_tokens_per_sec", "completion_tokens_per_sec"]
    if not handler.settings.max_new_tokens:
        needed.pop()
    given = {name: getattr(flags, name) for name in needed}
    if is_local(options):
        here = choose_device(artifact, handler.head, device)
        profile = find_profile(artifact, handler.head, here, this_machine())
    else:
        machine = options.view_as(WorkerOptions).machine_type
        profile = find_profile(artifact, handler.head, device, machine)
    measured = {name: getattr(profile, name, None) for name in needed}
    rates = {name: measured[name] if given[name] is None else given[name] for name in needed}
    unknown = [f"--{name}" for name in needed if rates[name] is None]
    if unknown:
        origin = (
            "throughput is not known: run some rows on such a machine by --limit and pass what it "
            f"computes by {' and '.join(unknown)}"
        )
    elif profile is None or None not in given.values():
        origin = f"throughput as given by {' and '.join(f'--{name}' for name in needed)}"
    else:
        changed = [f"--{name}" for name in needed if given[name] is not None]
        origin = ", but for ".join([profile.origin, *changed])
    return Throughput(
        prompt_tokens_per_sec=rates["prompt_tokens_per_sec"],
        completion_tokens_per_sec=rates.get("completion_tokens_per_sec"),
        origin=origin,
    )
