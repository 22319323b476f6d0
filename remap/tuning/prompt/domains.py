"""A set of prompts, norms or adapters for each look of the same classes (S-Prompts), chosen for each image.

Letters: B batch, T tokens, D width, H heads, h head width, l keys and values, K centroids, S sessions so far.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, AttentionBlock, module_at
from remap.backbones.typed import evaluating
from remap.tuning.adapter.adaptformer import AdaptFormer, ParallelBottleneck
from remap.tuning.adapter.bottleneck import Beside, insert_adapter
from remap.tuning.base import Attachment, Edits, Method, Options, Sample, TrainingHooks
from remap.tuning.one_a_session import one_a_session
from remap.tuning.prompt.pools import Query, extend
from remap.tuning.prompt.prompts import weight_like
from remap.tuning.weights import registered

PATH = "remap_domains"


class Domains(Method):
    """S-Prompts (Wang et al. 2022, arXiv 2207.12819): each session learns a set of its own for its look.

    K-means of the images' frozen features gives the centroids of a session (section 3.3); an image that is answered
    gets the set of the session with the nearest centroid. The paper has prompt tokens and a classifier a session; here
    a set is keys and values in every block, 2*l*D each, or a scale and shift behind every norm, or AdaptFormer's
    bottlenecks, and the classifier is that of the first session: later ones change no answer of an image that gets an
    earlier set.
    """

    class Config(Options):
        parts: Literal["prompts", "norms", "adapters"] = Field(default="prompts", description="What a session learns.")
        session: int = Field(default=0, ge=0, description="Which session is learned, from 0; `remap extend` counts on.")
        centroids: int = Field(default=5, ge=1, description="Centroids of a session, K.")
        length: int = Field(default=10, ge=1, description="Keys and values of a block, l.")
        bottleneck: int = Field(default=8, ge=1, description="Width of an adapter's bottleneck.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        config, like, edits = self.config, weight_like(model, anatomy), Edits(model)
        query = Looks(model, anatomy)
        router = edits.insert(PATH, Router(anatomy.width, config, query), like)
        edits.before(anatomy.input_module, router.ask)
        for site, block in enumerate(anatomy.attention_blocks):
            if config.parts == "prompts":
                extend(edits, block, SessionPrompts(block, config.length, router), like)
            elif config.parts == "adapters":
                of_block = AdaptFormer.Config(bottleneck=config.bottleneck)
                make = partial(ParallelBottleneck, block.width, of_block, site)
                adapter = insert_adapter(edits, block, PATH, SessionAdapters(make, router))
                edits.before(block.norm2, adapter.keep_input)
                edits.after(block.mlp_branch_end, adapter.add_to_branch)
        norms = [norm for block in anatomy.blocks for norm in block.norms]
        for path in norms if config.parts == "norms" else ():
            # Norms of queries and keys, and of hidden units, have widths of their own.
            width = registered(module_at(model, path), "weight").numel()
            affine = SessionAffine(partial(Affine, width), router)
            edits.after(path, edits.insert(f"{path}.{PATH}", affine, like).change_output)
        return Attachment(
            edits,
            no_decay=None if config.parts == "adapters" else edits.parameters(),
            identity_at_init=config.parts != "prompts",
            hooks=Centroids(router),
            trains_head=config.session == 0,
        )


class Looks(Query):
    """The frozen features of a batch.

    Attributes:
        session_B: The session whose set each image gets.
    """

    session_B: Tensor


class Router(nn.Module):
    """The centroids of all sessions."""

    def __init__(self, width: int, config: Domains.Config, query: Looks) -> None:
        super().__init__()
        self.session, self.count, self.query = config.session, config.centroids, query
        for session in range(config.session + 1):
            self.register_buffer(f"centroids_{session}", torch.zeros(config.centroids, width))

    def ask(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the module that takes the images; in training all have the newest set."""
        if self.training or self.query.idle:
            return
        self.query.ask(module, args)
        centroids_KD = torch.cat([getattr(self, f"centroids_{session}") for session in range(self.session + 1)])
        # One by one, so that an image's distances do not depend on the images beside it.
        distance_BK = (self.query.features_BD[:, None].to(centroids_KD.dtype) - centroids_KD).square().sum(-1)
        self.query.session_B = distance_BK.argmin(1) // self.count

    @torch.no_grad()
    def take(self, features_ND: Tensor) -> None:
        """Take the centroids of this session's images; of fewer images than centroids, each is one."""
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        x_ND = features_ND.double().cpu().numpy()
        count = min(self.count, len(x_ND))
        with threadpool_limits(1):  # several threads add up in any order, and all processes need the same bits
            found = torch.from_numpy(KMeans(count, n_init=4, random_state=0).fit(x_ND).cluster_centers_)
        centroids_KD = getattr(self, f"centroids_{self.session}")
        centroids_KD.copy_(found[torch.arange(self.count) % count])


class BySession(nn.Module):
    """A module for each session, of which each image gets one."""

    def __init__(self, make: Callable[[], nn.Module], router: Router) -> None:
        super().__init__()
        self.sets = one_a_session(make, router.session)
        self._router = (router,)  # which the model holds already

    @property
    def idle(self) -> bool:
        """Whether the pass runs that knows no sets."""
        return self._router[0].query.idle

    def pick(self, of: Callable[[nn.Module], Tensor]) -> Tensor:
        """Return what each image's own module gives (B, ...)."""
        if self.training:
            return of(self.sets[-1])
        every = torch.stack([of(one) for one in self.sets])
        return every[self._router[0].query.session_B, torch.arange(every.shape[1], device=every.device)]


class Prompts(nn.Module):
    """The keys and values of one block and session."""

    def __init__(self, block: AttentionBlock, length: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(2, block.heads, length, block.head_dim))
        nn.init.uniform_(self.prompts, -1.0, 1.0)

    def forward(self, images: int) -> Tensor:
        """Return them for so many images (B, 2, H, l, h)."""
        return self.prompts.expand(images, -1, -1, -1, -1)


class SessionPrompts(BySession):
    """The keys and values of one block."""

    def __init__(self, block: AttentionBlock, length: int, router: Router) -> None:
        super().__init__(partial(Prompts, block, length), router)

    def forward(self, k_BHTh: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, H, l, h) for a batch with these keys of tokens."""
        if self.idle:
            return k_BHTh[:, :, :0], k_BHTh[:, :, :0]
        own = self.pick(lambda one: one(k_BHTh.shape[0]))
        return own[:, 0], own[:, 1]


class SessionAdapters(BySession, Beside):
    """The bottlenecks of one block."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return torch.zeros_like(x_BTD) if self.idle else self.pick(lambda one: one(x_BTD))


class Affine(nn.Module):
    """A scale and shift, (..., D) to (..., D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class SessionAffine(BySession):
    """The scales and shifts behind one norm."""

    def change_output(self, norm: nn.Module, args: tuple, output_BTD: Tensor) -> Tensor:
        """Forward hook of a norm."""
        return output_BTD if self.idle else self.pick(lambda one: one(output_BTD))


class Centroids(TrainingHooks):
    """Takes the centroids of a session's images before its first step."""

    wants_sample, sample_images, each_session = True, 4096, True

    def __init__(self, router: Router) -> None:
        self.router = router

    def prepare(self, sample: Sample) -> None:
        query, features = self.router.query, []
        with evaluating(query.model):
            for images_BCHW, _ in sample.batches():
                query.ask(query.model, (images_BCHW,))
                features.append(query.features_BD)
        self.router.take(torch.cat(features))
