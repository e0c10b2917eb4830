"""Flax nnx modules on `jaxattn.attention`: those of `jaxattn.nn.linen`, with the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Unpack, overload

import jax.numpy as jnp

from ..caches.cache import Cache
from ..caches.kv_cache import KVCache
from ..shapes import Array, Float, Int
from . import functional
from .attention_fn import attention_fn
from .flax_packages import nnx
from .functional import C
from .rope import RoPE
from .sowing import collects, sow

__all__ = ["MultiHeadAttention", "RoPE", "TransformerBlock", "attention_fn"]

_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()


class _AttentionOptions(functional.AttentionOptions, total=False):
    rngs: nnx.Rngs | None


class MultiHeadAttention(nnx.Module):
    """Multi-head attention: projections, `jaxattn.attention`, and a projection back.

    `out = concat_h(attention(x W_q, y W_k, y W_v)) W_o`. Parameters have the names and shapes of
    `flax.nnx.MultiHeadAttention`, so that a checkpoint of one is one of the other: `query`, `key`,
    `value` with kernels `[features, heads, head dim]`, `out` with `[heads, head dim, features]`,
    `query_ln` and `key_ln` where `normalize_qk`.

    Args:
      num_heads: query heads N.
      in_features: features of `inputs_q`.
      num_kv_heads: key and value heads K, a divisor of N (grouped queries); N by default.
      in_kv_features: features of `inputs_kv`; by default `in_features`.
      qkv_features: N times the head dimension; by default `in_features`.
      head_dim: H, if it is not `qkv_features / num_heads`.
      out_features: of the output; by default `in_features`.
      mask: a mask without arrays, or a factory `() -> mask`, used in every call, with `&` the
        mask of the call.
      score: a score without arrays, or a factory `() -> score`, used in calls that give none.
      stats: statistics of the attention weights (`jaxattn.stats`), in any pytree, without arrays,
        or a factory `() -> statistics`; used in calls that give none. Each call adds their values
        to the `nnx.Intermediate` "attention_stats". They are computed only
        where they are collected: by `nnx.capture(..., nnx.Intermediate)`.
      rope: turns queries and keys by their positions: a `RoPE`, or any function of
        `[B, T, N, H]` and positions `[T]` or `[B, T]`.
      sinks: whether each head learns a logit that takes weight and has no value.
      normalize_qk: whether queries and keys pass a LayerNorm first (2302.05442).
      dropout_rate: of the attention weights; drawn from the rng stream "dropout".
      deterministic: True turns dropout off; may be given in the call instead, and is what
        `module.train()` and `module.eval()` set.
      use_bias: whether projections have a bias.
      dtype: of the computation; by default promoted from inputs and parameters.
      param_dtype: of the parameters.
      precision: the precision of all matrix products.
      kernel_init, bias_init: initialisers of the projections.
      out_kernel_init, out_bias_init: those of the last projection, if they differ.
      sharding: names of mesh axes for (features, heads, head dimension) of all parameters, as
        `("data", "model", None)`; kept as the metadata of `flax.nnx.with_partitioning`.
      backend: of `jaxattn.attention`.
      rngs: for the parameters, and for dropout.

    Source: Vaswani et al. 2017, arXiv 1706.03762; grouped queries: arXiv 2305.13245.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        qkv_features: int | None = None,
        head_dim: int | None = None,
        out_features: int | None = None,
        mask: Any = None,
        score: Any = None,
        stats: Any = None,
        rope: Callable[[Array, Array], Array] | None = None,
        sinks: bool = False,
        normalize_qk: bool = False,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Any = _KERNEL_INIT,
        bias_init: Any = _BIAS_INIT,
        out_kernel_init: Any = None,
        out_bias_init: Any = None,
        sharding: tuple[str | None, str | None, str | None] | None = None,
        backend: str = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        sizes = {"in_kv_features": in_kv_features, "out_features": out_features}
        functional.check_sizes("MultiHeadAttention", **sizes)
        functional.check_size("MultiHeadAttention", "in_features", in_features)
        functional.check_rngs("MultiHeadAttention(rngs)", rngs, "params")
        width = in_features if qkv_features is None else qkv_features
        kv_heads, head_dim = functional.sizes(
            "MultiHeadAttention", width, num_heads, num_kv_heads, head_dim
        )
        functional.check_rate("MultiHeadAttention", dropout_rate)
        functional.check_types("MultiHeadAttention", dtype, param_dtype)
        flags: dict[str, Any] = {"sinks": sinks, "normalize_qk": normalize_qk, "use_bias": use_bias}
        flags["deterministic"] = deterministic
        precision = functional.check_attributes("MultiHeadAttention", rope, precision, flags)
        # Once here, so that a mask with arrays is refused where it is given.
        functional.made("MultiHeadAttention", "mask", mask)
        functional.made("MultiHeadAttention", "score", score)
        functional.made("MultiHeadAttention", "stats", functional.asked(stats))
        self.mask, self.score, self.rope = mask, score, rope
        self.stats = functional.asked(stats)
        self.dropout_rate, self.deterministic = dropout_rate, deterministic
        self.normalize_qk = normalize_qk
        self.precision, self.backend = precision, backend
        by_feature, by_head, by_dim = functional.axes_of("MultiHeadAttention", sharding)

        def placed(init: Any, *names: str | None) -> Any:
            return init if sharding is None else nnx.with_partitioning(init, names)

        types = {"dtype": dtype, "param_dtype": param_dtype}

        def projection(features: int, number: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                features,
                (number, head_dim),
                use_bias=use_bias,
                precision=precision,
                kernel_init=placed(kernel_init, by_feature, by_head, by_dim),
                bias_init=placed(bias_init, by_head, by_dim),
                rngs=rngs,
                **types,
            )

        self.in_features = in_features
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        self.query = projection(self.in_features, num_heads)
        self.key = projection(self.in_kv_features, kv_heads)
        self.value = projection(self.in_kv_features, kv_heads)
        if normalize_qk:
            ones = placed(nnx.initializers.ones_init(), by_dim)
            norm = partial(nnx.LayerNorm, use_bias=False, scale_init=ones, rngs=rngs, **types)
            self.query_ln, self.key_ln = norm(head_dim), norm(head_dim)
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim),
            in_features if out_features is None else out_features,
            axis=(-2, -1),
            use_bias=use_bias,
            precision=precision,
            kernel_init=placed(out_kernel_init or kernel_init, by_head, by_dim, by_feature),
            bias_init=placed(out_bias_init or bias_init, by_feature),
            rngs=rngs,
            **types,
        )
        if sinks:
            init = placed(nnx.initializers.zeros_init(), by_head)
            self.sinks = nnx.Param(init(rngs.params(), (num_heads,), param_dtype))
        if dropout_rate > 0:
            self.rngs = rngs.dropout.fork()

    @overload
    def __call__(
        self,
        inputs_q: Float[Array, "*B T features"],
        inputs_kv: Float[Array, "*B S kv_features"] | Cache | None = None,
        *,
        cache: None = None,
        **options: Unpack[_AttentionOptions],
    ) -> Float[Array, "*B T out_features"]: ...

    @overload
    def __call__(
        self,
        inputs_q: Float[Array, "*B T features"],
        inputs_kv: Float[Array, "*B S kv_features"] | Cache | None = None,
        *,
        cache: C,
        **options: Unpack[_AttentionOptions],
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
        rngs: nnx.Rngs | None = None,
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
          stats: statistics of the weights; they may hold arrays. See those of the module.
          positions: the positions in masks, scores and `rope`, as in `jaxattn.attention`.
          rope_positions: other positions of queries and keys for `rope` alone: positions within
            packed documents, depths in a tree of drafts.
          cache: keys and values of earlier tokens; those of this call are appended.
          counts: how many tokens of each row are real, `[B]`; they come first. Padding after a
            prompt is not kept in the cache and gets no position.
          deterministic: True turns dropout off.
          sow_weights: keep the weights `[B, N, T, S]`, before dropout, as the `nnx.Intermediate`
            "attention_weights": O(T * S) memory.
          rngs: the stream that dropout draws from, instead of the module's own.

        Returns:
          `[B, T, out_features]` or `[T, out_features]`; with a cache, that and the cache after.

        Raises:
          ValueError: for dropout without `deterministic`.
        """
        functional.check_inputs("inputs_q", inputs_q, self.in_features)
        functional.check_call(deterministic, sow_weights, stats)
        key = value = memory = None
        if isinstance(inputs_kv, Cache):
            memory = inputs_kv
        else:
            key, value = self._keys_and_values(inputs_q if inputs_kv is None else inputs_kv)
        query = self.query(inputs_q)
        if self.normalize_qk:
            query = self.query_ln(query)
        rate, seed = 0.0, None
        if self.dropout_rate > 0:
            off = self.deterministic if deterministic is None else deterministic
            if off is None:
                raise ValueError(
                    f"deterministic: got None with dropout_rate={self.dropout_rate}, expected True "
                    "or False, here or from module.train() and module.eval()"
                )
            if rngs is not None:
                functional.check_rngs("rngs", rngs, "dropout")
            stream = self.rngs if rngs is None else rngs.dropout
            rate, seed = (0.0, None) if off else (self.dropout_rate, stream())
        own_score = functional.made("MultiHeadAttention", "score", self.score)
        own_mask = functional.made("MultiHeadAttention", "mask", self.mask)
        own_stats = functional.made("MultiHeadAttention", "stats", self.stats)
        asked = own_stats if stats is None else stats
        out, cache = functional.attend(
            query,
            key,
            value,
            memory=memory,
            cache=cache,
            counts=counts,
            rope=self.rope,
            rope_positions=rope_positions,
            positions=positions,
            mask=functional.both(own_mask, mask),
            score=own_score if score is None else score,
            sinks=self.sinks[...] if hasattr(self, "sinks") else None,
            dropout_rate=rate,
            dropout_seed=seed,
            precision=self.precision,
            backend=self.backend,
            sow=partial(sow, self),
            sow_weights=sow_weights,
            stats=asked if collects(self) else None,
        )
        out = self.out(out)
        return out if cache is None else (out, cache)

    def _keys_and_values(self, inputs: Array) -> tuple[Array, Array]:
        functional.check_inputs("inputs_kv", inputs, self.in_kv_features)
        key = self.key(inputs)
        return self.key_ln(key) if self.normalize_qk else key, self.value(inputs)

    def remember(self, inputs_kv: Float[Array, "B S kv_features"]) -> KVCache:
        """Keys and values of `inputs_kv`, to pass as `inputs_kv` to any number of calls."""
        return functional.remembered(*self._keys_and_values(inputs_kv), self.rope)


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention if there is a memory, and a feed-forward network.

    Each adds to its input: `x + f(norm(x))` (pre, 2002.04745), or `norm(x + f(x))` (post,
    1706.03762). The feed-forward network is `activation(x W_in) W_out`, or, if `gated`,
    `(activation(x W_gate) * x W_in) W_out` (2002.05202), in parameters `mlp_in`, `mlp_gate` and
    `mlp_out`.

    Example:
      A layer of Llama:

      >>> from functools import partial
      >>> import jaxattn as ja
      >>> from flax import nnx
      >>> from jaxattn.nn.nnx import MultiHeadAttention, TransformerBlock
      >>> attention = partial(
      ...     MultiHeadAttention, 8, num_kv_heads=2, use_bias=False, rope=ja.nn.RoPE(),
      ...     mask=ja.masks.causal(),
      ... )
      >>> block = TransformerBlock(
      ...     64, attention, 256, norm_layer=nnx.RMSNorm, gated=True, use_bias=False,
      ...     activation=nnx.silu, rngs=nnx.Rngs(0),
      ... )

    Args:
      in_features: features of input and output.
      attention: makes the attention, as `partial(MultiHeadAttention, num_heads=8)`; is given
        `in_features` and `rngs`.
      mlp_features: the width of the feed-forward network.
      memory_features: of the memory of cross-attention; None: there is none.
      norm: "pre" or "post".
      norm_layer: makes a norm, as `partial(nnx.RMSNorm, epsilon=1e-5)`; is given the number of
        features, `dtype`, `param_dtype` and `rngs`.
      activation: the activation of the feed-forward network.
      gated: whether the feed-forward network has a gate: SwiGLU with `activation=nnx.silu`.
      use_bias: whether the projections of the feed-forward network have a bias.
      dropout_rate: of what is added, drawn from the rng stream "dropout".
      deterministic: True turns dropout off; may be given in the call instead, and is what
        `module.train()` and `module.eval()` set.
      dtype, param_dtype: of the norms and of the feed-forward network.
      rngs: for the parameters, and for dropout.
    """

    def __init__(
        self,
        in_features: int,
        attention: Callable[..., nnx.Module],
        mlp_features: int,
        *,
        memory_features: int | None = None,
        norm: Literal["pre", "post"] = "pre",
        norm_layer: Callable[..., nnx.Module] = nnx.LayerNorm,
        activation: Callable[[Array], Array] = nnx.gelu,
        gated: bool = False,
        use_bias: bool = True,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        functional.check_norm(norm)
        functional.check_functions(
            "TransformerBlock",
            attention=attention,
            norm_layer=norm_layer,
            activation=activation,
        )
        functional.check_rate("TransformerBlock", dropout_rate)
        functional.check_types("TransformerBlock", dtype, param_dtype)
        flags = {"gated": gated, "use_bias": use_bias, "deterministic": deterministic}
        functional.check_flags("TransformerBlock", flags)
        functional.check_size("TransformerBlock", "in_features", in_features)
        functional.check_size("TransformerBlock", "mlp_features", mlp_features)
        functional.check_sizes("TransformerBlock", memory_features=memory_features)
        functional.check_rngs("TransformerBlock(rngs)", rngs, "params")
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm, self.activation = norm, activation
        self.deterministic = deterministic
        self.attention = attention(in_features=in_features, rngs=rngs)
        self.attention_norm = norm_layer(in_features, **options)
        self.in_features, self.memory_features = in_features, memory_features
        if memory_features is not None:
            self.cross_attention = attention(
                in_features=in_features, in_kv_features=memory_features, rngs=rngs
            )
            self.cross_norm = norm_layer(in_features, **options)
        linear = partial(nnx.Linear, use_bias=use_bias, **options)
        self.mlp_in = linear(in_features, mlp_features)
        self.mlp_gate = linear(in_features, mlp_features) if gated else None
        self.mlp_out = linear(mlp_features, in_features)
        self.mlp_norm = norm_layer(in_features, **options)
        self.dropout_rate = dropout_rate
        if dropout_rate > 0:
            # Only then, so that a module without dropout has no state but its parameters.
            self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

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

        Raises:
          ValueError: for a memory without `memory_features`, or the reverse.
        """
        functional.check_inputs("x", x, self.in_features)
        if (memory is None) != (self.memory_features is None):
            got, said = ("one", "without") if memory is not None else ("None", "with")
            raise ValueError(f"memory: got {got} in a block {said} memory_features")
        functional.check_memory(memory, memory_mask)
        if memory is not None and not isinstance(memory, Cache):
            functional.check_inputs("memory", memory, self.memory_features)
        off = self.deterministic if deterministic is None else deterministic
        both = {"deterministic": off, "sow_weights": sow_weights}

        def add(norm: nnx.Module, f: Callable[[Array], Array], x: Array) -> Array:
            y = f(norm(x) if self.norm == "pre" else x)
            if self.dropout_rate > 0:
                y = self.dropout(y, deterministic=off)
            return x + y if self.norm == "pre" else norm(x + y)

        after = []

        def attend(x: Array) -> Array:
            out = self.attention(
                x,
                mask=mask,
                score=score,
                stats=stats,
                positions=positions,
                rope_positions=rope_positions,
                cache=cache,
                counts=counts,
                **both,
            )
            if cache is None:
                return out
            after.append(out[1])
            return out[0]

        x = add(self.attention_norm, attend, x)
        if memory is not None:
            at = functional.of_queries(x, positions, cache)
            given = {"mask": memory_mask, "positions": at, **both}
            x = add(self.cross_norm, partial(self.cross_attention, inputs_kv=memory, **given), x)

        def mlp(x: Array) -> Array:
            hidden = self.mlp_in(x)
            if self.mlp_gate is None:
                return self.mlp_out(self.activation(hidden))
            return self.mlp_out(self.activation(self.mlp_gate(x)) * hidden)

        x = add(self.mlp_norm, mlp, x)
        return (x, *after) if after else x

    def remember(self, memory: Float[Array, "B S memory_features"]) -> KVCache:
        """Keys and values of the memory, to pass as `memory` to any number of calls."""
        return self.cross_attention.remember(memory)
