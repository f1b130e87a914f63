"""Flex Templates of the pipelines on Dataflow: what they say of themselves, and their images."""
