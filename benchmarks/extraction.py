"""Checks that extraction always gives valid JSON of its schema, on real text with the real model.

    python -m benchmarks.extraction --model models/gemma-3-270m --rows 300

Each text goes through the whole task once per schema, from a row to typed columns. Some texts run
again with few more tokens than the shortest valid output needs. Every output is parsed, checked by
jsonschema with its formats, and compared with the value of the typed column.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa

from beam_gemma.engine.engine import Engine
from beam_gemma.engine.sampling import SamplingParams
from beam_gemma.inputs.prompt_encoder import PromptEncoder
from beam_gemma.inputs.row import Row
from beam_gemma.model.artifact import Artifact
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.monitoring.progress import METER
from beam_gemma.runtime.limits import Limits
from beam_gemma.structured.constraint import Constraint
from beam_gemma.structured.output import EXTRACTED, StructuredOutput
from beam_gemma.tasks.generate import GenerateSettings, Generator
from beam_gemma.tasks.open_model import start_engine
from benchmarks.reviews import SAMPLE, first_rows
from benchmarks.table import table

TESTS = Path(__file__).parent.parent / "tests/data"
MAX_TOKENS = 160
PRESSURE = (0, 1, 2, 5, 10, 20)
"""Spare tokens beyond the length of the shortest valid output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """The results of one schema with one token limit."""

    schema: str
    num_shortest: int
    max_tokens: int
    results: Sequence[Mapping[str, Any]]
    problems: Sequence[str]
    secs: float

    @property
    def row(self) -> tuple[str, ...]:
        """Line of the table."""
        lengths = [result["num_completion_tokens"] or 0 for result in self.results]
        return (
            self.schema,
            f"{self.num_shortest}",
            f"{self.max_tokens}",
            f"{len(self.results)}",
            f"{len(self.results) - len(self.problems)}",
            f"{sum(lengths) / len(lengths):.1f}",
            f"{max(lengths)}",
            f"{self.secs:.1f}",
        )


class Extraction:
    """The model, and texts to extract values from."""

    def __init__(self, artifact: Artifact, prompt: str, rows: Sequence[Row]) -> None:
        self._artifact = artifact
        self._prompt = prompt
        self._rows = rows
        self._constraints: dict[str, Constraint] = {}
        self.tokenizer = Tokenizer.from_file(artifact.tokenizer_path)
        self.engine: Engine = start_engine(artifact, "generate", "cpu", Limits())

    def run(
        self,
        name: str,
        schema: Mapping[str, Any],
        *,
        max_tokens: int | None = None,
        spare_tokens: int = 0,
        num_rows: int | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> Turn:
        """Extract values from the rows and check the results.

        Args:
            name: Name of the schema.
            schema: The JSON Schema of the values to extract.
            max_tokens: Token limit; None for the shortest valid output plus `spare_tokens`.
            spare_tokens: Tokens beyond the shortest valid output, if `max_tokens` is None.
            num_rows: Number of rows from the first; None for all.
            sampling: Sampling parameters; greedy by default.
        """
        constraint = self._constraint(name, schema)
        max_tokens = max_tokens or constraint.num_shortest + spare_tokens
        settings = GenerateSettings(
            prompt=self._prompt,
            sampling=SamplingParams(max_tokens=max_tokens, **(sampling or {})),
            structured=StructuredOutput(json_schema=schema, completion=True),
        )
        generate = self.generator(settings, constraint)
        start = time.perf_counter()
        results = generate(self._rows[:num_rows])
        secs = time.perf_counter() - start
        return Turn(
            schema=name,
            num_shortest=constraint.num_shortest,
            max_tokens=max_tokens,
            results=results,
            problems=list(problems(results, schema, max_tokens)),
            secs=secs,
        )

    def generator(self, settings: GenerateSettings, constraint: Constraint) -> Generator:
        """Return a generator that completes rows with these settings."""
        encoder = PromptEncoder(
            self.tokenizer,
            settings,
            chat_template=self._artifact.chat_template,
            max_tokens=settings.max_prompt(self._artifact.config.max_position_embeddings),
        )
        return Generator(self.engine, encoder, settings, constraint=constraint, on_result=METER.add)

    def constraint(self, structured: StructuredOutput) -> Constraint:
        """Return the constraint that makes completions follow a structured output."""
        return Constraint(structured.language, self.tokenizer, self._artifact.eos_token_ids)

    def _constraint(self, name: str, schema: Mapping[str, Any]) -> Constraint:
        if name not in self._constraints:
            self._constraints[name] = self.constraint(StructuredOutput(json_schema=schema))
        return self._constraints[name]


def problems(
    results: Sequence[Mapping[str, Any]], schema: Mapping[str, Any], max_tokens: int
) -> Iterator[str]:
    """Yield a description of each invalid result."""
    formats = jsonschema.Draft202012Validator.FORMAT_CHECKER
    validator = jsonschema.Draft202012Validator(schema, format_checker=formats)
    structured = StructuredOutput(json_schema=schema)
    kind = structured.columns[0].type
    for number, result in enumerate(results):
        text = result["completion"]
        try:
            assert result["error"] is None, result["error"]
            assert result["finish_reason"] == "stop", result["finish_reason"]
            assert result["num_completion_tokens"] <= max_tokens, result["num_completion_tokens"]
            validator.validate(json.loads(text))
            (typed,) = pa.array([result[EXTRACTED]], kind).to_pylist()
            (again,) = pa.array([structured.values_of(text)[EXTRACTED]], kind).to_pylist()
            assert typed == again, typed
        except (AssertionError, ValueError, jsonschema.ValidationError, pa.ArrowException) as error:
            yield f"row {number}: {type(error).__name__}: {error}: {text!r}"


def schemas() -> dict[str, Mapping[str, Any]]:
    """Return the test schemas by name."""
    paths = sorted((TESTS / "schemas").glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def main() -> int:
    """Run all schemas and print the table; return 1 if an output is not valid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="exported model folder")
    add("--input", default=str(SAMPLE), help="table of texts (default: film reviews)")
    add("--prompt", default="Review: {sentence}\nAs JSON: ", help="template over its columns")
    add("--rows", type=int, default=300, help="texts (default: 300)")
    add("--pressed_rows", type=int, default=20, help="of these with little room (default: 20)")
    add("--temperature", type=float, default=0.0, help="of all draws (default: 0, none)")
    flags = parser.parse_args()
    rows = first_rows(flags.input, flags.rows)
    extraction = Extraction(Artifact.open(flags.model), flags.prompt, rows)
    sampling = {"temperature": flags.temperature}
    turns = []
    for name, schema in schemas().items():
        turns.append(extraction.run(name, schema, max_tokens=MAX_TOKENS, sampling=sampling))
        turns += [
            extraction.run(
                name, schema, spare_tokens=spare, num_rows=flags.pressed_rows, sampling=sampling
            )
            for spare in PRESSURE
        ]
        for turn in turns[-1 - len(PRESSURE) :]:
            print("  ".join(turn.row), *turn.problems[:3], sep="\n  ", file=sys.stderr)
        print(turns[-1 - len(PRESSURE)].results[0]["completion"], file=sys.stderr)
    header = (
        "schema", "shortest", "max_tokens", "rows", "valid", "mean tokens", "most tokens", "s"
    )  # fmt: skip
    print(table(header, [turn.row for turn in turns]))
    return int(any(turn.problems for turn in turns))


if __name__ == "__main__":
    sys.exit(main())
