"""Distillation of which images go with which classes, in both directions. B batch, C classes; all in float32."""

from pydantic import Field
from torch import Tensor

from remap.remapping.knowledge.logits.distillation import LogitsTerm, cross_entropy_with
from remap.remapping.labels import Labels
from remap.tuning.base import Options


class Affinity(LogitsTerm):
    """Affinity mimicking of TinyCLIP (Wu et al. 2023, arXiv 2309.12314), equations 1 to 3.

    The logits of a batch are affinities of images and texts, here the classes. Cross-entropy of the student's softmax
    over the classes of each image with the teacher's (image to text), plus that over the images of the batch of each
    class (text to image); means over images and over classes. The paper divides cosines by CLIP's temperature, which
    is in the logits of a zero-shot classifier: ``temperature`` comes on top. Without the second direction it is kd at
    this temperature, up to the teacher's entropy. No label is needed.
    """

    class Config(Options):
        temperature: float = Field(default=1.0, gt=0.0, description="Temperature; divides the logits of both networks.")
        text_to_image: float = Field(default=1.0, ge=0.0, description="Weight of each class's softmax over images.")

    config: Config

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, labels: Labels) -> Tensor:
        s_BC, t_BC = student_BC / self.config.temperature, teacher_BC / self.config.temperature
        over_classes, over_images = cross_entropy_with(s_BC, t_BC), cross_entropy_with(s_BC.mT, t_BC.mT)
        return over_classes + self.config.text_to_image * over_images
