"""What methods share that add a low-rank change to complete linear layers.

Letters: i input and o output features of a layer, r rank.
"""

from abc import abstractmethod
from dataclasses import replace

from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, Projection
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.layers import LayerTargets, layers_of
from remap.tuning.weights import Delta, attach_deltas, registered_at, require_rank


class LayerDelta(Method):
    """A fused q, k, v layer is one layer, changed as a whole if any of them is a target.

    Attributes:
        name: Last component of the inserted modules' names.
    """

    name: str

    class Config(Options):
        rank: int = Field(default=8, ge=1, description="Rank of the update.")
        targets: LayerTargets = None

    config: Config

    @abstractmethod
    def delta(self, weight_oi: Tensor, site: int, called: bool) -> Delta:
        """Return the change of a layer.

        Args:
            site: Counts the layers.
            called: Whether the backbone calls the layer, so that the change sees its input.
        """

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        deltas: dict[Projection, Delta] = {}
        edits = Edits(model)
        for site, layer in enumerate(layers_of(anatomy, self.config.targets)):
            weight = registered_at(model, f"{layer.path}.weight").detach()
            rows, columns = weight.flatten(1).shape
            require_rank(self.config.rank, min(rows, columns), layer.path, (rows, columns))
            change = replace(layer.projections[0], start=0, stop=rows, called=layer.called)
            delta = self.delta(weight.flatten(1), site, layer.called)
            deltas[change] = edits.insert(f"{layer.path}.{self.name}", delta, weight)
        return attach_deltas(edits, deltas)
