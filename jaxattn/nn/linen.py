"""Flax linen modules on `jaxattn.attention`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from ..algebra import Mask, as_mask
from ..attention import attention
from ..scores import Score
from ..shapes import Array, Float


class MultiHeadAttention(nn.Module):
    """Multi-head attention: projections, `jaxattn.attention`, and a projection back.

    `out = concat_h(attention(x W_q, y W_k, y W_v)) W_o`, with the parameters named and shaped as in
    `flax.linen.MultiHeadDotProductAttention`: `query`, `key`, `value` with kernels
    `[features, heads, head dim]` and `out` with `[heads, head dim, features]`.

    Attributes:
      num_heads: query heads N.
      num_kv_heads: key and value heads K, a divisor of N (grouped queries); N by default.
      qkv_features: N times the head dimension; by default the features of `inputs_q`.
      out_features: of the output; by default the features of `inputs_q`.
      mask: a mask without leaves, or a factory `() -> mask`, used in every call, with `&` the
        mask of the call.
      score: a score without leaves, or a factory `() -> score`, used where the call gives none.
      dropout_rate: of the attention weights; drawn from the rng collection "dropout".
      deterministic: True turns dropout off; may be given in the call instead.
      use_bias: whether projections have a bias.
      dtype: of the computation; by default promoted from inputs and parameters.
      param_dtype: of the parameters.
      precision: of all matrix products.
      kernel_init, bias_init: initialisers of the projections.
      backend: of `jaxattn.attention`.

    Source: Vaswani et al. 2017, arXiv 1706.03762; grouped queries: arXiv 2305.13245.
    """

    num_heads: int
    num_kv_heads: int | None = None
    qkv_features: int | None = None
    out_features: int | None = None
    mask: Any = None
    score: Any = None
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.linear.default_kernel_init
    bias_init: Any = nn.initializers.zeros_init()
    backend: str = "auto"

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "*B T features"],
        inputs_kv: Float[Array, "*B S kv_features"] | None = None,
        *,
        mask: Any = None,
        score: Any = None,
        positions: Any = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "*B T out_features"]:
        """Queries from `inputs_q`, keys and values from `inputs_kv` (by default the same).

        Args:
          inputs_q: `[B, T, features]` or `[T, features]`.
          inputs_kv: `[B, S, features]` or `[S, features]`, for cross attention.
          mask: which query may see which key, as in `jaxattn.attention`.
          score: what changes the logits, as in `jaxattn.attention`.
          positions: what masks and scores see, as in `jaxattn.attention`.
          deterministic: True turns dropout off.

        Returns:
          `[B, T, out_features]` or `[T, out_features]`.

        Raises:
          ValueError: for head counts that do not divide the features.
        """
        features = self.qkv_features or inputs_q.shape[-1]
        kv_heads = self.num_kv_heads or self.num_heads
        if features % self.num_heads:
            raise ValueError(
                f"MultiHeadAttention(qkv_features): got {features}, expected a multiple of "
                f"num_heads={self.num_heads}"
            )
        if self.num_heads % kv_heads:
            raise ValueError(
                f"MultiHeadAttention(num_kv_heads): got {kv_heads}, expected a divisor of "
                f"num_heads={self.num_heads}"
            )
        inputs_kv = inputs_q if inputs_kv is None else inputs_kv
        head_dim = features // self.num_heads

        def projection(name: str, features: Any, axis: Any) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                features=features,
                axis=axis,
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                precision=self.precision,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                name=name,
            )

        query = projection("query", (self.num_heads, head_dim), -1)(inputs_q)
        key = projection("key", (kv_heads, head_dim), -1)(inputs_kv)
        value = projection("value", (kv_heads, head_dim), -1)(inputs_kv)

        rate, seed = 0.0, None
        if self.dropout_rate > 0:
            is_off = nn.merge_param("deterministic", self.deterministic, deterministic)
            rate = 0.0 if is_off else self.dropout_rate
            seed = None if is_off else self.make_rng("dropout")
        out = attention(
            query,
            key,
            value,
            mask=_both(made(self.mask), mask),
            score=made(self.score) if score is None else score,
            positions=positions,
            dropout_rate=rate,
            dropout_seed=seed,
            precision=self.precision,
            backend=self.backend,
        )
        return projection("out", self.out_features or inputs_q.shape[-1], (-2, -1))(out)


def made(attribute: Any) -> Any:
    """A mask or score given as a module's attribute: itself, or what its factory makes."""
    is_factory = callable(attribute) and not isinstance(attribute, (Mask, Score))
    return attribute() if is_factory else attribute


def _both(first: Any, second: Any) -> Any:
    if first is None or second is None:
        return second if first is None else first
    return as_mask(first) & second
