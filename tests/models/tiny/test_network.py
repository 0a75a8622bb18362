"""The network: packed questions are independent, and the written checkpoint computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlm.models.checkpoint import FolderCheckpoint
from fastvlm.models.fastvit import FastViT
from fastvlm.models.layerwise import LayerwiseDecoder, Prompt, checkpoint_reader, run_layerwise
from fastvlm.models.tiny.data import (
    IGNORED,
    Batches,
    asked_in_training,
)
from fastvlm.models.tiny.network import TOKENS_PER_IMAGE, TinyFastVLM, write_checkpoint
from fastvlm.models.tiny.scenes import draw_scene

pytestmark = pytest.mark.slow


def test_packed_questions_attend_to_the_image_and_themselves(network: TinyFastVLM, tokenizer_json: str) -> None:
    batches = Batches(tokenizer_json, range(1), 1, 5)
    scene = draw_scene(0)
    questions = asked_in_training(scene, 5)
    packed = batches.packer.pack([scene], [questions])
    with torch.inference_mode():
        features = network.image_features(packed.pixel_values.float() / 255)
        projected = network.mm_projector(features)
        together = network.logits(network.hidden_states(projected, packed))
        for number, question in enumerate(questions):
            alone = batches.packer.pack([scene], [[question]])
            expected = network.logits(network.hidden_states(projected, alone))[alone.labels != IGNORED]
            torch.testing.assert_close(together[packed.answer_index == number], expected, rtol=1e-4, atol=1e-5)


def test_written_checkpoint_computes_the_same(
    network: TinyFastVLM, tokenizer_json: str, tmp_path: Path, tolerance
) -> None:
    for parameter in network.parameters():  # rounded like in the file
        parameter.data = parameter.data.half().float()
    write_checkpoint(network, tokenizer_json, tmp_path)
    checkpoint = FolderCheckpoint(tmp_path)
    batch = Batches(tokenizer_json, range(1), 1, 1)[0]
    with torch.inference_mode():
        pixels = batch.pixel_values.float() / 255
        features = network.image_features(pixels)
        expected = network.logits(network.hidden_states(network.mm_projector(features), batch))[0].numpy()
        encoder = FastViT.from_checkpoint(checkpoint)
        torch.testing.assert_close(encoder(pixels), features)

    ids, start = batch.token_ids[0].tolist(), batch.image_start
    prompt = Prompt(ids[:start], features.numpy(), ids[start + TOKENS_PER_IMAGE :])
    logits = run_layerwise(LayerwiseDecoder(checkpoint_reader(checkpoint), checkpoint.config), prompt).logits
    error = np.abs(logits - expected[-len(logits) :]).max() / np.abs(expected).max()
    assert error <= tolerance("decoder_logits_float32")
