"""Shots out of a table: seeded, the same for all rows, and only from rows that have a label."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_gemma.errors import OptionsError
from beam_gemma.inference import media_files
from beam_gemma.inference.media_files import ImageReading, MediaReading
from beam_gemma.jobs.fewshot import all_shots, draw_shots
from beam_gemma.tables.open_table import open_source
from beam_gemma.tasks.questions import ClassifySettings

SETTINGS = ClassifySettings(prompt="{text}:", labels=(" no", " yes"))


def table_of(folder, **columns):
    path = folder / "in.parquet"
    pq.write_table(pa.table(columns), path)
    return open_source(str(path))


def source_of(folder, num_rows=50, **columns):
    texts = [f"row {i}" for i in range(num_rows)]
    return table_of(folder, text=texts, answer=[i % 2 for i in range(num_rows)], **columns)


def test_a_draw_depends_on_the_seed_alone(tmp_path):
    source = source_of(tmp_path)
    draws = [draw_shots(source, SETTINGS, "answer", number=8, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    texts = [shot.row["text"] for shot in draws[0]]
    assert len(set(texts)) == 9, "eight, and one to spare"
    assert {shot.label for shot in draws[0]} == {0, 1}
    for shot in draws[0]:
        assert shot.row == {"text": shot.row["text"]}
        assert shot.label == int(shot.row["text"][4:]) % 2


def test_a_spare_one_where_there_is_one(tmp_path):
    source = source_of(tmp_path, 4)
    assert len(draw_shots(source, SETTINGS, "answer", number=4, seed=0)) == 4
    assert len(draw_shots(source, SETTINGS, "answer", number=3, seed=0)) == 4
    with pytest.raises(OptionsError, match="at most the 4 rows"):
        draw_shots(source, SETTINGS, "answer", number=5, seed=0)


def test_labels_by_name_or_index(tmp_path):
    names = table_of(tmp_path, text=["a", "b"], answer=["yes", "no "])
    assert [shot.label for shot in all_shots(names, SETTINGS, "answer")] == [1, 0]
    settings = ClassifySettings(prompt="{text}", labels=("{first}", "{second}"))
    choices = table_of(tmp_path, text=["q"], first=["2"], second=["3"], answer=["3"])
    (shot,) = all_shots(choices, settings, "answer")
    assert shot.label == 1
    assert shot.row == {"text": "q", "first": "2", "second": "3"}


def test_rows_without_a_label_or_a_prompt_are_no_shots(tmp_path):
    source = table_of(tmp_path, text=["a", None, "c"], answer=[None, 1, 1])
    assert [shot.row["text"] for shot in all_shots(source, SETTINGS, "answer")] == ["c"]


@pytest.mark.parametrize(
    ("answer", "kind"), [([0, 2], "int"), (["no", "hush"], "str"), ([1, -1], "int")]
)
def test_a_label_that_is_none_is_named_by_its_row(tmp_path, answer, kind):
    table = table_of(tmp_path, text=["a", "hush"], answer=answer)
    with pytest.raises(
        OptionsError, match=rf"in\.parquet, row 1 .*'answer'.* no,  yes, got another {kind};"
    ) as e:
        all_shots(table, SETTINGS, "answer")
    assert "hush" not in str(e.value)


def test_labels_of_rows_are_in_no_error(tmp_path):
    settings = ClassifySettings(prompt="{text}", labels=("{first}", "{second}"))
    columns = {"text": ["q"], "first": ["hush"], "second": ["hush 2"], "answer": ["hush 3"]}
    with pytest.raises(OptionsError, match=r"\{first\}, \{second\}, got another str") as error:
        all_shots(table_of(tmp_path, **columns), settings, "answer")
    assert "hush" not in str(error.value)


def test_a_column_that_is_missing(tmp_path):
    with pytest.raises(OptionsError, match=r"'anser'.*did you mean answer"):
        all_shots(source_of(tmp_path), SETTINGS, "anser")


def test_pictures_are_read_of_drawn_rows_alone(tmp_path, monkeypatch):
    settings = ClassifySettings(
        prompt="{photo} {text}", image_columns=("photo",), labels=("yes", "no")
    )
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(b"%d" % number)
    texts = [f"t{number}" for number in range(20)]
    names = [f"{number}.png" for number in range(20)]
    table = table_of(tmp_path, photo=names, text=texts, answer=["yes"] * 20)
    reading = MediaReading(image=ImageReading(allow_local=True, folder=str(tmp_path)))
    plain = ClassifySettings(prompt="{text}", labels=("yes", "no"))
    wanted = draw_shots(table, plain, "answer", number=3, seed=5)
    read, names_read = media_files._read, []
    monkeypatch.setattr(media_files, "_read", lambda n, *a: names_read.append(n) or read(n, *a))
    shots = draw_shots(table, settings, "answer", number=3, seed=5, reading=reading)
    assert [shot.row["text"] for shot in shots] == [shot.row["text"] for shot in wanted]
    assert sorted(names_read) == sorted(f"{shot.row['text'][1:]}.png" for shot in wanted)
    for shot in shots:
        ((image,),) = (shot.row["photo"],)
        assert image == {"bytes": shot.row["text"][1:].encode(), "error": None}
