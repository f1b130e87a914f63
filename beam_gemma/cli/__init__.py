"""Command line flags, and the job that they describe."""
