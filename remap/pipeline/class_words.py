"""Give a vision-language model its classifier of words, and say how sure it is of each class before it teaches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from remap.backbones.build import Backbone
from remap.cache.cache_folders import texts_root
from remap.cache.text_features import class_features
from remap.data.views import ViewSource
from remap.distributed.launch import accelerator
from remap.io.names import plain
from remap.language.pair import Language, language_of, write_zero_shot_head
from remap.language.words import descriptions_of, templates_of, texts_of, words_of
from remap.network import Network
from remap.pipeline.probe import signals_of
from remap.progress import Progress
from remap.recipe.schema import DataSpec

# Images without labels that a teacher's answers are counted on, evenly spaced over all.
LOOKED_AT = 2000
# A class is said to get nearly nothing below this part of an even share.
NEARLY_NOTHING = 0.1
# Classes that are listed; of more, the least and the most frequent half as many.
LISTED = 20


def write_words(backbone: Backbone, data: DataSpec, classes: Sequence[str], progress: Progress) -> bool:
    """Let what the classes are called be the classifier, in place; return False for models that read no words.

    Raises:
        DataError: The words, templates or descriptions cannot be read, or are for other classes.
    """
    language = language_of(backbone.model)
    if language is None or not classes:
        return False
    read_words(language, data, classes, progress)
    write_zero_shot_head(backbone.model, backbone.anatomy, language.features_CE)
    return True


def read_words(language: Language, data: DataSpec, classes: Sequence[str], progress: Progress) -> None:
    """Tell a language part what the classes are called, and compute the features of their texts."""
    words = words_of(classes, data.classes)
    language.names = tuple(several[0] for several in words.values())
    language.texts = texts_of(words, templates_of(data.templates), descriptions_of(data.descriptions, classes))
    count = sum(map(len, language.texts))
    with progress.wait(f"reading {count:,} texts of {len(classes):,} classes", count) as shown:
        language.tower.to(accelerator().device)
        language.features_CE = class_features(language, language.texts, texts_root(), shown.advance)
        language.tower.to("cpu")  # it is not needed again, unless a method takes it


@dataclass(frozen=True)
class Answers:
    """How a teacher answers on images without labels.

    Attributes:
        images: How many were looked at.
        shares: Of the images that each class is the answer to, (C,).
        confidences: Mean probability of these answers, (C,); NaN where a class is never the answer.
    """

    classes: tuple[str, ...]
    images: int
    shares: np.ndarray
    confidences: np.ndarray

    def to_dict(self) -> dict[str, object]:
        """Return plain values for the summary, of each class: its name, share, and confidence or None."""
        rows = zip(self.classes, self.shares.tolist(), self.confidences.tolist(), strict=True)
        return {
            "images": self.images,
            "classes": [[n, round(s, 4), None if np.isnan(c) else round(c, 4)] for n, s, c in rows],
        }

    def lines(self) -> list[str]:
        """Return what to say of it."""
        # stable: classes of equal shares keep their order.
        count, order = len(self.classes), np.argsort(-self.shares, kind="stable")
        listed = order if count <= LISTED else np.concatenate([order[: LISTED // 2], order[-LISTED // 2 :]])
        parts = [
            f"{plain(self.classes[i])} {self.shares[i]:.1%}"
            + ("" if np.isnan(self.confidences[i]) else f" (sure {self.confidences[i]:.0%})")
            for i in listed.tolist()
        ]
        rest = f" ... {count - LISTED:,} more ..." if count > LISTED else ""
        seen = self.shares[self.shares > 0]
        entropy = float(-(seen * np.log(seen)).sum() / np.log(count))
        # 1 for even shares; 0.9 is about what one class of ten with three times its share gives.
        balance = "about balanced" if entropy > 0.9 else "not balanced"
        said = [
            f"the teacher's answers on {self.images:,} images without labels are {balance} (evenness {entropy:.2f}):"
            f" {', '.join(parts)}{rest}"
        ]
        if balance == "not balanced":
            said.append("if there are about as many images of each class, let it answer so: --set teacher.balance=0.5")
        rare = [plain(self.classes[i]) for i in order[::-1] if self.shares[i] < NEARLY_NOTHING / count]
        if rare:
            more = f" and {len(rare) - 8} more" if len(rare) > 8 else ""
            said.append(
                f"warning: nearly no image is {', '.join(rare[:8])}{more} for the teacher: the student will hardly"
                " learn it; see whether there are such images, or find other words (--classes, --templates)"
            )
        return said


def probabilities(logits_NC: np.ndarray) -> np.ndarray:
    """Return the softmax of each row."""
    # Less the largest logit, which changes no probability and lets no exponential overflow.
    exponentials_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    return exponentials_NC / exponentials_NC.sum(axis=1, keepdims=True)


def answers_of(
    network: Network, source: ViewSource, batch_size: int, progress: Progress, logits_NC: np.ndarray | None = None
) -> Answers:
    """Say and return how sure a teacher is, class by class, on some images.

    Args:
        logits_NC: What it answers on these images, where that is known already.
    """
    if logits_NC is None:
        what = "the teacher's answers"
        logits_NC, _ = signals_of(network, source, batch_size, progress, what, pooled=False, at_most=LOOKED_AT)
    probabilities_NC = probabilities(logits_NC)
    answers_N, classes = probabilities_NC.argmax(axis=1), logits_NC.shape[1]
    counts_C = np.bincount(answers_N, minlength=classes)
    sums_C = np.bincount(answers_N, weights=probabilities_NC.max(axis=1), minlength=classes)
    # 0 / 0 for a class that is never the answer: the NaN that ``Answers`` names.
    with np.errstate(invalid="ignore"):
        confidences_C = sums_C / counts_C
    found = Answers(network.classes or (), len(answers_N), counts_C / len(answers_N), confidences_C)
    for line in found.lines():
        progress.say(line)
    return found
