"""The picture half of a model: its tower, its projector, and how pictures join a prompt.

Facts follow the configuration classes and processors of transformers 5.23 (`models/siglip`,
`models/gemma3`, `models/paligemma`).
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from beam_gemma.errors import ConfigError, nearest
from beam_gemma.model.config_reader import Reader, check_factor, check_keys, section_of

Projector = Literal["pooled", "linear", "tower", "patches", "mobilenet"]
Bidirectional = Literal["picture", "prefix", "local", "none"]
Resample = Literal["bilinear", "bicubic"]

VISION_MODEL_TYPES = ("gemma3", "shieldgemma2", "paligemma")
"""Kinds of models in Hugging Face's `config.json` that have a tower of pictures."""
BEGIN_TOKEN, END_TOKEN = "<start_of_image>", "<end_of_image>"
"""Pieces around a picture in Gemma 3."""
OUTER_KEYS = frozenset({
    "_vocab_size", "boi_token_id", "boi_token_index", "eoi_token_id", "eoi_token_index",
    "hidden_size", "ignore_index", "image_token_id", "image_token_index", "mm_tokens_per_image",
    "no_token_index", "projection_dim", "text_config", "tie_word_embeddings", "vision_config",
    "vocab_size", "yes_token_index",
})  # fmt: skip
"""Keys beside `text_config` and `vision_config` in config.json; those that nothing reads are copies
of what the two sections say, or name tokens."""
UNREAD_TOWER_KEYS = ("num_image_tokens", "projection_dim", "projector_hidden_act",
                     "vision_use_head", "vocab_size")  # fmt: skip
"""Keys of `vision_config` that change nothing: copies, and settings of parts that are not used."""
MAX_TOWER_SIZES = {
    "hidden_size": 1 << 14,
    "intermediate_size": 1 << 16,
    "num_hidden_layers": 512,
    "num_attention_heads": 1 << 10,
    "image_size": 1 << 13,
    "patch_size": 1 << 10,
    "mm_tokens_per_image": 1 << 12,
}
"""Largest sizes that are read: at least 8 times those of any released tower."""
MAX_TOKEN_ID = 1 << 22
IMAGE_TOKENS = (70, 140, 280, 560, 1120)
"""Most tokens of a picture that can be chosen where pictures vary in size; source:
`Gemma4ImageProcessorPil` of transformers 5.23."""
MAX_IMAGE_TOKENS = IMAGE_TOKENS[-1]
RESAMPLE: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the filters in `preprocessor_config.json`."""
MIN_CROP_SIZE, MAX_NUM_CROPS, MIN_RATIO = 256, 4, 1.2
"""Parameters of pan and scan: the least height and width of a crop in pixels, the most crops of a
picture, and the least ratio of its sides; source: `images_kwargs` of `Gemma3Processor`."""
PAN_AND_SCAN = {
    "do_pan_and_scan": False,
    "pan_and_scan_min_crop_size": MIN_CROP_SIZE,
    "pan_and_scan_max_num_crops": MAX_NUM_CROPS,
    "pan_and_scan_min_ratio_to_activate": MIN_RATIO,
}
"""What the keys of crops must say; `null` stands for it."""
UNREAD_PROCESSOR_KEYS = (
    "_valid_processor_keys", "auto_map", "crop_size", "data_format", "default_to_square", "device",
    "disable_grouping", "feature_extractor_type", "image_processor_type", "input_data_format",
    "model_input_names", "pad_size", "processor_class", "return_tensors", "size_divisor",
)  # fmt: skip
"""Keys of `preprocessor_config.json` that change no pixel of a picture that is resized."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """A tower of pictures, its projector, and the tokens around a picture in a prompt."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    """Height and width of the pictures that the tower takes, in pixels; 0 if they vary."""
    patch_size: int
    layer_norm_eps: float
    projector: Projector
    """`pooled`: means of patches, a norm and a matrix (Gemma 3); `linear`: a matrix and a bias for
    each patch (PaliGemma); `tower`: the tower of Gemma 4; `patches`: no tower, a projection of each
    square of pixels (Gemma 4 12B); `mobilenet`: the tower of Gemma 3n, and a matrix between two
    norms."""
    num_image_tokens: int
    """Tokens of the decoder that one picture takes, or most of them if pictures vary in size. In
    Gemma 3n the last one is the token behind a picture, which no text has."""
    bidirectional: Bidirectional
    """Tokens that attend in both directions: those of each `picture`, within the window of a layer
    (Gemma 3), the same in layers with a window alone (`local`, the larger Gemma 4), the whole
    `prefix`, which is the prompt, beyond any window (PaliGemma), or `none`."""
    first_position: int
    """Rotary position of the first token of a sequence: 0, or 1 in PaliGemma."""
    image_token_id: int
    """Token id that stands for each token of a picture."""
    begin_token: str | None
    """Control piece before the tokens of a picture, such as `<start_of_image>`; None for none."""
    end_token: str | None
    """Control piece after the tokens of a picture; None for none."""
    resample: Resample
    """Filter by which Pillow makes a picture `image_size` high and wide."""
    image_mean: tuple[float, ...]
    """Mean of each channel; a value from 0 to 1 becomes (value - mean) / std."""
    image_std: tuple[float, ...]
    pooling_kernel_size: int | None = None
    """Patches along the side of a square that is one token, if pictures vary in size."""
    position_embedding_size: int = 0
    """Places along a side that have an embedding, if pictures vary in size."""
    standardize: bool = False
    """True if features are shifted and scaled by learned numbers."""
    use_clipped_linears: bool = False
    """True if products have bounds for what goes in and comes out."""
    image_token: str | None = None
    """Control piece that chat templates write for a picture, if it is not `begin_token`."""
    architecture: str | None = None
    """Name of the tower's layers in `beam_gemma.model.mobilenet_v5`, in Gemma 3n."""
    image_vocab_size: int = 0
    """Rows of the table of tokens that pictures have for themselves, in Gemma 3n."""
    end_token_row: int = 0
    """Row of that table that is the last token of a picture."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vision_config: expected a hidden_size that num_attention_heads "
                f"({self.num_attention_heads}) divides, got {self.hidden_size}"
            )
        if (self.image_size == 0) != (self.pooling_kernel_size is not None):
            raise ConfigError(
                "vision_config: expected an image_size, or a pooling_kernel_size for pictures that "
                f"vary in size, got {self.image_size} and {self.pooling_kernel_size}"
            )
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"vision_config: expected an image_size that patch_size ({self.patch_size}) "
                f"divides, got {self.image_size}"
            )

    @classmethod
    def from_hf(
        cls, raw: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None
    ) -> "VisionConfig":
        """Read the tower of a model that takes pictures from its settings.

        Args:
            raw: Content of `config.json`.
            preprocessor: Content of `preprocessor_config.json`; None for what is published with
                every such model.

        Raises:
            ConfigError: a key is missing, unknown, or requests an unsupported feature.
        """
        model_type = raw.get("model_type")
        if model_type not in VISION_MODEL_TYPES:
            raise ConfigError(
                f"model_type: expected one of {', '.join(VISION_MODEL_TYPES)}, "
                f"got {reprlib.repr(model_type)}"
            )
        check_keys(raw, OUTER_KEYS)
        if not isinstance(raw.get("vision_config"), Mapping):
            raise ConfigError(
                f"vision_config: expected a dictionary in a {model_type} model, got "
                f"{reprlib.repr(raw.get('vision_config'))}"
            )
        tower = _tower(raw["vision_config"])
        is_pali = model_type == "paligemma"
        side = tower["image_size"] // tower["patch_size"]
        count = side**2 if is_pali else _pooled_tokens(raw, side)
        return cls(
            **tower,
            projector="linear" if is_pali else "pooled",
            num_image_tokens=count,
            bidirectional="prefix" if is_pali else "picture",
            first_position=1 if is_pali else 0,
            image_token_id=_image_token_id(raw, is_pali=is_pali),
            begin_token=None if is_pali else BEGIN_TOKEN,
            end_token=None if is_pali else END_TOKEN,
            **_pixels(preprocessor or {}, tower["image_size"], count, is_pali=is_pali),
        )

    @property
    def num_patches(self) -> int:
        """Number of patches of a picture, or most of them if pictures vary in size."""
        if self.pooling_kernel_size is not None:
            return MAX_IMAGE_TOKENS * self.pooling_kernel_size**2
        return (self.image_size // self.patch_size) ** 2

    @property
    def max_pixels(self) -> int:
        """Most pixels of a picture in a size that the model takes."""
        return self.num_patches * self.patch_size**2

    @property
    def image_step(self) -> int:
        """Side in pixels of a square that is one token, if pictures vary in size; else 0."""
        return self.patch_size * (self.pooling_kernel_size or 0)

    @property
    def graph_patch_size(self) -> int:
        """Side in pixels of the patches that a graph takes, if pictures vary in size."""
        return self.image_step if self.projector == "patches" else self.patch_size

    @property
    def piece(self) -> str | None:
        """Control piece that chat templates write for a picture; None for none."""
        return self.image_token or self.begin_token

    def tokens_of(self, height: int, width: int) -> int:
        """Return how many tokens a picture of a size that the model takes is."""
        if not self.image_step:
            return self.num_image_tokens
        return (height // self.image_step) * (width // self.image_step)

    @property
    def head_dim(self) -> int:
        """Width of an attention head of the tower."""
        return self.hidden_size // self.num_attention_heads

    def to_json(self) -> dict[str, Any]:
        """Return a form for the manifest that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "VisionConfig":
        """Read what `to_json` wrote."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return cls(**values)


def _tower(section: Mapping[str, Any]) -> dict[str, Any]:
    """Read `vision_config`; published files leave out what is 224, 3 or 1e-6."""
    reader = Reader(section)
    reader.require("model_type", ("siglip_vision_model",))
    reader.require("hidden_act", ("gelu_pytorch_tanh",))
    reader.require("num_channels", (3,))
    values: dict[str, Any] = {
        "image_size": _size(reader, "image_size", 224),
        **{
            key: _size(reader, key)
            for key in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "patch_size",
            )
        },
        "layer_norm_eps": check_factor("layer_norm_eps", reader.take("layer_norm_eps", 1e-6)),
    }
    for key in UNREAD_TOWER_KEYS:
        reader.take(key, None)
    reader.finish()
    return values


def _size(source: Reader, key: str, *default: int) -> int:
    value = source.take(key, default[0] if default else None)
    limit = MAX_TOWER_SIZES[key]
    if type(value) is not int or not 1 <= value <= limit:
        raise ConfigError(
            f"vision_config: expected {key} as a whole number from 1 to {limit:,}, got "
            f"{reprlib.repr(value)}"
        )
    return value


def _pooled_tokens(raw: Mapping[str, Any], side: int) -> int:
    """Return how many squares of patches Gemma 3 takes the means of."""
    count = _size(Reader(raw), "mm_tokens_per_image", 256)
    root = math.isqrt(count)
    if root**2 != count or side % root:
        raise ConfigError(
            f"mm_tokens_per_image: expected a square number whose root divides {side} patches of "
            f"a side, got {count}"
        )
    return count


def _image_token_id(raw: Mapping[str, Any], *, is_pali: bool) -> int:
    """Return the id that stands for a token of a picture, under either name of its key."""
    names = ("image_token_index", "image_token_id")
    given = [raw[name] for name in names if raw.get(name) is not None]
    if not given and is_pali:
        raise ConfigError(f"config.json: expected the key {names[0]!r}, got none")
    for value in given:
        if type(value) is not int or not 0 <= value < MAX_TOKEN_ID or value != given[0]:
            raise ConfigError(
                f"{names[0]}: expected one whole number from 0 to {MAX_TOKEN_ID:,}, got "
                f"{reprlib.repr(given)}"
            )
    return given[0] if given else 262144


def _pixels(
    settings: Mapping[str, Any], image_size: int, num_image_tokens: int, *, is_pali: bool
) -> dict[str, Any]:
    """Read what makes pixels of a picture; a key that is `null` stands for its default."""
    given = {key: value for key, value in settings.items() if value is not None}
    known = {"image_mean", "image_std", "resample", "size", "rescale_factor", "image_seq_length",
             "do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "do_center_crop",
             "do_pad", *PAN_AND_SCAN, *UNREAD_PROCESSOR_KEYS}  # fmt: skip
    for key in sorted(set(given) - known):
        raise ConfigError(
            f"preprocessor_config.json: the key {reprlib.repr(key)} is not known"
            f"{nearest(key, known)}"
        )
    expected: dict[str, Any] = {
        **dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"), True),
        **dict.fromkeys(("do_center_crop", "do_pad"), False),
        **PAN_AND_SCAN,
        "image_seq_length": num_image_tokens,
    }
    for key, value in expected.items():
        if given.get(key, value) != value:
            raise ConfigError(f"{key}: expected {value}, got {reprlib.repr(given[key])}")
    check_size(given.get("size"), image_size)
    check_rescale(given.get("rescale_factor", 1 / 255))
    return {
        "resample": resample_filter(given.get("resample", 3 if is_pali else 2)),
        "image_mean": _channels("image_mean", given.get("image_mean", (0.5,) * 3)),
        "image_std": _channels("image_std", given.get("image_std", (0.5,) * 3)),
    }


def check_size(size: Any, image_size: int) -> None:
    """Raise ConfigError if a processor's settings make pictures of another height or width."""
    section = {} if size is None else section_of("size", size)
    for key, value in section.items():
        if key not in ("height", "width") or value != image_size:
            raise ConfigError(
                f"size: expected a height and a width of {image_size} as vision_config says, got "
                f"{reprlib.repr(size)}"
            )


def resample_filter(number: Any) -> Resample:
    """Return the filter of Pillow's number in a processor's settings, checked."""
    if type(number) is not int or number not in RESAMPLE:
        raise ConfigError(
            f"resample: expected 2 (bilinear) or 3 (bicubic), got {reprlib.repr(number)}"
        )
    return RESAMPLE[number]


def check_rescale(factor: Any) -> None:
    """Raise ConfigError if a processor's settings scale colors by other than 1 / 255."""
    if type(factor) is not float or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ConfigError(f"rescale_factor: expected 1 / 255, got {reprlib.repr(factor)}")


def check_colors(given: Mapping[str, Any]) -> None:
    """Raise ConfigError if a processor's settings change colors from 0 to 1."""
    mean, std = given.get("image_mean", (0.0,) * 3), given.get("image_std", (1.0,) * 3)
    is_plain = mean in ([0.0] * 3, (0.0,) * 3) and std in ([1.0] * 3, (1.0,) * 3)
    if given.get("do_normalize") and not is_plain:
        raise ConfigError(
            "do_normalize: expected false, or a mean of 0 and a deviation of 1, got "
            f"{reprlib.repr(mean)} and {reprlib.repr(std)}"
        )


def _channels(key: str, values: Any) -> tuple[float, ...]:
    """Return the three numbers of a mean or a deviation."""
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ConfigError(f"{key}: expected three numbers, got {reprlib.repr(values)}")
    for value in values:
        is_number = type(value) in (int, float) and -1e3 < value < 1e3
        if not is_number or (key == "image_std" and value < 1e-3):
            raise ConfigError(
                f"{key}: expected numbers that pixels from 0 to 1 can have, got "
                f"{reprlib.repr(values)}"
            )
    return tuple(float(value) for value in values)
