"""Labels behind prompts: their own tokens, and a plan that scores them all with the least work."""

import hashlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_gemma.errors import RecordError
from beam_gemma.model.markup import Control, Text
from beam_gemma.model.tokenizer import SPACE, Tokenizer
from beam_gemma.tasks.labels import Continuation, Plan, join, softmax
from tests.doubles.tiny_tokenizer import tiny_tokenizer_model

TOKENIZER = Tokenizer(tiny_tokenizer_model())
BOS = TOKENIZER.bos_token_id
# Characters that merge with their neighbours, that stand alone, and of several bytes.
TEXT = st.text(st.sampled_from(f"the in\n{SPACE}éü<b>"), max_size=12)
LABEL = TEXT.filter(bool)


def own_text(joined: Continuation) -> str:
    return TOKENIZER.decode(joined.token_ids[joined.start :])


def score(prefix: tuple[int, ...], token_id: int) -> float:
    """Return a log-probability that any change of any token changes."""
    digest = hashlib.blake2b(repr((prefix, token_id)).encode(), digest_size=6).digest()
    return -int.from_bytes(digest, "little") / 2**45


def logliks_by_definition(continuations: list[Continuation]) -> list[float]:
    return [
        math.fsum(score(c.token_ids[:i], c.token_ids[i]) for i in range(c.start, len(c.token_ids)))
        for c in continuations
    ]


def logliks_by_plan(plan: Plan) -> list[float]:
    return plan.logliks(
        [[score(p.token_ids[: at + 1], token) for at, token in p.targets] for p in plan.paths]
    )


@given(TEXT, LABEL)
def test_own_tokens_begin_with_the_first_that_covers_a_character_of_the_label(
    prompt: str, label: str
) -> None:
    joined = join(TOKENIZER, [Text(prompt)], [Text(label)])
    assert list(joined.token_ids) == TOKENIZER.encode([Text(prompt + label)])
    num_bytes = len(label.replace(SPACE, " ").encode())
    lengths = [len(TOKENIZER.token_bytes(i)) for i in joined.token_ids[joined.start :]]
    assert sum(lengths) >= num_bytes > sum(lengths[1:])
    assert joined.num_label_tokens == len(lengths)


@pytest.mark.parametrize(
    ("prompt", "label", "own"),
    [
        ("a", "b", "b"),
        ("a ", "the", " the"),
        ("a", " the", " the"),
        ("a ", "b", "b"),
        ("t", "he", "he"),
        ("t", "hin", "thin"),
        ("a\n", "\nb", "\n\nb"),
        ("", "é", "é"),
    ],
)
def test_a_label_takes_along_what_shares_its_first_token(prompt: str, label: str, own: str) -> None:
    assert own_text(join(TOKENIZER, [Text(prompt)], [Text(label)])) == own


def test_control_pieces_cover_nothing() -> None:
    end = Control("<end_of_turn>")
    joined = join(TOKENIZER, [Text("a"), end], [end, Text("b"), end])
    assert [TOKENIZER.token_bytes(i) for i in joined.token_ids[joined.start :]] == [b"b", b""]
    with pytest.raises(RecordError, match="expected some text"):
        join(TOKENIZER, [Text("a")], [end])


@given(st.lists(st.tuples(TEXT, LABEL), min_size=1, max_size=5))
def test_a_plan_scores_what_the_definition_says(texts: list[tuple[str, str]]) -> None:
    continuations = [join(TOKENIZER, [Text(p)], [Text(label)]) for p, label in texts]
    assert logliks_by_plan(Plan(continuations)) == logliks_by_definition(continuations)


@given(TEXT, st.lists(LABEL, min_size=1, max_size=6, unique=True))
def test_a_plan_computes_and_asks_nothing_twice(prompt: str, labels: list[str]) -> None:
    plan = Plan([join(TOKENIZER, [Text(prompt)], [Text(label)]) for label in labels])
    asked = [(p.token_ids[: at + 1], token) for p in plan.paths for at, token in p.targets]
    assert len(asked) == len(set(asked))
    for path in plan.paths:
        others = [p.token_ids for p in plan.paths if p is not path]
        assert all(other[: len(path.token_ids)] != path.token_ids for other in others)
        positions = [position for position, _ in path.targets]
        assert positions == sorted(positions)
        assert positions[-1] == len(path.token_ids) - 1


def plan_of(prompt: str, *labels: str) -> Plan:
    return Plan([join(TOKENIZER, [Text(prompt)], [Text(label)]) for label in labels])


def test_single_tokens_are_one_choice() -> None:
    plan = plan_of("x ", "a", "b", "c")
    assert plan.is_one_choice
    (path,) = plan.paths
    assert list(path.token_ids) == TOKENIZER.encode([Text("x ")])
    assert [position for position, _ in path.targets] == [2, 2, 2]


def test_a_label_that_goes_on_from_another_shares_its_sequence() -> None:
    plan = plan_of("x", "a", "ab", "abc")
    assert not plan.is_one_choice
    (path,) = plan.paths
    assert [position for position, _ in path.targets] == [1, 2, 3]


def test_labels_that_end_their_prompt_differently_are_no_choice_of_one_token() -> None:
    """The space is part of ` the`, but stands alone before `b`."""
    plan = plan_of("x ", "the", "b")
    assert not plan.is_one_choice
    assert [path.targets[0][0] for path in plan.paths] == [1]
    assert plan.paths[0].targets[1][0] == 2


def lm_eval_pair(prompt: str, label: str) -> tuple[list[int], list[int]]:
    """Return context and continuation as lm-evaluation-harness 0.4 cuts them."""
    if num_spaces := len(prompt) - len(prompt.rstrip()):
        label = prompt[-num_spaces:] + label
        prompt = prompt[:-num_spaces]
    whole, context = (TOKENIZER.encode([Text(text)]) for text in (prompt + label, prompt))
    return whole[: len(context)], whole[len(context) :]


WORDS = st.text(st.sampled_from("thein"), min_size=1, max_size=8)


@given(st.text(st.sampled_from("the in\n"), max_size=12), WORDS, WORDS)
def test_a_label_after_one_space_is_what_lm_eval_scores(head: str, last: str, label: str) -> None:
    context, continuation = lm_eval_pair(f"{head}{last} ", label)
    for prompt, text in ((f"{head}{last} ", label), (f"{head}{last}", f" {label}")):
        joined = join(TOKENIZER, [Text(prompt)], [Text(text)])
        own = joined.token_ids[joined.start :]
        # A space that no piece of the label begins with is lm-eval's, the same for all labels.
        extra = continuation[: len(continuation) - len(own)]
        assert [*joined.token_ids] == [*context, *continuation]
        assert TOKENIZER.decode(extra) in ("", " ")


def test_softmax() -> None:
    assert softmax([math.log(1), math.log(3)]) == pytest.approx([0.25, 0.75], abs=1e-15)
    assert softmax([-1e30, -1e30]) == [0.5, 0.5]
    assert sum(softmax([1000.0, 900.0, -1000.0])) == pytest.approx(1.0, abs=1e-15)
