"""`python -m fastvlm.models.tiny.train --out DIR`: trains `tiny` from nothing, on the CPU.

Each step draws its own scenes, so that no picture is seen twice and a run that was stopped goes on exactly where its
last saved state is. Needs the `dev` extra (transformers, whose Qwen2 is trained; matplotlib, for the loss plot).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import UsageError
from .auxiliary import CellsHead, Teacher, TokensHead, imitation_loss
from .data import IGNORED, Batch, Batches
from .layout import write_checkpoint
from .network import TinyFastVLM, is_kernel
from .place import REPORT_NAME, free_place, in_place_of
from .questions import KINDS
from .splits import scene_seeds
from .tokenizer import learned_tokenizer

STATE_NAME, LOG_NAME, PLOT_NAME = "state.pt", "log.jsonl", "loss.png"


@dataclass(frozen=True)
class TrainingRecipe:
    steps: int = 5400
    batch_size: int = 24
    """Scenes per step."""
    questions: int = 6
    """About each scene."""
    learning_rate: float = 1.2e-3
    """After warm-up; it falls along a cosine to a hundredth of it."""
    warmup_steps: int = 150
    weight_decay: float = 0.05
    auxiliary_weight: float = 0.5
    """Of each loss besides the answers'."""
    taught_share: float = 0.35
    """For this share of the steps the decoder reads the teacher's tokens, for as many scenes as there are."""
    blended_share: float = 0.2
    """And over this share more and more scenes' tokens come from the encoder instead, until all do."""
    seed: int = 0

    def seen_at(self, step: int) -> int:
        """For how many scenes of a batch the decoder reads the encoder's tokens."""
        progress = (step / self.steps - self.taught_share) / self.blended_share
        return round(self.batch_size * min(1.0, max(0.0, progress)))


VALIDATE_EVERY = 300
VALIDATION_SCENES = 192


class Trainer:
    """A training run; its state, saved every `save_every` steps, and its log are in the folder `out`."""

    def __init__(self, recipe: TrainingRecipe, out: Path, save_every: int = 100) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.out, self.save_every = recipe, out, save_every
        self.tokenizer_json = learned_tokenizer()
        self.network = TinyFastVLM()
        self.teacher, self.cells_head, self.tokens_head = Teacher(), CellsHead(), TokensHead()
        self.modules = {
            "network": self.network,
            "teacher": self.teacher,
            "cells": self.cells_head,
            "tokens": self.tokens_head,
        }
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.modules.values(), recipe.weight_decay), betas=(0.9, 0.98)
        )
        self.step = 0
        self.seconds = 0.0
        """Spent in training so far, over all sessions."""

    def run(self) -> None:
        recipe = self.recipe
        self.resume()
        seeds = scene_seeds("train", recipe.steps * recipe.batch_size)
        batches = Batches(self.tokenizer_json, seeds, recipe.batch_size, recipe.questions)
        order = range(self.step, recipe.steps)
        loader = DataLoader(batches, batch_size=None, sampler=order, num_workers=1, prefetch_factor=4)
        for batch in loader:
            started = time.perf_counter()
            losses = self.train_step(batch)
            self.step += 1
            self.seconds += time.perf_counter() - started
            if self.step % 20 == 0 or self.step == recipe.steps:
                self.log(losses)
            if self.step % VALIDATE_EVERY == 0 or self.step == recipe.steps:
                self.log({f"right/{kind}": share for kind, share in self.validate().items()})
            if self.step % self.save_every == 0 or self.step == recipe.steps:
                self.save()

    def train_step(self, batch: Batch) -> dict[str, float]:
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.recipe)
        features, middle = self.network.observed_features(batch.pixel_values.float() / 255)
        projected, taught = self.network.mm_projector(features), self.teacher(batch.tokens)
        seen = self.recipe.seen_at(self.step)
        losses = {
            "answers": answers_loss(*answer_logits(self.network, torch.cat((projected[:seen], taught[seen:])), batch)),
            "imitation": imitation_loss(projected, taught, batch.tokens),
            "tokens": self.tokens_head(features, batch.tokens),
            "cells": self.cells_head(middle, batch.cells),
        }
        loss = losses["answers"] + self.recipe.auxiliary_weight * sum(list(losses.values())[1:])
        loss.backward()
        nn.utils.clip_grad_norm_([p for module in self.modules.values() for p in module.parameters()], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {name: value.item() for name, value in losses.items()}

    def validate(self) -> dict[str, float]:
        """The share of answers without a wrong token, by kind of question, on scenes of another split."""
        batches = Batches(self.tokenizer_json, scene_seeds("calibration", VALIDATION_SCENES), 32, len(KINDS))
        return validation_accuracy(self.network, (batches[i] for i in range(len(batches))))

    def log(self, values: dict[str, float]) -> None:
        entry = {"step": self.step, "seconds": round(self.seconds, 1), **{k: round(v, 4) for k, v in values.items()}}
        with (self.out / LOG_NAME).open("a") as file:
            file.write(json.dumps(entry) + "\n")
        remaining = self.seconds / max(self.step, 1) * (self.recipe.steps - self.step)
        figures = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(f"{self.step}/{self.recipe.steps}  {remaining / 60:.0f} min left  {figures}", file=sys.stderr, flush=True)

    def save(self) -> None:
        """The state to resume from, under its name only when it is complete."""
        partial = self.out / f"{STATE_NAME}.partial"
        torch.save(
            {
                "recipe": asdict(self.recipe),
                "step": self.step,
                "seconds": self.seconds,
                "modules": {name: module.state_dict() for name, module in self.modules.items()},
                "optimizer": self.optimizer.state_dict(),
            },
            partial,
        )
        partial.replace(self.out / STATE_NAME)

    def resume(self) -> None:
        """Goes on from a saved state of the same recipe, if there is one, and drops what was logged after it."""
        path, log = self.out / STATE_NAME, self.out / LOG_NAME
        if path.exists():
            state = torch.load(path, weights_only=True)
            if state["recipe"] != asdict(self.recipe):
                raise SystemExit(f"{path} belongs to another recipe, {state['recipe']}; choose another --out")
            self.step, self.seconds = state["step"], state["seconds"]
            for name, module in self.modules.items():
                module.load_state_dict(state["modules"][name])
            self.optimizer.load_state_dict(state["optimizer"])
        entries = read_log(log) if log.exists() else []
        partial = log.with_name(f"{LOG_NAME}.partial")
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries if entry["step"] <= self.step))
        partial.replace(log)


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; norms, biases and layer scales do not."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return [
        {"params": [p for p in parameters if is_kernel(p)], "weight_decay": weight_decay},
        {"params": [p for p in parameters if not is_kernel(p)], "weight_decay": 0.0},
    ]


def learning_rate(step: int, recipe: TrainingRecipe) -> float:
    """Linear warm-up, then a cosine."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(recipe.steps - recipe.warmup_steps, 1)
    return recipe.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def answer_logits(network: TinyFastVLM, projected: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (M, vocabulary), labels (M) and answer numbers (M) of the positions inside answers."""
    inside = batch.labels != IGNORED
    hidden = network.hidden_states(projected, batch)[inside]  # (M, D)
    return network.logits(hidden), batch.labels[inside], batch.answer_index[inside]


def answers_loss(logits: Tensor, labels: Tensor, answers: Tensor) -> Tensor:
    """The mean over answers of each one's mean cross-entropy: "Yes." weighs as much as a long description."""
    losses = F.cross_entropy(logits, labels, reduction="none")  # (M,)
    weights = 1 / torch.bincount(answers)[answers]
    return (losses * weights).sum() / weights.sum()


@torch.inference_mode()
def validation_accuracy(network: TinyFastVLM, batches: Iterable[Batch]) -> dict[str, float]:
    """By kind, the share of answers whose every token is the likeliest one: what greedy decoding would get right."""
    network.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    for batch in batches:
        features = network.image_features(batch.pixel_values.float() / 255)
        logits, labels, answers = answer_logits(network, network.mm_projector(features), batch)
        wrong = set(answers[logits.argmax(-1) != labels].tolist())
        for number, kind in enumerate(batch.kinds):
            right[kind].append(number not in wrong)
    return {kind: sum(found) / len(found) for kind, found in sorted(right.items())}


def read_log(path: Path) -> list[dict[str, float]]:
    """What was logged; a last line that a full disk has cut off is none."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train `tiny` on drawn scenes; a run that was stopped goes on.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, the log and the state")
    parser.add_argument("--steps", type=int, default=TrainingRecipe.steps)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.out / "checkpoint"
    free_place(checkpoint)  # before the time is spent
    trainer = Trainer(TrainingRecipe(steps=arguments.steps), arguments.out)
    trainer.run()
    publish(trainer, checkpoint)
    from .plot import plot_log

    plot_log(read_log(arguments.out / LOG_NAME), arguments.out / PLOT_NAME)


def publish(trainer: Trainer, checkpoint: Path) -> None:
    """Writes the checkpoint, which gets its name when it is whole, in place of an earlier one of training's."""
    with in_place_of(checkpoint) as partial:
        (partial / REPORT_NAME).write_text(json.dumps(report(trainer), indent=2) + "\n")
        write_checkpoint(trainer.network, trainer.tokenizer_json, partial)


def report(trainer: Trainer) -> dict[str, Any]:
    """What stands beside the weights: recipe, time and the last figures."""
    last: dict[str, float] = {}
    for entry in read_log(trainer.out / LOG_NAME):
        last |= entry
    return {
        "recipe": asdict(trainer.recipe),
        "training_seconds": round(trainer.seconds),
        "torch": torch.__version__,
        "figures": last,
    }


if __name__ == "__main__":
    try:
        main()
    except UsageError as reason:
        sys.exit(f"error: {reason}")
    except KeyboardInterrupt:
        sys.stderr.write("stopped: the same command goes on from the last saved state\n")
        sys.exit(130)
