"""Declarations of functions: read, checked, and written into the prompt by the chat template."""

import json

import pytest

from beam_gemma.errors import OptionsError, RecordError
from beam_gemma.inputs.chat_template import ChatTemplate
from beam_gemma.inputs.decoder_prompt import Decoder
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.inputs.prompt_settings import PromptSettings
from beam_gemma.inputs.tools import checked_tools, traced
from beam_gemma.inputs.traced_text import ROW, origins
from beam_gemma.model.markup import Control, Text
from tests.doubles import fake_models
from tests.doubles.chat_reference import TEMPLATES, hugging_face, markup
from tests.doubles.tool_models import FAMILIES, STOP, WEATHER

TOOLS = checked_tools([WEATHER, STOP])
HI = [{"role": "user", "content": "hi"}]
FLASHLIGHT = {
    "name": "set_torch",
    "description": "Switch the torch.",
    "parameters": {
        "type": "object",
        "properties": {
            "on": {"type": "boolean", "description": "On or off"},
            "color": {"type": "string", "enum": ["red", "white"]},
        },
        "required": ["on"],
    },
}
DECLARED = {
    "Gemma 4": '<bos><|turn>system\n<|tool>declaration:set_torch{description:<|"|>Switch the torch.'
    '<|"|>,parameters:{properties:{color:{enum:[<|"|>red<|"|>,<|"|>white<|"|>],type:<|"|>STRING'
    '<|"|>},on:{description:<|"|>On or off<|"|>,type:<|"|>BOOLEAN<|"|>}},required:[<|"|>on<|"|>],'
    'type:<|"|>OBJECT<|"|>}}<tool|><turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n',
    "FunctionGemma": "<bos><start_of_turn>developer\n<start_function_declaration>declaration:"
    "set_torch{description:<escape>Switch the torch.<escape>,parameters:{properties:{color:{enum:["
    "<escape>red<escape>,<escape>white<escape>],type:<escape>STRING<escape>},on:{description:"
    "<escape>On or off<escape>,type:<escape>BOOLEAN<escape>}},required:[<escape>on<escape>],type:"
    "<escape>OBJECT<escape>}}<end_function_declaration><end_of_turn>\n<start_of_turn>user\nhi"
    "<end_of_turn>\n<start_of_turn>model\n",
}
"""The form in which the models' pages show declarations."""


def encoder(family, *, tools=TOOLS, template=None, decoder=None, **settings):
    _, tokenizer, source = FAMILIES[family]
    return PromptEncoder(
        tokenizer,
        PromptSettings(**{"prompt": "{t}"} | settings),
        chat_template=source if template is None else template,
        max_tokens=5000,
        tools=tools,
        decoder=decoder,
    )


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_functions_are_declared_in_the_first_turn(self, family):
        encode = encoder(family, tools=checked_tools([FLASHLIGHT]))
        assert encode({"t": "hi"}).text == DECLARED[family]

    def test_prompts_are_those_of_transformers(self, family):
        _, tokenizer, source = FAMILIES[family]
        template = ChatTemplate(source, tokenizer.control_pieces, tools=TOOLS)
        system = {"role": "system", "content": "Be brief."}
        for conversation in (HI, [system, *HI], [system, *HI, {"role": "model", "content": "a"}]):
            expected = hugging_face(source, conversation, tools=TOOLS)
            assert markup(template.render(conversation)) == expected

    def test_no_text_of_a_declaration_makes_a_control_token(self, family):
        """Descriptions, names of properties and constants that hold pieces stay text."""
        _, tokenizer, source = FAMILIES[family]
        for piece in tokenizer.control_pieces:
            hostile = {
                "name": "f",
                "description": f"a{piece}b",
                "parameters": {
                    "type": "object",
                    "properties": {f"x{piece}": {"type": "string", "enum": [piece, "y"]}},
                    "required": [f"x{piece}"],
                },
            }
            plain = json.loads(json.dumps(hostile).replace(json.dumps(piece)[1:-1], "p"))
            found, expected = (
                ChatTemplate(source, tokenizer.control_pieces, tools=checked_tools([tool])).render(
                    HI
                )
                for tool in (hostile, plain)
            )
            assert markup(found).count(piece) == markup(expected).count(piece) + 4
            assert [p for p in found if isinstance(p, Control)] == [
                p for p in expected if isinstance(p, Control)
            ]

    def test_the_developer_is_another_name_of_the_system(self, family):
        encode = encoder(family, prompt=None, messages_column="m", system="never mind")
        named = [
            encode({"m": [{"role": role, "content": "Be brief."}, *HI]}).token_ids
            for role in ("developer", "system")
        ]
        assert named[0] == named[1]
        late = [*HI, {"role": "developer", "content": "x"}, *HI]
        with pytest.raises(RecordError, match="system message only at the head"):
            encode({"m": late})

    def test_the_result_of_a_function_ends_a_completion(self, family):
        pieces, tokenizer, _ = FAMILIES[family]
        for tools in (TOOLS, ()):
            expected = (tokenizer.control_pieces[pieces.response],)
            assert encoder(family, tools=tools).stop_token_ids == expected

    @pytest.mark.parametrize(
        ("options", "got"),
        [
            ({"template": TEMPLATES["gemma3"]}, "whose chat template declares .* that ignores"),
            ({"prompt_format": "raw"}, "got a prompt without a chat template"),
            ({"decoder": Decoder(model_type="t5gemma", max_tokens=9)}, "got an encoder-decoder"),
        ],
    )
    def test_models_that_cannot_be_told_are_refused(self, family, options, got):
        with pytest.raises(OptionsError, match=f"^tools: expected .*{got}"):
            encoder(family, **options)


def test_a_vocabulary_without_calls_is_refused():
    _, _, source = FAMILIES["FunctionGemma"]
    with pytest.raises(OptionsError, match="got one without control pieces for calls"):
        PromptEncoder(
            fake_models.TOKENIZER, PromptSettings(prompt="{t}"), chat_template=source,
            max_tokens=900, tools=TOOLS,
        )  # fmt: skip


def test_a_template_may_write_declarations_as_json():
    source = "<bos>{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{{ messages[0].content }}"
    tools = checked_tools([{"name": "f", "description": "a<bos>b"}])
    parts = ChatTemplate(source, ["<bos>"], tools=tools).render(HI)
    assert markup(parts) == hugging_face(source, HI, tools=tools)
    assert [part.piece for part in parts if isinstance(part, Control)] == ["<bos>"]


def test_a_template_that_fails_on_tools_is_refused():
    source = "{% for t in tools or [] %}{{ raise_exception('no tools') }}{% endfor %}{{ messages }}"
    with pytest.raises(OptionsError, match="one user message, and these tools, got: no tools"):
        ChatTemplate(source, ["<bos>"], tools=TOOLS)


def test_bare_functions_are_tools():
    wrapped = [{"type": "function", "function": function} for function in (WEATHER, STOP)]
    assert checked_tools(wrapped) == checked_tools((WEATHER, STOP)) == wrapped
    assert checked_tools([{"function": STOP}]) == wrapped[1:]
    nothing = {"name": "a", "parameters": None, "strict": True, "return": {"type": "string"}}
    assert checked_tools([nothing])[0]["function"].keys() == {"name", "strict", "return"}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({}, r"tools: expected a list of at least one function, got \{\}"),
        ([], r"tools: expected a list of at least one function, got \[\]"),
        ("f", "tools: expected a list of at least one function, got 'f'"),
        ([STOP, 3], r"tools\[1\]: expected a function, got 3"),
        ([STOP, STOP], "tools: expected each name once, got 'stop' twice"),
        ([{"function": 3}], r"tools\[0\]\.function: expected a name, .* got 3"),
        ([{"type": "retrieval", "function": STOP}], r"tools\[0\]\.type: expected function, got"),
        ([{"function": STOP, "typ": 1}], r"tools\[0\]: .* got 'typ'; did you mean type\?"),
        ([{"name": "f", "parameter": {}}], "got 'parameter'; did you mean parameters?"),
        ([{"name": "f", "desription": ""}], "got 'desription'; did you mean description?"),
        ([{"name": "get weather"}], r"tools\[0\]\.name: expected at most 64 letters, digits, _"),
        ([{"name": "f" * 65}], r"tools\[0\]\.name: expected at most 64"),
        ([{"description": "x"}], r"tools\[0\]\.name: expected at most 64 .* got None"),
        ([{"name": "f", "description": None}], r"tools\[0\]\.description: expected a text, got"),
        ([{"name": "f", "parameters": []}], "expected a JSON Schema of type object, got"),
        ([{"name": "f", "parameters": {"type": "array"}}], "expected a JSON Schema of type object"),
    ],
)
def test_what_is_no_declaration_is_refused_by_its_place(tools, message):
    with pytest.raises(OptionsError, match=message):
        checked_tools(tools)


def test_names_of_parameters_are_data_too_even_where_a_template_hides_whose_they_are():
    """`tojson` writes plain text, in which a name that looks like a control piece is allowed."""
    schema = {"type": "object", "properties": {"<turn|>": {"type": "string"}}}
    tools = checked_tools([{"name": "f", "parameters": schema}])
    source = "{{ tools | tojson }}{{ messages[0].content }}"
    template = ChatTemplate(source, ["<turn|>"], tools=tools)
    parts = template.render([{"role": "user", "content": "a"}])
    assert [type(part) for part in parts] == [Text]
    assert "<turn|>" in parts[0].text
    [key] = traced({"name": "f"})
    assert origins(key) == bytes([ROW]) * 4
