"""Reads checkpoints: Hugging Face folders, GGUF files, `.ckpt` files and LoRA adapters."""
