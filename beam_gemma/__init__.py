"""Generate, embed and classify texts and pictures with Gemma in Apache Beam pipelines.

A pipeline imports what it needs from here:

    from beam_gemma import GemmaGenerateModelHandler, Generate, GenerateSettings

Each name is loaded when it is first used, so `import beam_gemma` loads neither Beam nor ONNX
Runtime. Workers need numpy, onnxruntime, sentencepiece, pyarrow and Beam, never torch or
transformers. Models are exported by the `export` package of the same repository.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beam_gemma.engine.sampling import SamplingParams as SamplingParams
    from beam_gemma.errors import ArtifactError as ArtifactError
    from beam_gemma.errors import BalanceError as BalanceError
    from beam_gemma.errors import BeamGemmaError as BeamGemmaError
    from beam_gemma.errors import BudgetError as BudgetError
    from beam_gemma.errors import CheckpointError as CheckpointError
    from beam_gemma.errors import ConfigError as ConfigError
    from beam_gemma.errors import DeviceError as DeviceError
    from beam_gemma.errors import EngineError as EngineError
    from beam_gemma.errors import FailuresError as FailuresError
    from beam_gemma.errors import OptionsError as OptionsError
    from beam_gemma.errors import PromptTooLongError as PromptTooLongError
    from beam_gemma.errors import RecordError as RecordError
    from beam_gemma.errors import StorageError as StorageError
    from beam_gemma.inference.handlers import GemmaClassifyModelHandler as GemmaClassifyModelHandler
    from beam_gemma.inference.handlers import GemmaEmbedModelHandler as GemmaEmbedModelHandler
    from beam_gemma.inference.handlers import GemmaGenerateModelHandler as GemmaGenerateModelHandler
    from beam_gemma.inference.media_files import AudioReading as AudioReading
    from beam_gemma.inference.media_files import ImageReading as ImageReading
    from beam_gemma.inference.ml_transform import GemmaTextEmbeddings as GemmaTextEmbeddings
    from beam_gemma.inference.transforms import Classify as Classify
    from beam_gemma.inference.transforms import Embed as Embed
    from beam_gemma.inference.transforms import Generate as Generate
    from beam_gemma.jobs.infer_table import InferTable as InferTable
    from beam_gemma.jobs.write_table import WriteTable as WriteTable
    from beam_gemma.runtime.limits import Limits as Limits
    from beam_gemma.structured.output import StructuredOutput as StructuredOutput
    from beam_gemma.tables.open_table import ReadTable as ReadTable
    from beam_gemma.tasks.generate import GenerateSettings as GenerateSettings
    from beam_gemma.tasks.moderate import ModerateSettings as ModerateSettings
    from beam_gemma.tasks.moderate import Policy as Policy
    from beam_gemma.tasks.questions import ClassifySettings as ClassifySettings
    from beam_gemma.tasks.questions import Shot as Shot
    from beam_gemma.tasks.text_encoder import EmbedSettings as EmbedSettings

# ONNX Runtime's official builds send telemetry unless this is set before they are imported. It is
# set here so that the exporter and all child processes have it too.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

__version__ = "0.12.0"
PUBLIC = {
    "SamplingParams": "beam_gemma.engine.sampling",
    "ArtifactError": "beam_gemma.errors",
    "BalanceError": "beam_gemma.errors",
    "BeamGemmaError": "beam_gemma.errors",
    "BudgetError": "beam_gemma.errors",
    "CheckpointError": "beam_gemma.errors",
    "ConfigError": "beam_gemma.errors",
    "DeviceError": "beam_gemma.errors",
    "EngineError": "beam_gemma.errors",
    "FailuresError": "beam_gemma.errors",
    "OptionsError": "beam_gemma.errors",
    "PromptTooLongError": "beam_gemma.errors",
    "RecordError": "beam_gemma.errors",
    "StorageError": "beam_gemma.errors",
    "GemmaClassifyModelHandler": "beam_gemma.inference.handlers",
    "GemmaEmbedModelHandler": "beam_gemma.inference.handlers",
    "GemmaGenerateModelHandler": "beam_gemma.inference.handlers",
    "AudioReading": "beam_gemma.inference.media_files",
    "ImageReading": "beam_gemma.inference.media_files",
    "GemmaTextEmbeddings": "beam_gemma.inference.ml_transform",
    "Classify": "beam_gemma.inference.transforms",
    "Embed": "beam_gemma.inference.transforms",
    "Generate": "beam_gemma.inference.transforms",
    "InferTable": "beam_gemma.jobs.infer_table",
    "Limits": "beam_gemma.runtime.limits",
    "ReadTable": "beam_gemma.tables.open_table",
    "StructuredOutput": "beam_gemma.structured.output",
    "WriteTable": "beam_gemma.jobs.write_table",
    "GenerateSettings": "beam_gemma.tasks.generate",
    "ModerateSettings": "beam_gemma.tasks.moderate",
    "Policy": "beam_gemma.tasks.moderate",
    "ClassifySettings": "beam_gemma.tasks.questions",
    "Shot": "beam_gemma.tasks.questions",
    "EmbedSettings": "beam_gemma.tasks.text_encoder",
}
"""The module that defines each public name."""


def __getattr__(name: str) -> Any:
    """Load a public name."""
    if name in PUBLIC:
        return getattr(importlib.import_module(PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
