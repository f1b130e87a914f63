"""Groups of flags shared by the tasks, and the settings they describe."""

import argparse
from collections.abc import Mapping
from typing import Any

from beam_gemma.cli.flag_types import SWITCH, column_names, count, fraction, positive, rising
from beam_gemma.cli.flags import ArgumentGroup, text_of
from beam_gemma.dataflow.gpus import GPUS
from beam_gemma.dataflow.options import DRIVER
from beam_gemma.runtime.limits import (
    GPU_MEMORY_UTILIZATION,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    Limits,
)


def limits_of(flags: argparse.Namespace) -> Limits:
    """Return the step and memory limits that the `add_engine` or `add_steps` flags describe."""
    return Limits(
        max_num_seqs=flags.max_num_seqs,
        max_num_batched_tokens=flags.max_num_batched_tokens,
        cudagraph_capture_sizes=flags.cudagraph_capture_sizes,
        gpu_memory_utilization=flags.gpu_memory_utilization,
    )


def prompt_settings(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the `add_prompt` flags as fields of `PromptSettings`.

    Raises:
        OptionsError: the chat template cannot be read.
    """
    return {
        "prompt": flags.prompt,
        "prompt_column": flags.prompt_column,
        "messages_column": flags.messages_column,
        "system": flags.system,
        "prompt_format": flags.prompt_format,
        "chat_template": _chat_template(flags.chat_template),
        "allow_special_tokens": flags.allow_special_tokens,
        "max_prompt_tokens": flags.max_prompt_tokens,
        "truncate": flags.truncate,
    }


def _chat_template(name_or_file: str | None) -> str | None:
    if name_or_file in (None, "gemma"):
        return name_or_file
    return text_of("--chat_template", name_or_file)


def add_files(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the model, the input and the output."""
    group = parser.add_argument_group("input and output")
    add = group.add_argument
    add(
        "--model",
        required=True,
        metavar="DIR",
        help="model folder that python -m export wrote, on this machine or on gs://",
    )
    read = group.add_mutually_exclusive_group(required=True).add_argument
    read(
        "--input",
        metavar="URI",
        help="table to read: a .parquet or .jsonl file, a pattern, a folder of Parquet files, or "
        "bq://PROJECT.DATASET.TABLE; this or --query is required (default: none)",
    )
    read("--query", metavar="SQL", help="query of BigQuery whose result to read (default: none)")
    add(
        "--read_method",
        choices=("DIRECT_READ", "EXPORT"),
        help="how to read from BigQuery: from its storage, or from files under --temp_location "
        "that it is exported to (default: DIRECT_READ)",
    )
    add(
        "--output",
        required=True,
        metavar="URI",
        help="table to write: dir/name.parquet becomes dir/name-00000-of-00004.parquet and so on, "
        "bq://PROJECT.DATASET.TABLE is loaded from --temp_location; all columns are kept",
    )
    add(
        "--columns",
        type=column_names,
        metavar="A,B",
        help="columns of the table to read and to keep (default: all)",
    )
    add("--overwrite", **SWITCH, help="replace an earlier output (default: refuse)")
    add("--append", **SWITCH, help="add to a table of BigQuery (default: refuse)")
    add(
        "--errors",
        metavar="URI",
        help="table to write failed rows to as well (default: they are in the output alone)",
    )
    add(
        "--num_shards",
        type=count,
        default=0,
        metavar="N",
        help="files to write, of even size (default: 0, so many that each has about 256 MB)",
    )
    add("--limit", type=positive, metavar="N", help="rows to read, from the first (default: all)")


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """Add the flags that turn a row into a prompt."""
    group = parser.add_argument_group("prompt", "one of the first three is required")
    add = group.add_argument
    add("--prompt", metavar="TEMPLATE", help="text with column names in braces (default: none)")
    add("--prompt_column", metavar="COLUMN", help="holds the whole prompt (default: none)")
    add(
        "--messages_column",
        metavar="COLUMN",
        help="holds a conversation, a list of role and content (default: none)",
    )
    add("--system", metavar="TEXT", help="system prompt of every row (default: none)")
    add(
        "--prompt_format",
        choices=("auto", "raw", "chat"),
        default="auto",
        help="raw takes the prompt as it stands, chat makes it a user's turn (default: auto, "
        "which is chat where there is a chat template)",
    )
    add(
        "--chat_template",
        metavar="NAME_OR_FILE",
        help="gemma, or a file with a Jinja template (default: the model's own)",
    )
    add(
        "--allow_special_tokens",
        **SWITCH,
        help="let text of rows become control tokens (default: no, it stays text)",
    )
    add(
        "--max_prompt_tokens",
        type=positive,
        metavar="N",
        help="longest prompt, in tokens (default: what the model takes beside its answer)",
    )
    add(
        "--truncate",
        choices=("left", "right"),
        help="side on which a longer prompt loses text (default: such a row is an error)",
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the engine."""
    add = add_steps(parser, MAX_NUM_BATCHED_TOKENS).add_argument
    add(
        "--max_num_seqs",
        type=int,
        metavar="N",
        help=f"rows that run at once (default: {_by_device(MAX_NUM_SEQS)} rows)",
    )
    add(
        "--cudagraph_capture_sizes",
        type=rising,
        metavar="N,N",
        help="CUDA: what the rows of a decode step are padded to, up to --max_num_seqs; with "
        "several, steps of few rows cost less, and a row's last bits may depend on the others "
        "(default: --max_num_seqs alone)",
    )


def add_steps(
    parser: argparse.ArgumentParser, max_num_batched_tokens: Mapping[str, int]
) -> ArgumentGroup:
    """Add the flags for the device, step size and GPU memory, and return their group.

    Args:
        parser: The parser to add the flags to.
        max_num_batched_tokens: The default step size by device, in tokens.
    """
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the model runs (default: auto, CUDA where model and machine have it)",
    )
    group.add_argument(
        "--max_num_batched_tokens",
        type=positive,
        metavar="N",
        help=f"new tokens of one step (default: {_by_device(max_num_batched_tokens)} tokens)",
    )
    group.add_argument(
        "--gpu_memory_utilization",
        type=fraction,
        metavar="X",
        help="CUDA: share of the GPU's memory to use, the rest is for others "
        f"(default: {GPU_MEMORY_UTILIZATION})",
    )
    return group


def _by_device(defaults: Mapping[str, int]) -> str:
    return f"{defaults['cpu']}, on CUDA {defaults['cuda']}"


def add_job(parser: argparse.ArgumentParser) -> None:
    """Add the flags for running a job: dry run, resume, limits and report."""
    add = parser.add_argument_group("job").add_argument
    add(
        "--dry_run",
        nargs="?",
        const="text",
        choices=("text", "json"),
        help="read a sample, show its prompts and say what all rows take, and do not load the "
        "model; text where no form is named (default: run)",
    )
    add(
        "--resume",
        **SWITCH,
        help="go on with a job that was broken off; what it has finished is not computed again "
        "(default: refuse where there is such a job)",
    )
    add(
        "--max_error_fraction",
        type=fraction,
        default=1.0,
        metavar="X",
        help="rows that may fail, as a share of all; with more, the job stops early "
        "(default: %(default)s, all)",
    )
    add(
        "--max_cost_tokens",
        type=positive,
        metavar="N",
        help="prompt and completion tokens to compute; then the job stops, and --resume goes on "
        "(default: no limit)",
    )
    add(
        "--report",
        metavar="FILE",
        help="page to write about the run, as HTML with charts: lengths, tokens per second, "
        "errors; it holds nothing of the rows (default: none)",
    )
    add(
        "--report_rows",
        type=count,
        default=0,
        metavar="N",
        help="rows of the output to show in the report (default: %(default)s rows)",
    )
    add("--verbose", **SWITCH, help="log what the job does (default: warnings only)")


def add_dataflow(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the GPUs of Dataflow workers."""
    add = parser.add_argument_group(
        "Dataflow",
        "with --runner DataflowRunner; Beam's own flags, such as --sdk_container_image and "
        "--machine_type, say the rest",
    ).add_argument
    add(
        "--gpu_type",
        choices=tuple(GPUS),
        help="GPU of the workers that run the model (default: none, they run it on the CPU)",
    )
    add(
        "--gpu_count",
        type=positive,
        metavar="N",
        help="GPUs of each of these workers, of which the model uses one (default: 1)",
    )
    add(
        "--gpu_driver",
        metavar="WORDS",
        help=f"how Dataflow gets the driver, passed on as it stands (default: {DRIVER})",
    )
