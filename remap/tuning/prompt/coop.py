"""Context optimisation: the words around a class name are learned (CoOp, KgCoOp, ProGrad).

Letters: B images, C classes, M context vectors, D width of the text tower, E dimensions that images and texts share.
"""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy
from remap.backbones.projected_head import exact_linear
from remap.tuning.base import Attachment, Edits, Method, TrainingHooks
from remap.tuning.prompt.context import Context, ContextOptions, Position
from remap.tuning.words import WordHead, attach_words, zero_shot


class CoOp(Method):
    """t_c = g([V]_1 ... [V]_M [CLASS] .) (Zhou et al. 2022, arXiv 2109.01134, equations 1 to 3): M*D parameters.

    Afterwards the texts are a classifier: nothing is left of the text tower in the tuned model.
    """

    class Config(ContextOptions):
        position: Position = Field(
            default="end", description="Where the class name stands: at the end of the context, in the middle or front."
        )
        per_class: bool = Field(default=False, description="Learn context vectors for each class (C*M*D parameters).")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        config = self.config
        words = Context(model, anatomy, "coop", config, position=config.position, sets=config.per_class)
        return attach_words(model, anatomy, words)


class KgCoOp(Method):
    """CoOp with the words kept near the hand-written ones (Yao et al. 2023, arXiv 2303.13283, equations 4 and 5).

    The loss gets strength * mean_c (1 - cos(t_c, w_c)), w_c the zero-shot feature of the class, as in the authors'
    code: half of the ||t_c - w_c||^2 of equation 4.
    """

    class Config(ContextOptions):
        num_context: int = Field(default=4, ge=1, description="Context vectors.")
        words: str | None = Field(default="a photo of a", description="Words that the context starts from.")
        strength: float = Field(
            default=8.0, ge=0.0, description="Weight lambda of the distance to the zero-shot words."
        )

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        words = Context(model, anatomy, "kgcoop", self.config)
        return attach_words(model, anatomy, words, NearZeroShot(words, self.config.strength))


class NearZeroShot(TrainingHooks):
    """A penalty on 1 - cosine of the words and the zero-shot ones."""

    def __init__(self, words: WordHead, strength: float) -> None:
        self.words, self.strength = words, strength

    def penalty(self) -> Tensor | None:
        unit_CE = self.words.unit_now()
        cosines_C = (unit_CE * zero_shot(self.words.language, unit_CE)).sum(dim=-1)
        return self.strength * (1 - cosines_C.mean())


class ProGrad(Method):
    """CoOp whose updates do not contradict the zero-shot model (Zhu et al. 2023, arXiv 2205.14865, equation 5).

    G_d is the gradient of the loss and G_g that of KL(zero-shot || tuned) of the class probabilities. Where their
    product is negative, G_d - strength * (G_d G_g) / ||G_g||^2 G_g is stepped along instead of G_d. Both are those of
    the whole batch, however it is divided; G_g costs a second backward pass through the text tower.
    """

    class Config(ContextOptions):
        words: str | None = Field(
            default="a photo of a", description="Words that the context starts from, behind zeros."
        )
        strength: float = Field(
            default=1.0, ge=0.0, le=1.0, description="Share lambda of the conflict that is removed."
        )
        temperature: float = Field(default=1.0, gt=0.0, description="Temperature of the divergence.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        words, edits = Context(model, anatomy, "prograd", self.config), Edits(model)
        hooks = ProjectedGradient(words, self.config)
        edits.after(anatomy.classifier_heads[0], hooks.see_logits)
        return attach_words(model, anatomy, words, hooks, edits=edits)


class ProjectedGradient(TrainingHooks):
    """The general direction G_g of a step, and the rule that projects onto it."""

    def __init__(self, words: Context, config: ProGrad.Config) -> None:
        self.words, self.config = words, config
        self._general: Tensor | None = None

    def see_logits(self, head: nn.Module, args: tuple, logits_BC: Tensor) -> None:
        """Forward hook of the classifier."""
        if self.words.learns and torch.is_grad_enabled():
            self.see(args[0].detach(), logits_BC)

    def see(self, unit_BE: Tensor, logits_BC: Tensor) -> None:
        """Add the gradient of the divergence of some images, summed over them."""
        context = self.words.context
        if context.grad is None:  # the first images of a step
            self._general = None
        with torch.no_grad():
            plain_BC = exact_linear(unit_BE, *self._zero_shot_head(unit_BE))
        temperature = self.config.temperature
        log_BC, wanted_BC = (F.log_softmax(x.float() / temperature, dim=-1) for x in (logits_BC, plain_BC))
        divergence = F.kl_div(log_BC, wanted_BC, reduction="sum", log_target=True)
        (gradient,) = torch.autograd.grad(divergence, context, retain_graph=True)
        self._general = gradient if self._general is None else self._general + gradient

    def _zero_shot_head(self, like: Tensor) -> tuple[Tensor, Tensor]:
        weight_CE, bias_C = self.words.language.head(zero_shot(self.words.language, like))
        return weight_CE, bias_C.to(like)

    def before_step(self, average: Callable[[list[Tensor]], None]) -> None:
        gradient = self.words.context.grad
        if gradient is None:
            return
        # A process that could read no image of the step has none, and still takes part: the others wait for it.
        general = torch.zeros_like(gradient) if self._general is None else self._general
        average([general])  # sums of all processes divided alike: only the direction counts
        project(gradient, general, self.config.strength)
        self._general = None


def project(gradient: Tensor, general: Tensor, strength: float) -> None:
    """Take the part of a gradient that points against a general direction out of it, in place."""
    product = (gradient * general).sum().clamp_max(0.0)
    tiny = torch.finfo(general.dtype).tiny
    gradient.sub_(strength * product / general.square().sum().clamp_min(tiny) * general)
