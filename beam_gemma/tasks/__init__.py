"""Tasks to run on rows: generate, classify, moderate and embed."""
