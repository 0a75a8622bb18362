"""FastVLM as a whole: a model folder, loaded, that answers prompts about images."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..models._mlx import mx, on_cpu
from ..models.errors import PromptError, WeightsError
from ..models.folder_layout import IMAGE_TOKEN
from ..models.images import Fit, ImageSource, preprocess, to_pixel_values
from ..models.kv_cache import KVCache
from ..models.language import LanguageSide, load_language
from .encoders import Shapes, VisionEncoder, open_encoder
from .feature_cache import FeatureCache
from .folder import ModelFolder, open_folder
from .generate import Generation, Stream, decode, prefill, read_answer
from .prompt import Prompt, PromptEncoder
from .request import Request, prepare
from .sampling import Sampler, id_on_host
from .timings import LapClock, Timings
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

CACHE_ROOM = 512
"""Positions for the answer that are allocated ahead, however large max_tokens is."""

_answers = itertools.count()


def load(folder: str | Path, vision: str | None = None) -> FastVLM:
    """The model in an exported folder.

    `vision` is `coreml` (default on a Mac: Neural Engine and CPU) or `reference` (default elsewhere, works anywhere).

    Raises:
        ModelFolderError: the folder is incomplete or does not match its manifest.
        CheckpointError: a config, tokenizer or weight file in it is malformed.
        PackageError: the vision encoder cannot be read.
        MachineError: this machine lacks the back end.
    """
    return FastVLM.load(folder, vision)


@dataclass(frozen=True)
class Start:
    """An answer of which the first token is known."""

    first: mx.array
    """Its id (1,), evaluated."""
    cache: list[KVCache]
    sampler: Sampler
    room: int
    """Tokens that the answer may have."""
    prompt_tokens: int
    cached_images: int
    stages_ms: dict[str, float]


class FastVLM:
    """A loaded model. Not for two threads at once.

    Attributes:
        trained: False for random weights, whose text means nothing.
        notes: what a user should know of this folder on this machine.
        feature_cache: the features of the last few images; clear it to measure the time that encoding takes.
        load_ms: time that loading took, without the first-use compilation of the package.
    """

    def __init__(
        self, folder: ModelFolder, encoder: VisionEncoder, language: LanguageSide, tokenizer: Tokenizer, load_ms: float
    ) -> None:
        self.folder = folder
        self.config = folder.config
        self.encoder = encoder
        self.language = language
        self.tokenizer = tokenizer
        self.load_ms = load_ms
        self.trained = folder.trained
        self.feature_cache = FeatureCache()
        self.notes = (*folder.notes, *_machine_notes(language))
        self._prompts = PromptEncoder(folder.path, tokenizer, _image_token_index(folder, tokenizer))
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.eos_token_ids = tuple(dict.fromkeys((*self.config.eos_token_ids, *own)))

    @classmethod
    def load(cls, folder: str | Path, vision: str | None = None) -> FastVLM:
        """See `load`."""
        start = time.perf_counter()
        opened = open_folder(folder)
        config = opened.config
        tokenizer = Tokenizer(opened.path)
        encoder = open_encoder(opened.package, vision, Shapes.of(config))
        language = load_language(opened.weights(), config, quantization=config.quantization)
        load_ms = 1000 * (time.perf_counter() - start) - encoder.compile_ms
        return cls(opened, encoder, language, tokenizer, load_ms)

    def generate(self, image: ImageSource | Sequence[ImageSource] | None, prompt: str, **options: Any) -> Generation:
        """The whole answer; `options` are those of `prepare`."""
        stream = self.stream(image, prompt, **options)
        for _ in stream:
            pass
        return stream.generation

    def stream(self, image: ImageSource | Sequence[ImageSource] | None, prompt: str, **options: Any) -> Stream:
        """The answer in pieces, computed while they are read. `options` are those of `prepare`.

        Raises:
            UsageError: an option is out of range.
            ImageError: an image cannot be opened.
            PromptError: (while reading) the prompt does not fit the images or the context.
        """
        return self.answer(prepare(image, prompt, **options))

    def answer(self, request: Request) -> Stream:
        """The answer to a request from `prepare`."""
        return Stream(self._answer(request))

    def _answer(self, request: Request) -> Generator[str, None, Generation]:
        start = self._start(request)
        cold = next(_answers) == 0  # counted once it has worked
        rest = decode(self.language.language_model, start.first, start.cache, start.sampler, start.room - 1)
        eos = () if request.options.ignore_eos else self.eos_token_ids
        ids = itertools.chain([id_on_host(start.first)], rest)
        ending = yield from read_answer(ids, self.tokenizer, eos, request.options.stop)
        timings = Timings(
            **start.stages_ms,
            load_ms=self.load_ms,
            image_open_ms=request.image_open_ms,
            compile_ms=self.encoder.compile_ms,
            decode_tps=ending.decode_tps,
            prompt_tokens=start.prompt_tokens,
            generated_tokens=len(ending.token_ids),
            cold=cold,
            cached_images=start.cached_images,
        )
        return Generation(ending.text, ending.token_ids, timings, ending.finish_reason, start.prompt_tokens)

    def _start(self, request: Request) -> Start:
        """Everything up to the first token, stage by stage."""
        clock, stages_ms = LapClock(), {}
        prompt = self._prompts.encode(request.messages)
        length = self._checked_length(prompt, len(request.images))
        size, fit = self.encoder.image_size, request.fit or cast("Fit", self.config.image_aspect_ratio)
        pixels = [preprocess(image, size, fit) for image in request.images]
        stages_ms["preprocess_ms"] = clock.lap_ms()
        hits = self.feature_cache.hits
        image_features = [self._features(square) for square in pixels]
        cached_images = self.feature_cache.hits - hits
        stages_ms["encode_ms"] = clock.lap_ms()
        projected = self._project(image_features)
        stages_ms["project_ms"] = clock.lap_ms()
        room = min(request.options.max_tokens, self.config.max_context - length)
        cache = self.language.language_model.make_cache(length + min(room, CACHE_ROOM))
        logits = prefill(self.language.language_model, self._embed(prompt, projected), cache)
        _check_finite(logits)
        stages_ms["prefill_ms"] = clock.lap_ms()
        sampler = Sampler(request.options.sampling, prompt.ids)
        first = sampler(logits[0])
        mx.eval(first)
        stages_ms["sample_ms"] = clock.lap_ms()
        return Start(first, cache, sampler, room, length, cached_images, stages_ms)

    def _checked_length(self, prompt: Prompt, image_count: int) -> int:
        """Positions that the prompt takes. Raises PromptError unless it fits the images, the context and the model."""
        if prompt.image_count != image_count:
            raise PromptError(f"the prompt has places for {prompt.image_count} images, but {image_count} came with it")
        length = prompt.token_count(self.config.tokens_per_image)
        if length == 0:
            raise PromptError("the prompt is empty, and the model's chat template adds nothing to it")
        if length >= self.config.max_context:
            raise PromptError(
                f"the prompt takes {length} tokens ({image_count} images of {self.config.tokens_per_image} included), "
                f"and the context holds {self.config.max_context} with the answer: shorten it"
            )
        highest = max((i for i in prompt.ids if i != prompt.image_token_index), default=0)
        rows = self.language.vocabulary_rows
        if highest >= rows:
            raise PromptError(f"the prompt has the token {highest}, and the model has embeddings for {rows}")
        return length

    def _features(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """`image_features` (1, N, C) of a square (3, S, S), encoded unless they are remembered."""
        features = self.feature_cache.get(pixels)
        if features is None:
            features = self.encoder.encode(to_pixel_values(pixels))
            self.feature_cache.put(pixels, features)
        return features

    def _project(self, image_features: list[NDArray[np.float32]]) -> list[mx.array]:
        """What stands in for each image's tokens, (1, N, D); nothing to compute where the package projects."""
        projector = self.language.multi_modal_projector
        if self.encoder.projected:
            projected = [mx.array(features).astype(projector.linear_2.bias.dtype) for features in image_features]
        else:
            projected = [projector(mx.array(features)) for features in image_features]
        mx.eval(projected)
        return projected

    def _embed(self, prompt: Prompt, projected: Sequence[mx.array]) -> mx.array:
        """`inputs_embeds` (1, L, D): the text's embeddings, with each image's features in its place."""
        images = iter(projected)
        parts = [
            next(images) if segment is None else self.language.language_model.embed(mx.array([segment]))
            for segment in prompt.segments()
        ]
        return mx.concatenate(parts, axis=1)  # (1, L, D)


def _check_finite(logits: mx.array) -> None:
    """Computes the logits. Raises WeightsError when they are no numbers to pick a token by."""
    finite = mx.isfinite(logits).all()
    mx.eval(logits, finite)
    if not finite.item():
        raise WeightsError(
            "the decoder gives logits that are not finite: its weights are damaged, or overflow "
            f"{str(logits.dtype).removeprefix('mlx.core.')}; export the model again"
        )


def _image_token_index(folder: ModelFolder, tokenizer: Tokenizer) -> int:
    """The id that stands for an image; Apple's sentinel where neither config nor tokenizer names one."""
    if folder.config.image_token_index is not None:
        return folder.config.image_token_index
    return tokenizer.control_tokens.get(IMAGE_TOKEN, -200)


def _machine_notes(language: LanguageSide) -> tuple[str, ...]:
    if on_cpu() and language.language_model.model.norm.weight.dtype != mx.float32:
        return ("too little memory to expand the weights to float32: decoding on this CPU will be slow",)
    return ()
