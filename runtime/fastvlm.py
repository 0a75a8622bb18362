"""The public face of a loaded model: the backend of its encoder, answers, streams, batches and chats."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from ..models._mlx import mx, on_cpu
from ..models.errors import FastVLMError, UsageError
from ..models.folder_layout import has_mlx_encoder
from ..models.images import ImageSource
from ..models.kv_cache import check_kv_bits
from ..models.language import LanguageSide, load_language
from ..models.tokenizer_files import IMAGE_TOKEN
from .batch import BATCH_SIZE, Batch, requests_for
from .conversation import Conversation
from .coreml import COMPUTE_UNITS, check_mac, default_compute_units
from .encoder_process import EncoderProcess
from .encoders import MLXEncoder, OnWait, ReferenceEncoder, SeparateEncoder, Shapes, VisionEncoder, close_encoder
from .engine import Engine
from .folder import ModelFolder, open_folder
from .generate import Generation, Stream
from .prompt import PromptEncoder
from .prompt_cache import check_cache_bytes
from .request import prepare
from .structured import Schema
from .tokenizer import Tokenizer

APPLE_IMAGE_SENTINEL = -200
"""The id that stands for an image in Apple's prompts, for folders that name none themselves."""

BACKENDS = ("coreml", "reference", "mlx")
"""The backends of the vision encoder: Core ML, the reference executor, and MLX for folders without a package."""


class FastVLM:
    """A loaded model. Use `fastvlm.load` to get one.

    Several threads may ask one model. They take turns, token by token.

    Attributes:
        folder: the model folder.
        config: its `config.json`.
        trained: False for random weights, whose text means nothing.
        notes: what a user should know about this folder on this machine.
        load_ms: time to load the model, without the first-use compilation of the package.
        engine: the parts of the model, for code that schedules its own requests.
    """

    def __init__(
        self,
        folder: ModelFolder,
        encoder: VisionEncoder,
        language: LanguageSide,
        tokenizer: Tokenizer,
        load_ms: float,
        kv_bits: int | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self.folder = folder
        self.config = folder.config
        self.trained = folder.trained
        prompts = PromptEncoder(folder.path, tokenizer, _image_token_index(folder, tokenizer))
        self.engine = Engine(folder.config, encoder, language, tokenizer, prompts, kv_bits, cache_bytes)
        self.engine.load_ms = load_ms
        self.notes = (*folder.notes, *_machine_notes(language), *self.engine.memory.notes)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        backend: str | None = None,
        *,
        compute_units: str | None = None,
        kv_bits: int | None = None,
        cache_bytes: int | None = None,
        verify_hashes: bool = False,
        encoder_process: bool = False,
        on_wait: OnWait | None = None,
    ) -> FastVLM:
        """Loads an exported model folder.

        The prefix that the chat template writes before every image is computed here, once.

        Args:
            folder: an exported folder, or the hub id of one.
            backend: `coreml` (the default on a Mac), `reference` (the default elsewhere, runs anywhere) or `mlx` (for
                folders that have the encoder in MLX).
            compute_units: the units of Core ML: `CPU_AND_NE` (default), `CPU_ONLY`, `CPU_AND_GPU` or `ALL`. The
                environment variable FASTVLM_COMPUTE_UNITS changes the default.
            kv_bits: 8 stores keys and values in 8 bits, a third of the memory of float32.
            cache_bytes: the most bytes of keys, values and features that are kept for later prompts with the same
                beginning or image. The default is a sixteenth of the available memory, at most 1 GiB. 0 keeps none.
                On a Mac an answer that reuses them agrees with the first up to float16 rounding.
            verify_hashes: compare every byte with the manifest, not only sizes and samples.
            encoder_process: run the reference executor in a process of its own, as Core ML always does.
            on_wait: called several times a second with a message and the seconds so far, while the first use on the
                Neural Engine takes more than 2 s.

        Raises:
            ModelFolderError: the folder is incomplete or does not match its manifest.
            CheckpointError: a config, tokenizer or weight file is malformed.
            PackageError: the vision encoder cannot be read, or its process crashed.
            MachineError: this machine lacks the backend, or memory to share with the process.
            UsageError: an argument is invalid, or does not fit the model.
        """
        check_kv_bits(kv_bits)
        check_cache_bytes(cache_bytes)
        start = time.perf_counter()
        opened = open_folder(folder, verify_hashes=verify_hashes)
        config = opened.config
        tokenizer = Tokenizer(opened.path)
        encoder = open_encoder(opened.package, backend, Shapes.of(config), compute_units, encoder_process, on_wait)
        try:
            language = load_language(opened.weights(), config, quantization=config.quantization)
            model = cls(opened, encoder, language, tokenizer, 0.0, kv_bits, cache_bytes)
            model.engine.warm_up()
            compile_ms = _wait_for(encoder)
            model.notes = (*model.notes, *encoder_notes(encoder))
        except BaseException:
            close_encoder(encoder)
            raise
        model.engine.load_ms = 1000 * (time.perf_counter() - start) - compile_ms
        return model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the encoder process, if there is one. No image can be encoded after that.

        Without it the process ends with the last reference to this model.
        """
        close_encoder(self.engine.encoder)

    @property
    def load_ms(self) -> float:
        """Time to load the model in milliseconds, without the first-use compilation of the package."""
        return self.engine.load_ms

    def generate(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str,
        *,
        system: str | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        fit: str | None = None,
        background: str = "white",
        schema: Schema | None = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        grammar: str | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        logprobs: int | None = None,
    ) -> Generation:
        """Returns the whole answer to a prompt about an image, several images or none.

        Args:
            image: a path, bytes, a PIL image, a uint8 array (H, W, 3), a sequence of these, or None.
            prompt: the question. `<image>` in it marks the place of an image. Without a mark the images come first.
            system: the system prompt. The default is the chat template's.
            max_tokens: the most tokens of the answer.
            temperature: 0 takes the most likely token, above 0 samples.
            top_p: sample from the most likely tokens that together have this probability.
            top_k: sample from at most this many tokens. 0 means all.
            min_p: drop tokens less likely than this share of the most likely.
            repetition_penalty: above 1 discourages tokens that were used already.
            seed: makes sampling repeatable.
            stop: one or more strings that end the answer. They are not part of it.
            ignore_eos: continue after the end token, for measurements.
            fit: `pad` or `crop` the image to a square. The default is how the model was trained.
            background: the color under transparent pixels, `white` or `black`. `none` drops the alpha channel, as
                LLaVA does.
            schema: a JSON schema (a mapping or JSON text) or a Pydantic model class. The answer is JSON that satisfies
                it, and `Generation.parsed` has its content.
            regex: a regular expression that the whole answer matches.
            choice: strings, one of which is the answer.
            grammar: a grammar in Lark's syntax that the answer follows.
            num_beams: above 1, search for the likeliest answer with this many beams, without sampling.
            length_penalty: above 0 favors long answers among the beams, below 0 short ones.
            early_stopping: True, False or `never`: when the search ends, as in transformers.
            logprobs: report the log-probability of each token in `Generation.logprobs`, with those of this many of the
                likeliest tokens at its place.

        Raises:
            UsageError: an option is out of range, or a schema or its like cannot be followed.
            ImageError: an image cannot be opened.
            PromptError: the prompt does not fit the images or the context.
            PackageError: the encoder failed.
        """
        request = prepare(
            image,
            prompt,
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            fit=fit,
            background=background,
            schema=schema,
            regex=regex,
            choice=choice,
            grammar=grammar,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            logprobs=logprobs,
        )
        return self.engine.stream(request).read()

    def stream(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str,
        *,
        system: str | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        fit: str | None = None,
        background: str = "white",
        schema: Schema | None = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        grammar: str | None = None,
        logprobs: int | None = None,
    ) -> Stream:
        """Returns the answer as a stream of text, which is decoded while it is read. See `generate`.

        Raises:
            UsageError: an option is out of range, or a schema or its like cannot be followed.
            ImageError: an image cannot be opened.
            PromptError: (while reading) the prompt does not fit the images or the context.
            PackageError: (while reading) the encoder failed.
        """
        request = prepare(
            image,
            prompt,
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            fit=fit,
            background=background,
            schema=schema,
            regex=regex,
            choice=choice,
            grammar=grammar,
            logprobs=logprobs,
        )
        return self.engine.stream(request)

    def generate_batch(
        self,
        images: Sequence[ImageSource | Sequence[ImageSource] | None],
        prompts: str | Sequence[str],
        *,
        batch_size: int = BATCH_SIZE,
        system: str | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        fit: str | None = None,
        background: str = "white",
        schema: Schema | None = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        grammar: str | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        logprobs: int | None = None,
    ) -> list[Generation]:
        """Returns the answers to many prompts, decoded `batch_size` at a time.

        `images[n]` belongs to `prompts[n]`, or to the one prompt. The other options are those of `generate`, and so are
        the token ids. On a Mac the ids agree up to float16 rounding, because other kernels compute several rows.

        Raises:
            UsageError: images and prompts differ in number, or an option is out of range.
            FastVLMError: any error of `generate`, for the first request that fails.
        """
        requests = requests_for(
            images,
            prompts,
            {
                "system": system,
                "max_tokens": max_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "seed": seed,
                "stop": stop,
                "ignore_eos": ignore_eos,
                "fit": fit,
                "background": background,
                "schema": schema,
                "regex": regex,
                "choice": choice,
                "grammar": grammar,
                "num_beams": num_beams,
                "length_penalty": length_penalty,
                "early_stopping": early_stopping,
                "logprobs": logprobs,
            },
        )
        return [_generation(outcome) for outcome in Batch(self.engine, batch_size).outcomes(requests)]

    def chat(
        self,
        image: ImageSource | Sequence[ImageSource] | None = None,
        system: str | None = None,
        background: str = "white",
    ) -> Conversation:
        """Returns a new conversation, whose first question is about `image`. `background` is that of `generate`.

        Raises:
            ImageError: an image cannot be opened.
            UsageError: `system` is not a string, or `background` is unknown.
        """
        return Conversation(self.engine, image, system, background)


load = FastVLM.load


def _generation(outcome: Generation | FastVLMError) -> Generation:
    if isinstance(outcome, FastVLMError):
        raise outcome
    return outcome


def _wait_for(encoder: VisionEncoder) -> float:
    """Waits until the encoder is loaded. Returns how long its first-use compilation was waited for, in ms."""
    if not isinstance(encoder, SeparateEncoder):
        return encoder.compile_ms
    before = time.perf_counter()
    encoder.wait_ready()
    return min(encoder.compile_ms, 1000 * (time.perf_counter() - before))


def _image_token_index(folder: ModelFolder, tokenizer: Tokenizer) -> int:
    """Returns the id that stands for an image."""
    if folder.config.image_token_index is not None:
        return folder.config.image_token_index
    return tokenizer.control_tokens.get(IMAGE_TOKEN, APPLE_IMAGE_SENTINEL)


def _machine_notes(language: LanguageSide) -> tuple[str, ...]:
    if on_cpu() and language.language_model.model.norm.weight.dtype != mx.float32:
        return ("too little memory to expand the weights to float32, so decoding on this CPU will be slow",)
    return ()


def open_encoder(
    package: Path,
    backend: str | None,
    shapes: Shapes,
    compute_units: str | None = None,
    encoder_process: bool = False,
    on_wait: OnWait | None = None,
) -> VisionEncoder:
    """Opens the vision encoder on a backend. None takes Core ML on a Mac and the reference executor elsewhere.

    Without a package, the folder has the encoder in MLX, and `mlx` is the only backend. `compute_units` is one of
    COMPUTE_UNITS, for Core ML only. None takes FASTVLM_COMPUTE_UNITS, or else the first. Core ML runs in a process of
    its own, which loads while this one does other work. With `encoder_process` the reference executor does too.

    Raises:
        UsageError: the backend does not exist or does not fit the folder, or the compute units do not fit the backend.
        MachineError: this machine does not have the backend.
        PackageError: the package cannot be read or compiled.
    """
    in_mlx = not package.is_dir() and has_mlx_encoder(package.parent)
    if backend in BACKENDS and in_mlx != (backend == "mlx"):
        found = "has its encoder in MLX" if in_mlx else "has its encoder in a package"
        advice = "Use backend='mlx'" if in_mlx else "Use another backend"
        raise UsageError(
            f"backend={backend!r} does not fit {package.parent}, which {found}. {advice}, or leave it out.", "backend"
        )
    if backend is None:
        backend = "mlx" if in_mlx else "coreml" if sys.platform == "darwin" else "reference"
    check_compute_units(backend, compute_units)
    if backend == "mlx":
        if encoder_process:
            raise UsageError(
                f"encoder_process=True runs packages, and {package.parent} has none. Leave encoder_process out.",
                "encoder_process",
            )
        return MLXEncoder(package.parent, shapes)
    if backend == "coreml":
        check_mac()
        units = compute_units or default_compute_units()
        return EncoderProcess(package, shapes, compute_units=units, on_wait=on_wait)
    if backend == "reference":
        if not encoder_process:
            return ReferenceEncoder(package, shapes)
        return EncoderProcess(package, shapes, backend="reference", on_wait=on_wait)
    raise UsageError(f"backend must be 'coreml', 'reference' or 'mlx', got {backend!r:.40}", "backend")


def encoder_notes(encoder: VisionEncoder) -> tuple[str, ...]:
    """Returns notes for the user on how the backend runs the package. Waits until it is loaded."""
    return encoder.notes if isinstance(encoder, EncoderProcess) else ()


def check_compute_units(backend: str, compute_units: str | None) -> None:
    """Raises UsageError unless the compute units are None, or are Core ML's and the backend is Core ML."""
    if compute_units is None:
        return
    if compute_units not in COMPUTE_UNITS:
        raise UsageError(
            f"compute_units must be one of {', '.join(COMPUTE_UNITS)}, got {compute_units!r:.40}", "compute_units"
        )
    if backend != "coreml":
        raise UsageError(
            f"compute_units needs backend='coreml', got backend={backend!r:.40}. Leave compute_units out.",
            "compute_units",
            "backend",
        )
