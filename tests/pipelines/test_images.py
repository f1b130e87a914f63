"""Jobs over tables with pictures, however these hold them, end to end with a tiny model."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_gemma.batches import HELD_IN
from beam_gemma.cli import run as cli
from pipelines import classify, generate
from tests.doubles.seeing import picture, seeing_folder
from tests.doubles.vision_models import IMAGE_SIZE
from tests.doubles.workers_path import WORKERS_PATH

ROOT = Path(__file__).parents[2]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
DATASETS = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
"""Metadata that Hugging Face's `datasets` writes beside a table with pictures."""
NUM = 6
PROMPT = ("--prompt={image} is {text}", "--max_tokens=3", "--logprob", "--ignore_eos")


@pytest.fixture(scope="module")
def model():
    """Folder of a tiny Gemma 3 that takes pictures."""
    return seeing_folder()


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process; return exit code, output and errors."""

    def run_with(*flags, module=generate):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
        code = cli.exit_code(module.main)
        return code, *capsys.readouterr()

    return run_with


@pytest.fixture
def folder(tmp_path):
    """A folder with files of pictures; `copy.png` is the same as `0.png`."""
    (tmp_path / "in/pictures").mkdir(parents=True)
    for number in range(NUM):
        (tmp_path / f"in/pictures/{number}.png").write_bytes(picture(number))
    (tmp_path / "in/pictures/copy.png").write_bytes(picture(0))
    (tmp_path / "in/pictures/text.png").write_bytes(b"no picture at all")
    return tmp_path / "in"


def table_of(images, kind, **columns):
    """Return a table of pictures in a column `image`, each with the same text."""
    return pa.table({"image": pa.array(images, kind), "text": ["so"] * len(images), **columns})


@pytest.fixture
def hugging_face(folder):
    """A Parquet file as `datasets` writes it."""
    rows = [{"bytes": picture(number), "path": f"{number}.png"} for number in range(NUM)]
    path = folder / "hf.parquet"
    table = table_of(rows, STRUCT, id=range(NUM)).replace_schema_metadata(DATASETS)
    pq.write_table(table, path, row_group_size=2)
    return path


def written(folder):
    """Return the rows of an output."""
    files = sorted(folder.glob("x-*"))
    if files[0].suffix == ".parquet":
        return pq.read_table(files[0]).to_pylist() if len(files) == 1 else rows_of(files)
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def rows_of(files):
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def names_in(folder):
    """Return what lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def results(rows):
    """Return what the model says of each row; the log-probabilities tell pictures apart."""
    return [(row["completion"], row["logprob"], row["error"]) for row in rows]


@pytest.fixture
def wanted(run, model, hugging_face, tmp_path):
    """Results of the first pictures, from a table that holds their bytes."""
    out = tmp_path / "wanted"
    flags = (f"--input={hugging_face}", f"--output={out}/x.parquet", "--image_column=image")
    code, stdout, stderr = run(f"--model={model}", *flags, *PROMPT)
    assert code == 0, stderr
    assert stdout.startswith(f"read {NUM} = ok {NUM} + failed 0 = written {NUM} rows; ")
    found = results(written(out))
    assert len(set(found)) == NUM
    return found


def test_a_table_of_datasets_comes_back_as_it_was(wanted, hugging_face, tmp_path):
    (file,) = (tmp_path / "wanted").glob("x-*.parquet")
    given, back = pq.read_table(hugging_face), pq.read_table(file)
    assert back.select(given.schema.names).equals(given)
    assert back.schema.metadata[b"huggingface"] == DATASETS["huggingface"].encode()
    record = (tmp_path / "wanted/_x.run.json").read_text()
    settings = json.loads(record)["tasks"][0]["settings"]
    assert settings["image_columns"] == ["image"]
    assert base64.b64encode(picture(0)).decode()[:40] not in record
    assert not os.environ.get(HELD_IN)
    assert wanted[0] != wanted[1]


@pytest.mark.parametrize("kind", ["paths", "bytes", "structs of paths", "lists", "lines", "uris"])
def test_however_rows_hold_pictures_the_results_are_the_same(
    run, model, folder, wanted, tmp_path, kind
):
    names = [f"pictures/{number}.png" for number in range(NUM)]
    values, arrow = {
        "paths": (names, pa.string()),
        "uris": ([f"file://{folder}/{name}" for name in names], pa.large_string()),
        "bytes": ([picture(number) for number in range(NUM)], pa.binary()),
        "structs of paths": ([{"bytes": None, "path": name} for name in names], STRUCT),
        "lists": ([[{"bytes": None, "path": name}] for name in names], pa.list_(STRUCT)),
        "lines": (names, pa.string()),
    }[kind]
    table, suffix = table_of(values, arrow), "jsonl" if kind == "lines" else "parquet"
    if kind == "lines":
        lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
        (folder / "in.jsonl").write_text(lines)
    else:
        pq.write_table(table, folder / "in.parquet")
    code, _, stderr = run(
        f"--model={model}", f"--input={folder}/in.{suffix}",
        f"--output={tmp_path}/out/x.{suffix}", "--image_column=image", *PROMPT,
    )  # fmt: skip
    assert code == 0, stderr
    rows = written(tmp_path / "out")
    assert results(rows) == wanted
    assert [row["image"] for row in rows] == values


@pytest.mark.parametrize("mode", ["multi_threading", "multi_processing"])
def test_threads_and_processes_say_the_same(run, model, folder, wanted, tmp_path, mode):
    """There are as many rows as make several groups, which several workers share."""
    names = [f"pictures/{number % NUM}.png" for number in range(40 * NUM)]
    ids = [str(number // NUM) for number in range(len(names))]
    table = table_of(names, pa.string(), id=ids)
    pq.write_table(table, folder / "in.parquet", row_group_size=50)
    flags = (f"--model={model}", f"--input={folder}/in.parquet", "--image_column=image", *PROMPT)
    # Drawn rows are not merged, and at the lowest temperature the likeliest token is drawn.
    flags += ("--temperature=1e-6", "--seed=1", "--key_column=id")
    code, _, stderr = run(
        *flags, f"--output={tmp_path}/out/x.parquet",
        f"--direct_running_mode={mode}", "--direct_num_workers=2",
    )  # fmt: skip
    assert code == 0, stderr
    found = results(written(tmp_path / "out"))
    assert [(text, error) for text, _, error in found] == [
        (text, error) for text, _, error in wanted * 40
    ]
    assert names_in(tmp_path / "out") == ["_x.run.json", "x-00000-of-00001.parquet"]


def test_equal_files_are_one_request_and_bad_ones_are_errors_of_their_rows(
    run, model, folder, wanted, tmp_path
):
    names = ["0", "copy", "text", "none", "1"]
    rows = [f"pictures/{name}.png" for name in names]
    rows += [None, "../secret.png", "http://localhost/0.png", "pictures"]
    pq.write_table(table_of(rows, pa.string()), folder / "in.parquet")
    flags = (
        f"--model={model}", f"--input={folder}/in.parquet", f"--output={tmp_path}/out/x.jsonl",
        "--image_column=image", *PROMPT,
    )  # fmt: skip
    code, stdout, stderr = run(*flags)
    assert code == 0, stderr
    assert stdout.startswith("read 9 = ok 3 + failed 6 = written 9 rows; ")
    assert stdout.endswith("; 1 rows asked what others ask\n")
    found = results(written(tmp_path / "out"))
    assert [found[i] for i in (0, 1, 4)] == [wanted[0], wanted[0], wanted[1]]
    errors = [error for _, _, error in found if error]
    assert len(set(errors)) == 6
    assert all(error.startswith("column 'image': expected ") for error in errors)
    small = tmp_path / "small"
    code, stdout, stderr = run(*flags, f"--output={small}/x.jsonl", "--max_image_bytes=100")
    assert stdout.startswith("read 9 = ok 0 + failed 9 = written 9 rows; ")
    code, stdout, stderr = run(
        *flags, f"--output={tmp_path}/none/x.jsonl", "--allow_missing_images", "--prompt=so {text}"
    )
    assert stdout.startswith("read 9 = ok 4 + failed 5 = written 9 rows; ")


def test_pictures_in_messages_are_fetched_too(run, model, folder, tmp_path):
    def said(*parts):
        return [{"role": "user", "content": [*parts, {"type": "text", "text": "so"}]}]

    def shown(name):
        return {"type": "image", "path": f"pictures/{name}.png"}

    rows = [said(*map(shown, names)) for names in ("0", ["copy"], "10", "1", ["none"], [])]
    lines = [json.dumps({"chat": chat}) + "\n" for chat in rows]
    (folder / "in.jsonl").write_text("".join(lines))
    code, stdout, stderr = run(
        f"--model={model}", f"--input={folder}/in.jsonl", f"--output={tmp_path}/out/x.jsonl",
        "--messages_column=chat", "--chat_template=gemma", *PROMPT[1:],
    )  # fmt: skip
    assert code == 0, stderr
    assert stdout.startswith("read 6 = ok 5 + failed 1 = written 6 rows; ")
    assert stdout.endswith("; 1 rows asked what others ask\n")
    found = written(tmp_path / "out")
    assert [row["chat"] for row in found] == rows
    said_of = results(found)
    assert said_of[0] == said_of[1]
    assert len(set(said_of)) == 5
    assert "none at 'pictures/none.png'" in said_of[4][2]


def test_a_dry_run_and_a_report_show_prompts_and_no_bytes(run, model, hugging_face, tmp_path):
    page = tmp_path / "page.html"
    flags = (
        f"--model={model}", f"--input={hugging_face}", f"--output={tmp_path}/out/x.jsonl",
        "--image_column=image", *PROMPT,
    )  # fmt: skip
    code, stdout, _ = run(*flags, "--dry_run")
    assert code == 0
    assert "[picture]" in stdout
    assert f"tokens in all: {NUM * 27} prompt tokens, {NUM * 27} of them" in stdout, stdout
    assert run(*flags, f"--report={page}", "--report_rows=2")[0] == 0
    text = page.read_text()
    assert f"file, {len(picture(0)):,} bytes" in text
    assert base64.b64encode(picture(0)).decode()[:40] not in text


def test_labels_are_scored_beside_pictures_and_after_shots_with_pictures(
    run, model, hugging_face, folder, tmp_path
):
    shots = table_of([f"pictures/{n}.png" for n in (4, 5)], pa.string(), label=["a", "b"])
    pq.write_table(shots, folder / "shots.parquet")
    flags = (
        f"--model={model}", f"--input={hugging_face}", "--image_column=image",
        "--prompt={image}{text}", "--labels=a,b",
    )  # fmt: skip
    few = (f"--fewshot_file={folder}/shots.parquet", "--label_column=label")
    for name, more in (("plain", ()), ("shots", few)):
        code, _, stderr = run(*flags, f"--output={tmp_path}/{name}/x.jsonl", *more, module=classify)
        assert code == 0, stderr
    plain, shot = (written(tmp_path / name) for name in ("plain", "shots"))
    assert len({row["scores"][0] for row in plain}) == NUM
    assert all(row["error"] is None for row in [*plain, *shot])
    lengths = [[row["num_prompt_tokens"] for row in rows] for rows in (plain, shot)]
    assert min(lengths[1]) > max(lengths[0]) + 16


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--image_column=text", "--image_size=57"], "image_size: expected 56, that of "),
        (["--image_column=id"], "column 'id': expected bytes, a path or URI as string, struct<"),
        (["--image_column=none"], "column 'none': expected in the table, got "),
        (["--image_column=image", "--max_image_bytes=0"], "--max_image_bytes: expected a whole"),
    ],
)
def test_what_cannot_work_is_refused_before_the_job(
    run, model, hugging_face, tmp_path, flags, error
):
    code, _, stderr = run(
        f"--model={model}", f"--input={hugging_face}", f"--output={tmp_path}/out/x.jsonl",
        "--prompt=so", "--max_tokens=3", *flags,
    )  # fmt: skip
    assert code == cli.USAGE
    assert error in stderr
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tower_is_refused(run, tiny_gemma3, hugging_face, tmp_path):
    flags = (f"--input={hugging_face}", f"--output={tmp_path}/out/x.jsonl", "--prompt=so")
    for more in (["--image_column=image"], ["--image_size=56"]):
        code, _, stderr = run(
            f"--model={tiny_gemma3.artifact.path}", *flags, "--max_tokens=3", *more
        )
        assert code == cli.USAGE
        assert "image_columns: expected a model that takes pictures, for" in stderr
    assert IMAGE_SIZE["gemma3"] == 56


def test_a_model_without_the_graph_of_its_tower_is_refused(run, model, hugging_face, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["signatures"] = [s for s in manifest["signatures"] if s["head"] != "vision"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    flags = (f"--model={folder}", f"--input={hugging_face}", f"--output={tmp_path}/out/x.jsonl")
    code, _, stderr = run(*flags, "--image_column=image", *PROMPT)
    assert code == cli.USAGE
    assert "expected a graph to see on cpu, got generate on cpu, classify on cpu; export" in stderr
    assert stderr.endswith("again without --text_only, with --device cpu\n")
    assert not (tmp_path / "out").exists()


def test_a_killed_job_goes_on_where_it_was(run, model, folder, tmp_path):
    rows = [f"pictures/{number % NUM}.png" for number in range(40)]
    texts = pa.array([f"so {number}" for number in range(40)])
    table = pa.table({"image": rows, "text": texts})
    pq.write_table(table, folder / "many.parquet", row_group_size=10)
    flags = [
        f"--model={model}", f"--input={folder}/many.parquet",
        f"--output={tmp_path}/out/x.parquet", "--image_column=image", "--max_num_seqs=4", *PROMPT,
    ]  # fmt: skip
    report = tmp_path / "report.json"
    killed = subprocess.run(
        [sys.executable, "-m", "tests.faults.doomed", "piece:2", str(report), *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": WORKERS_PATH},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list((tmp_path / "out").rglob("held/*"))
    code, stdout, stderr = run(*flags, "--resume")
    assert code == 0, stderr
    assert stdout.startswith("read 40 = ok 40 + failed 0 = written 40 rows; ")
    assert "rows resumed" in stdout
    assert names_in(tmp_path / "out") == ["_x.run.json", "x-00000-of-00001.parquet"]
    whole = tmp_path / "whole"
    assert run(*flags, f"--output={whole}/x.parquet")[0] == 0
    assert written(tmp_path / "out") == written(whole)


@pytest.fixture
def uploaded(gcp, folder):
    """The same pictures on Cloud Storage, in a folder of their own; its URI."""
    uri = f"{gcp.bucket}/{folder.parent.name}"
    gcp.upload(folder, uri)
    return uri


@pytest.mark.timeout(600)
def test_pictures_on_cloud_storage(run, gcp, model, folder, uploaded, wanted, tmp_path):
    places = [f"{uploaded}/pictures/{n}.png" for n in range(NUM)]
    relative = [f"pictures/{n}.png" for n in range(NUM)]
    missing = [f"{uploaded}/pictures/none.png", f"{gcp.bucket}-none/x.png", f"{uploaded}/pictures"]
    pq.write_table(table_of([*places, *missing], pa.string()), folder / "in.parquet")
    pq.write_table(table_of(relative, pa.string()), folder / "beside.parquet")
    gcp.upload(folder, uploaded)
    flags = (f"--model={model}", "--image_column=image", *PROMPT, *gcp.flags)
    code, stdout, stderr = run(
        *flags, f"--input={folder}/in.parquet", f"--output={tmp_path}/out/x.jsonl"
    )
    assert code == 0, stderr
    assert stdout.startswith("read 9 = ok 6 + failed 3 = written 9 rows; ")
    *good, none, no_bucket, no_object = results(written(tmp_path / "out"))
    assert good == wanted
    for name, (_, _, error) in zip(missing, (none, no_bucket, no_object), strict=True):
        assert error == f"column 'image': expected a file that is there, got none at {name!r}"
    code, _, stderr = run(
        *flags, f"--input={uploaded}/beside.parquet", f"--output={tmp_path}/beside/x.jsonl"
    )
    assert code == 0, stderr
    assert results(written(tmp_path / "beside")) == wanted


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["BYTES", "ObjectRef", "paths"])
def test_pictures_in_bigquery(run, gcp, model, uploaded, wanted, tmp_path, kind):
    def choice(values):
        return f"[{', '.join(values)}][OFFSET(x)]"

    files = [f"FROM_BASE64('{base64.b64encode(picture(n)).decode()}')" for n in range(NUM)]
    uri = f"CONCAT('{uploaded}/pictures/', CAST(x AS STRING), '.png')"
    image = {
        "BYTES": choice(files),
        "ObjectRef": f"STRUCT({uri} AS uri, CAST(NULL AS STRING) AS version, 'a.b' AS authorizer)",
        "paths": "CONCAT('pictures/', CAST(x AS STRING), '.png')",
    }[kind]
    name = f"pictures_{kind}"
    table = gcp.fill(name, f"x AS id, {image} AS image, 'so' AS text", NUM)
    code, _, stderr = run(
        f"--model={model}", f"--input={table}", f"--output={tmp_path}/out/x.parquet",
        "--image_column=image", *PROMPT, *gcp.flags,
    )  # fmt: skip
    assert code == 0, stderr
    rows = sorted(written(tmp_path / "out"), key=lambda row: row["id"])
    if kind == "paths":
        error = "column 'image': expected a URI such as gs://, as the table has no folder for paths"
        assert all(row["error"].startswith(error) for row in rows)
    else:
        assert results(rows) == wanted
    if kind == "BYTES":
        assert [row["image"] for row in rows] == [picture(n) for n in range(NUM)]


MEASURE = """
import resource, sys
from beam_gemma.cli import run
from pipelines.generate import main
code = run.exit_code(main)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
sys.exit(code)
"""


def test_memory_does_not_grow_with_the_rows(model, folder, tmp_path):
    """Rows name few files, so that the model has little to do; each brings its 2 MB all the way."""
    for number in range(4):
        (folder / f"pictures/large{number}.bmp").write_bytes(picture(number, (836, 836), "BMP"))

    def peak(num_rows):
        names = [f"pictures/large{number % 4}.bmp" for number in range(num_rows)]
        pq.write_table(table_of(names, pa.string()), folder / "in.parquet")
        done = subprocess.run(
            [
                sys.executable, "-c", MEASURE, f"--model={model}", f"--input={folder}/in.parquet",
                f"--output={tmp_path}/{num_rows}/x.parquet", "--image_column=image", *PROMPT,
            ],
            cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"read {num_rows} = ok {num_rows} + failed 0" in done.stdout
        assert sum(f.stat().st_size for f in (tmp_path / str(num_rows)).iterdir()) < 1 << 20
        return int(done.stdout.split()[-1])

    few, many = peak(60), peak(400)
    assert many < few + 250, (few, many)
