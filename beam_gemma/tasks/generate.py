"""The generate task: turns rows into prompts and completions, and returns one result per row.

A row that fails reports the failure in its `error` column and does not affect other rows.
"""

import hashlib
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.engine.sequence import Request
from beam_gemma.engine.thoughts import Thinking
from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.inputs.image_processor import read_header
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.inputs.prompt_settings import PromptSettings
from beam_gemma.inputs.row import ColumnUse, Prompt, Row
from beam_gemma.inputs.template import column_value
from beam_gemma.inputs.tools import ToolChoice, checked_tools
from beam_gemma.model.sound_config import SoundConfig
from beam_gemma.model.tokenizer import StreamingDecoder, Tokenizer
from beam_gemma.model.vision_config import VisionConfig
from beam_gemma.monitoring.progress import Count
from beam_gemma.structured.constraint import Constraint
from beam_gemma.structured.output import StructuredOutput
from beam_gemma.structured.tool_grammar import calls_language, check_parameters
from beam_gemma.tasks.boxes import LOCATION_PIECE, box_type, read_boxes
from beam_gemma.tasks.encoded_rows import request_in
from beam_gemma.tasks.engine_model import EngineModel
from beam_gemma.tasks.interface import Settings
from beam_gemma.tasks.mask_decoder import MaskDecoder, digest_of
from beam_gemma.tasks.media_requests import Work
from beam_gemma.tasks.row_keys import ENCODED, ROW_KEY
from beam_gemma.tasks.thoughts import DEFAULT_TOKENS, parts_of, text_of, thinking_of
from beam_gemma.tasks.tool_calls import CALL_TYPE, CallReader, calls_constraint


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateSettings(PromptSettings, Settings):
    """Settings of the generate task.

    Example:
        >>> sampling = SamplingParams(max_tokens=64, temperature=0.7, top_p=0.9)
        >>> settings = GenerateSettings(prompt="Summarize: {text}", sampling=sampling)
        >>> settings.result_schema.names[:2]
        ['completion', 'finish_reason']
    """

    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    """Texts that end a completion; the completion excludes them."""
    structured: StructuredOutput | None = None
    """Format that completions must have; None for any text."""
    thinking: bool | None = None
    """True to have the model think before it answers, False to have it answer at once, None for
    what its chat template does by itself; see `thoughts.py`."""
    thinking_tokens: int | None = None
    """Most tokens of a row's thoughts, beyond those of `max_tokens`; None for 1,024."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions that the model may call, as OpenAI declares them; see `inputs/tools.py`."""
    tool_choice: ToolChoice = "auto"
    """`auto` for text, calls of functions, or both; `required` for at least one call, of declared
    functions with valid arguments, and nothing else."""
    key_column: str | None = None
    """Column that seeds a row's random draws. Without a key, the prompt seeds them; in a job over a
    table, all columns of the row do."""
    logprob: bool = False
    """True to return the log-probability of the completion, after its thoughts if it has any."""
    token_ids: bool = False
    """True to return the token ids of the completion."""
    statistics: bool = False
    """True to return the queries that DataGemma writes into a completion; see `data_commons`."""
    boxes: bool = False
    """True to return the boxes that PaliGemma writes into a completion; see `boxes.py`."""
    mask_decoder: str | None = None
    """File that decodes the masks of boxes; see `mask_decoder.py`. None leaves them as tokens."""

    def __post_init__(self) -> None:
        PromptSettings.__post_init__(self)
        if "" in self.stop:
            raise OptionsError("stop: expected texts that are not empty, got an empty one")
        if self.mask_decoder is not None and not self.boxes:
            raise OptionsError("mask_decoder: expected boxes beside it, whose masks it decodes")
        self._check_thinking()
        if self.structured is not None:
            self._check_structured()
        self._check_tools()

    def _check_thinking(self) -> None:
        if self.thinking_tokens is not None and not self.thinking:
            raise OptionsError("thinking_tokens: expected thinking beside it, which it limits")
        if self.thinking_tokens is not None and self.thinking_tokens < 2:
            raise OptionsError(
                "thinking_tokens: expected at least 2, for the control tokens that begin and end a "
                f"thought, got {self.thinking_tokens}"
            )
        others = {
            "prompt_format raw": self.prompt_format == "raw",
            "prefix_column": self.prefix_column,
            "source_lang": self.has_languages,
            "decoder_prompt": self.decoder_prompt,
            "boxes": self.boxes,
        }
        if self.thinking and (given := [name for name, value in others.items() if value]):
            raise OptionsError(
                f"thinking: expected a chat with a model that thinks, such as Gemma 4, got "
                f"{given[0]}; leave one of them out"
            )

    def _check_tools(self) -> None:
        if not self.tools:
            if self.tool_choice == "required":
                raise OptionsError("tool_choice: expected tools beside it, got none")
            return
        check_parameters(self.functions)
        if self.tool_choice == "required":
            calls_language(self.functions)
        self._check_alone("tools, which alone say", structured=self.structured)

    def _check_alone(self, what: str, **others: Any) -> None:
        """Refuse settings beside one that says where a completion ends and what it holds."""
        others |= {
            "stop": self.stop,
            "stop_token_ids": self.sampling.stop_token_ids,
            "ignore_eos": self.sampling.ignore_eos,
            "prefix_column": self.prefix_column,
            "statistics": self.statistics,
            "boxes": self.boxes,
        }
        if given := [name for name, value in others.items() if value]:
            raise OptionsError(
                f"{given[0]}: expected none beside {what} where a completion ends and what it "
                "holds; leave one of them out"
            )

    def _check_structured(self) -> None:
        self._check_alone("structured output, which alone says")
        names = self.result_schema.names
        for name in names:
            if names.count(name) > 1:
                raise OptionsError(
                    f"flatten: expected properties that are not named as other results are, got "
                    f"{name!r}; rename it in the schema or leave out flatten"
                )

    @property
    def functions(self) -> list[dict[str, Any]]:
        """The declarations of `tools`, each with a `name`."""
        return [tool["function"] for tool in self.openai_tools]

    @property
    def openai_tools(self) -> list[dict[str, Any]]:
        """The tools in OpenAI's form."""
        return checked_tools(self.tools) if self.tools else []

    @property
    def has_source(self) -> bool:
        """True if settings define a row's input: one of `SOURCES`, or a picture to translate."""
        is_translated = self.has_languages and bool(self.image_columns)
        return is_translated or any(getattr(self, name) is not None for name in self.SOURCES)

    @property
    def columns(self) -> dict[str, ColumnUse]:
        """Columns that the task reads."""
        keys: dict[str, ColumnUse] = {self.key_column: "key"} if self.key_column else {}
        return keys | self.prompt_columns

    @property
    def result_schema(self) -> pa.Schema:
        """Columns that the task adds to each row."""
        text = [pa.field("completion", pa.string())]
        if self.structured is not None:
            text = self.structured.columns
        columns = {
            "thoughts": pa.string() if self.thinking else None,
            "finish_reason": pa.string(),
            "num_prompt_tokens": pa.int64(),
            "num_thinking_tokens": pa.int64() if self.thinking else None,
            "num_completion_tokens": pa.int64(),
            "logprob": pa.float64() if self.logprob else None,
            "completion_token_ids": pa.list_(pa.int64()) if self.token_ids else None,
            "statistic_queries": pa.list_(pa.string()) if self.statistics else None,
            "statistic_values": pa.list_(pa.string()) if self.statistics else None,
            "boxes": box_type(with_mask=self.mask_decoder is not None) if self.boxes else None,
            "num_unreadable_boxes": pa.int64() if self.boxes else None,
            "tool_calls": CALL_TYPE if self.tools else None,
            "num_unreadable_calls": pa.int64() if self.tools else None,
            "truncated": pa.bool_() if self.truncate else None,
            "error": pa.string(),
        }
        others = [(name, kind) for name, kind in columns.items() if kind is not None]
        return pa.schema([*text, *others])

    @property
    def is_sampled(self) -> bool:
        """True if completions are drawn at random."""
        return self.sampling.temperature > 0

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of tokens in a completion, with its thoughts."""
        return self.sampling.max_tokens + (self.max_thinking_tokens or 0)

    @property
    def max_thinking_tokens(self) -> int | None:
        """Maximum number of tokens of thoughts, 0 to allow none; see `Thinking.max_tokens`."""
        if not self.thinking:
            return None if self.thinking is None else 0
        return DEFAULT_TOKENS if self.thinking_tokens is None else self.thinking_tokens

    def _parameters(self) -> dict[str, Any]:
        sampling = asdict(self.sampling)
        if not self.is_sampled:
            for of_draws in ("top_k", "top_p", "seed"):
                del sampling[of_draws]
        parameters = {
            "sampling": sampling,
            "stop": self.stop,
            # Infill adds stop tokens, which the prompt does not show.
            "infill": self.prefix_column is not None,
        }
        if self.thinking is not None:
            parameters["thinking_tokens"] = self.max_thinking_tokens
        if self.structured is not None:
            parameters["structured"] = asdict(self.structured)
        if self.tools:
            parameters |= {"tools": self.openai_tools, "tool_choice": self.tool_choice}
        if self.structured is not None or self.tool_choice == "required":
            # llguidance chooses how forced text is tokenized.
            parameters["llguidance"] = version("llguidance")
        if self.mask_decoder is not None:
            parameters["mask_decoder"] = digest_of(self.mask_decoder)
        return parameters

    def max_prompt(self, max_model_len: int) -> int:
        """Return the longest prompt, in tokens, that leaves room for a completion.

        Raises:
            OptionsError: there is no room for a prompt.
        """
        room = max_model_len - self.max_new_tokens
        if room < 1:
            both = " and thinking_tokens" if self.thinking else ""
            raise OptionsError(
                f"max_tokens{both}: expected less than the {max_model_len:,} tokens that the model "
                f"takes in all, got {self.max_new_tokens:,}"
            )
        return room


def constraint_of(
    settings: GenerateSettings, tokenizer: Tokenizer, end_token_ids: Iterable[int]
) -> Constraint | None:
    """Return the constraint for the structured output or the calls that are required, or None.

    Args:
        settings: The settings of the task.
        tokenizer: The model's tokenizer, with control pieces for calls if these are required.
        end_token_ids: The model's token ids that end a completion.

    Raises:
        OptionsError: `max_tokens` is too small for any valid output.
    """
    if settings.tool_choice == "required":
        constraint = calls_constraint(settings.functions, tokenizer, end_token_ids)
    elif settings.structured is not None:
        constraint = Constraint(settings.structured.language, tokenizer, end_token_ids)
    else:
        return None
    if too_few := constraint.shortage(settings.sampling.max_tokens):
        raise OptionsError(too_few)
    return constraint


def mask_decoder_of(settings: GenerateSettings) -> MaskDecoder | None:
    """Return the decoder of masks that the settings name, or None if they name none.

    Raises:
        OptionsError: the file cannot be read, or is none.
    """
    return None if settings.mask_decoder is None else MaskDecoder.from_file(settings.mask_decoder)


def check_boxes(settings: GenerateSettings, tokenizer: Tokenizer) -> None:
    """Check that a model writes boxes, if the task wants them.

    Raises:
        OptionsError: its vocabulary has no places.
    """
    if settings.boxes and LOCATION_PIECE not in tokenizer.control_pieces:
        raise OptionsError(
            f"boxes: expected a model such as PaliGemma, with {LOCATION_PIECE} in its vocabulary, "
            "got one without"
        )


class _Stop:
    """Watches a growing completion for the first stop text."""

    def __init__(self, tokenizer: Tokenizer, texts: tuple[str, ...]) -> None:
        self.position: int | None = None
        """Character index of the first stop text in the completion; None until one occurs."""
        self._decoder = StreamingDecoder(tokenizer)
        self._texts = texts
        self._reach = max(map(len, texts)) - 1
        self._window = ""
        self._start = 0

    def __call__(self, token_id: int) -> bool:
        """Add the next token and return whether the completion ends there."""
        self._window += self._decoder.add(token_id)
        found = [at for text in self._texts if (at := self._window.find(text)) >= 0]
        if found:
            self.position = self._start + min(found)
            return True
        passed = max(len(self._window) - self._reach, 0)
        self._window = self._window[passed:]
        self._start += passed
        return False


@dataclass(eq=False, slots=True, kw_only=True)
class _Completing(Work):
    """A row whose request the engine is processing."""

    prompt: Prompt
    stop: _Stop | None


class Generator(EngineModel[_Completing]):
    """Completes rows on an engine; many threads can share one generator."""

    def __init__(
        self,
        engine: Engine,
        encoder: PromptEncoder,
        settings: GenerateSettings,
        *,
        constraint: Constraint | None = None,
        vision: VisionConfig | None = None,
        sound: SoundConfig | None = None,
        on_result: Callable[[Count], None],
    ) -> None:
        """Initialize the generator.

        Args:
            engine: The engine that runs the model.
            encoder: The encoder that turns rows into prompts.
            settings: The settings of the task.
            constraint: The result of `constraint_of` for these settings.
            vision: The model's picture half; None if it has none.
            sound: The model's sound half; None if it has none.
            on_result: Called with a count of each row as soon as the row is done, from any thread.
                The engine counts tokens itself.

        Raises:
            OptionsError: the mask decoder cannot be read.
        """
        super().__init__(engine, settings, vision=vision, sound=sound, on_result=on_result)
        self._encoder = encoder
        self._settings = settings
        self._constraint = constraint
        self._calls = CallReader(encoder.tokenizer) if settings.tools else None
        self._mask_decoder = mask_decoder_of(settings)
        stops = (*settings.sampling.stop_token_ids, *encoder.stop_token_ids)
        self._sampling = replace(settings.sampling, stop_token_ids=stops)

    def _work(self, index: int, row: Row) -> _Completing:
        prompt = request_in(row, self._encoder, Prompt.of_identity)
        if self._settings.boxes and len(prompt.files) != 1:
            raise RecordError(
                "boxes: expected one picture in the row, whose pixels they are in, got "
                f"{len(prompt.files)}"
            )
        key = self._sampling_key(row, prompt)
        stop = _Stop(self._encoder.tokenizer, self._settings.stop) if self._settings.stop else None
        request = Request(
            request_id=key,
            prompt_token_ids=prompt.start_token_ids,
            source_token_ids=prompt.source_token_ids,
            params=self._sampling,
            sampling_key=key,
            should_stop=stop,
            constraint=self._constraint,
            thinking=self._thinking(prompt),
            logprob=self._settings.logprob,
        )
        return _Completing(index=index, asked=[(prompt, request)], prompt=prompt, stop=stop)

    def _thinking(self, prompt: Prompt) -> Thinking | None:
        """Return how the thoughts of a row are recognized; None if it can have none."""
        if self._constraint is not None and not self._settings.thinking:
            return None  # structured output has no room for thoughts
        return thinking_of(
            self._encoder.tokenizer,
            prompt.start_token_ids,
            max_tokens=self._settings.max_thinking_tokens,
        )

    def _sampling_key(self, row: Row, prompt: Prompt) -> str:
        """Return the key that seeds a row's random draws; it is the same in every run."""
        column = self._settings.key_column
        if not isinstance(row, str) and ROW_KEY in row:
            return str(row[ROW_KEY])
        # An encoded row without a row key is not sampled, so any key will do.
        if column is not None and not isinstance(row, str) and ENCODED not in row:
            value = column_value(row, column)
            if value is not None:
                return str(value)
        ids = array("q", (*prompt.token_ids, *prompt.decoder_token_ids)).tobytes()
        return hashlib.blake2b(ids, digest_size=16).hexdigest()

    def _result(self, work: _Completing) -> dict[str, Any]:
        (completion,) = (future.result() for future in work.futures)
        result = dict.fromkeys(self._names)
        result["num_prompt_tokens"] = len(work.prompt.token_ids)
        if "truncated" in result:
            result["truncated"] = work.prompt.truncated
        if completion.error is not None:
            return result | {"error": completion.error}
        ((_, request),) = work.asked
        parts = parts_of(completion.token_ids, request.thinking)
        calls = self._calls.read(parts.answer) if self._calls else None
        text = calls.text if calls else self._text(work, parts.answer)
        structured = self._settings.structured
        result |= {"completion": text} if structured is None else structured.values_of(text)
        result["finish_reason"] = completion.finish_reason
        result["num_completion_tokens"] = len(parts.answer)
        if "thoughts" in result:
            result["thoughts"] = text_of(parts.thoughts, self._encoder.tokenizer)
            result["num_thinking_tokens"] = len(completion.token_ids) - len(parts.answer)
        if "logprob" in result:
            result["logprob"] = completion.logprob
        if "completion_token_ids" in result:
            result["completion_token_ids"] = parts.answer
        if "statistic_queries" in result:
            queries, values = find_statistics(text)
            result |= {"statistic_queries": queries, "statistic_values": values}
        if "boxes" in result:
            result |= self._boxes(work.prompt, text)
        if calls is not None:
            result |= calls.columns(completion.finish_reason)
        return result

    def _boxes(self, prompt: Prompt, text: str) -> dict[str, Any]:
        (image,) = prompt.files
        header = read_header(image.data)
        boxes, num_unreadable = read_boxes(text)
        values = [box.in_pixels(height=header.height, width=header.width) for box in boxes]
        if self._mask_decoder is not None:
            for box, value in zip(boxes, values, strict=True):
                value["mask"] = self._mask_decoder.png(box.segment) if box.segment else None
        return {"boxes": values, "num_unreadable_boxes": num_unreadable}

    def _text(self, work: _Completing, token_ids: list[int]) -> str:
        # The last token may be only part of a character.
        text = self._encoder.tokenizer.decode(token_ids, final=False)
        return text if work.stop is None else text[: work.stop.position]


STATISTIC = re.compile(r'\[__DC__\("([^"]+)"\) --> "([^"]*)"\]?')


def find_statistics(completion: str) -> tuple[list[str], list[str]]:
    """Return the Data Commons queries in a completion, and the model's own value for each."""
    found = STATISTIC.findall(completion)
    return [query for query, _ in found], [value for _, value in found]
