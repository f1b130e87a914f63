"""Continuous batching: token ids in, token ids, scores or vectors out."""
