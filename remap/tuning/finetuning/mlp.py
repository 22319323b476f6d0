"""MLP-k (Jia et al. 2022, arXiv 2203.12119): hidden layers between the frozen features and the classifier.

Letters: B batch, D width of the features, k hidden layers.
"""

from collections.abc import Iterator

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, module_at
from remap.errors import BackboneError
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.dropout import SampleDropout
from remap.tuning.seam import FeatureSeam


class MLP(Method):
    """k times dropout(bn(relu(W x + b))) in front of the classifier: k*(D*D + 3*D) parameters.

    With the classifier that is the paper's MLP-(k+1). Distilled models have two classifiers: each feature passes
    through the same layers.
    """

    class Config(Options):
        num_layers: int = Field(default=2, ge=1, description="Hidden layers, without the classifier.")
        dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="Dropout probability after each hidden layer.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        require_one_feature(anatomy, "mlp")
        head = module_at(model, anatomy.classifier_heads[0])
        like = head.weight if isinstance(head, nn.Linear) else next(model.parameters())
        edits = Edits(model)
        hidden = edits.insert("remap_mlp", HiddenLayers(anatomy.feature_width, self.config), like)
        for path in anatomy.classifier_heads:
            edits.before(path, hidden.before_classifier)
        return Attachment(edits, identity_at_init=False, seam=FeatureSeam(model, anatomy))


def require_one_feature(anatomy: Anatomy, method: str) -> None:
    """Raise a BackboneError for a network whose classifiers read features of their own."""
    if not anatomy.averaged_heads:
        raise BackboneError(
            f"{method} acts on the feature of the classifier, and this network has several",
            given=f"classifiers {', '.join(anatomy.classifier_heads)}",
            do="take linear, norm, partial, lora or full",
        )


def one_layer_heads(model: nn.Module, anatomy: Anatomy, method: str) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Yield path and layer of each classifier; a model without one has none.

    Raises:
        BackboneError: A classifier has several layers.
    """
    for path in anatomy.classifier_heads:
        head = module_at(model, path)
        if isinstance(head, nn.Linear | nn.Conv2d):
            yield path, head
        elif not isinstance(head, nn.Identity):
            raise BackboneError(f"{method} needs a classifier of one layer", given=type(head).__name__)


class HiddenLayers(nn.Module):
    """The hidden layers and the hook of the classifier."""

    def __init__(self, width: int, config: MLP.Config) -> None:
        super().__init__()
        linears = [nn.Linear(width, width) for _ in range(config.num_layers)]
        self.linears = nn.ModuleList(linears)
        self.norms = nn.ModuleList(BatchNorm(width) for _ in range(config.num_layers))
        self.dropouts = nn.ModuleList(SampleDropout(config.dropout, site) for site in range(config.num_layers))
        for linear in linears:
            nn.init.kaiming_normal_(linear.weight, mode="fan_out")
            nn.init.zeros_(linear.bias)

    def forward(self, x_BD: Tensor) -> Tensor:
        for linear, norm, dropout in zip(self.linears, self.norms, self.dropouts, strict=True):
            x_BD = dropout(norm(F.relu(linear(x_BD))))
        return x_BD

    def before_classifier(self, head: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook of a linear layer (or 1x1 convolution) of the classifier."""
        return (self(args[0].flatten(1)).view_as(args[0]), *args[1:])


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over (B, D) that takes the running statistics for a single image, which has no variance."""

    def forward(self, x_BD: Tensor) -> Tensor:
        if self.training and len(x_BD) == 1:
            return F.batch_norm(x_BD, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x_BD)
