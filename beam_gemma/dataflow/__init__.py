"""The rules of Dataflow: options, GPUs, images and staged packages."""
