"""CLIP-LoRA (Zanella and Ben Ayed 2024, arXiv 2405.18541): LoRA in both towers of a vision-language model.

Letters: C classes, L positions of a text, E dimensions that images and texts share.
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.data import keyed_random
from remap.language.pair import require_language
from remap.language.text_tower import TextTower, text_anatomy
from remap.tuning.base import Attachment, Edits, Fold, Method, TrainingHooks
from remap.tuning.dropout import SampleDropout
from remap.tuning.layers import Target
from remap.tuning.parameter.lora import LoRA
from remap.tuning.words import WordHead, attach_words, classifier_of, insert_words

TOWER = "remap_text"


class CLIPLoRA(Method):
    """LoRA of rank 2 in the query, key and value weights of every block of both towers: rank * 6 * (L_t D_t + L_v D_v).

    The text of a class is the first of its texts (data.templates). The text tower folds into the classifier and LoRA
    into the image tower, so a tuned model is a plain one. The scale is that of the authors' code, alpha / sqrt(rank).
    """

    class Config(LoRA.Config):
        rank: int = Field(default=2, ge=1, description="Rank of the update.")
        alpha: float | None = Field(default=1.0, gt=0.0, description="Scale is alpha / sqrt(rank); null is 1.")
        targets: tuple[Target, ...] | None = Field(
            default=("q", "k", "v"), min_length=1, description="Layers to change."
        )
        dropout: float = Field(default=0.25, ge=0.0, lt=1.0, description="Dropout probability on the input of A.")
        towers: Literal["both", "image", "text"] = Field(default="both", description="Towers that are tuned.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        language = require_language(model, "clip_lora")
        alpha = None if self.config.alpha is None else self.config.alpha * math.sqrt(self.config.rank)
        lora = LoRA(LoRA.Config(**self.config.model_dump(exclude={"towers", "alpha"}), alpha=alpha))
        image = None if self.config.towers == "text" else lora.attach(model, anatomy)
        if self.config.towers == "image":
            assert image is not None
            return replace(image, trains_head=False)
        edits = Edits(model) if image is None or image.edits is None else image.edits
        before = set(edits.parameters())
        like = classifier_of(model, anatomy, "clip_lora").weight
        tower = edits.insert(TOWER, deepcopy(language.tower), like)
        inner = lora.attach(tower, text_anatomy(tower)).edits
        assert inner is not None
        words = TunedTower(model, anatomy, tower)
        trained = [*before, *(f"{TOWER}.{name}" for name in inner.parameters())]
        if image is None:
            attached = attach_words(model, anatomy, words, Steps(words), edits=edits)
            return replace(attached, trainable=trained, no_decay=())
        insert_words(edits, anatomy, words)
        assert image.fold is not None
        fold = Fold(partial(_fold, words, image.fold))
        return replace(
            image,
            trainable=trained,
            no_decay=(),
            fold=fold,
            trains_head=False,
            identity_at_init=False,
            hooks=Steps(words),
        )


class TunedTower(WordHead):
    """Texts of the classes through a text tower that is a module of the model.

    Its dropout is a function of run, step and class: the same in every micro-batch and process, which tune one tower.

    Attributes:
        seed: That of the run.
        step: Steps so far.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, tower: TextTower) -> None:
        super().__init__(model, anatomy, "clip_lora")
        self._tower = (tower,)
        self.seed, self.step = torch.initial_seed() % 2**32, 0

    def texts(self) -> Tensor:
        tower = self._tower[0]
        ids_CL = self.language.ids([texts[0] for texts in self.language.texts]).to(tower.positions.device)
        keys_C = keyed_random.keys(self.seed, self.step, np.arange(len(ids_CL)), keyed_random.TEXT)
        for module in tower.modules():
            if isinstance(module, SampleDropout):  # rows are classes here, not images
                module.keys_B = torch.from_numpy(keys_C.view(np.int64)).to(ids_CL.device)
        return tower(ids_CL)


class Steps(TrainingHooks):
    """Counts the steps for the dropout of a text tower."""

    def __init__(self, words: TunedTower) -> None:
        self.words = words

    def before_step(self, average: Callable[[list[Tensor]], None]) -> None:
        self.words.step += 1

    def memory(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.words.step)}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        self.words.step = int(memory["step"]) if memory else 0


def _fold(words: WordHead, image: Fold) -> None:
    words.train(False)
    image.write()
