"""What an export does to a checkpoint: asked for by options, or replayed from an earlier export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..models.config import check_image_size
from ..models.errors import UsageError
from ..quant.calibration import ImageSet, calibration_images, folder_images
from ..quant.decoder_scheme import DecoderScheme
from ..quant.encoder_scheme import EncoderScheme
from ..quant.recipe import SavedRecipe
from .interface import Interface, interface_for


@dataclass(frozen=True)
class Border:
    """What was asked of the package's border; None: as in a recipe that is replayed, or the default."""

    io: str | None = None
    target: str | None = None
    with_projector: bool | None = None


@dataclass(frozen=True)
class Recipe:
    """What `export` does to a checkpoint."""

    encoder: EncoderScheme
    decoder: DecoderScheme
    image_size: int
    """Side of the encoder's square, in pixels."""
    interface: Interface

    def __post_init__(self) -> None:
        check_image_size(self.image_size)

    @property
    def quant(self) -> str:
        return self.encoder.quant

    @property
    def has_package(self) -> bool:
        """Whether the encoder becomes a Core ML package; it does not with `--layout mlx`."""
        return "layout" not in self.encoder.as_dict()

    def as_dict(self) -> dict[str, Any]:
        settings = asdict(self)
        del settings["encoder"], settings["interface"]
        border = asdict(self.interface) if self.has_package else {}
        return {**self.encoder.as_dict(), **settings, **border}


def check_beside(saved: SavedRecipe, encoder: Mapping[str, object], decoder: Mapping[str, object]) -> None:
    """Raises UsageError when options, by their names, say what the recipe does too; None: not given."""
    settled = {"encoder": encoder, "decoder": decoder if saved.decoder is not None else {}}
    for part, options in settled.items():
        given = [option_name(name, value) for name, value in options.items() if value is not None]
        if given:
            raise UsageError(f"--recipe says how the {part}'s weights are stored: leave out {', '.join(given)}")


def option_name(name: str, value: object) -> str:
    return ("--no-" if value is False else "--") + name.replace("_", "-")


def calibration_set(folder: str | Path | None, image_size: int, fit: str, saved: SavedRecipe | None) -> ImageSet:
    """The images to calibrate on: those in `folder`, or embedded ones.

    Raises:
        ImageError: `folder` holds none.
        UsageError: they are not those that `saved` was measured on.
    """
    images = calibration_images(image_size) if folder is None else folder_images(folder, image_size, fit)
    if saved is not None:
        check_calibration(saved, images, image_size)
    return images


def check_calibration(saved: SavedRecipe, given: ImageSet, image_size: int) -> None:
    """Raises UsageError when images of a folder were measured on, and `given` are others: the bytes would differ.

    Images of a folder in place of embedded ones are plainly meant. Those of another size cannot be told apart.
    """
    before, now = saved.calibration, given.as_dict()
    if before.get("source") != "folder":
        return
    found = str(before.get("images"))
    if now["source"] != "folder":
        raise UsageError(f"{saved.file}: was measured on {found:.20} images of a folder; give them with --calibrate")
    if saved.image_size == image_size and before.get("sha256") != now["sha256"]:
        raise UsageError(
            f"{saved.file}: was measured on {found:.20} images, and --calibrate has {now['images']} that are not the "
            "same; give those, or take 'calibration' out of a copy of the recipe"
        )


def replayed(recipe: Recipe, saved: SavedRecipe, border: Border, *, keep_size: bool) -> Recipe:
    """`recipe` with what an earlier export decided."""
    schemes = {saved.encoder.quant, *saved.encoder.weights.values()}
    return replace(
        recipe,
        encoder=saved.encoder,
        decoder=saved.decoder or recipe.decoder,
        image_size=recipe.image_size if keep_size or saved.image_size is None else saved.image_size,
        interface=interface_for(schemes, **asdict(border), saved=saved.settings),
    )
