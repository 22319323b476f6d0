"""Read a block with additional queries: a few tokens attend to the block's sequence without joining it.

Letters: B batch, T tokens of the sequence, p queries, D width, H heads, h head width, E = H*h.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, einsum, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, AttentionBlock, Projection, module_at
from remap.backbones.families.eva import RotaryAttention, rotated
from remap.backbones.typed import layer_at

# A module whose weights are divided among processes (``remap.distributed.sharding``) has a method of this name.
APART = "_remap_apart"


class _Sharded(Protocol):
    def unshard(self) -> None: ...

    def reshard(self) -> None: ...


def apart(block: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function(*args)``, which reads the weights of a block outside of its forward pass.

    Weights that are divided among processes are gathered meanwhile, and again when the gradient comes.
    """
    return getattr(block, APART, _call)(function, *args)


def leaving(block: nn.Module, output: Tensor, start: Tensor | None = None) -> Tensor:
    """Mark a tensor that was made inside the forward pass of a block and leaves it next to the block's output.

    Weights that are divided among processes are then gathered for its gradient.

    Args:
        start: What it was made from, if nothing else in the block has a gradient: behind it the weights part again.
    """
    if hasattr(block, APART) and output.requires_grad:
        sharded = cast(_Sharded, block)
        output.register_hook(lambda _gradient: sharded.unshard())
        if start is not None:
            start.register_hook(lambda _gradient: sharded.reshard())
    return output


class BlockReader:
    """Apply a block to p query tokens whose keys and values are the tokens of the block's own sequence.

    Values, and keys where nothing follows their projection, are never formed: softmax(q (W_k x)^T) W_v x is
    W_v (softmax((W_k^T q) x^T) x), which costs 2*p*H*D multiplications a token instead of 2*D*D.

    Only modules are held, so a deep copy of a model together with its readers reads the copy. The block's own dropout
    and drop-path are left out. Its modules run past their hooks: those are for the tokens of the sequence.
    """

    def __init__(self, model: nn.Module, paths: AttentionBlock) -> None:
        self.heads, self.whole = paths.heads, module_at(model, paths.block)
        self.attn, self.proj = module_at(model, paths.attn), module_at(model, paths.proj)
        self.norm1, self.norm2, self.mlp = (module_at(model, path) for path in (paths.norm1, paths.norm2, paths.mlp))
        self._scales = [_owner(model, path) for path in (paths.attn_scale, paths.mlp_scale)]
        self._q, self._k, self._v = (_Rows(model, paths.projections[word]) for word in "qkv")

    def keys(self, tokens_BTD: Tensor, rope: Tensor | None) -> Tensor | None:
        """Return keys (B, H, T, h) where the block rotates or normalises its keys, else None: ``attend`` needs none.

        Args:
            tokens_BTD: What the block gives its attention (behind norm1).
            rope: The rotary embedding it gives with them.
        """
        norm = getattr(self.attn, "k_norm", nn.Identity())
        if rope is None and isinstance(norm, nn.Identity):
            return None
        weight, bias = self._k.tensors()
        keys_BHTh = norm.forward(self._split(F.linear(tokens_BTD, weight, bias)))
        if rope is None:
            return keys_BHTh
        assert isinstance(self.attn, RotaryAttention)
        return rotated(self.attn, keys_BHTh, rope)

    def attend(
        self,
        queries_BpD: Tensor,
        tokens_BTD: Tensor,
        keys_BHTh: Tensor | None = None,
        affine: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the attention's output (B, p, D) for queries that, like the tokens, are behind norm1 and not rotated.

        Args:
            affine: Scale and shift (D,) that the tokens are still to get, where there are no keys. Left to this
                function, no gradient has to be formed for every token.
        """
        batch, count = queries_BpD.shape[:2]
        q_BHph = self._split(F.linear(queries_BpD, *self._q.tensors()))
        q_BHph = getattr(self.attn, "q_norm", nn.Identity()).forward(q_BHph) * cast(float, self.attn.scale)
        if keys_BHTh is None:
            weight, bias = self._k.tensors()
            turned_BHpD = einsum("bhpe,hed->bhpd", q_BHph, weight.unflatten(0, (self.heads, -1)))
            if affine is not None:
                turned_BHpD = turned_BHpD * affine[0]  # the shift adds the same to all scores of a query
            scores_BHpT = (turned_BHpD.flatten(1, 2) @ tokens_BTD.mT).unflatten(1, (self.heads, count))
            if bias is not None:
                # Shifts all scores of a query alike, which the softmax does not see; here for its (zero) gradient.
                scores_BHpT = scores_BHpT + (q_BHph * bias.view(self.heads, 1, -1)).sum(-1, keepdim=True)
        else:
            scores_BHpT = q_BHph @ keys_BHTh.mT
        mixed_BHpD = (scores_BHpT.softmax(-1).flatten(1, 2).to(tokens_BTD.dtype) @ tokens_BTD).unflatten(1, (-1, count))
        if affine is not None:
            mixed_BHpD = mixed_BHpD * affine[0] + affine[1]  # the weights of a softmax add up to 1
        weight, bias = self._v.tensors()
        out_BHph = einsum("bhpd,hed->bhpe", mixed_BHpD, weight.unflatten(0, (self.heads, -1)))
        out_BpE = out_BHph.transpose(1, 2).reshape(batch, count, -1)
        if bias is not None:
            out_BpE = out_BpE + bias
        return self.proj.forward(getattr(self.attn, "norm", nn.Identity()).forward(out_BpE))

    def block(self, x_BpD: Tensor, tokens_BTD: Tensor, keys_BHTh: Tensor | None = None) -> Tensor:
        """Run the block for p rows of its residual stream that are not behind norm1 yet, as the tokens are."""
        return self._mlp(x_BpD + self._scaled(0, self.attend(self.norm1.forward(x_BpD), tokens_BTD, keys_BHTh)))

    def class_row(self, x_BTD: Tensor) -> Tensor:
        """Return the block's output (B, 1, D) for token 0 of its own input, which has no gradient, by ``attend``."""
        norm, row_B1D = self.norm1, x_BTD[:, :1]
        if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
            plain_BTD = F.layer_norm(x_BTD, norm.normalized_shape, eps=norm.eps)
            bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
            queries_B1D = plain_BTD[:, :1] * norm.weight + bias
            out_B1D = self.attend(queries_B1D, plain_BTD, affine=(norm.weight, bias))
        else:
            tokens_BTD = norm.forward(x_BTD)
            out_B1D = self.attend(tokens_BTD[:, :1], tokens_BTD)
        return self._mlp(row_B1D + self._scaled(0, out_B1D))

    def _mlp(self, x_BpD: Tensor) -> Tensor:
        return x_BpD + self._scaled(1, self.mlp.forward(self.norm2.forward(x_BpD)))

    def _split(self, x_BTE: Tensor) -> Tensor:
        return x_BTE.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _scaled(self, branch: int, x: Tensor) -> Tensor:
        owner = self._scales[branch]
        return x if owner is None else x * getattr(*owner)


class _Rows:
    """Weight and bias of a projection, read anew at every use."""

    def __init__(self, model: nn.Module, projection: Projection) -> None:
        self.layer, self.rows = layer_at(model, projection.path), projection.rows
        self.bias, start = _owner(model, projection.bias), projection.bias_start
        self.bias_rows = slice(start, start + projection.stop - projection.start)

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None else getattr(*self.bias)[self.bias_rows]
        return self.layer.weight[self.rows], bias


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _owner(model: nn.Module, path: str | None) -> tuple[nn.Module, str] | None:
    if path is None:
        return None
    parent, _, name = path.rpartition(".")
    return module_at(model, parent), name


def reads_one_row(anatomy: Anatomy) -> bool:
    """Return whether logits need only the class token's row of the last block, and ``BlockReader`` needs no keys."""
    last = anatomy.blocks[-1]
    return anatomy.class_token_pooled and isinstance(last, AttentionBlock) and last.plain_scores
