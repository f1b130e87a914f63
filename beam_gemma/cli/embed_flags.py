"""Flags of `python -m pipelines.embed`."""

import argparse

from beam_gemma.cli.estimate_flags import add_estimate
from beam_gemma.cli.flag_groups import add_dataflow, add_files, add_job, add_steps
from beam_gemma.cli.flag_types import SWITCH, positive
from beam_gemma.cli.flags import FlagParser, flag_parser
from beam_gemma.cli.media_flags import add_image_columns
from beam_gemma.errors import OptionsError
from beam_gemma.runtime.limits import EMBED_TOKENS
from beam_gemma.tasks.text_encoder import EmbedSettings

EXAMPLES = """\
  python -m pipelines.embed --model models/embeddinggemma-300m --input articles.parquet \\
      --output out/vectors.parquet --text_column body --title_column title

  python -m pipelines.embed --model models/embeddinggemma-300m --input queries.jsonl \\
      --output out/queries.parquet --text_column text --prompt_name query --truncate_dim 256

  python -m pipelines.embed --model models/embeddinggemma-2 --input products.parquet \\
      --output out/products.parquet --image_column photo --text_column name --prompt_name document
"""


PICTURES = """\
For EmbeddingGemma 2. A row's pictures come before its text, in the order of the
flags, and all of them together have one embedding. A row with a picture may have
no text."""


def embed_parser() -> FlagParser:
    """Return the parser of the embed command."""
    parser = flag_parser(
        "pipelines.embed",
        "Compute an embedding of a text, pictures or both for every row of a table with a Gemma.",
        EXAMPLES,
    )
    add_files(parser)
    _add_text(parser)
    add_image_columns(parser, PICTURES)
    _add_results(parser)
    add_steps(parser, EMBED_TOKENS)
    parser.set_defaults(max_num_seqs=None, cudagraph_capture_sizes=None)
    add_job(parser)
    add_estimate(parser, completes=False)
    add_dataflow(parser)
    return parser


def embed_settings(flags: argparse.Namespace) -> EmbedSettings:
    """Return the task settings that the flags describe.

    Raises:
        OptionsError: the flags contradict each other.
    """
    settings = EmbedSettings(
        text_column=flags.text_column,
        image_columns=tuple(flags.image_column),
        image_tokens=flags.image_tokens,
        allow_missing_images=flags.allow_missing_images,
        title_column=flags.title_column,
        prompt_name=flags.prompt_name,
        prompt=flags.prompt,
        truncate=flags.truncate,
        truncate_dim=flags.truncate_dim,
        embedding_dtype=flags.embedding_dtype,
    )
    if not settings.has_source:
        raise OptionsError("text: expected --text_column or --image_column, got none")
    return settings


def _add_text(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("text").add_argument
    add(
        "--text_column",
        metavar="COLUMN",
        help="Column with the text to embed. Either --text_column or --image_column is required. "
        "(default: none)",
    )
    add(
        "--title_column",
        metavar="COLUMN",
        help="Column with the title of each document, for the model's document prompt. Titles may "
        "be null. (default: none)",
    )
    add(
        "--prompt_name",
        metavar="NAME",
        help="Name of the model's prompt that comes before each text, such as query, document, "
        "classification or clustering. (default: the model's default prompt, if it has one)",
    )
    add(
        "--prompt",
        metavar="TEXT",
        help="Text that comes before each text, in place of one of the model's prompts. "
        "(default: none)",
    )
    add(
        "--truncate",
        **SWITCH,
        help="Cut off the end of a text that is too long. Without this flag, its row gets an "
        "error. (default: false)",
    )


def _add_results(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("results").add_argument
    add(
        "--truncate_dim",
        type=positive,
        metavar="N",
        help="Number of values to keep of each embedding, such as 512, 256 or 128. Set it to save "
        "space. (default: all values)",
    )
    add(
        "--embedding_dtype",
        choices=("float32", "float16"),
        default="float32",
        help="Type of an embedding's values. float16 takes half the space. (default: %(default)s)",
    )
