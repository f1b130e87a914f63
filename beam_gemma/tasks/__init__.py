"""What a row means: generate, classify, moderate and embed."""
