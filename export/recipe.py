"""The recipe of an export: what it does to a checkpoint, planned from arguments or from an earlier export."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from ..models.config import check_image_size
from ..models.errors import UsageError
from ..models.files import read_json_object
from ..models.folder_layout import EMBEDS_NAME, MANIFEST_NAME, OUTPUT_NAME
from ..quant.calibration import ImageSet, calibration_images, folder_images
from ..quant.decoder_scheme import DecoderScheme, decoder_scheme
from ..quant.encoder_scheme import EncoderScheme, encoder_scheme
from ..quant.schemes import WEIGHT_SCHEMES
from .options import ExportOptions

ENCODERS = ("coreml", "mlx")
FORMATS = ("coreml", "coreai", "both")
"""The formats of an encoder for Apple's frameworks: a Core ML package, a Core AI asset, or both."""
ASSET_SCHEMES = ("fp16", "int8", "pal8", "pal6", "pal4")
"""The schemes that an asset stores. Scales per block are wrong on the engine in Core AI's beta, and no asset has w8a8's
int8 inputs."""

IO_KINDS = ("float32", "float16", "image")

ATTENTION_TILES = (1, 2, 4)
"""The numbers of parts that the queries of large attention maps are computed in. 1 leaves the program as it is."""

DEPLOYMENT_TARGETS = {"ios17": "iOS17", "ios18": "iOS18"}
"""The oldest system by argument, with coremltools' name for it. macOS 14 and 15 go with them."""

SCHEMES_FROM_IOS18 = frozenset({"int4"})
"""The schemes that need iOS 18, which introduced weights with a scale per block."""

LARGEST_BYTE = 255.0

MLX_DTYPES = ("bf16", "fp32")
"""The types of an encoder in MLX, without float16: clients compute in the stored type, and trained weights overflow
float16 inside the encoder."""

ENCODER_OPTIONS = ("quant", "min_snr", "max_bytes")
DECODER_OPTIONS = ("decoder_bits", "decoder_quantizer", "decoder_avg_bits", "group_size", "quantize_embeddings")
PACKAGE_OPTIONS = ("format", "attention_tiles", "io", "min_os", "with_projector", "recipe", "min_snr", "max_bytes")
"""The options that an encoder in MLX does not have."""


@dataclass(frozen=True)
class PackageInterface:
    """The input and the output of a package, and the oldest system that runs it.

    Raises:
        UsageError: a value is unknown.
    """

    io: str = "float32"
    """`float32` or `float16`: pixels in 0..1 and features of that type. `image`: an RGB image in, float32 out."""
    min_os: str = "ios17"
    with_projector: bool = False
    """True if the package also projects: its output is `image_embeds`, which the decoder takes without a change."""
    attention_tiles: int = 1
    """The number of parts of the queries of large attention maps. It changes no result."""

    def __post_init__(self) -> None:
        if self.io not in IO_KINDS:
            raise UsageError(f"io must be one of {', '.join(IO_KINDS)} (got {self.io!r:.40}).", "io")
        if self.min_os not in DEPLOYMENT_TARGETS:
            known = ", ".join(DEPLOYMENT_TARGETS)
            raise UsageError(f"min_os must be one of {known} (got {self.min_os!r:.40}).", "min_os")
        if type(self.attention_tiles) is not int or self.attention_tiles not in ATTENTION_TILES:
            known = ", ".join(map(str, ATTENTION_TILES))
            raise UsageError(
                f"attention_tiles must be one of {known} (got {self.attention_tiles!r:.40}).", "attention_tiles"
            )

    @property
    def takes_image(self) -> bool:
        """True if the input is an image, false if it is an array."""
        return self.io == "image"

    @property
    def pixel_scale(self) -> float:
        """The factor between pixels in 0..1 and the first convolution's input."""
        return LARGEST_BYTE if self.takes_image else 1.0

    @property
    def output_dtype(self) -> str:
        """The type of the output."""
        return "float16" if self.io == "float16" else "float32"

    @property
    def output_name(self) -> str:
        """The name of the output."""
        return EMBEDS_NAME if self.with_projector else OUTPUT_NAME

    def as_dict(self) -> dict[str, Any]:
        """Returns the manifest's entries."""
        entries = {"io": self.io, "target": self.min_os, "with_projector": self.with_projector}
        return {**entries, "attention_tiles": self.attention_tiles} if self.attention_tiles > 1 else entries


DEFAULT_INTERFACE = PackageInterface()


def interface_for(
    schemes: Collection[str],
    io: str | None = None,
    min_os: str | None = None,
    with_projector: bool | None = None,
    saved: Mapping[str, Any] | None = None,
    attention_tiles: int | None = None,
) -> PackageInterface:
    """Returns the interface for the arguments of an export. None is replaced from `saved`, or by the default.

    Without `min_os` it is for the oldest system that supports the weights' `schemes`.

    Raises:
        UsageError: a value is unknown, or the schemes need a newer system than the requested one.
    """
    saved = saved or {}
    io = saved.get("io", DEFAULT_INTERFACE.io) if io is None else io
    with_projector = saved.get("with_projector", False) if with_projector is None else with_projector
    newer = sorted(SCHEMES_FROM_IOS18 & set(schemes))
    if newer and min_os == "ios17":
        raise UsageError(f"quant={newer[0]!r} needs min_os='ios18' (got min_os='ios17').", "quant", "min_os")
    if min_os is None:
        min_os = "ios18" if newer else saved.get("target", DEFAULT_INTERFACE.min_os)
    if attention_tiles is None:
        attention_tiles = saved.get("attention_tiles", DEFAULT_INTERFACE.attention_tiles)
    return PackageInterface(str(io), str(min_os), bool(with_projector), attention_tiles)


@dataclass(frozen=True)
class MLXScheme(EncoderScheme):
    """The storage of an encoder in MLX. Raises UsageError for an unknown type."""

    quant: str = MLX_DTYPES[0]

    def __post_init__(self) -> None:
        if self.quant not in MLX_DTYPES:
            raise UsageError(
                f"quant must be {' or '.join(MLX_DTYPES)} with encoder='mlx' (got {self.quant!r:.40}). "
                "Fewer bits need encoder='coreml'.",
                "quant",
                "encoder",
            )

    def as_dict(self) -> dict[str, Any]:
        """Returns the manifest's entries."""
        return {"layout": "mlx", "quant": self.quant}


@dataclass(frozen=True)
class Recipe:
    """The decisions of an export about a checkpoint."""

    encoder: EncoderScheme
    decoder: DecoderScheme
    image_size: int
    """The side of the encoder's square input in pixels."""
    interface: PackageInterface
    format: str = FORMATS[0]

    def __post_init__(self) -> None:
        check_image_size(self.image_size)
        if self.format not in FORMATS:
            raise UsageError(f"format must be one of {', '.join(FORMATS)} (got {self.format!r:.40}).", "format")
        if self.has_asset:
            check_asset_options(self)

    @property
    def quant(self) -> str:
        """The name of the encoder's scheme."""
        return self.encoder.quant

    @property
    def in_mlx(self) -> bool:
        """True if the encoder becomes MLX weights."""
        return isinstance(self.encoder, MLXScheme)

    @property
    def has_package(self) -> bool:
        """True if the encoder becomes a Core ML package."""
        return not self.in_mlx and self.format != "coreai"

    @property
    def has_asset(self) -> bool:
        """True if the encoder becomes a Core AI asset."""
        return not self.in_mlx and self.format != "coreml"

    def settled(self, weights: Mapping[str, str], decoder: DecoderScheme) -> Recipe:
        """Returns the recipe with the choices made during the export: each convolution's scheme, and the decoder's."""
        return replace(self, encoder=replace(self.encoder, weights=weights), decoder=decoder)

    def as_dict(self) -> dict[str, Any]:
        """Returns the manifest's entries."""
        interface = {} if self.in_mlx else self.interface.as_dict()
        if not self.has_package:
            interface.pop("target", None)
        formats = {"format": self.format} if self.has_asset else {}
        decoder = asdict(self.decoder)
        return {**self.encoder.as_dict(), "decoder": decoder, "image_size": self.image_size, **interface, **formats}


def check_asset_options(recipe: Recipe) -> None:
    """Raises UsageError if a Core AI asset cannot have what the recipe decides."""
    others = sorted({recipe.quant, *recipe.encoder.weights.values()} - set(ASSET_SCHEMES))
    if others:
        raise UsageError(
            f"format={recipe.format!r} has quant {', '.join(ASSET_SCHEMES)} (got {others[0]!r}). Use one of them, or "
            "format='coreml'.",
            "format",
            "quant",
        )
    if recipe.interface.takes_image:
        raise UsageError(
            f"format={recipe.format!r} has io float32 or float16 (got io='image'). Use one of them, or "
            "format='coreml'.",
            "format",
            "io",
        )


def earlier_recipe(options: ExportOptions) -> SavedRecipe | None:
    """Reads the recipe of `options.recipe`, if it is given and goes with the encoder's arguments.

    Raises:
        UsageError: the recipe is invalid, or arguments contradict each other.
    """
    requested_encoder(options)  # an export without a package is refused before any file is read
    return None if options.recipe is None else read_recipe(options.recipe)


def planned_recipe(options: ExportOptions, trained_size: int, saved: SavedRecipe | None) -> Recipe:
    """Returns the recipe for the arguments of an export, with the decisions of an earlier one where there is one.

    Args:
        trained_size: the checkpoint's own image size in pixels.

    Raises:
        UsageError: arguments are invalid, contradict each other, or repeat what `saved` decides.
    """
    encoder = requested_encoder(options)
    decoder = decoder_scheme(
        options.decoder_bits,
        options.decoder_quantizer,
        options.decoder_avg_bits,
        options.group_size,
        options.quantize_embeddings,
    )
    schemes, image_size = {encoder.quant}, trained_size
    settings: Mapping[str, Any] = {}
    if saved is not None:
        check_not_settled(saved, options)
        encoder, decoder, settings = saved.encoder, saved.decoder or decoder, saved.settings
        schemes = {encoder.quant, *encoder.weights.values()}
        image_size = trained_size if saved.image_size is None else saved.image_size
    form = str(settings.get("format", FORMATS[0])) if options.format is None else options.format
    if form == "coreai" and options.min_os is not None:
        raise UsageError(
            "min_os is about the Core ML package, which format='coreai' does not write. Leave it out.",
            "min_os",
            "format",
        )
    return Recipe(
        encoder,
        decoder,
        image_size if options.image_size is None else options.image_size,
        interface_for(schemes, options.io, options.min_os, options.with_projector, settings, options.attention_tiles),
        form,
    )


def requested_encoder(options: ExportOptions) -> EncoderScheme:
    """Returns the scheme for the encoder's arguments. Raises UsageError if they contradict each other."""
    if options.encoder not in ENCODERS:
        raise UsageError(f"encoder must be {' or '.join(ENCODERS)} (got {options.encoder!r:.40}).", "encoder")
    if options.encoder == "coreml":
        return encoder_scheme(options.quant, options.min_snr, options.max_bytes)
    for name in options.given(*PACKAGE_OPTIONS):
        raise UsageError(
            f"{name} is about the Core ML package, which encoder='mlx' does not write. Leave it out.", name, "encoder"
        )
    return MLXScheme() if options.quant is None else MLXScheme(options.quant)


def check_not_settled(saved: SavedRecipe, options: ExportOptions) -> None:
    """Raises UsageError when arguments repeat or contradict what the recipe decides."""
    settled = {"encoder": ENCODER_OPTIONS, "decoder": DECODER_OPTIONS if saved.decoder is not None else ()}
    for part, names in settled.items():
        given = options.given(*names)
        if given:
            words = ", ".join(f"{name}=False" if value is False else name for name, value in given.items())
            raise UsageError(
                f"recipe decides how the {part}'s weights are stored. Leave out {words}.", "recipe", *given
            )


@dataclass(frozen=True)
class SavedRecipe:
    """The decisions of an earlier export."""

    file: Path
    encoder: EncoderScheme
    decoder: DecoderScheme | None
    image_size: int | None
    calibration: Mapping[str, Any]
    """The manifest's entry about the calibration images. Empty if there is none."""
    settings: Mapping[str, Any]
    """The whole recipe as it was read."""


def read_recipe(path: str | Path) -> SavedRecipe:
    """Reads the recipe of an exported folder, of its `fastvlm.json`, or of a file with only a recipe.

    Raises:
        UsageError: the recipe cannot be read, lacks the encoder's weights, or has an invalid value.
    """
    file = Path(path).expanduser()
    file = file / MANIFEST_NAME if file.is_dir() else file
    content = read_json_object(file, UsageError)
    settings = content.get("recipe", content)
    try:
        _check_kind(settings)
        return SavedRecipe(
            file,
            EncoderScheme(
                _typed(settings, "quant", str),
                _typed(settings, "min_snr", float, None),
                _typed(settings, "max_bytes", int, None),
                _weights(settings),
                str(file),
            ),
            _decoder(settings),
            _typed(settings, "image_size", int, None),
            _calibration(settings),
            settings,
        )
    except UsageError as reason:
        raise UsageError(f"{file}: {reason}") from None


def _check_kind(settings: object) -> None:
    if not isinstance(settings, Mapping):
        raise UsageError(f"'recipe' must be a JSON object (got {type(settings).__name__}).")
    if settings.get("layout") == "mlx":
        raise UsageError("this export has the layout mlx, without a recipe for an encoder. Pass its arguments again.")


REQUIRED = object()
"""The default of values that a recipe must have."""

DECODER_FIELDS: Mapping[str, tuple[type, ...]] = {
    "bits": (int, str),
    "group_size": (int,),
    "quantize_embeddings": (bool,),
    "quantizer": (str,),
    "avg_bits": (int, float, NoneType),
    "layers": (dict,),
}
"""The JSON types of the fields of `DecoderScheme`. Bits of single layers are whole numbers."""


def _typed(settings: Mapping[str, Any], key: str, kind: type, default: Any = REQUIRED) -> Any:
    value = settings.get(key)
    if value is None and default is not REQUIRED:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise UsageError(f"{key!r} must be of type {kind.__name__} (got {value!r:.40}).")
    return kind(value)


def _weights(settings: Mapping[str, Any]) -> dict[str, str]:
    weights = settings.get("weights")
    if not isinstance(weights, Mapping) or not weights:
        raise UsageError(f"'weights' must have the scheme of each convolution (got {str(weights)!r:.40}).")
    for name, scheme in weights.items():
        if not isinstance(scheme, str) or scheme not in WEIGHT_SCHEMES:
            known = ", ".join(WEIGHT_SCHEMES)
            raise UsageError(f"the scheme of {name!r:.80} must be one of {known} (got {scheme!r:.40}).")
    return dict(weights)


def _calibration(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = settings.get("calibration")
    if found is not None and not isinstance(found, Mapping):
        raise UsageError(f"'calibration' must be an object with source, images, sha256 (got {found!r:.40}).")
    return dict(found or {})


def _decoder(settings: Mapping[str, Any]) -> DecoderScheme | None:
    saved = settings.get("decoder")
    if saved is None:
        return None
    if not isinstance(saved, Mapping) or not DECODER_FIELDS.keys() >= saved.keys():
        known = ", ".join(sorted(DECODER_FIELDS))
        raise UsageError(f"'decoder' must be an object with {known} (got {str(saved)!r:.80}).")
    layers = saved.get("layers")
    for name, value in {**(layers if isinstance(layers, dict) else {}), **saved}.items():
        if type(value) not in DECODER_FIELDS.get(name, (int,)):
            raise UsageError(f"'decoder' has a value of a wrong type ({name} is {value!r:.80}).")
    return DecoderScheme(**saved)


def calibration_set(folder: str | Path | None, image_size: int, fit: str, saved: SavedRecipe | None) -> ImageSet:
    """Returns the calibration images: those in `folder`, or the embedded ones.

    Raises:
        ImageError: `folder` has no images.
        UsageError: the images differ from those of the earlier export `saved`.
    """
    images = calibration_images(image_size) if folder is None else folder_images(folder, image_size, fit)
    if saved is not None:
        check_calibration(saved, images, image_size)
    return images


def check_calibration(saved: SavedRecipe, given: ImageSet, image_size: int) -> None:
    """Raises UsageError when the earlier export measured on a folder and `given` differs: its bytes would differ too.

    A folder in place of embedded images is accepted as intended. Images of another size cannot be compared.
    """
    before, now = saved.calibration, given.as_dict()
    if before.get("source") != "folder":
        return
    count = str(before.get("images"))
    if now["source"] != "folder":
        raise UsageError(
            f"{saved.file}: the recipe was measured on {count:.20} images of a folder. Pass that folder as calibrate.",
            "calibrate",
        )
    if saved.image_size == image_size and before.get("sha256") != now["sha256"]:
        raise UsageError(
            f"{saved.file}: the recipe was measured on {count:.20} other images (calibrate has {now['images']}). Pass "
            "the same images, or remove 'calibration' from a copy of the recipe.",
            "calibrate",
        )
