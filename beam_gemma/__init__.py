"""Generate, embed and classify text with Gemma in Apache Beam pipelines.

This package is what a Beam worker imports: numpy, onnxruntime, sentencepiece, pyarrow and Beam,
never torch or transformers. Models are exported by the `export` package of the same repository.
"""

__version__ = "0.7.0"
