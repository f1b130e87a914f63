"""Flex Templates of the pipelines on Dataflow: metadata and images."""
