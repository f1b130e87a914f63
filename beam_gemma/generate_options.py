"""The flags of `python -m pipelines.generate`."""

import argparse
import dataclasses

from beam_gemma.errors import OptionsError
from beam_gemma.flags import (
    FlagParser,
    add_engine,
    add_files,
    add_job,
    add_prompt,
    flag_parser,
    prompt_settings,
)
from beam_gemma.generate import GenerateSettings
from beam_gemma.sampling import SamplingParams

EXAMPLES = """\
  python -m pipelines.generate --model models/gemma-3-270m-it --input articles.parquet \\
      --output out/summaries.parquet --prompt 'Summarize in one sentence: {text}' --max_tokens 64

  python -m pipelines.generate --model models/gemma-3-270m-it --input 'chats/*.jsonl' \\
      --output out/replies.jsonl --messages_column messages --temperature 0.7 --top_k 64
"""


def generate_parser() -> FlagParser:
    """Return the parser."""
    parser = flag_parser(
        "pipelines.generate",
        "Complete a prompt for every row of a table with a Gemma model.",
        EXAMPLES,
    )
    add_files(parser)
    add_prompt(parser)
    _add_infill(parser)
    _add_sampling(parser)
    _add_results(parser)
    add_engine(parser)
    add_job(parser)
    return parser


def generate_settings(flags: argparse.Namespace) -> GenerateSettings:
    """Return what the flags ask of each row.

    Raises:
        OptionsError: the flags contradict each other or are out of range.
    """
    params = {field.name for field in dataclasses.fields(SamplingParams)}
    settings = GenerateSettings(
        **prompt_settings(flags),
        sampling=SamplingParams(**{k: v for k, v in vars(flags).items() if k in params}),
        stop=tuple(flags.stop),
        key_column=flags.key_column,
        logprob=flags.logprob,
        token_ids=flags.token_ids,
        statistics=flags.statistics,
    )
    if not settings.has_source:
        raise OptionsError(
            "prompt: expected one of --prompt, --prompt_column, --messages_column and "
            "--prefix_column, got none"
        )
    return settings


def _add_infill(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fill in the middle", "in place of a prompt, for CodeGemma")
    add = group.add_argument
    add("--prefix_column", metavar="COLUMN", help="holds the text before the gap (default: none)")
    add("--suffix_column", metavar="COLUMN", help="holds the text after the gap (default: none)")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    defaults = SamplingParams()
    add = parser.add_argument_group("sampling").add_argument
    add(
        "--max_tokens",
        type=int,
        default=defaults.max_tokens,
        metavar="N",
        help="longest completion (default: %(default)s tokens)",
    )
    add(
        "--temperature",
        type=float,
        default=defaults.temperature,
        metavar="X",
        help="divides the logits (default: %(default)s, which takes the most likely token)",
    )
    add(
        "--top_k",
        type=int,
        default=defaults.top_k,
        metavar="K",
        help="draw among the K most likely tokens (default: %(default)s, all)",
    )
    add(
        "--top_p",
        type=float,
        default=defaults.top_p,
        metavar="P",
        help="draw among the fewest tokens of this probability (default: %(default)s, all)",
    )
    add(
        "--seed",
        type=int,
        default=defaults.seed,
        metavar="S",
        help="of all draws (default: %(default)s)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends a completion and is no part of it; may be repeated (default: none)",
    )
    add(
        "--ignore_eos",
        action="store_true",
        help="go on where the model would end (default: no)",
    )


def _add_results(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("results").add_argument
    add(
        "--key_column",
        metavar="COLUMN",
        help="identifies a row for its random draws (default: its prompt does)",
    )
    add("--logprob", action="store_true", help="add the column logprob (default: no)")
    add("--token_ids", action="store_true", help="add completion_token_ids (default: no)")
    add(
        "--statistics",
        action="store_true",
        help="add statistic_queries and statistic_values, which DataGemma RIG writes into "
        "completions (default: no)",
    )
