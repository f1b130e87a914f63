"""What a task needs of a table is checked before a job."""

from unittest.mock import Mock

import pyarrow as pa
import pytest

from beam_gemma.batches import JSON_TEXT
from beam_gemma.errors import OptionsError
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.gemma4_vision import gemma4_vision
from beam_gemma.tasks.columns import check_columns, check_media
from beam_gemma.tasks.generate import GenerateSettings

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.large_string())])
PART = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", pa.binary())])
IMAGES = pa.struct([("role", pa.string()), ("content", pa.list_(pa.binary()))])
PARTS = pa.struct([("content", pa.list_(PART)), ("role", pa.string())])
SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("large", pa.large_string()),
        ("label", pa.dictionary(pa.int8(), pa.string())),
        ("count", pa.int32()),
        ("raw", pa.binary()),
        ("chat", pa.list_(MESSAGE)),
        ("large_chat", pa.large_list(MESSAGE)),
        ("chat_of_parts", pa.list_(PARTS)),
        ("images", pa.list_(IMAGES)),
        ("large_raw", pa.large_binary()),
        ("fixed", pa.binary(3)),
        ("picture", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("paths", pa.struct([("path", pa.string())])),
        ("no_bytes", pa.struct([("bytes", pa.null()), ("path", pa.string())])),
        ("object_ref", pa.struct([("uri", pa.string()), ("version", pa.string())])),
        ("pictures", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("many_paths", pa.large_list(pa.string())),
        ("lists", pa.list_(pa.list_(pa.string()))),
        ("no_picture", pa.struct([("file", pa.string())])),
        ("odd_bytes", pa.struct([("bytes", pa.int32()), ("path", pa.string())])),
        pa.field("json", pa.string(), metadata={JSON_TEXT: b""}),
        ("not_chat", pa.list_(pa.struct([("role", pa.string())]))),
    ]
)


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": "{text} {count} {chat} {label}", "key_column": "count"},
        {"prompt": "no column"},
        {"prompt_column": "text"},
        {"prompt_column": "large"},
        {"prompt_column": "label"},
        {"messages_column": "chat"},
        {"messages_column": "large_chat"},
        {"messages_column": "chat_of_parts"},
        {"prompt": "{raw}", "image_columns": ("raw", "large_raw", "fixed", "text", "label")},
        {"prompt": "x", "image_columns": ("picture", "paths", "no_bytes", "object_ref")},
        {"prompt": "x", "image_columns": ("pictures", "many_paths", "large")},
    ],
)
def test_tables_that_fit(settings):
    check_columns(GenerateSettings(**settings), SCHEMA)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"prompt": "{txt}"}, "'txt'.*did you mean text"),
        ({"prompt_column": "txt"}, "'txt'.*did you mean text"),
        ({"messages_column": "chats"}, "'chats'.*did you mean chat"),
        ({"prompt": "x", "key_column": "conut"}, "'conut'.*did you mean count"),
        ({"prompt_column": "count"}, "'count': expected string, got int32"),
        ({"prompt": "{raw}"}, "'raw'.*got binary"),
        ({"messages_column": "text"}, "'text': expected list<struct<role: string"),
        ({"messages_column": "images"}, "'images': expected list<struct<role: string"),
        ({"prompt": "x", "image_columns": ("count",)}, "'count': expected bytes, a path or URI"),
        ({"prompt": "x", "image_columns": ("lists",)}, "got list<item: list<item: string>>"),
        ({"prompt": "x", "image_columns": ("no_picture",)}, "'no_picture': expected bytes"),
        ({"prompt": "x", "image_columns": ("odd_bytes",)}, "'odd_bytes': expected bytes"),
        ({"prompt": "x", "image_columns": ("json",)}, "got JSON values of several types"),
        ({"prompt": "x", "image_columns": ("chat",)}, "'chat': expected bytes, a path or URI"),
        ({"messages_column": "not_chat"}, "'not_chat': expected list<struct<role: string"),
    ],
)
def test_tables_that_do_not_fit(settings, match):
    with pytest.raises(OptionsError, match=match):
        check_columns(GenerateSettings(**settings), SCHEMA)


@pytest.mark.parametrize(
    ("name", "settings"), [("error", {}), ("completion", {}), ("logprob", {"logprob": True})]
)
def test_clash_with_a_result_is_refused(name, settings):
    table = SCHEMA.append(pa.field(name, pa.string()))
    with pytest.raises(OptionsError, match=f"'{name}'.*rename it"):
        check_columns(GenerateSettings(prompt="x", **settings), table)


def test_optional_results_clash_only_when_asked_for():
    check_columns(GenerateSettings(prompt="x"), SCHEMA.append(pa.field("logprob", pa.string())))


def test_column_that_occurs_twice_is_refused():
    table = pa.schema([("text", pa.string()), ("text", pa.string())])
    with pytest.raises(OptionsError, match="got it twice"):
        check_columns(GenerateSettings(prompt="{text}"), table)


def test_a_size_is_refused_where_pictures_vary_in_size():
    raw = {"model_type": "gemma4", "vision_config": {}, "image_token_id": 9}
    artifact = Mock(spec=Artifact, path="models/gemma4", vision=gemma4_vision(raw, {}), sound=None)
    settings = GenerateSettings(prompt="x", image_columns=("raw",))
    check_media(settings, artifact)
    with pytest.raises(OptionsError, match="expected none for models/gemma4, whose pictures vary"):
        check_media(settings, artifact, 448)
