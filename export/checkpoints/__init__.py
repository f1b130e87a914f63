"""Reads checkpoints: Hugging Face folders, GGUF files, `.ckpt` files, LoRA adapters."""
