"""CODA-Prompt (Smith et al. 2023, arXiv 2211.13218): a prompt of its own for each image, a sum of components.

Letters: B batch, M components, l tokens of a prompt, D width, H heads, h head width, E = H * h.
"""

from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, AttentionBlock
from remap.tuning.base import Attachment, Edits, Method, TrainingHooks
from remap.tuning.prompt.pools import Query, SessionOptions, attachment, extend
from remap.tuning.prompt.prompts import weight_like


class CODAPrompt(Method):
    """CODA-Prompt (Smith et al. 2023, arXiv 2211.13218): a prompt of its own for each image, a sum of components.

    In each of the first blocks p = sum_m cos(q * A_m, K_m) P_m (equations 4 and 5), whose first half of tokens are keys
    and the others values: M*(l + 2)*D parameters a block. A session trains its own M / sessions components, sums those
    of the sessions up to it, and is kept orthogonal (equation 7), as it starts by Gram-Schmidt.
    """

    class Config(SessionOptions):
        pool: int = Field(default=100, ge=1, description="Components of all sessions together, M.")
        length: int = Field(default=8, ge=2, multiple_of=2, description="Tokens, half of them keys and half values, l.")
        num_blocks: int = Field(default=5, ge=1, description="First blocks, which have prompts.")
        orthogonality: float = Field(default=0.1, ge=0.0, description="Weight of the term that keeps them orthogonal.")

        @model_validator(mode="after")
        def _some_for_each(self) -> "CODAPrompt.Config":
            if self.pool < self.sessions:
                raise ValueError(f"a pool of {self.pool} has none for each of {self.sessions} sessions")
            return self

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        like, edits, query = weight_like(model, anatomy), Edits(model), Query(model, anatomy)
        query.attach(edits, self.config.num_blocks)
        sums = []
        for block in anatomy.attention_blocks[: self.config.num_blocks]:
            sums.append(Components(block, anatomy.width, self.config, query))
            extend(edits, block, sums[-1], like)
        return attachment(edits, Orthogonal(sums, self.config.orthogonality))


class Components(nn.Module):
    """CODA-Prompt's components of one block."""

    def __init__(self, block: AttentionBlock, width: int, config: CODAPrompt.Config, query: Query) -> None:
        super().__init__()
        each = config.pool // config.sessions
        self.first, self.stop = each * config.session, each * (config.session + 1)
        self.heads, self.query = block.heads, query
        shape = (config.pool, 2, config.length // 2, block.heads * block.head_dim)
        self.prompts, self.keys, self.attention = (
            nn.Parameter(torch.empty(size)) for size in (shape, (config.pool, width), (config.pool, width))
        )
        for parameter in (self.prompts, self.keys, self.attention):
            nn.init.orthogonal_(parameter.view(config.pool, -1))

    def parts(self) -> list[Tensor]:
        """Return prompts, keys and attention of the sessions up to this one; those before do not learn."""
        every = (self.prompts, self.keys, self.attention)
        return [torch.cat([one[: self.first].detach(), one[self.first : self.stop]]) for one in every]

    @torch.no_grad()
    def start_session(self) -> None:
        """Make the components of this session orthonormal, and orthogonal to those before, which training has moved."""
        for one in (self.prompts, self.keys, self.attention):
            rows = one.view(len(one), -1)
            if self.stop > rows.shape[1]:  # there is no direction left
                continue
            before = torch.linalg.qr(rows[: self.first].T).Q
            new = rows[self.first : self.stop]
            rows[self.first : self.stop] = torch.linalg.qr((new - new @ before @ before.T).T).Q.T

    def forward(self, k_BHTh: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, H, l / 2, h) for a batch with these keys of tokens."""
        if self.query.idle:
            return k_BHTh[:, :, :0], k_BHTh[:, :, :0]
        prompts, keys_MD, attention_MD = self.parts()
        asked_BMD = F.normalize(self.query.features_BD.to(keys_MD.dtype)[:, None] * attention_MD, dim=-1)
        share_BM = (asked_BMD * F.normalize(keys_MD, dim=-1)).sum(-1)
        own = torch.einsum("bm,mkle->bkle", share_BM, prompts).unflatten(-1, (self.heads, -1)).transpose(2, 3)
        return own[:, 0], own[:, 1]

    def penalty(self) -> Tensor:
        """Return how far prompts, keys and attention are from orthogonal: mean of (X X^T - 1)^2 of each."""
        found = torch.zeros((), device=self.keys.device)
        for part in self.parts():
            rows = part.flatten(1).float()
            found = found + (rows @ rows.T - torch.eye(len(rows), device=rows.device)).square().mean()
        return found


class Orthogonal(TrainingHooks):
    """The term that keeps components orthogonal, and Gram-Schmidt at the start of a session."""

    def __init__(self, sums: Sequence[Components], weight: float) -> None:
        self.sums, self.weight = sums, weight

    def start_session(self) -> None:
        for one in self.sums:
            one.start_session()

    def penalty(self) -> Tensor:
        return self.weight * torch.stack([one.penalty() for one in self.sums]).sum()
