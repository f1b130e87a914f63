"""Flags of `python -m pipelines.classify`."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from beam_gemma.cli.estimate_flags import add_estimate
from beam_gemma.cli.flag_groups import (
    add_dataflow,
    add_engine,
    add_files,
    add_job,
    add_prompt,
    prompt_settings,
)
from beam_gemma.cli.flag_types import SWITCH, count
from beam_gemma.cli.flags import FlagParser, flag_parser, text_of, words_of
from beam_gemma.cli.media_flags import media_reading
from beam_gemma.errors import OptionsError
from beam_gemma.jobs.fewshot import POOL_ROWS, all_shots, draw_shots
from beam_gemma.tables.bigquery_client import SCHEME
from beam_gemma.tables.open_table import open_source
from beam_gemma.tasks.moderate import PICTURE_POLICIES, POLICIES, ModerateSettings, Policy
from beam_gemma.tasks.questions import ClassifySettings, Shot

EXAMPLES = """\
  python -m pipelines.classify --model models/gemma-3-270m --input reviews.parquet \\
      --output out/reviews.parquet --prompt $'Review: {text}\\nSentiment: ' \\
      --labels negative,positive --num_fewshot 8 --label_column sentiment

  python -m pipelines.classify --model models/gemma-3-270m --input goals.jsonl \\
      --output out/goals.jsonl --prompt '{goal}' --label ' {sol1}' --label ' {sol2}'

  python -m pipelines.classify --model models/shieldgemma-2b --input chats.parquet \\
      --output out/chats.parquet --policy all --prompt_column asked --response_column answered

  python -m pipelines.classify --model models/shieldgemma-2-4b-it --input photos.parquet \\
      --output out/photos.parquet --policy all --image_column photo
"""
NOT_WITH_A_POLICY = (
    "prompt", "messages_column", "decoder_prompt", "system", "chat_template",
    "allow_special_tokens", "labels", "label", "labels_file", "label_norm", "logliks",
    "num_fewshot", "fewshot_file", "label_column", "pan_and_scan", "image_tokens",
    "allow_missing_images", "audio_column", "split_audio", "allow_missing_audio",
)  # fmt: skip
"""Flags that conflict with --policy, which sets its own prompt and labels."""


def classify_parser() -> FlagParser:
    """Return the parser of the classify command."""
    parser = flag_parser(
        "pipelines.classify",
        "Score labels, or safety policies, for every row of a table with a Gemma model.",
        EXAMPLES,
    )
    add_files(parser)
    add_prompt(parser)
    _add_labels(parser)
    _add_fewshot(parser)
    _add_policies(parser)
    add_engine(parser)
    add_job(parser)
    add_estimate(parser, completes=False)
    add_dataflow(parser)
    return parser


def classify_settings(flags: argparse.Namespace) -> ClassifySettings | ModerateSettings:
    """Return the task settings that the flags describe.

    Raises:
        OptionsError: the flags contradict each other or are out of range, or a file of labels,
            shots or a policy cannot be used.
    """
    if flags.policy:
        return _moderate_settings(flags)
    for name in ("response_column", "threshold"):
        if getattr(flags, name) is not None:
            raise OptionsError(f"--{name}: expected --policy beside it, got none")
    settings = ClassifySettings(
        **prompt_settings(flags),
        labels=_labels(flags),
        label_norm=flags.label_norm or "none",
        logliks=flags.logliks,
        num_fewshot=flags.num_fewshot,
        fewshot_delimiter=flags.fewshot_delimiter,
    )
    if not settings.has_source:
        raise OptionsError(
            "prompt: expected one of --prompt, --prompt_column and --messages_column, got none"
        )
    return dataclasses.replace(settings, shots=_shots(flags, settings))


def _labels(flags: argparse.Namespace) -> tuple[str, ...]:
    """Return the labels from the one label flag that is set."""
    given = [name for name in ("labels", "label", "labels_file") if getattr(flags, name)]
    if len(given) != 1:
        got = " and ".join(f"--{name}" for name in given) or "none"
        raise OptionsError(
            f"labels: expected one of --labels, --label, --labels_file and --policy, got {got}"
        )
    if flags.label:
        return tuple(flags.label)
    if flags.labels_file:
        return tuple(text_of("--labels_file", flags.labels_file).splitlines())
    return words_of("--labels", flags.labels, "repeat --label for labels with spaces around them")


def _shots(flags: argparse.Namespace, settings: ClassifySettings) -> tuple[Shot, ...]:
    wanted = flags.num_fewshot is not None or flags.fewshot_file is not None
    if wanted != (flags.label_column is not None):
        raise OptionsError(
            "--label_column: expected exactly where --num_fewshot or --fewshot_file is, got "
            f"{'none' if wanted else 'it alone'}"
        )
    if not wanted:
        return ()
    pool = flags.fewshot_file or flags.input
    if pool is None or pool.startswith(SCHEME):
        raise OptionsError(
            f"--fewshot_file: expected a file of examples, got {pool or '--query'}, where nobody "
            "knows which rows come first; write some to a file"
        )
    source = open_source(pool, limit=POOL_ROWS)
    reading = media_reading(flags, source.folder, is_local=True)
    if flags.num_fewshot is None:
        return all_shots(source, settings, flags.label_column, reading=reading)
    return draw_shots(
        source,
        settings,
        flags.label_column,
        number=flags.num_fewshot,
        seed=flags.fewshot_seed,
        reading=reading,
    )


def _moderate_settings(flags: argparse.Namespace) -> ModerateSettings:
    idle = [name for name in NOT_WITH_A_POLICY if getattr(flags, name)]
    idle += ["prompt_format"] * (flags.prompt_format != "auto")
    if idle:
        raise OptionsError(
            f"--policy: expected only columns beside it, since it has its own prompt and labels, "
            f"got --{idle[0]}"
        )
    if flags.prompt_column is None and not flags.image_column:
        raise OptionsError(
            "--policy: expected --prompt_column or --image_column beside it, got none"
        )
    names = PICTURE_POLICIES if flags.image_column else POLICIES
    threshold = {} if flags.threshold is None else {"threshold": flags.threshold}
    return ModerateSettings(
        policies=tuple(policy for name in flags.policy for policy in _policies(name, names)),
        prompt_column=flags.prompt_column,
        response_column=flags.response_column,
        image_columns=tuple(flags.image_column),
        max_prompt_tokens=flags.max_prompt_tokens,
        truncate=flags.truncate,
        **threshold,
    )


def _policies(name_or_file: str, names: Sequence[str]) -> tuple[Policy, ...]:
    """Return the policies that one value of the flag stands for.

    Args:
        name_or_file: The value.
        names: The published policies for what is judged, texts or pictures.
    """
    if name_or_file == "all":
        return tuple(Policy(name=name) for name in names)
    path = Path(name_or_file)
    if not path.suffix:
        return (Policy(name=name_or_file),)
    return (Policy(name=path.stem, guideline=text_of("--policy", name_or_file)),)


def _add_labels(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "labels",
        "Texts that are scored after each prompt, exactly as they are written. Set one\n"
        "of --labels, --label and --labels_file, or set --policy.",
    )
    add = group.add_argument
    add(
        "--labels",
        metavar="A,B",
        help="Labels, separated by commas without spaces around them. (default: none)",
    )
    add(
        "--label",
        action="append",
        default=[],
        metavar="TEMPLATE",
        help="One label, or one template such as '{choice0}' if each row has its own labels; may "
        "be repeated. (default: none)",
    )
    add(
        "--labels_file",
        metavar="FILE",
        help="File with one label or template per line. (default: none)",
    )
    add(
        "--label_norm",
        choices=("none", "tokens", "chars"),
        help="Length that a label's log-likelihood is divided by, in tokens or in characters. "
        "Characters do not include the spaces that a label begins with. Set it if labels differ "
        "in length. (default: none)",
    )
    add(
        "--logliks",
        **SWITCH,
        help="Add the column logliks: the log-likelihood of each label. (default: false)",
    )


def _add_fewshot(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "few-shot",
        "Examples are rows with known labels. They are put before each prompt and are\n"
        "the same for all rows.",
    )
    add = group.add_argument
    add(
        "--num_fewshot",
        type=count,
        metavar="N",
        help=f"Number of examples to draw at random from the first {POOL_ROWS:,} rows. "
        "(default: all rows of --fewshot_file, or 0 without it)",
    )
    add(
        "--fewshot_seed",
        type=int,
        default=0,
        metavar="N",
        help="Seed of the random draw of examples. (default: %(default)s)",
    )
    add(
        "--fewshot_file",
        metavar="URI",
        help="Table with the examples: a .parquet or .jsonl file. Required for examples if the "
        "input is in BigQuery. (default: --input)",
    )
    add(
        "--label_column",
        metavar="COLUMN",
        help="Column with the label of an example: its text, or its index from 0. Required with "
        "--num_fewshot or --fewshot_file. (default: none)",
    )
    add(
        "--fewshot_delimiter",
        default="\n\n",
        metavar="TEXT",
        help="Text after each example. It has no effect in a chat, where examples are turns. "
        "(default: an empty line)",
    )


def _add_policies(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "policies",
        "For ShieldGemma, which scores whether the text in --prompt_column violates\n"
        "safety policies, and ShieldGemma 2, which scores the picture in --image_column.",
    )
    add = group.add_argument
    add(
        "--policy",
        action="append",
        default=[],
        metavar="NAME_OR_FILE",
        help=f"Policy to check: {', '.join(POLICIES)} for texts, {', '.join(PICTURE_POLICIES)} for "
        "pictures, all (every one of these), or a .txt file with a guideline; may be repeated. "
        "(default: none)",
    )
    add(
        "--response_column",
        metavar="COLUMN",
        help="Column with the response to the text in --prompt_column. Set it to check the "
        "response in place of that text. (default: none)",
    )
    add(
        "--threshold",
        type=float,
        metavar="P",
        help="Lowest score at which a policy counts as violated, from 0 to 1. (default: 0.5)",
    )
