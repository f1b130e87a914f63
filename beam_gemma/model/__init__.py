"""What an export says of a model: the seam between `export` and the rest of the package."""
