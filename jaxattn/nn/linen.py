"""Flax linen modules on `jaxattn.attention`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from functools import partial
from typing import Any, Literal, Unpack, overload

import jax.numpy as jnp

from ..caches.cache import Cache
from ..caches.kv_cache import KVCache
from ..shapes import Array, Float, Int
from . import functional
from .attention_fn import attention_fn
from .flax_packages import linen as nn
from .functional import C
from .rope import RoPE
from .sowing import collects, sow

__all__ = ["MultiHeadAttention", "RoPE", "TransformerBlock", "attention_fn"]


class MultiHeadAttention(nn.Module):
    """Multi-head attention: projections, `jaxattn.attention`, and a projection back.

    `out = concat_h(attention(x W_q, y W_k, y W_v)) W_o`. Parameters have the names and shapes of
    `flax.linen.MultiHeadDotProductAttention`, so that a checkpoint of one is one of the other:
    `query`, `key`, `value` with kernels `[features, heads, head dim]`, `out` with
    `[heads, head dim, features]`, `query_ln` and `key_ln` where `normalize_qk`.

    Attributes:
      num_heads: query heads N.
      num_kv_heads: key and value heads K, a divisor of N (grouped queries); N by default.
      qkv_features: N times the head dimension; by default the features of `inputs_q`.
      head_dim: H, if it is not `qkv_features / num_heads`.
      out_features: the features of the output; by default those of `inputs_q`.
      mask: a mask without arrays, or a factory `() -> mask`, used in every call, with `&` the
        mask of the call.
      score: a score without arrays, or a factory `() -> score`, used in calls that give none.
      stats: statistics of the attention weights (`jaxattn.stats`), in any pytree, without arrays,
        or a factory `() -> statistics`; used in calls that give none. Each call adds their values
        to "attention_stats" in the collection "intermediates". They are computed only
        where they are collected: by `apply(..., mutable=["intermediates"])`.
      rope: turns queries and keys by their positions: a `RoPE`, or any function of
        `[B, T, N, H]` and positions `[T]` or `[B, T]`.
      sinks: whether each head learns a logit that takes weight and has no value.
      normalize_qk: whether queries and keys pass a LayerNorm first (2302.05442).
      dropout_rate: the rate for attention weights; seeds come from the rng collection "dropout".
      deterministic: True turns dropout off; may be given in the call instead.
      use_bias: whether projections have a bias.
      dtype: of the computation; by default promoted from inputs and parameters.
      param_dtype: of the parameters.
      precision: the precision of all matrix products.
      kernel_init, bias_init: initialisers of the projections.
      out_kernel_init, out_bias_init: those of the last projection, if they differ.
      sharding: the mesh axes for (features, heads, head dimension) of all parameters, such as
        `("data", "model", None)`; kept as `flax.linen.Partitioned`.
      backend: of `jaxattn.attention`.

    Source: Vaswani et al. 2017, arXiv 1706.03762; grouped queries: arXiv 2305.13245.
    """

    num_heads: int
    num_kv_heads: int | None = None
    qkv_features: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    mask: Any = None
    score: Any = None
    rope: Callable[[Array, Array], Array] | None = None
    sinks: bool = False
    normalize_qk: bool = False
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.linear.default_kernel_init
    bias_init: Any = field(default_factory=nn.initializers.zeros_init)
    out_kernel_init: Any = None
    out_bias_init: Any = None
    sharding: tuple[str | None, str | None, str | None] | None = None
    backend: str = "auto"
    stats: Any = None

    def __post_init__(self) -> None:
        self.stats = functional.asked(self.stats)
        super().__post_init__()

    @overload
    def __call__(
        self,
        inputs_q: Float[Array, "*B T features"],
        inputs_kv: Float[Array, "*B S kv_features"] | Cache | None = None,
        *,
        cache: None = None,
        **options: Unpack[functional.AttentionOptions],
    ) -> Float[Array, "*B T out_features"]: ...

    @overload
    def __call__(
        self,
        inputs_q: Float[Array, "*B T features"],
        inputs_kv: Float[Array, "*B S kv_features"] | Cache | None = None,
        *,
        cache: C,
        **options: Unpack[functional.AttentionOptions],
    ) -> tuple[Float[Array, "*B T out_features"], C]: ...

    def __call__(
        self,
        inputs_q: Float[Array, "*B T features"],
        inputs_kv: Float[Array, "*B S kv_features"] | Cache | None = None,
        *,
        mask: Any = None,
        score: Any = None,
        stats: Any = None,
        positions: Any = None,
        rope_positions: Int[Array, "*Bp T"] | None = None,
        cache: Cache | None = None,
        counts: Int[Array, "B"] | None = None,
        deterministic: bool | None = None,
        sow_weights: bool = False,
    ) -> Any:
        """Queries from `inputs_q`, keys and values from `inputs_kv` (by default the same).

        Args:
          inputs_q: `[B, T, features]` or `[T, features]`.
          inputs_kv: `[B, S, features]` or `[S, features]`, for cross attention; or what `remember`
            made of it, so that it is projected once and not at every step.
          mask: which query may see which key, as in `jaxattn.attention`. With a cache it is asked
            about positions in the whole sequence, so an array of padding has to be as long as the
            cache; with `counts` no mask of the padding is needed.
          score: what changes the logits, as in `jaxattn.attention`.
          stats: statistics of the weights; they may hold arrays. See the attribute.
          positions: the positions in masks, scores and `rope`, as in `jaxattn.attention`.
          rope_positions: other positions of queries and keys for `rope` alone: positions within
            packed documents, depths in a tree of drafts.
          cache: keys and values of earlier tokens; those of this call are appended.
          counts: how many tokens of each row are real, `[B]`; they come first. Padding after a
            prompt is not kept in the cache and gets no position.
          deterministic: True turns dropout off.
          sow_weights: put the weights `[B, N, T, S]`, before dropout, into the collection
            "intermediates" as "attention_weights": O(T * S) memory.

        Returns:
          `[B, T, out_features]` or `[T, out_features]`; with a cache, that and the cache after.

        Raises:
          ValueError: for head counts that do not divide the features.
        """
        functional.check_inputs("inputs_q", inputs_q, None)
        return self._all(
            inputs_q,
            inputs_kv,
            mask=mask,
            score=score,
            stats=stats,
            positions=positions,
            rope_positions=rope_positions,
            cache=cache,
            counts=counts,
            deterministic=deterministic,
            sow_weights=sow_weights,
        )

    def remember(self, inputs_kv: Float[Array, "B S kv_features"]) -> KVCache:
        """Keys and values of `inputs_kv`, to pass as `inputs_kv` to any number of calls.

        Needs `head_dim` or `qkv_features` if queries have other features than `inputs_kv`.
        """
        return self._all(None, inputs_kv)

    @nn.compact
    def _all(self, inputs_q: Any, inputs_kv: Any, **call: Any) -> Any:
        inputs_kv = inputs_q if inputs_kv is None else inputs_kv
        if inputs_q is not None:
            functional.check_inputs("inputs_q", inputs_q, _width(self, "query"))
        if not isinstance(inputs_kv, Cache):
            functional.check_inputs("inputs_kv", inputs_kv, _width(self, "key"))
        features = self.qkv_features
        if features is None:
            features = (inputs_kv if inputs_q is None else inputs_q).shape[-1]
        kv_heads, head_dim = functional.sizes(
            "MultiHeadAttention", features, self.num_heads, self.num_kv_heads, self.head_dim
        )
        functional.check_sizes("MultiHeadAttention", out_features=self.out_features)
        functional.check_rate("MultiHeadAttention", self.dropout_rate)
        functional.check_types("MultiHeadAttention", self.dtype, self.param_dtype)
        flags: dict[str, Any] = {
            "sinks": self.sinks,
            "normalize_qk": self.normalize_qk,
            "use_bias": self.use_bias,
        }
        flags["deterministic"] = self.deterministic
        precision = functional.check_attributes(
            "MultiHeadAttention", self.rope, self.precision, flags
        )
        by_feature, by_head, by_dim = functional.axes_of("MultiHeadAttention", self.sharding)

        def placed(init: Any, *names: str | None) -> Any:
            return init if self.sharding is None else nn.with_partitioning(init, names)

        def projected(name: str, number: int, x: Array) -> Array:
            projection = nn.DenseGeneral(
                features=(number, head_dim),
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                precision=precision,
                kernel_init=placed(self.kernel_init, by_feature, by_head, by_dim),
                bias_init=placed(self.bias_init, by_head, by_dim),
                name=name,
            )(x)
            if not self.normalize_qk or name == "value":
                return projection
            return nn.LayerNorm(
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                scale_init=placed(nn.initializers.ones_init(), by_dim),
                name=f"{name}_ln",
            )(projection)

        memory = inputs_kv if isinstance(inputs_kv, Cache) else None
        key: Any = None
        value: Any = None
        if memory is None:
            key = projected("key", kv_heads, inputs_kv)
            value = projected("value", kv_heads, inputs_kv)
        if inputs_q is None:
            return functional.remembered(key, value, self.rope)
        query = projected("query", self.num_heads, inputs_q)

        deterministic, sow_weights = call.pop("deterministic"), call["sow_weights"]
        functional.check_call(deterministic, sow_weights, call["stats"])
        rate, seed = 0.0, None
        if self.dropout_rate > 0:
            is_off = nn.merge_param("deterministic", self.deterministic, deterministic)
            rate = 0.0 if is_off else self.dropout_rate
            seed = None if is_off else self.make_rng("dropout")
        sinks = None
        if self.sinks:
            init = placed(nn.initializers.zeros_init(), by_head)
            sinks = self.param("sinks", init, (self.num_heads,), self.param_dtype)
        own_mask = functional.made("MultiHeadAttention", "mask", self.mask)
        own_score = functional.made("MultiHeadAttention", "score", self.score)
        mask, score, stats = call.pop("mask"), call.pop("score"), call.pop("stats")
        if stats is None:
            stats = functional.made("MultiHeadAttention", "stats", self.stats)
        out, cache = functional.attend(
            query,
            key,
            value,
            memory=memory,
            rope=self.rope,
            mask=functional.both(own_mask, mask),
            score=own_score if score is None else score,
            sinks=sinks,
            dropout_rate=rate,
            dropout_seed=seed,
            precision=precision,
            backend=self.backend,
            sow=partial(sow, self),
            stats=stats if collects(self) else None,
            **call,
        )
        out = nn.DenseGeneral(
            features=inputs_q.shape[-1] if self.out_features is None else self.out_features,
            axis=(-2, -1),
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=precision,
            kernel_init=placed(
                self.out_kernel_init or self.kernel_init, by_head, by_dim, by_feature
            ),
            bias_init=placed(self.out_bias_init or self.bias_init, by_feature),
            name="out",
        )(out)
        return out if cache is None else (out, cache)


def _width(module: nn.Module, name: str) -> int | None:
    """The input features of a projection of the module; `None` before they are known."""
    made = module.variables.get("params", {}).get(name)
    return None if made is None else int(nn.unbox(made["kernel"]).shape[0])


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention if there is a memory, and a feed-forward network.

    Each adds to its input: `x + f(norm(x))` (pre, 2002.04745), or `norm(x + f(x))` (post,
    1706.03762). The feed-forward network is `activation(x W_in) W_out`, or, if `gated`,
    `(activation(x W_gate) * x W_in) W_out` (2002.05202), in parameters `mlp_in`, `mlp_gate` and
    `mlp_out`.

    Attributes:
      attention: a function that makes the attention and takes a `name`, such as
        `partial(MultiHeadAttention, num_heads=8)`.
      mlp_features: the width of the feed-forward network.
      norm: "pre" or "post".
      norm_layer: makes a norm, as `partial(nn.RMSNorm, epsilon=1e-5)`; is given `dtype`,
        `param_dtype` and a `name`.
      activation: the activation of the feed-forward network.
      gated: whether the feed-forward network has a gate: SwiGLU with `activation=nn.silu`.
      use_bias: whether the projections of the feed-forward network have a bias.
      dropout_rate: the rate for what is added; keys come from the rng collection "dropout".
      deterministic: True turns dropout off; may be given in the call instead.
      dtype, param_dtype: of the norms and of the feed-forward network.
    """

    attention: Callable[..., nn.Module]
    mlp_features: int
    norm: Literal["pre", "post"] = "pre"
    norm_layer: Callable[..., nn.Module] = nn.LayerNorm
    activation: Callable[[Array], Array] = nn.gelu
    gated: bool = False
    use_bias: bool = True
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @overload
    def __call__(
        self,
        x: Float[Array, "*B T features"],
        *,
        cache: None = None,
        **options: Unpack[functional.BlockOptions],
    ) -> Float[Array, "*B T features"]: ...

    @overload
    def __call__(
        self,
        x: Float[Array, "*B T features"],
        *,
        cache: C,
        **options: Unpack[functional.BlockOptions],
    ) -> tuple[Float[Array, "*B T features"], C]: ...

    def __call__(
        self,
        x: Float[Array, "*B T features"],
        *,
        mask: Any = None,
        score: Any = None,
        stats: Any = None,
        positions: Any = None,
        rope_positions: Int[Array, "*Bp T"] | None = None,
        cache: Cache | None = None,
        counts: Int[Array, "B"] | None = None,
        memory: Float[Array, "*B S memory_features"] | Cache | None = None,
        memory_mask: Any = None,
        deterministic: bool | None = None,
        sow_weights: bool = False,
    ) -> Any:
        """The block's output, in the shape of its input; with a cache, that and the cache after.

        Args:
          x: `[B, T, features]` or `[T, features]`.
          mask, score, stats, positions, rope_positions, cache, counts: of self-attention, as in
            `MultiHeadAttention`.
          memory: the sequence for cross-attention, `[B, S, features]`, or what `remember` made of
            it.
          memory_mask: which query may see which part of the memory. With a cache, as `mask`, it is
            asked about positions in the whole sequence.
          deterministic: True turns dropout off.
          sow_weights: as in `MultiHeadAttention`, for both attentions.
        """
        functional.check_inputs("x", x, None)
        deterministic = self.deterministic if deterministic is None else deterministic
        both = {"deterministic": deterministic, "sow_weights": sow_weights}
        own = {"mask": mask, "score": score, "stats": stats, "positions": positions}
        own |= {"rope_positions": rope_positions, "cache": cache, "counts": counts, **both}
        return self._all(x, memory, own, {"mask": memory_mask, **both})

    def remember(self, memory: Float[Array, "B S memory_features"]) -> KVCache:
        """Keys and values of the memory, to pass as `memory` to any number of calls."""
        return self._all(None, memory, {}, {})

    @nn.compact
    def _all(self, x: Any, memory: Any, own: dict[str, Any], cross: dict[str, Any]) -> Any:
        functional.check_norm(self.norm)
        functional.check_functions(
            "TransformerBlock",
            attention=self.attention,
            norm_layer=self.norm_layer,
            activation=self.activation,
        )
        functional.check_rate("TransformerBlock", self.dropout_rate)
        functional.check_size("TransformerBlock", "mlp_features", self.mlp_features)
        functional.check_types("TransformerBlock", self.dtype, self.param_dtype)
        flags = {
            "gated": self.gated,
            "use_bias": self.use_bias,
            "deterministic": self.deterministic,
        }
        functional.check_flags("TransformerBlock", flags)
        if x is None:
            return self.attention(name="cross_attention").remember(memory)
        functional.check_inputs("x", x, _width(self, "mlp_in"))
        functional.check_memory(memory, cross["mask"])
        if memory is not None and not isinstance(memory, Cache):
            functional.check_inputs("memory", memory, None)

        def norm(name: str, x: Array) -> Array:
            return self.norm_layer(dtype=self.dtype, param_dtype=self.param_dtype, name=name)(x)

        def add(name: str, f: Callable[[Array], Array], x: Array) -> Array:
            y = f(norm(name, x) if self.norm == "pre" else x)
            if self.dropout_rate > 0:
                y = nn.Dropout(self.dropout_rate)(y, deterministic=own["deterministic"])
            return x + y if self.norm == "pre" else norm(name, x + y)

        after = []

        def attend(x: Array) -> Array:
            out = self.attention(name="attention")(x, **own)
            if own["cache"] is None:
                return out
            after.append(out[1])
            return out[0]

        def mlp(x: Array) -> Array:
            types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            dense = partial(nn.Dense, use_bias=self.use_bias, **types)
            hidden = dense(self.mlp_features, name="mlp_in")(x)
            if self.gated:
                hidden = self.activation(dense(self.mlp_features, name="mlp_gate")(x)) * hidden
            else:
                hidden = self.activation(hidden)
            return dense(x.shape[-1], name="mlp_out")(hidden)

        x = add("attention_norm", attend, x)
        if memory is not None:
            attention = self.attention(name="cross_attention")
            at = functional.of_queries(x, own["positions"], own["cache"])
            x = add("cross_norm", lambda x: attention(x, memory, positions=at, **cross), x)
        x = add("mlp_norm", mlp, x)
        return (x, *after) if after else x
