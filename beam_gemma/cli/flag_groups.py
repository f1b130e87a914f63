"""Groups of flags shared by the tasks, and the settings they describe."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from beam_gemma.cli.flag_types import SWITCH, column_names, count, fraction, positive, rising
from beam_gemma.cli.flags import ArgumentGroup, text_of
from beam_gemma.cli.media_flags import add_pictures, add_sounds, media_settings
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
        "decoder_prompt": flags.decoder_prompt,
        "system": flags.system,
        "prompt_format": flags.prompt_format,
        "chat_template": _chat_template(flags.chat_template),
        "allow_special_tokens": flags.allow_special_tokens,
        "max_prompt_tokens": flags.max_prompt_tokens,
        "truncate": flags.truncate,
        **media_settings(flags),
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
        "--model", required=True, metavar="DIR",
        help="Model folder that python -m export wrote, on this machine or on gs://. (required)",
    )  # fmt: skip
    read = group.add_mutually_exclusive_group(required=True).add_argument
    read(
        "--input", metavar="URI",
        help="Table to read: a .parquet or .jsonl file, a pattern such as 'chats/*.jsonl', a "
        "folder of Parquet files, or bq://PROJECT.DATASET.TABLE. Either --input or --query is "
        "required. (default: none)",
    )  # fmt: skip
    read("--query", metavar="SQL", help="BigQuery query whose result is read. (default: none)")
    add(
        "--read_method", choices=("DIRECT_READ", "EXPORT"),
        help="How to read from BigQuery. DIRECT_READ uses the Storage Read API. EXPORT first "
        "copies the table to files under --temp_location. (default: DIRECT_READ)",
    )  # fmt: skip
    add(
        "--output", required=True, metavar="URI",
        help="Table to write, with the columns that are read and the results: a .parquet or .jsonl "
        "file, or bq://PROJECT.DATASET.TABLE, which needs --temp_location. dir/name.parquet is "
        "written as dir/name-00000-of-00004.parquet and so on. (required)",
    )  # fmt: skip
    add(
        "--columns", type=column_names, metavar="A,B",
        help="Columns to read and to keep in the output, separated by commas. Include the columns "
        "that the job uses. (default: all columns)",
    )  # fmt: skip
    add(
        "--overwrite", **SWITCH,
        help="Replace an existing output or an unfinished job. Without this flag, a job that "
        "finds either one is refused. (default: false)",
    )  # fmt: skip
    add(
        "--append", **SWITCH,
        help="Add the rows to an existing BigQuery table. Without this flag, a job whose table "
        "has rows is refused. (default: false)",
    )  # fmt: skip
    add(
        "--errors", metavar="URI",
        help="Table to write copies of the failed rows to, named as in --output. The output "
        "contains these rows in any case. (default: none)",
    )  # fmt: skip
    add(
        "--num_shards", type=count, default=0, metavar="N",
        help="Number of files to write. 0 chooses a number that keeps each file below about "
        "256 MB. (default: %(default)s)",
    )  # fmt: skip
    add(
        "--limit", type=positive, metavar="N",
        help="Number of rows to read: the first rows of files, or any rows of a BigQuery table. "
        "Use it to try a job. (default: all rows)",
    )  # fmt: skip


PROMPT = """What the model reads of each row. Set one of --prompt, --prompt_column and
--messages_column."""


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """Add the flags that turn a row into a prompt."""
    add = parser.add_argument_group("prompt", PROMPT).add_argument
    _add_texts(add)
    add("--system", metavar="TEXT", help="System prompt for all rows. (default: none)")
    add(
        "--prompt_format",
        choices=("auto", "raw", "chat"),
        default="auto",
        help="How to pass a prompt to the model. raw passes it unchanged. chat makes it a user "
        "turn of the chat template. auto is chat if there is a chat template, otherwise raw. "
        "(default: %(default)s)",
    )
    add(
        "--chat_template",
        metavar="NAME_OR_FILE",
        help="Chat template: gemma for the built-in one, or a file with a Jinja template. Set it "
        "if the model folder has none. (default: the template of the model folder)",
    )
    add(
        "--allow_special_tokens",
        **SWITCH,
        help="Turn control pieces in the values of rows, such as <end_of_turn>, into control "
        "tokens. Without this flag, they stay plain text. (default: false)",
    )
    add(
        "--max_prompt_tokens",
        type=positive,
        metavar="N",
        help="Maximum number of tokens in a prompt. A row with a longer prompt gets an error, "
        "unless --truncate is set. (default: as many as the model takes besides its answer)",
    )
    add(
        "--truncate",
        choices=("left", "right"),
        help="Side on which a row's longest text is cut if the prompt has too many tokens. "
        "(default: none, such a row gets an error)",
    )
    add_pictures(parser)
    add_sounds(parser)


def _add_texts(add: Callable[..., argparse.Action]) -> None:
    add(
        "--prompt",
        metavar="TEMPLATE",
        help="Prompt template with column names in braces, such as 'Summarize: {text}'. Quote "
        'names that are no plain words, as in {"user.name"}. Write {{ and }} for literal braces. '
        "(default: none)",
    )
    add(
        "--prompt_column",
        metavar="COLUMN",
        help="Column with the whole prompt. (default: none)",
    )
    add(
        "--messages_column",
        metavar="COLUMN",
        help="Column with a conversation: a list of messages, each with role and content. "
        "(default: none)",
    )
    add(
        "--decoder_prompt",
        metavar="TEMPLATE",
        help="Only for encoder-decoders such as T5Gemma, whose encoder reads the prompt: text that "
        "the decoder starts with, a template like --prompt. The completion or the label follows "
        "it. (default: none)",
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the engine."""
    add = add_steps(parser, MAX_NUM_BATCHED_TOKENS).add_argument
    add(
        "--max_num_seqs",
        type=int,
        metavar="N",
        help="Maximum number of rows that run at once. Lower it if their caches do not fit into "
        f"memory. (default: {_by_device(MAX_NUM_SEQS)})",
    )
    add(
        "--cudagraph_capture_sizes",
        type=rising,
        metavar="N,N",
        help="CUDA only: numbers of rows that decode steps are padded to, in rising order up to "
        "--max_num_seqs. With several numbers, steps of few rows are faster, but a row's last "
        "bits may depend on the other rows. (default: --max_num_seqs alone)",
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
        help="Device that runs the model. auto is CUDA if the model folder and the machine support "
        "it, otherwise the CPU; on Dataflow, it is CUDA if --gpu_type is set. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--max_num_batched_tokens",
        type=positive,
        metavar="N",
        help="Maximum number of new tokens in one step of the model. Lower it if a step does not "
        f"fit into memory. (default: {_by_device(max_num_batched_tokens)})",
    )
    group.add_argument(
        "--gpu_memory_utilization",
        type=fraction,
        metavar="FRACTION",
        help="CUDA only: share of the GPU's memory to use, above 0 and at most 1. Lower it if "
        f"other programs use the GPU too. (default: {GPU_MEMORY_UTILIZATION})",
    )
    return group


def _by_device(defaults: Mapping[str, int]) -> str:
    return f"{defaults['cpu']} on the CPU, {defaults['cuda']} on CUDA"


def add_job(parser: argparse.ArgumentParser) -> None:
    """Add the flags for running a job: dry run, resume, limits and report."""
    add = parser.add_argument_group("job").add_argument
    add(
        "--dry_run",
        nargs="?",
        const="text",
        choices=("text", "json"),
        help="Print sample prompts and an estimate of tokens, hours and cost for all rows, and do "
        "not run the job. The value is text if none is given; json prints only the estimate, for "
        "programs. (default: none, the job runs)",
    )
    add(
        "--resume",
        **SWITCH,
        help="Continue an interrupted job with the same --output, without computing its finished "
        "rows again. Without this flag, a job that finds an unfinished one is refused. "
        "(default: false)",
    )
    add(
        "--max_error_fraction",
        type=fraction,
        default=1.0,
        metavar="FRACTION",
        help="Maximum share of rows that may fail, from 0 to 1. Above it, the job stops early and "
        "fails. (default: %(default)s, all rows)",
    )
    add(
        "--max_cost_tokens",
        type=positive,
        metavar="N",
        help="Maximum number of tokens, of prompts and completions, that each worker computes. "
        "When it is reached, the job stops, and --resume continues it. (default: no maximum)",
    )
    add(
        "--report",
        metavar="FILE",
        help="HTML page to write with charts of the run: lengths, tokens per second, errors. It "
        "shows nothing from the rows, unless --report_rows is set. (default: none)",
    )
    add(
        "--report_rows",
        type=count,
        default=0,
        metavar="N",
        help="Number of output rows to show in the --report. (default: %(default)s)",
    )
    add(
        "--verbose",
        **SWITCH,
        help="Log informational messages as well as warnings. (default: false)",
    )


def add_dataflow(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the GPUs of Dataflow workers."""
    add = parser.add_argument_group(
        "Dataflow",
        "For jobs with --runner DataflowRunner. Beam's own flags, such as\n"
        "--machine_type and --sdk_container_image, set everything else.",
    ).add_argument
    add(
        "--gpu_type",
        choices=tuple(GPUS),
        help="Type of GPU in the workers that run the model. (default: none, the model runs on "
        "the CPU)",
    )
    add(
        "--gpu_count",
        type=positive,
        metavar="N",
        help="Number of GPUs in each worker that runs the model. The model uses only one of them. "
        "(default: 1)",
    )
    add(
        "--gpu_driver",
        metavar="SETTING",
        help="Dataflow's setting for the GPU driver, passed on unchanged. Set it if the workers "
        f"need another driver. (default: {DRIVER})",
    )
