"""Compares classification with transformers: reviews after eight examples, with two labels.

    python -m benchmarks.classify --model models/gemma-3-270m --checkpoint gemma-3-270m.gguf

Our time covers the whole task from rows to result columns, including prompts and tokenization. The
transformers loop gets ready token ids, sorts them by length and scores both labels with one forward
pass over whole prompts, computing logits only at the last position. It tries a few batch sizes on
some of the rows and uses the fastest for all rows. Both systems run one after the other in this
process, in float32, and must choose the same labels.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from beam_gemma.inference.handlers import GemmaClassifyModelHandler
from beam_gemma.inputs.row import Row
from beam_gemma.jobs.fewshot import draw_shots
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.tables.open_table import open_source
from beam_gemma.tasks.labels import join
from beam_gemma.tasks.questions import ClassifySettings, QuestionEncoder
from benchmarks.comparison import Bar, bar_lines
from benchmarks.padding import padded
from benchmarks.reviews import SAMPLE, first_rows
from benchmarks.table import table
from benchmarks.weights import transformers_folder

NUM_FEWSHOT, SEED = 8, 0
LABELS = ("negative", "positive")
BATCH_SIZES = (4, 16, 64)
TRIED_ROWS = 32
BAR = 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One system's run."""

    system: str
    labels: list[int]
    secs: float

    @property
    def rate(self) -> float:
        """Rows per second."""
        return len(self.labels) / self.secs


class Loop:
    """Classifies prompts with transformers, one batch after another."""

    def __init__(self, folder: Path, label_ids: Sequence[int]) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._label_ids = list(label_ids)

    def run(self, prompts: Sequence[tuple[int, ...]], batch_size: int) -> list[int]:
        """Return the index of the label of each prompt."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        labels = [0] * len(prompts)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for i, label in zip(batch, self._batch([prompts[i] for i in batch]), strict=True):
                labels[i] = label
        return labels

    @torch.inference_mode()
    def _batch(self, prompts: list[tuple[int, ...]]) -> list[int]:
        """Return label indices; prompts are padded on the left to end at the last position."""
        ids, mask = padded(prompts)
        logits = self._model(
            ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=1,
            use_cache=False,
        ).logits[:, -1]
        return logits[:, self._label_ids].argmax(dim=1).tolist()


def settings_of(path: str) -> ClassifySettings:
    """Return the classification settings, with examples drawn from the table at `path`."""
    prompt = "Review: {sentence}\nSentiment: "
    shots = draw_shots(
        open_source(path),
        ClassifySettings(prompt=prompt, labels=LABELS),
        "sentiment",
        number=NUM_FEWSHOT,
        seed=SEED,
    )
    return ClassifySettings(prompt=prompt, labels=LABELS, shots=shots, num_fewshot=NUM_FEWSHOT)


def run_ours(model: str, settings: ClassifySettings, rows: Sequence[Row]) -> Turn:
    """Run our task; the time includes computing the examples."""
    handler = GemmaClassifyModelHandler(model, settings, large_model=False)
    classify = handler.load_model()
    start = time.perf_counter()
    results = classify(rows)
    secs = time.perf_counter() - start
    return Turn(system="ours", labels=[result["label_index"] for result in results], secs=secs)


def run_theirs(loop: Loop, prompts: Sequence[tuple[int, ...]]) -> list[Turn]:
    """Try the batch sizes on some rows, and run all rows with the fastest."""
    tried = {size: _timed(lambda n=size: loop.run(prompts[:TRIED_ROWS], n)) for size in BATCH_SIZES}
    best = min(tried, key=lambda size: tried[size][1])
    labels, secs = _timed(lambda: loop.run(prompts, best))
    turns = [
        Turn(system=f"transformers, {size} at once, {TRIED_ROWS} rows", labels=done, secs=taken)
        for size, (done, taken) in tried.items()
    ]
    return [*turns, Turn(system=f"transformers, {best} at once", labels=labels, secs=secs)]


def _timed(work: Callable[[], list[int]]) -> tuple[list[int], float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def main() -> int:
    """Run both systems and print the report; return 1 if a label differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="exported model folder")
    add("--checkpoint", type=Path, required=True, help="GGUF file that it was exported from")
    add("--input", default=str(SAMPLE), help="reviews: sentence and sentiment")
    add("--rows", type=int, default=1000, help="rows (default: 1000)")
    add("--their_rows", type=int, help="of these for transformers, from the first (default: all)")
    flags = parser.parse_args()
    artifact = Artifact.open(flags.model)
    settings = settings_of(flags.input)
    tokenizer = Tokenizer.from_file(artifact.tokenizer_path)
    encode = QuestionEncoder(
        tokenizer,
        settings,
        chat_template=None,
        max_model_len=artifact.config.max_position_embeddings,
    )
    table_rows = first_rows(flags.input, flags.rows)
    questions = [encode(row) for row in table_rows]
    parts = questions[0].prompt.parts
    label_ids = [join(tokenizer, parts, [Text(label)]).token_ids[-1] for label in LABELS]
    prompts = [question.plan.paths[0].token_ids for question in questions]
    loop = Loop(transformers_folder(flags.checkpoint, Path(flags.model)), label_ids)
    theirs = run_theirs(loop, prompts[: flags.their_rows])
    ours = run_ours(flags.model, settings, table_rows)
    print(report(theirs, ours, [row["sentiment"] for row in table_rows]))
    return int(theirs[-1].labels != ours.labels[: len(theirs[-1].labels)])


def report(theirs: list[Turn], ours: Turn, truth: list[int]) -> str:
    """Return the table, the ratio with its target, and the number of equal labels."""
    lines = [
        (
            turn.system,
            str(len(turn.labels)),
            f"{turn.secs:.1f}",
            f"{turn.rate:.1f}",
            f"{sum(map(int.__eq__, turn.labels, truth)) / len(turn.labels):.3f}",
        )
        for turn in (*theirs, ours)
    ]
    header = ("system", "rows", "s", "rows/s", "accuracy")
    bar = Bar(name="rows/s, ours / transformers", value=ours.rate / theirs[-1].rate, least=BAR)
    same = sum(map(int.__eq__, theirs[-1].labels, ours.labels))
    equal = f"labels that are equal: {same} of {len(theirs[-1].labels)}"
    return "\n\n".join([table(header, lines), bar_lines([bar]), equal])


if __name__ == "__main__":
    sys.exit(main())
