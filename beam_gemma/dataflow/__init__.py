"""Dataflow jobs: pipeline options, GPUs, worker images and staged packages."""
