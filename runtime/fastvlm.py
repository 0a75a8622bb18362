"""FastVLM as a whole: a model folder, loaded, that answers prompts about images."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..models._mlx import mx, on_cpu
from ..models.errors import FastVLMError
from ..models.images import ImageSource
from ..models.kv_cache import check_kv_bits
from ..models.language import LanguageSide, load_language
from ..models.tokenizer_files import IMAGE_TOKEN
from .batch import BATCH_SIZE, Batch, requests_for
from .conversation import Conversation
from .device_memory import DeviceMemory
from .encoders import OnWait, SeparateEncoder, Shapes, VisionEncoder, close_encoder, open_encoder
from .folder import ModelFolder, open_folder
from .generate import Ending, Generation, Stream, decode, read_answer
from .prompt import PromptEncoder
from .request import Request, prepare
from .reuse import Memory, Picture
from .sampling import id_on_host
from .shared_stream import SharedStream
from .start import Prepared, Start, Starter
from .timings import Timings
from .tokenizer import Tokenizer

_answers = itertools.count()


class FastVLM:
    """A loaded model. Several threads may ask it: they take turns, token by token.

    Attributes:
        trained: False for random weights, whose text means nothing.
        notes: what a user should know of this folder on this machine.
        feature_cache: the features of the last few images; clear it to measure the time that encoding takes.
        load_ms: time that loading took, without the first-use compilation of the package.
        memory: the GPU's, to be in use while answers are computed.
        turn: held by whoever computes with this model, in what `stream_of_turn` gives.
    """

    def __init__(
        self,
        folder: ModelFolder,
        encoder: VisionEncoder,
        language: LanguageSide,
        tokenizer: Tokenizer,
        load_ms: float,
        kv_bits: int | None = None,
    ) -> None:
        self.folder = folder
        self.config = folder.config
        self.encoder = encoder
        self.language = language
        self.tokenizer = tokenizer
        self.load_ms = load_ms
        self.trained = folder.trained
        self.memory = DeviceMemory(language)
        self.notes = (*folder.notes, *_machine_notes(language), *self.memory.notes)
        self._prompts = PromptEncoder(folder.path, tokenizer, _image_token_index(folder, tokenizer))
        self._starter = Starter(self.config, encoder, language, self._prompts, kv_bits)
        self.feature_cache = self._starter.feature_cache
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.eos_token_ids = tuple(dict.fromkeys((*self.config.eos_token_ids, *own)))
        self.turn = threading.Lock()
        self.stream_of_turn = SharedStream()

    @classmethod
    def load(
        cls,
        folder: str | Path,
        vision: str | None = None,
        *,
        compute_units: str | None = None,
        kv_bits: int | None = None,
        verify_hashes: bool = False,
        encoder_process: bool = False,
        on_wait: OnWait | None = None,
    ) -> FastVLM:
        """The model in an exported folder. What its chat template writes in front of every image is read here, once.

        `vision` is `coreml` (default on a Mac: Neural Engine and CPU), `reference` (default elsewhere, works anywhere)
        or `mlx` (for folders that hold the encoder in MLX). `compute_units` are Core ML's: `CPU_AND_NE` (default),
        `CPU_ONLY`, `CPU_AND_GPU` or `ALL`. `kv_bits=8` keeps keys and values in 8 bits: a third of what float32 takes.
        `verify_hashes` compares every byte with the manifest, not only sizes and samples. Core ML runs in a process of
        its own; with `encoder_process` the reference executor does too. `on_wait` is called with what loading waits
        for and the seconds so far, several times a second, where the first use on the engine takes more than 2 s.

        Raises:
            ModelFolderError: the folder is incomplete or does not match its manifest.
            CheckpointError: a config, tokenizer or weight file in it is malformed.
            PackageError: the vision encoder cannot be read, or its process crashed.
            MachineError: this machine lacks the back end, or space for the memory that it shares with the process.
            UsageError: `vision`, `compute_units` or `kv_bits` is none of these, or does not fit the model.
        """
        check_kv_bits(kv_bits)
        start = time.perf_counter()
        opened = open_folder(folder, verify_hashes=verify_hashes)
        config = opened.config
        tokenizer = Tokenizer(opened.path)
        encoder = open_encoder(opened.package, vision, Shapes.of(config), compute_units, encoder_process, on_wait)
        try:
            language = load_language(opened.weights(), config, quantization=config.quantization)
            model = cls(opened, encoder, language, tokenizer, 0.0, kv_bits)
            model._starter.warm()
            before = time.perf_counter()
            if isinstance(encoder, SeparateEncoder):
                encoder.wait_ready()
                waited_ms = 1000 * (time.perf_counter() - before)
                compiling_ms = min(encoder.compile_ms, waited_ms)
            else:
                compiling_ms = encoder.compile_ms
        except BaseException:
            close_encoder(encoder)
            raise
        model.load_ms = 1000 * (time.perf_counter() - start) - compiling_ms
        return model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the encoder's process, where it has one, at once; else it ends with the last reference to this model.

        No image can be encoded after that.
        """
        close_encoder(self.encoder)

    def generate(self, image: ImageSource | Sequence[ImageSource] | None, prompt: str, **options: Any) -> Generation:
        """The whole answer; `options` are those of `prepare`."""
        return self.stream(image, prompt, **options).read()

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
        return Stream(self.pieces(request, Memory()))

    def chat(self, image: ImageSource | Sequence[ImageSource] | None = None, system: str | None = None) -> Conversation:
        """A conversation, whose first question is about `image`.

        Raises:
            ImageError: an image cannot be opened.
            UsageError: `system` is no text.
        """
        return Conversation(self, image, system)

    def generate_batch(
        self,
        images: Sequence[ImageSource | Sequence[ImageSource] | None],
        prompts: str | Sequence[str],
        *,
        batch_size: int = BATCH_SIZE,
        **options: Any,
    ) -> list[Generation]:
        """The answers to many prompts, `batch_size` of them decoded at a time.

        Their ids are those of `generate`, on a Mac up to float16's rounding: other kernels compute several rows.

        `images[n]` belongs to `prompts[n]`, or to the one prompt; `options` are those of `prepare`, the same for all.

        Raises:
            UsageError: images and prompts differ in number, or an option is out of range.
            FastVLMError: whatever `generate` raises, for the first of them that fails.
        """
        outcomes = self.answer_all(requests_for(images, prompts, options), batch_size)
        return [_generation(outcome) for outcome in outcomes]

    def answer_all(
        self, requests: Iterable[Request | FastVLMError], batch_size: int = BATCH_SIZE
    ) -> Iterator[Generation | FastVLMError]:
        """The answer to each request, in their order, or why there is none. An error passes through.

        Requests are taken one by one, when there is room for another in the batch, and two more where the encoder has a
        process of its own, which then encodes their images. Raises UsageError for no batch size.
        """
        return Batch(self, batch_size).outcomes(requests)

    def pieces(
        self, request: Request, memory: Memory, pictures: Sequence[Picture] = ()
    ) -> Generator[str, None, Generation]:
        """The answer to a request whose beginning may be in `memory`, which is kept up with what is read."""
        with self.memory.in_use():
            start, cold = self.start(request, memory, pictures)
            eos = () if request.options.ignore_eos else self.eos_token_ids
            ending = yield from read_answer(self._ids(start, memory), self.tokenizer, eos, request.options.stop)
        return self.generation(request, start, ending, cold)

    @property
    def ahead(self) -> int:
        """Requests whose images can be encoded before they begin; 0 where the encoder has no process of its own."""
        return self._starter.ahead

    def look_ahead(self, request: Request | Prepared) -> Prepared:
        """Gives the images of a request to the encoder's process, as far as it has room; returns at once."""
        prepared = request if isinstance(request, Prepared) else self._starter.prepare(request)
        self._starter.submit(prepared)
        return prepared

    def start(
        self, request: Request | Prepared, memory: Memory, pictures: Sequence[Picture] = ()
    ) -> tuple[Start, bool]:
        """The first token of an answer, and whether it is the first of this process. See `Starter.start`."""
        with self.turn, self.stream_of_turn():
            start = self._starter.start(request, memory, pictures)
            self.memory.after_prefill()
        return start, next(_answers) == 0  # counted once it has worked

    def generation(self, request: Request, start: Start, ending: Ending, cold: bool) -> Generation:
        """What is told of an answer that has ended."""
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
            reused_tokens=start.reused_tokens,
        )
        full = ending.finish_reason == "length" and len(ending.token_ids) < request.options.max_tokens
        return Generation(
            ending.text, ending.token_ids, timings, "context" if full else ending.finish_reason, start.prompt_tokens
        )

    def _ids(self, start: Start, memory: Memory) -> Iterator[int]:
        """The answer's ids, each of them noted in `memory`, which an error empties."""
        decoder = self.language.language_model
        rest = itertools.chain(
            [id_on_host(start.first)], decode(decoder, start.first, start.cache, start.sampler, start.room - 1)
        )
        while True:
            try:
                with self.turn, self.stream_of_turn():
                    token_id = next(rest, None)
            except BaseException:
                memory.clear()
                raise
            if token_id is None:
                return
            memory.cells.append(token_id)
            yield token_id


load = FastVLM.load
"""The model in an exported folder: see there."""


def _generation(outcome: Generation | FastVLMError) -> Generation:
    if isinstance(outcome, FastVLMError):
        raise outcome
    return outcome


def _image_token_index(folder: ModelFolder, tokenizer: Tokenizer) -> int:
    """The id that stands for an image; Apple's sentinel where neither config nor tokenizer names one."""
    if folder.config.image_token_index is not None:
        return folder.config.image_token_index
    return tokenizer.control_tokens.get(IMAGE_TOKEN, -200)


def _machine_notes(language: LanguageSide) -> tuple[str, ...]:
    if on_cpu() and language.language_model.model.norm.weight.dtype != mx.float32:
        return ("too little memory to expand the weights to float32: decoding on this CPU will be slow",)
    return ()
