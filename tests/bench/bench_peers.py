"""Prints images per second of captions in batches, compared with mlx-vlm's and transformers'.

    python tests/bench/bench_peers.py FOLDER [--mlx-vlm BUNDLE] [--images 16] [--runs 3]

FOLDER is an exported `random:SIZE`. BUNDLE comes from `fastvlm bundle` of a folder that was exported with the encoder
in MLX and a decoder of 16 bits. transformers gets random weights of the same size, and needs timm and torchvision. A
side whose library is missing is left out. Every side has a process of its own, its model in float32, and the same
files, prompt and number of tokens. mlx-vlm gets the BLAS that fastvlm uses, because the one in MLX's wheel for Linux
is 50 times slower.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench_captions import BATCH, PROMPT, make_images
from decoders import asked, ready

Captions = Callable[[list[Path]], int]
"""Answers about images, and returns the number of tokens of the first prompt with its image."""


def ours(given: argparse.Namespace) -> Captions:
    import fastvlm
    from fastvlm.runtime.bulk.pipeline import Captioner
    from fastvlm.runtime.bulk.sources import Source

    model = fastvlm.load(given.folder, "reference")
    options = {"max_tokens": given.tokens, "ignore_eos": True}

    def captions(paths: list[Path]) -> int:
        model.engine.clear_caches()
        rows = list(Captioner(model, PROMPT, options, batch_size=given.batch).rows(Source(paths)))
        assert all(len(row.answers[0].token_ids) == given.tokens for row in rows) and len(rows) == len(paths)
        return rows[0].answers[0].prompt_tokens

    return captions


def mlx_vlm(given: argparse.Namespace) -> Captions:
    from fastvlm.models._mlx import mx  # with the faster BLAS, before mlx_vlm imports MLX

    if given.mlx_vlm is None:
        raise ImportError("--mlx-vlm is missing")
    from mlx_vlm import batch_generate, load

    model, processor = load(str(given.mlx_vlm))
    model.set_dtype(mx.float32)  # a CPU multiplies 16 bits many times slower
    image_tokens = (processor.image_processor.crop_size["height"] // 64) ** 2  # it counts one
    processor.tokenizer.stopping_criteria.reset([])  # no token ends an answer

    def captions(paths: list[Path]) -> int:
        prompt_tokens = 0
        for start in range(0, len(paths), given.batch):
            part = list(map(str, paths[start : start + given.batch]))
            done = batch_generate(model, processor, images=part, prompts=[PROMPT] * len(part), max_tokens=given.tokens)
            assert done.stats.generation_tokens == given.tokens * len(part), done.stats
            prompt_tokens = done.stats.prompt_tokens // len(part) - 1 + image_tokens
        return prompt_tokens

    return captions


def transformers(given: argparse.Namespace) -> Captions:
    import torch
    from PIL import Image
    from tokenizers import Tokenizer
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration

    from fastvlm.runtime.folder import open_folder

    config = open_folder(given.folder).config
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "vocab_size", "tie_word_embeddings")  # fmt: skip
    text = {"model_type": "qwen2", **{field: getattr(config.decoder, field) for field in fields}}
    tied = config.decoder.tie_word_embeddings
    model = FastVlmForConditionalGeneration(FastVlmConfig(text_config=text, tie_word_embeddings=tied)).eval()
    tokenizer = Tokenizer.from_file(str(given.folder / "tokenizer.json"))
    size = json.loads((given.folder / "preprocessor_config.json").read_text())["crop_size"]["height"]
    image_id = model.config.image_token_id
    words = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "\n" + PROMPT + ("<|im_end|>\n<|im_start|>assistant\n"),
    )
    before, after = (tokenizer.encode(part, add_special_tokens=False).ids for part in words)
    ids = torch.tensor([before + [image_id] * (size // 64) ** 2 + after])

    def pixels(path: Path) -> torch.Tensor:
        import numpy as np

        with Image.open(path) as image:
            side = max(image.size)
            square = Image.new("RGB", (side, side))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return torch.from_numpy(np.asarray(square.resize((size, size)), np.float32) / 255).permute(2, 0, 1)

    @torch.inference_mode()
    def captions(paths: list[Path]) -> int:
        for start in range(0, len(paths), given.batch):
            part = torch.stack([pixels(path) for path in paths[start : start + given.batch]])
            rows = ids.expand(len(part), -1)
            done = model.generate(
                input_ids=rows, attention_mask=torch.ones_like(rows), pixel_values=part, do_sample=False,
                min_new_tokens=given.tokens, max_new_tokens=given.tokens,
            )  # fmt: skip
            assert done.shape == (len(part), ids.shape[1] + given.tokens)
        return ids.shape[1]

    return captions


SIDES = {"fastvlm": ours, "mlx-vlm": mlx_vlm, "transformers": transformers}


def serve(given: argparse.Namespace) -> None:
    """Answers about the images of each folder that is read, and prints images per second. See `decoders.py`."""
    sys.stdout, results = sys.stderr, sys.stdout  # libraries print
    try:
        captions = SIDES[given.side](given)
    except ImportError as missing:
        print(f"{given.side}: {missing}", file=sys.stderr)
        print("missing", file=results, flush=True)
        return
    print("ready", file=results, flush=True)
    for line in sys.stdin:
        paths = sorted(Path(line.strip()).iterdir())
        start = time.perf_counter()
        prompt_tokens = captions(paths)
        print(len(paths) / (time.perf_counter() - start), file=results, flush=True)
        print(f"{given.side}: {prompt_tokens} tokens in a prompt", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a model folder")
    parser.add_argument("--mlx-vlm", type=Path, help="a bundle for mlx-vlm of the same size")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--megapixels", type=float, default=0.3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    given = parser.parse_args()
    if given.side:
        serve(given)
        return
    with tempfile.TemporaryDirectory() as name:
        few, folder = Path(name) / "few", Path(name) / "images"
        for path, count in ((few, 2), (folder, given.images)):
            path.mkdir()
            make_images(path, count, given.megapixels)
        command = [sys.executable, *sys.argv]
        processes = {
            side: subprocess.Popen([*command, "--side", side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for side in given.sides
        }
        present = {side: process for side, process in processes.items() if ready(process)}
        for process in present.values():
            asked(process, str(few))  # the first call compiles and allocates
        rates: dict[str, list[float]] = {side: [] for side in present}
        for _ in range(given.runs):
            for side, process in present.items():
                rates[side].append(asked(process, str(folder)))
        for process in processes.values():
            process.communicate()
    print(
        f"{given.images} JPEGs of {given.megapixels:g} MP, {given.tokens} tokens, batches of {given.batch}, "
        f"median of {given.runs}"
    )
    for side, values in rates.items():
        gains = [own / value for own, value in zip(rates["fastvlm"], values, strict=True)]
        print(
            f"  {side:<14} {statistics.median(values):7.3f} images/s   fastvlm {statistics.median(gains):.2f} x"
            f"   (runs: {' '.join(f'{gain:.2f}' for gain in gains)})"
        )


if __name__ == "__main__":
    main()
