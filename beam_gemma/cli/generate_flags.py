"""Flags of `python -m pipelines.generate`."""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from beam_gemma.cli.estimate_flags import add_estimate
from beam_gemma.cli.flag_groups import (
    add_dataflow,
    add_engine,
    add_files,
    add_job,
    add_prompt,
    prompt_settings,
)
from beam_gemma.cli.flag_types import SWITCH
from beam_gemma.cli.flags import FlagParser, flag_parser, text_of, words_of
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.errors import OptionsError
from beam_gemma.inputs.tools import checked_tools
from beam_gemma.structured.output import StructuredOutput
from beam_gemma.tasks.generate import GenerateSettings
from beam_gemma.tasks.thoughts import DEFAULT_TOKENS

EXAMPLES = """\
  python -m pipelines.generate --model models/gemma-3-270m-it --input articles.parquet \\
      --output out/summaries.parquet --prompt 'Summarize in one sentence: {text}' --max_tokens 64

  python -m pipelines.generate --model models/gemma-3-270m-it --input 'chats/*.jsonl' \\
      --output out/replies.jsonl --messages_column messages --temperature 0.7 --top_k 64

  python -m pipelines.generate --model models/gemma-3-270m-it --input mails.parquet \\
      --output out/orders.parquet --prompt 'The order in this mail, as JSON: {text}' \\
      --json_schema order.json --max_tokens 200

  python -m pipelines.generate --model models/paligemma2-3b-mix-448 --input photos.parquet \\
      --output out/cats.parquet --image_column photo --prompt 'detect cat' --boxes
"""


def generate_parser() -> FlagParser:
    """Return the parser of the generate command."""
    parser = flag_parser(
        "pipelines.generate",
        "Complete a prompt for every row of a table with a Gemma model.",
        EXAMPLES,
    )
    add_files(parser)
    add_prompt(parser)
    _add_infill(parser)
    _add_languages(parser)
    _add_thinking(parser)
    _add_sampling(parser)
    _add_structured(parser)
    _add_tools(parser)
    _add_results(parser)
    add_engine(parser)
    add_job(parser)
    add_estimate(parser, completes=True)
    add_dataflow(parser)
    return parser


def generate_settings(flags: argparse.Namespace) -> GenerateSettings:
    """Return the task settings that the flags describe.

    Raises:
        OptionsError: the flags contradict each other or are out of range.
    """
    settings = GenerateSettings(
        **prompt_settings(flags),
        prefix_column=flags.prefix_column,
        suffix_column=flags.suffix_column,
        sampling=SamplingParams(
            max_tokens=flags.max_tokens,
            temperature=flags.temperature,
            top_k=flags.top_k,
            top_p=flags.top_p,
            seed=flags.seed,
            ignore_eos=flags.ignore_eos,
        ),
        stop=tuple(flags.stop),
        structured=structured_output(flags),
        thinking=None if flags.thinking is None else flags.thinking == "on",
        thinking_tokens=flags.thinking_tokens,
        tools=_tools(flags.tools),
        tool_choice=flags.tool_choice,
        key_column=flags.key_column,
        logprob=flags.logprob,
        token_ids=flags.token_ids,
        statistics=flags.statistics,
        boxes=flags.boxes,
        mask_decoder=flags.mask_decoder,
        source_lang=flags.source_lang,
        target_lang=flags.target_lang,
        source_lang_column=flags.source_lang_column,
        target_lang_column=flags.target_lang_column,
    )
    if not settings.has_source:
        raise OptionsError(
            "prompt: expected one of --prompt, --prompt_column, --messages_column and "
            "--prefix_column, got none"
        )
    return settings


def structured_output(flags: argparse.Namespace) -> StructuredOutput | None:
    """Return the structured output that the flags describe, or None.

    Raises:
        OptionsError: the flags contradict each other, or a file, schema or pattern cannot be used.
    """
    sources = ("json_schema", "choices", "choices_file", "regex")
    given = [f"--{name}" for name in sources if getattr(flags, name) is not None]
    if len(given) > 1:
        raise OptionsError(
            f"structured output: expected one of --json_schema, --choices, --choices_file and "
            f"--regex, got {' and '.join(given)}"
        )
    columns = {"flatten": flags.flatten, "completion": flags.completion}
    if not given:
        if idle := [name for name, is_asked in columns.items() if is_asked]:
            raise OptionsError(f"--{idle[0]}: expected --json_schema beside it, got none")
        return None
    schema = flags.json_schema and read_schema(flags.json_schema)
    return StructuredOutput(
        json_schema=schema, choices=_choices(flags), regex=flags.regex, **columns
    )


def read_schema(path: str) -> Mapping[str, Any]:
    """Read a JSON Schema from a file on this machine or on gs://.

    Raises:
        OptionsError: the file cannot be read or does not hold a JSON object.
    """
    flag = "--json_schema"
    schema = _read_json(flag, path, "a JSON Schema")
    if not isinstance(schema, dict):
        raise OptionsError(
            f"{flag} {path}: expected an object of JSON, got a {type(schema).__name__}"
        )
    return schema


def _tools(path: str | None) -> Sequence[Mapping[str, Any]]:
    if path is None:
        return ()
    tools = _read_json("--tools", path, "a list of functions in JSON")
    return checked_tools(tools, f"--tools {path}")


def _read_json(flag: str, path: str, expected: str) -> Any:
    try:
        return json.loads(text_of(flag, path), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise OptionsError(f"{flag} {path}: expected {expected}, got an error: {error}") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, with an error for duplicate names, which Python would accept."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the name {name!r} is twice in an object")
    return dict(pairs)


def _choices(flags: argparse.Namespace) -> tuple[str, ...]:
    if flags.choices_file is not None:
        lines = text_of("--choices_file", flags.choices_file).splitlines()
        if not lines:
            raise OptionsError(
                f"--choices_file {flags.choices_file}: expected a text on each line, got none"
            )
        return tuple(lines)
    if flags.choices is not None:
        remedy = "write texts with spaces around them to a --choices_file"
        return words_of("--choices", flags.choices, remedy)
    return ()


def _add_infill(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "fill in the middle",
        "For CodeGemma, which fills the gap between two texts. Set both columns, in\n"
        "place of a prompt.",
    )
    add = group.add_argument
    add(
        "--prefix_column",
        metavar="COLUMN",
        help="Column with the text before the gap. (default: none)",
    )
    add(
        "--suffix_column",
        metavar="COLUMN",
        help="Column with the text after the gap. (default: none)",
    )


def _add_languages(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "translation",
        "For TranslateGemma, which translates the text in --prompt_column or in the\n"
        "picture in --image_column. Set both languages, by code or by column.",
    ).add_argument
    add(
        "--source_lang",
        metavar="CODE",
        help="Language to translate from, as the model's chat template names it, such as cs or "
        "de-DE. (default: none)",
    )
    add(
        "--target_lang",
        metavar="CODE",
        help="Language to translate to, named likewise. (default: none)",
    )
    add(
        "--source_lang_column",
        metavar="COLUMN",
        help="Column with each row's language to translate from, named likewise. A row with "
        "another code gets an error. (default: none)",
    )
    add(
        "--target_lang_column",
        metavar="COLUMN",
        help="Column with each row's language to translate to. (default: none)",
    )


def _add_thinking(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "thinking",
        "For models such as Gemma 4, which can write a thought before the answer. The\n"
        "thought goes to the column thoughts, never into the completion.",
    ).add_argument
    add(
        "--thinking",
        choices=("on", "off"),
        help="Whether the model thinks before it answers. on adds the columns thoughts and "
        "num_thinking_tokens. off ends each thought at once. (default: what the model's chat "
        "template does by itself)",
    )
    add(
        "--thinking_tokens",
        type=int,
        metavar="N",
        help="Maximum number of tokens of a row's thoughts, beside those of --max_tokens, which "
        "are for the answer alone. A thought that reaches it is ended, and the answer follows. "
        f"Only with --thinking on. (default: {DEFAULT_TOKENS})",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    defaults = SamplingParams()
    add = parser.add_argument_group(
        "sampling",
        "How completions are drawn. --top_k, --top_p and --seed have an effect only if\n"
        "--temperature is above 0.",
    ).add_argument
    add(
        "--max_tokens",
        type=int,
        default=defaults.max_tokens,
        metavar="N",
        help="Maximum number of tokens in a completion. (default: %(default)s)",
    )
    add(
        "--temperature",
        type=float,
        default=defaults.temperature,
        metavar="X",
        help="Number, at least 0, that divides the logits. Higher numbers give more varied "
        "completions; 0 always takes the most likely token. (default: %(default)s)",
    )
    add(
        "--top_k",
        type=int,
        default=defaults.top_k,
        metavar="K",
        help="Number of most likely tokens that each token is drawn from. 0 draws from all tokens. "
        "(default: %(default)s)",
    )
    add(
        "--top_p",
        type=float,
        default=defaults.top_p,
        metavar="P",
        help="Total probability of the most likely tokens that each token is drawn from, above 0 "
        "and at most 1. 1 draws from all tokens. (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=defaults.seed,
        metavar="N",
        help="Seed of the random draws. Another seed gives other completions. "
        "(default: %(default)s)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="Text that ends a completion and is left out of it; may be repeated. (default: none)",
    )
    add(
        "--ignore_eos",
        **SWITCH,
        help="Continue a completion after the model's end token. Use it to measure the speed of "
        "completions of a fixed length. (default: false)",
    )


def _add_structured(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "structured output",
        "The form that every completion has. Set at most one of --json_schema,\n"
        "--choices, --choices_file and --regex.",
    )
    add = group.add_argument
    add(
        "--json_schema",
        metavar="FILE",
        help="File with a JSON Schema. Every completion is valid JSON of this schema, and its "
        "values become the typed column extracted. docs/structured.md lists the supported "
        "schemas. (default: none)",
    )
    add(
        "--choices",
        metavar="A,B",
        help="Texts, separated by commas without spaces around them. Every completion is one of "
        "these texts. (default: none)",
    )
    add(
        "--choices_file",
        metavar="FILE",
        help="File with one text per line. Every completion is one of these texts. Use it for "
        "texts that contain commas. (default: none)",
    )
    add(
        "--regex",
        metavar="PATTERN",
        help="Regular expression, in Python's syntax. Every completion matches it as a whole. "
        "(default: none)",
    )
    add(
        "--flatten",
        **SWITCH,
        help="Write each property of the --json_schema as a column of its own, in place of the "
        "column extracted. (default: false)",
    )
    add(
        "--completion",
        **SWITCH,
        help="Write the column completion too, with the JSON text that the values are read from. "
        "Only with --json_schema. (default: false)",
    )


def _add_tools(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "tools",
        "For models such as Gemma 4 and FunctionGemma, which call functions. The calls\n"
        "become the column tool_calls, and the text beside them the completion.",
    ).add_argument
    add(
        "--tools",
        metavar="FILE",
        help="File with a JSON list of functions that the model may call, as OpenAI declares them: "
        "each with name, description and parameters. docs/tools.md has an example. "
        "(default: none)",
    )
    add(
        "--tool_choice",
        choices=("auto", "required"),
        default="auto",
        help="What a completion is. auto is text, calls, or both, as the model likes. required is "
        "one or more calls of the --tools, with arguments that are valid under their parameters. "
        "(default: %(default)s)",
    )


def _add_results(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("results").add_argument
    add(
        "--key_column",
        metavar="COLUMN",
        help="Column that identifies a row for its random draws. Set it if a row's completion must "
        "stay the same when its other columns change. (default: none, all columns identify a row)",
    )
    add(
        "--logprob",
        **SWITCH,
        help="Add the column logprob: the log-probability of the completion. (default: false)",
    )
    add(
        "--token_ids",
        **SWITCH,
        help="Add the column completion_token_ids: the token ids of the completion. "
        "(default: false)",
    )
    add(
        "--statistics",
        **SWITCH,
        help="Add the columns statistic_queries and statistic_values: the statistics that "
        "DataGemma RIG marks in a completion. (default: false)",
    )
    add(
        "--boxes",
        **SWITCH,
        help="Add the columns boxes and num_unreadable_boxes: what PaliGemma answers to a prompt "
        "such as 'detect cat ; dog' or 'segment cat', in pixels of the row's picture. "
        "(default: false)",
    )
    add(
        "--mask_decoder",
        metavar="FILE",
        help="File vae-oid.npz, which Google publishes beside PaliGemma. It decodes the masks of "
        "--boxes into PNG pictures; without it, masks are left as tokens. (default: none)",
    )
