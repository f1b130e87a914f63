"""Conversion of rows to prompts and their token ids."""
