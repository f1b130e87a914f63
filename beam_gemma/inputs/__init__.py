"""From the columns of a row to the token ids that a model reads."""
