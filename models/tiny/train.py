"""`python -m fastvlm.models.tiny.train --out DIR`: trains `tiny` from scratch on the CPU.

Each step draws its own scenes. Auxiliary losses come from the scenes' descriptions, and their modules are discarded
after training. No image is seen twice, and a stopped run resumes exactly from its last saved state.
Training needs the `dev` extra: transformers, whose Qwen2 is trained, and matplotlib for the loss plot.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import UsageError
from .data import CHARACTERS, IGNORED, Batch, Batches, learned_tokenizer
from .network import DECODER, ENCODER, TinyFastVLM, is_kernel, write_checkpoint
from .questions import KINDS
from .scenes import COLOURS, MAX_CHARACTERS, PLACES, SHAPES, scene_seeds

STATE_NAME, LOG_NAME, PLOT_NAME = "state.pt", "log.jsonl", "loss.png"
REPORT_NAME = "training.json"
"""The report in a checkpoint's folder. It is written first, so that leftovers of a killed run are recognized."""

KIND_PREFIX = "right/"
"""The prefix of the log's keys for the share of right answers by kind of question."""
LOSSES = (
    ("answers", "#1f6fb4", "answers"),
    ("tokens", "#c8781e", "tokens (auxiliary)"),
    ("cells", "#6a9a3b", "cells (auxiliary)"),
    ("imitation", "#8a63b0", "imitation of the teacher (share of variance)"),
)
"""The plotted losses: key in the log, colour, label."""

VALIDATE_EVERY = 300
"""The number of steps between two validations."""
VALIDATION_SCENES = 192
"""The number of scenes of a validation."""


@dataclass(frozen=True)
class TrainingRecipe:
    """The hyperparameters of a training run."""

    steps: int = 5400
    batch_size: int = 24
    """The number of scenes per step."""
    questions: int = 6
    """The number of questions about each scene."""
    learning_rate: float = 1.2e-3
    """The learning rate after warm-up. It falls along a cosine to a hundredth."""
    warmup_steps: int = 150
    weight_decay: float = 0.05
    auxiliary_weight: float = 0.5
    """The weight of each loss other than the answers' loss."""
    taught_share: float = 0.35
    """The share of the steps, from the first, in which the decoder reads the teacher's tokens of all scenes."""
    blended_share: float = 0.2
    """The share of the steps after that in which the encoder's tokens gradually replace the teacher's."""
    seed: int = 0

    def seen_at(self, step: int) -> int:
        """Returns the number of scenes in a batch for which the decoder reads the encoder's tokens."""
        progress = (step / self.steps - self.taught_share) / self.blended_share
        return round(self.batch_size * min(1.0, max(0.0, progress)))


class Trainer:
    """A training run. Its log, and its state of every `save_every` steps, are in the folder `out`."""

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
        """The training time so far, over all sessions."""

    def run(self) -> None:
        """Trains from the last saved state to the last step, with logs, validations and saves."""
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
        """Updates the weights with one batch, and returns its losses by name."""
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.recipe)
        features, third_stage = self.network.features_and_third_stage(batch.pixel_values.float() / 255)
        projected, taught = self.network.mm_projector(features), self.teacher(batch.tokens)
        seen = self.recipe.seen_at(self.step)
        losses = {
            "answers": answers_loss(*answer_logits(self.network, torch.cat((projected[:seen], taught[seen:])), batch)),
            "imitation": imitation_loss(projected, taught, batch.tokens),
            "tokens": self.tokens_head(features, batch.tokens),
            "cells": self.cells_head(third_stage, batch.cells),
        }
        loss = losses["answers"] + self.recipe.auxiliary_weight * sum(list(losses.values())[1:])
        loss.backward()
        nn.utils.clip_grad_norm_([p for module in self.modules.values() for p in module.parameters()], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {name: value.item() for name, value in losses.items()}

    def validate(self) -> dict[str, float]:
        """Returns the share of answers without a wrong token by kind of question, on scenes of another split."""
        batches = Batches(self.tokenizer_json, scene_seeds("calibration", VALIDATION_SCENES), 32, len(KINDS))
        return validation_accuracy(self.network, (batches[i] for i in range(len(batches))))

    def log(self, values: dict[str, float]) -> None:
        """Appends figures to the log, and prints them to stderr."""
        entry = {"step": self.step, "seconds": round(self.seconds, 1), **{k: round(v, 4) for k, v in values.items()}}
        with (self.out / LOG_NAME).open("a") as file:
            file.write(json.dumps(entry) + "\n")
        remaining = self.seconds / max(self.step, 1) * (self.recipe.steps - self.step)
        figures = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(f"{self.step}/{self.recipe.steps}  {remaining / 60:.0f} min left  {figures}", file=sys.stderr, flush=True)

    def save(self) -> None:
        """Saves the state to resume from. It gets its name once it is complete."""
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
        """Resumes from a saved state of the same recipe, if there is one, and drops later log entries."""
        path, log = self.out / STATE_NAME, self.out / LOG_NAME
        if path.exists():
            state = torch.load(path, weights_only=True)
            if state["recipe"] != asdict(self.recipe):
                raise SystemExit(f"{path}: has another recipe (got {state['recipe']}). Choose another --out.")
            self.step, self.seconds = state["step"], state["seconds"]
            for name, module in self.modules.items():
                module.load_state_dict(state["modules"][name])
            self.optimizer.load_state_dict(state["optimizer"])
        entries = read_log(log) if log.exists() else []
        partial = log.with_name(f"{LOG_NAME}.partial")
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries if entry["step"] <= self.step))
        partial.replace(log)


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Returns the optimizer's groups: weight decay for matrices and kernels, none for norms, biases and scales."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return [
        {"params": [p for p in parameters if is_kernel(p)], "weight_decay": weight_decay},
        {"params": [p for p in parameters if not is_kernel(p)], "weight_decay": 0.0},
    ]


def learning_rate(step: int, recipe: TrainingRecipe) -> float:
    """Returns the learning rate of a step: linear warm-up, then a cosine."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(recipe.steps - recipe.warmup_steps, 1)
    return recipe.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def answer_logits(network: TinyFastVLM, projected: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logits (M, vocabulary), labels (M) and answer numbers (M) of the positions inside answers."""
    inside = batch.labels != IGNORED
    hidden = network.hidden_states(projected, batch)[inside]  # (M, D)
    return network.logits(hidden), batch.labels[inside], batch.answer_index[inside]


def answers_loss(logits: Tensor, labels: Tensor, answers: Tensor) -> Tensor:
    """Returns the mean over answers of their mean cross-entropy. "Yes." has the weight of a long description."""
    losses = F.cross_entropy(logits, labels, reduction="none")  # (M,)
    weights = 1 / torch.bincount(answers)[answers]
    return (losses * weights).sum() / weights.sum()


@torch.inference_mode()
def validation_accuracy(network: TinyFastVLM, batches: Iterable[Batch]) -> dict[str, float]:
    """Returns by kind the share of answers in which every token is the likeliest, so that greedy decoding is right."""
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
    """Returns the log's entries, without an incomplete last line from a full disk."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def plot_log(entries: Sequence[dict[str, float]], path: Path) -> None:
    """Writes a PNG: losses over steps on the left, the share of right answers by kind on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, shares) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, colour, label in LOSSES:
        if points := [(entry["step"], entry[name]) for entry in entries if name in entry]:
            losses.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.2)
    losses.set(xlabel="step", ylabel="loss", yscale="log", title="Loss")
    losses.legend(frameon=False)
    kinds = sorted({name for entry in entries for name in entry if name.startswith(KIND_PREFIX)})
    for kind in kinds:
        points = [(entry["step"], 100 * entry[kind]) for entry in entries if kind in entry]
        shares.plot(*zip(*points, strict=True), label=kind.removeprefix(KIND_PREFIX), linewidth=1.2, marker=".")
    shares.set(xlabel="step", ylabel="% of answers right", ylim=(0, 101), title="Scenes never trained on")
    if kinds:
        shares.legend(frameon=False)
    for axes in (losses, shares):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def check_replaceable(checkpoint: Path) -> None:
    """Checks that training may replace `checkpoint`, and restores one that a killed run had moved away.

    Raises:
        UsageError: `checkpoint`, or one of its temporary folders, was not written by training.
    """
    partial, replaced = temporary_folders(checkpoint)
    for path in (checkpoint, partial, replaced):
        if not (path.exists() or path.is_symlink()) or _is_from_training(path):
            continue
        raise UsageError(
            f"{path}: was not written by training (it has no {REPORT_NAME}), so it is not replaced. "
            "Move it away, or choose another --out."
        )
    if replaced.exists() and not checkpoint.exists():
        replaced.rename(checkpoint)


@contextlib.contextmanager
def replacing(checkpoint: Path) -> Iterator[Path]:
    """Yields a folder that is renamed to `checkpoint` when the block succeeds. Write `training.json` into it first.

    An earlier checkpoint is only removed after that.

    Raises:
        UsageError: `check_replaceable` failed.
    """
    check_replaceable(checkpoint)
    partial, replaced = temporary_folders(checkpoint)
    for leftover in (partial, replaced):  # of a killed run
        _remove(leftover)
    partial.mkdir()
    yield partial
    check_replaceable(checkpoint)
    if checkpoint.exists():
        checkpoint.rename(replaced)
    try:
        partial.rename(checkpoint)
    except BaseException:  # Ctrl-C too
        if replaced.exists() and not checkpoint.exists():
            replaced.rename(checkpoint)
        raise
    _remove(replaced)


def temporary_folders(checkpoint: Path) -> tuple[Path, Path]:
    """Returns the folder that a new checkpoint is written to, and the one that keeps an earlier one meanwhile."""
    return checkpoint.with_name(f"{checkpoint.name}.partial"), checkpoint.with_name(f"{checkpoint.name}.replaced")


def _is_from_training(path: Path) -> bool:
    """Returns True for a folder that training wrote, or an empty one."""
    if path.is_symlink() or not path.is_dir():
        return False
    return (path / REPORT_NAME).is_file() or not any(path.iterdir())


def _remove(folder: Path) -> None:
    """Removes a folder, `training.json` last, so that the next run still recognizes the leftovers of a killed one."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != REPORT_NAME:
            path.unlink()
    shutil.rmtree(folder)


def publish(trainer: Trainer, checkpoint: Path) -> None:
    """Writes the checkpoint. It gets its name once it is complete, and replaces an earlier one from training."""
    with replacing(checkpoint) as partial:
        (partial / REPORT_NAME).write_text(json.dumps(report(trainer), indent=2) + "\n")
        write_checkpoint(trainer.network, trainer.tokenizer_json, partial)


def report(trainer: Trainer) -> dict[str, Any]:
    """Returns the report for the checkpoint's folder: recipe, time and the last figures."""
    last: dict[str, float] = {}
    for entry in read_log(trainer.out / LOG_NAME):
        last |= entry
    return {
        "recipe": asdict(trainer.recipe),
        "training_seconds": round(trainer.seconds),
        "torch": torch.__version__,
        "figures": last,
    }


def main() -> None:
    """Parses the command line, trains, and writes the checkpoint and the loss plot."""
    parser = argparse.ArgumentParser(description="Train `tiny` on drawn scenes. A stopped run resumes.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, the log and the state")
    parser.add_argument("--steps", type=int, default=TrainingRecipe.steps)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.out / "checkpoint"
    check_replaceable(checkpoint)  # before the time is spent
    trainer = Trainer(TrainingRecipe(steps=arguments.steps), arguments.out)
    trainer.run()
    publish(trainer, checkpoint)
    plot_log(read_log(arguments.out / LOG_NAME), arguments.out / PLOT_NAME)


TOKEN_GROUPS = (
    1 + len(SHAPES),
    1 + len(COLOURS),
    1 + len(PLACES),
    1 + len(PLACES),
    *[1 + len(CHARACTERS)] * MAX_CHARACTERS,
)
"""The number of classes of each column of `data.Batch.tokens`. Class 0 means that there is nothing."""


class Teacher(nn.Module):
    """Computes image tokens from a scene's description: each is the sum of learned vectors for its content.

    With these tokens the decoder learns to answer before the encoder can see. The encoder learns, through the
    projector, to compute the same tokens from pixels.
    """

    def __init__(self) -> None:
        super().__init__()
        size = int(DECODER["hidden_size"])
        self.tables = nn.ModuleList(nn.Embedding(classes, size) for classes in TOKEN_GROUPS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns (B, 16, D) for `data.Batch.tokens` (B, 16, 8)."""
        return torch.stack([table(column) for table, column in zip(self.tables, tokens.unbind(-1), strict=True)]).sum(0)


def imitation_loss(projected: Tensor, taught: Tensor, tokens: Tensor) -> Tensor:
    """Returns the squared error of the projector's tokens (B, 16, D) as a share of the teacher's variance."""
    taught = taught.detach()
    error = (projected - taught).square().mean(-1) / taught.var()  # (B, 16)
    return balanced(error, tokens.any(-1))


class TokensHead(nn.Module):
    """Classifies the content of each image token from the encoder's features, with one layer for all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Linear(ENCODER.out_channels, sum(TOKEN_GROUPS))

    def forward(self, image_features: Tensor, tokens: Tensor) -> Tensor:
        """Returns the sum of the groups' cross-entropies for `image_features` (B, 16, C) and `tokens` (B, 16, 8)."""
        logits = self.classes(image_features).flatten(0, 1).split(TOKEN_GROUPS, 1)  # (B * 16, classes) each
        targets = tokens.flatten(0, 1).unbind(1)  # (B * 16,) each
        return torch.stack([balanced(F.cross_entropy(found, target, reduction="none"), target > 0)
                            for found, target in zip(logits, targets, strict=True)]).sum()  # fmt: skip


class CellsHead(nn.Module):
    """Classifies what covers each cell from the third stage's features. Each image has many examples."""

    groups = (1 + len(SHAPES), 1 + len(COLOURS), 1 + len(CHARACTERS))

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Conv2d(ENCODER.embed_dims[2], sum(self.groups), 1)

    def forward(self, features: Tensor, cells: Tensor) -> Tensor:
        """Returns the sum of the cross-entropies of shape, colour and character.

        `features` are (B, 64, 16, 16), and `cells` are `data.Batch.cells` (B, 3, 16, 16).
        """
        logits = self.classes(features).split(self.groups, 1)
        losses = []
        for found, target in zip(logits, cells.unbind(1), strict=True):
            loss = F.cross_entropy(found, target, reduction="none")  # (B, 16, 16)
            losses.append(balanced(loss, target > 0))
        return torch.stack(losses).sum()


def balanced(loss: Tensor, filled: Tensor) -> Tensor:
    """Returns the average of the mean losses of filled and of empty positions, because filled ones are few."""
    return (loss[filled].sum() / filled.sum().clamp(min=1) + loss[~filled].sum() / (~filled).sum().clamp(min=1)) / 2


if __name__ == "__main__":
    try:
        main()
    except UsageError as reason:
        sys.exit(f"error: {reason}")
    except KeyboardInterrupt:
        sys.stderr.write("stopped: the same command resumes from the last saved state\n")
        sys.exit(130)
