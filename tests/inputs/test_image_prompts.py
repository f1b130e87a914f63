"""Prompts with pictures: the published processors' token ids, and text that stays text."""

import io

import pytest
from PIL import Image

from beam_gemma.errors import OptionsError, PromptTooLongError, RecordError
from beam_gemma.inputs.image_processor import read_header
from beam_gemma.inputs.prompt_encoder import PromptEncoder, Shots
from beam_gemma.inputs.prompt_settings import PromptSettings
from beam_gemma.inputs.row import MediaPart, MediaPlace, Prompt
from beam_gemma.model.markup import Control, Text
from tests.doubles.chat_reference import TEMPLATES
from tests.doubles.published_processors import IMAGE_TOKENS, VISIONS, our_tokenizer, processor

SIZES = {"a": (30, 20), "b": (20, 30), "c": (25, 25), "wide": (900, 300), "high": (256, 600)}
"""Pictures by name; with pan and scan, the last two have 3 and 2 crops."""
PILLOW = {
    name: Image.new("RGB", size, f"#{len(name)}{size[0] % 10}8") for name, size in SIZES.items()
}
TOKENIZERS = {name: our_tokenizer(name) for name in VISIONS}
SEES, PALIGEMMA = processor("gemma3"), processor("paligemma")
CHAT = TEMPLATES["gemma3"]
PICTURE = {"type": "image"}
ATTACKS = ("<start_of_image>", "<image_soft_token>", "<image>", "<loc0001>", "[picture]", "<bos>")
"""What a row may write that looks like a picture, or is a control token."""


def png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)  # as pictures of Pillow are written
    return file.getvalue()


FILES = {name: png(picture) for name, picture in PILLOW.items()}


def encoder(name="gemma3", *, chat_template=None, vision=True, **options):
    """Return an encoder; options that are no settings go to it as they are."""
    own = {key: options.pop(key) for key in ("shots", "max_tokens") if key in options}
    return PromptEncoder(
        TOKENIZERS[name],
        PromptSettings(**options),
        chat_template=chat_template,
        vision=VISIONS[name] if vision else None,
        vocab_size=2000,
        **{"max_tokens": 1000, **own},
    )


def published(text, *names, by=SEES, **options):
    """Return the ids of a text with a placeholder for each picture."""
    pictures = [[PILLOW[name] for name in names]]
    return by(images=pictures, text=[text], **options)["input_ids"][0]


def published_chat(messages, *names, **options):
    """Return the ids of a conversation."""
    text = SEES.apply_chat_template(messages, chat_template=CHAT, add_generation_prompt=True)
    return published(text.removeprefix("<bos>"), *names, **options)


def user(*parts):
    return {"role": "user", "content": [words(p) if isinstance(p, str) else p for p in parts]}


def words(text):
    return {"type": "text", "text": text}


def check(prompt, expected, *pictures):
    """Compare a prompt with published ids, and its places with pictures, each with its crops."""
    assert list(prompt.token_ids) == expected
    vision = VISIONS["paligemma" if 1452 in expected else "gemma3"]
    soft = [index for index, i in enumerate(expected) if i == vision.image_token_id]
    assert [place.start for place in prompt.places] == soft[::IMAGE_TOKENS]
    shown = [(prompt.files[place.file].data, place.view) for place in prompt.places]
    assert shown == [(FILES[name], crop) for name, crops in pictures for crop in range(crops + 1)]
    assert len({file.digest for file in prompt.files}) == len(prompt.files)


def whole(*names):
    return [(name, 0) for name in names]


@pytest.mark.parametrize(
    ("prompt", "columns", "written", "shown"),
    [
        ("what is it", ("x",), "<start_of_image>what is it", "a"),
        ("what is {x} there", ("x",), "what is <start_of_image> there", "a"),
        ("{x}\nand\n{y}", ("y", "x"), "<start_of_image>\nand\n<start_of_image>", "ab"),
        ("is it {x}", ("y", "x"), "<start_of_image>is it <start_of_image>", "ba"),
        ("is it", ("y", "x"), "<start_of_image><start_of_image>is it", "ba"),
        ("{x}{t}{x}", ("x",), "<start_of_image>the thing<start_of_image>", "aa"),
        ("\n{x}\n", ("x",), "\n<start_of_image>\n", "a"),
    ],
)
def test_pictures_stand_where_a_template_names_them_or_before_its_text(
    prompt, columns, written, shown
):
    row = {"x": FILES["a"], "y": FILES["b"], "t": "the thing"}
    raw = encoder(prompt=prompt, image_columns=columns)(row)
    check(raw, published(written, *shown), *whole(*shown))
    chat = encoder(prompt=prompt, image_columns=columns, chat_template=CHAT)(row)
    conversation = [{"role": "user", "content": written}]
    check(chat, published_chat(conversation, *shown), *whole(*shown))


def test_pictures_of_a_list_stand_one_after_the_other():
    row = {"x": [FILES["a"], FILES["b"], FILES["a"]], "t": "how many"}
    found = encoder(prompt_column="t", image_columns=("x",))(row)
    check(found, published("<start_of_image>" * 3 + "how many", *"aba"), *whole(*"aba"))
    assert [place.file for place in found.places] == [0, 1, 0]


@pytest.mark.parametrize("names", [("wide",), ("wide", "a", "high"), ("high", "high")])
def test_crops_are_written_as_published(names):
    row = {"x": [FILES[name] for name in names], "t": "what is it"}
    found = encoder(prompt_column="t", image_columns=("x",), pan_and_scan=True)(row)
    text = "<start_of_image>" * len(names) + "what is it"
    crops = [(name, {"wide": 3, "high": 2}.get(name, 0)) for name in names]
    check(found, published(text, *names, do_pan_and_scan=True), *crops)
    chat = encoder(prompt_column="t", image_columns=("x",), pan_and_scan=True, chat_template=CHAT)(
        row
    )
    conversation = [user(*[PICTURE] * len(names), "what is it")]
    check(chat, published_chat(conversation, *names, do_pan_and_scan=True), *crops)


@pytest.mark.parametrize(
    ("prompt", "columns", "written", "shown"),
    [
        ("caption en", ("x",), "<image>caption en", "a"),
        ("answer en {t}", ("x", "y"), "<image><image>answer en the thing", "ab"),
        ("one {x} two {y} three", ("x", "y"), "one <image> two <image> three", "ab"),
        ("{x} detect thing ; <loc0001>\n", ("x",), "<image> detect thing ; <loc0001>\n", "a"),
        ("", ("x",), "<image>", "a"),
    ],
)
def test_paligemma_has_bos_after_pictures_and_a_line_feed_at_the_end(
    prompt, columns, written, shown
):
    row = {"x": FILES["a"], "y": FILES["b"], "t": "the thing"}
    found = encoder("paligemma", prompt=prompt, image_columns=columns)(row)
    check(found, published(written, *shown, by=PALIGEMMA), *whole(*shown))
    assert (
        encoder("paligemma", prompt=prompt, image_columns=columns, prompt_format="raw")(row)
        == found
    )


def test_paligemma_without_a_picture_is_text_behind_bos():
    bos, *ids = TOKENIZERS["paligemma"].encode([Text("caption en\n")])
    for columns in ((), ("x",)):
        found = encoder(
            "paligemma", prompt="caption en", image_columns=columns, allow_missing_images=True
        )({"x": None})
        assert found.token_ids == (bos, *ids)
        assert not found.places
    with pytest.raises(OptionsError, match=r"expected a column with pictures.*--image_column"):
        encoder("paligemma", prompt="caption en")
    for settings in (
        {"messages_column": "m"}, {"system": "x"}, {"prompt_format": "chat", "prompt": "x"},
    ):  # fmt: skip
        with pytest.raises(OptionsError, match="expected no chat for PaliGemma"):
            encoder("paligemma", image_columns=("x",), **settings)
    asked = PromptSettings(prompt="x", image_columns=("x",), chat_template="gemma")
    with pytest.raises(OptionsError, match="expected no chat for PaliGemma"):
        PromptEncoder(
            TOKENIZERS["paligemma"],
            asked,
            chat_template=None,
            max_tokens=99,
            vision=VISIONS["paligemma"],
        )
    with pytest.raises(OptionsError, match="pan_and_scan"):
        encoder("paligemma", image_columns=("x",), pan_and_scan=True)


MESSAGES = [
    [user(PICTURE, "what is it")],
    [user("look ", PICTURE, " and ", PICTURE, "which")],
    [user("hi"), {"role": "assistant", "content": "yes"}, user("this", PICTURE)],
    [user(PICTURE), {"role": "assistant", "content": [words("a hat")]}, user(PICTURE, "this")],
]


@pytest.mark.parametrize("messages", MESSAGES)
@pytest.mark.parametrize("system", [None, "be kind"])
def test_parts_of_messages_take_the_next_picture_of_the_row(messages, system):
    names = "ab"[: str(messages).count("image")]
    row = {"m": messages, "x": [FILES[name] for name in names]}
    found = encoder(messages_column="m", image_columns=("x",), system=system, chat_template=CHAT)
    heads = [{"role": "system", "content": [words(system)]}] if system else []
    check(found(row), published_chat([*heads, *messages], *names), *whole(*names))


@pytest.mark.parametrize("key", ["image", "bytes", "url", "path", "uri"])
def test_parts_of_messages_may_bring_their_own_picture(key):
    # What reading the file of a path or URI puts in its place.
    own = FILES["c"] if key in ("image", "bytes") else {"bytes": FILES["c"], "error": None}
    none = {"text": None, "bytes": None, "path": None}  # as Arrow has it
    messages = [user(PICTURE | none, "and", PICTURE | none | {key: own})]
    encode = encoder(messages_column="m", image_columns=("x",), chat_template=CHAT)
    expected = published_chat([user(PICTURE, "and", PICTURE)], *"ac")
    check(encode({"m": messages, "x": FILES["a"]}), expected, *whole(*"ac"))
    alone = encoder(messages_column="m", chat_template=CHAT)
    brought = [user({"type": "image", "image": PILLOW["c"]})]
    check(alone({"m": brought}), published_chat([user(PICTURE)], "c"), ("c", 0))


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_takes_parts_with_pictures(name):
    encode = encoder(messages_column="m", image_columns=("x",), chat_template=TEMPLATES[name])
    found = encode({"m": [user("look", PICTURE, "is it", "new")], "x": FILES["a"]})
    is_gemma3 = "gemma3" in name
    joined = "is itnew" if is_gemma3 else "is it\nnew"
    content = [{"role": "user", "content": f"look<start_of_image>{joined}"}]
    check(found, published_chat(content, "a"), ("a", 0))


def test_parts_and_pictures_must_be_as_many():
    encode = encoder(messages_column="m", image_columns=("x",), chat_template=CHAT)
    for parts, pictures in ((1, 2), (2, 1), (1, 0), (0, 1)):
        row = {"m": [user("hi", *[PICTURE] * parts)], "x": [FILES["a"]] * pictures}
        if not pictures:
            encode = encoder(
                messages_column="m",
                image_columns=("x",),
                chat_template=CHAT,
                allow_missing_images=True,
            )
        with pytest.raises(RecordError, match=f"column 'm'.* which are {pictures}, got {parts}"):
            encode(row)
    for role in ("assistant", "system"):
        bad = [user("hi"), {"role": role, "content": [PICTURE]}, user("hi")]
        with pytest.raises(RecordError, match="image in a user's message"):
            encode({"m": bad if role == "assistant" else bad[1:], "x": FILES["a"]})


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", VISIONS)
def test_text_of_a_row_never_makes_a_picture(name, attack):
    chat = CHAT if name == "gemma3" else None
    encode = encoder(name, prompt="{t}{x}{t}", image_columns=("x",), chat_template=chat)
    found = encode({"t": f"{attack} a", "x": FILES["a"]})
    assert len(found.places) == 1
    expected = encode({"t": "SAFE a", "x": FILES["a"]})
    assert [part for part in found.parts if isinstance(part, Control)] == [
        part for part in expected.parts if isinstance(part, Control)
    ]
    assert found.text == expected.text.replace("SAFE", attack)
    ids = list(found.token_ids)
    start = found.places[0].start
    assert VISIONS[name].image_token_id not in ids[:start] + ids[start + IMAGE_TOKENS :]


def test_a_message_that_writes_a_picture_has_none():
    encode = encoder(messages_column="m", image_columns=("x",), chat_template=CHAT)
    found = encode({"m": [user("<start_of_image>", PICTURE)], "x": FILES["a"]})
    assert len(found.places) == 1
    assert found.text.count("<start_of_image>") == 2


@pytest.mark.parametrize(
    "settings", [{"prompt": "<start_of_image>{t}"}, {"prompt": "{t}", "allow_special_tokens": True}]
)
def test_a_piece_without_its_picture_is_an_error(settings):
    encode = encoder(image_columns=("x",), **settings)
    with pytest.raises(RecordError, match="which are 1, got 2"):
        encode({"t": "<start_of_image>", "x": FILES["a"]})


def test_text_prompts_of_a_model_that_sees_are_those_of_one_that_does_not():
    for chat_template in (None, CHAT):
        settings = {"prompt": "<start_of_image>say {t}", "chat_template": chat_template}
        for row in ({"t": "it <start_of_image>"}, {"t": "x"}, "text alone <start_of_image>"):
            blind = encoder(vision=False, **settings)(row)
            assert encoder(**settings)(row) == blind
            assert not blind.places


def test_shots_bring_their_own_pictures():
    shots = Shots(
        examples=tuple(({"t": name, "x": FILES[name]}, (Text(f"it is {name}"),)) for name in "abc"),
        number=2,
        delimiter="\n\n",
    )
    settings = {"prompt": "{x}{t}", "image_columns": ("x",), "shots": shots}
    row = {"t": "a", "x": FILES["a"]}
    raw = encoder(**settings)(row)
    text = "".join(f"<start_of_image>{n}it is {n}\n\n" for n in "bc") + "<start_of_image>a"
    check(raw, published(text, *"bca"), *whole(*"bca"))
    turns = [
        {"role": role, "content": content}
        for name in "bc"
        for role, content in (("user", f"<start_of_image>{name}"), ("assistant", f"it is {name}"))
    ]
    chat = encoder(**settings, chat_template=CHAT)(row)
    expected = published_chat([*turns, {"role": "user", "content": "<start_of_image>a"}], *"bca")
    check(chat, expected, *whole(*"bca"))
    # The same text with another picture is another row.
    other = encoder(**settings)({"t": "a", "x": FILES["b"]})
    assert [file.data for file in other.files] == [FILES["a"], FILES["b"]]
    assert [place.file for place in other.places] == [0, 1, 1]


def test_an_error_about_a_message_shows_nothing_of_its_file():
    """A path may lead to any file, and it is read before the message is found to be none."""
    part = {"type": "image", "path": {"bytes": b"TOKEN=secret", "error": None}}
    encode = encoder(messages_column="m", chat_template=CHAT)
    with pytest.raises(RecordError, match=r"got .*12 bytes") as caught:
        encode({"m": [{"role": "assistant", "content": [part]}]})
    assert "TOKEN" not in str(caught.value)


def test_a_damaged_picture_of_a_shot_is_a_wrong_setting():
    """Its header is whole, so that otherwise each row would fail once pictures are decoded."""
    damaged = FILES["a"][: len(FILES["a"]) * 2 // 3]
    assert read_header(damaged)
    shots = Shots(examples=(({"t": "x", "x": damaged}, (Text("it is a"),)),))
    with pytest.raises(
        OptionsError, match=r"^shots: expected rows .* column 'x': expected a pictu"
    ):
        encoder(prompt="{x}{t}", image_columns=("x",), shots=shots)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_cut_and_pictures_are_not(side):
    row = {"t": "a" * 50 + "z" * 50, "x": FILES["a"]}
    settings = {"prompt": "see {x} and {t}.", "image_columns": ("x",), "chat_template": CHAT}
    cut = encoder(**settings, truncate=side, max_tokens=50)(row)
    assert cut.truncated
    assert 45 <= len(cut.token_ids) <= 50
    [place] = cut.places
    soft = VISIONS["gemma3"].image_token_id
    assert cut.token_ids[place.start : place.start + IMAGE_TOKENS] == (soft,) * IMAGE_TOKENS
    messages = {"m": [user(PICTURE, "a" * 100)], "x": FILES["a"]}
    settings = {"messages_column": "m", "image_columns": ("x",), "chat_template": CHAT}
    cut = encoder(**settings, truncate=side, max_tokens=50)(messages)
    assert cut.truncated
    assert len(cut.places) == 1
    only = {"m": [user(*[PICTURE] * 9)], "x": [FILES["a"]] * 9}
    with pytest.raises(PromptTooLongError):
        encoder(**settings, truncate=side, max_tokens=50)(only)


def test_nulls_are_errors_or_no_picture():
    nulls = (None, [], [None], {"bytes": None, "path": None}, [{"bytes": None, "error": None}])
    for value in nulls:
        with pytest.raises(RecordError, match="column 'x': expected a picture, got null"):
            encoder(prompt="say", image_columns=("x",))({"x": value})
        allowed = encoder(prompt="say {x}", image_columns=("x",), allow_missing_images=True)
        assert allowed({"x": value}).token_ids == encoder(prompt="say ")({}).token_ids
    mixed = allowed({"x": [None, FILES["a"]]})
    assert [file.data for file in mixed.files] == [FILES["a"]]
    with pytest.raises(RecordError, match="column 'x', picture 1: expected a picture, got null"):
        encoder(prompt="say", image_columns=("x",))({"x": [None, FILES["a"]]})
    with pytest.raises(RecordError, match="column 'x'"):
        encoder(prompt="say", image_columns=("x",))("only a text")
    with pytest.raises(RecordError, match=r"column 'x': expected in every row"):
        encoder(prompt="say", image_columns=("x",))({"y": 1})


def test_a_token_id_that_the_decoder_lacks_is_written_as_zero():
    vision = VISIONS["gemma3"]
    for size, written in ((301, 0), (302, 301), (None, 301)):
        encode = PromptEncoder(
            TOKENIZERS["gemma3"],
            PromptSettings(prompt="x", image_columns=("x",)),
            chat_template=None,
            max_tokens=99,
            vision=vision,
            vocab_size=size,
        )
        found = encode({"x": FILES["a"]})
        start = found.places[0].start
        assert found.token_ids[start : start + IMAGE_TOKENS] == (written,) * IMAGE_TOKENS


def test_prompts_are_restored_from_their_identity():
    row = {"x": [FILES["a"], FILES["b"], FILES["a"]]}
    found = encoder(prompt="which", image_columns=("x",))(row)
    restored = Prompt.of_identity(found.identity, [file.data for file in found.files])
    assert (restored.token_ids, restored.places) == (found.token_ids, found.places)
    assert restored.files == found.files
    count = VISIONS["gemma3"].num_image_tokens
    assert found.places[0] == MediaPlace(found.places[0].start, 0, 0, count)
    # All that encodes parts again, as labels do, gives the same ids.
    assert TOKENIZERS["gemma3"].encode(found.parts) == list(found.token_ids)
    assert not any(isinstance(part, MediaPart) for part in found.parts)


@pytest.mark.parametrize("name", VISIONS)
def test_the_tokenizer_gives_the_ids_of_a_prompts_parts(name):
    for prompt in ("{x}which", "one {x} two"):
        found = encoder(name, prompt=prompt, image_columns=("x",))({"x": FILES["a"]})
        assert TOKENIZERS[name].encode(found.parts) == list(found.token_ids)


def test_a_model_without_sight_takes_no_pictures():
    for settings in ({"image_columns": ("x",)}, {"pan_and_scan": True}):
        with pytest.raises(OptionsError, match="expected no pictures, as the model takes none"):
            encoder(vision=False, prompt="say", **settings)
    encode = encoder(vision=False, messages_column="m", chat_template=CHAT)
    with pytest.raises(RecordError, match="parts of type text"):
        encode({"m": [user(PICTURE, "hi")]})


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"image_columns": ("x", "x")}, "'x': expected once"),
        ({"image_columns": ("x",), "prompt_column": "x"}, "'x': expected once"),
        ({"image_columns": ("x",), "messages_column": "x"}, "'x': expected once"),
        (
            {"image_columns": ("x",), "prefix_column": "a", "suffix_column": "b"},
            "prefix_column: expected no columns of pictures or sounds",
        ),
    ],
)
def test_contradictions_are_refused(settings, match):
    with pytest.raises(OptionsError, match=match):
        PromptSettings(**settings)


def test_columns_with_pictures_have_that_use():
    settings = PromptSettings(prompt="{a}{x}", image_columns=("x", "y"))
    assert settings.prompt_columns == {"a": "value", "x": "images", "y": "images"}
    settings = PromptSettings(messages_column="m", image_columns=("x",))
    assert settings.prompt_columns == {"m": "messages", "x": "images"}


def test_errors_quote_no_bytes_of_a_picture():
    encode = encoder(messages_column="m", chat_template=CHAT)
    with pytest.raises(RecordError) as caught:
        encode({"m": [{"role": "user", "content": [{"type": "picture", "bytes": b"x" * 9999}]}]})
    assert len(str(caught.value)) < 500
