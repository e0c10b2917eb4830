"""Attention layers of other libraries, and broken ones: what `what_models_see.py` looks at.

A case is a function from inputs `[B, S, D]` to outputs `[B, T, D]`, and the mask that its library's
documentation promises for it. Each body stands alone: it is the reproduction of what is found. Its
queries do not depend on the inputs, unless the case says that they do.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import masks
from jaxattn.masks.mask import Mask
from jaxattn.shapes import Array, Float

# Rows, tokens and features of the inputs.
B, S, D = 2, 6, 8


def inputs() -> Float[Array, "B S D"]:
    """Inputs of every layer here."""
    return jnp.asarray(np.random.default_rng(0).standard_normal((B, S, D)), jnp.float32)


def queries(T: int = S) -> Float[Array, "B T D"]:
    """Queries that do not depend on the inputs."""
    return jnp.asarray(np.random.default_rng(1).standard_normal((B, T, D)), jnp.float32)


@dataclass(frozen=True)
class Case:
    """One way to call one library.

    Attributes:
      library: its name, as the package index has it.
      name: the call, in a few words.
      run: from inputs to outputs.
      promised: the mask that the documentation promises.
      own: whether an output depends on its own input besides, through its query.
    """

    library: str
    name: str
    run: Callable[[Any], Any]
    promised: Mask
    own: bool = False

    @property
    def source(self) -> str:
        """The lines of `run`."""
        lines = inspect.getsource(self.run).splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith("def "))
        return textwrap.dedent("\n".join(lines[first:]))


# What stands in place of a library for layers that are broken on purpose.
BROKEN = "broken on purpose"

CASES: list[Case] = []

Layer = Callable[[Any], Any]


def case(library: str, name: str, promised: Mask, *, own: bool = False) -> Callable[[Layer], Layer]:
    """Adds a function to the cases."""

    def add(run: Layer) -> Layer:
        CASES.append(Case(library, name, run, promised, own))
        return run

    return add


# The masks that are given to the libraries, as arrays, and what they mean.
LENGTHS = np.array([6, 4])
PADDING = np.arange(S) < LENGTHS[:, None]  # [B, S]
IDS = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]])
PACKED = (IDS[:, :, None] == IDS[:, None]) & np.tri(S, dtype=bool)  # [B, T, S]
# Query 2 sees no key.
ROW_OUT = np.tri(S, dtype=bool) & (np.arange(S) != 2)[:, None]  # [T, S]

padding = masks.key_padding(lengths=LENGTHS)
packed = masks.segments(jnp.asarray(IDS)) & masks.causal()
row_out = masks.dense(jnp.asarray(ROW_OUT))


# --------------------------------------------------------------------------------------- jax.nn


@case("jax", "no mask", masks.full())
def jax_plain(x: Any) -> Any:
    q, k = queries().reshape(B, S, 2, 4), x.reshape(B, S, 2, 4)
    return jax.nn.dot_product_attention(q, k, k)


@case("jax", "is_causal", masks.causal())
def jax_causal(x: Any) -> Any:
    q, k = queries().reshape(B, S, 2, 4), x.reshape(B, S, 2, 4)
    return jax.nn.dot_product_attention(q, k, k, is_causal=True)


@case("jax", "is_causal, 4 queries and 6 keys", masks.causal())
def jax_causal_fewer_queries(x: Any) -> Any:
    q, k = queries(4).reshape(B, 4, 2, 4), x.reshape(B, S, 2, 4)
    return jax.nn.dot_product_attention(q, k, k, is_causal=True)


@case("jax", "local_window_size=2", masks.sliding_window(2, 2))
def jax_window(x: Any) -> Any:
    q, k = queries().reshape(B, S, 2, 4), x.reshape(B, S, 2, 4)
    return jax.nn.dot_product_attention(q, k, k, local_window_size=2)


@case("jax", "local_window_size=(3, 1)", masks.sliding_window(3, 1))
def jax_window_both(x: Any) -> Any:
    q, k = queries().reshape(B, S, 2, 4), x.reshape(B, S, 2, 4)
    return jax.nn.dot_product_attention(q, k, k, local_window_size=(3, 1))


@case("jax", "is_causal, local_window_size=2", masks.sliding_window(2, 0))
def jax_causal_window(x: Any) -> Any:
    q, k = queries().reshape(B, S, 2, 4), x.reshape(B, S, 2, 4)
    return jax.nn.dot_product_attention(q, k, k, is_causal=True, local_window_size=2)


@case("jax", "key_value_seq_lengths=[6, 4]", padding)
def jax_key_lengths(x: Any) -> Any:
    q, k = queries().reshape(B, S, 2, 4), x.reshape(B, S, 2, 4)
    return jax.nn.dot_product_attention(q, k, k, key_value_seq_lengths=jnp.array([6, 4]))


@case("jax", "query_seq_lengths=[6, 4]", masks.query_padding(lengths=LENGTHS))
def jax_query_lengths(x: Any) -> Any:
    q, k = queries().reshape(B, S, 2, 4), x.reshape(B, S, 2, 4)
    return jax.nn.dot_product_attention(q, k, k, query_seq_lengths=jnp.array([6, 4]))


@case("jax", "mask, padding", padding)
def jax_padding(x: Any) -> Any:
    q, k = queries().reshape(B, S, 2, 4), x.reshape(B, S, 2, 4)
    return jax.nn.dot_product_attention(q, k, k, mask=PADDING[:, None, None])


@case("jax", "mask, packed documents", packed)
def jax_packed(x: Any) -> Any:
    q, k = queries().reshape(B, S, 2, 4), x.reshape(B, S, 2, 4)
    return jax.nn.dot_product_attention(q, k, k, mask=PACKED[:, None])


@case("jax", "mask, a query that sees no key", row_out)
def jax_row_out(x: Any) -> Any:
    q, k = queries().reshape(B, S, 2, 4), x.reshape(B, S, 2, 4)
    return jax.nn.dot_product_attention(q, k, k, mask=ROW_OUT[None, None])


@case("jax", "bias of -1e9 for padding", padding)
def jax_bias(x: Any) -> Any:
    q, k = queries().reshape(B, S, 2, 4), x.reshape(B, S, 2, 4)
    bias = jnp.where(PADDING[:, None, None], 0.0, -1e9)
    return jax.nn.dot_product_attention(q, k, k, bias=bias)


# ----------------------------------------------------------------------------------------- flax


@case("flax", "linen, make_causal_mask", masks.causal())
def linen_causal(x: Any) -> Any:
    from flax import linen

    mask = linen.make_causal_mask(jnp.ones((B, S)))
    layer = linen.MultiHeadDotProductAttention(2)
    return layer.init_with_output(jax.random.key(0), queries(), x, mask=mask)[0]


@case("flax", "linen, make_attention_mask", padding)
def linen_padding(x: Any) -> Any:
    from flax import linen

    mask = linen.make_attention_mask(jnp.ones((B, S)), PADDING.astype(np.float32))
    layer = linen.MultiHeadDotProductAttention(2)
    return layer.init_with_output(jax.random.key(0), queries(), x, mask=mask)[0]


@case("flax", "linen, packed documents", packed)
def linen_packed(x: Any) -> Any:
    from flax import linen

    mask = linen.combine_masks(
        linen.make_attention_mask(IDS, IDS, jnp.equal), linen.make_causal_mask(IDS)
    )
    layer = linen.MultiHeadDotProductAttention(2)
    return layer.init_with_output(jax.random.key(0), queries(), x, mask=mask)[0]


@case("flax", "linen, a query that sees no key", row_out)
def linen_row_out(x: Any) -> Any:
    from flax import linen

    layer = linen.MultiHeadDotProductAttention(2)
    return layer.init_with_output(jax.random.key(0), queries(), x, mask=ROW_OUT[None, None])[0]


@case("flax", "linen, decoding with a cache", masks.causal(), own=True)
def linen_decoding(x: Any) -> Any:
    from flax import linen

    layer = linen.MultiHeadDotProductAttention(2, decode=True)
    state, outputs = layer.init(jax.random.key(0), x), jnp.zeros((B, 0, D))
    for t in range(S):
        out, new = layer.apply(state, x[:, t : t + 1], mutable=["cache"])
        state, outputs = state | new, jnp.concatenate([outputs, out], 1)
    return outputs


@case("flax", "nnx, is_causal", masks.causal())
def nnx_causal(x: Any) -> Any:
    from flax import nnx

    layer = nnx.MultiHeadAttention(2, D, decode=False, rngs=nnx.Rngs(0))
    return layer(queries(), x, is_causal=True)


@case("flax", "nnx, make_causal_mask", masks.causal())
def nnx_causal_mask(x: Any) -> Any:
    from flax import nnx

    layer = nnx.MultiHeadAttention(2, D, decode=False, rngs=nnx.Rngs(0))
    return layer(queries(), x, mask=nnx.make_causal_mask(jnp.ones((B, S))))


@case("flax", "nnx, padding", padding)
def nnx_padding(x: Any) -> Any:
    from flax import nnx

    layer = nnx.MultiHeadAttention(2, D, decode=False, rngs=nnx.Rngs(0))
    return layer(queries(), x, mask=jnp.asarray(PADDING)[:, None, None])


@case("flax", "nnx, packed documents", packed)
def nnx_packed(x: Any) -> Any:
    from flax import nnx

    layer = nnx.MultiHeadAttention(2, D, decode=False, rngs=nnx.Rngs(0))
    return layer(queries(), x, mask=jnp.asarray(PACKED)[:, None])


@case("flax", "nnx, a query that sees no key", row_out)
def nnx_row_out(x: Any) -> Any:
    from flax import nnx

    layer = nnx.MultiHeadAttention(2, D, decode=False, rngs=nnx.Rngs(0))
    return layer(queries(), x, mask=jnp.asarray(ROW_OUT)[None, None])


@case("flax", "nnx, is_causal and padding", masks.causal() & padding)
def nnx_causal_padding(x: Any) -> Any:
    from flax import nnx

    layer = nnx.MultiHeadAttention(2, D, decode=False, rngs=nnx.Rngs(0))
    return layer(queries(), x, mask=jnp.asarray(PADDING)[:, None, None], is_causal=True)


@case("flax", "nnx, decoding with a cache", masks.causal(), own=True)
def nnx_decoding(x: Any) -> Any:
    from flax import nnx

    layer = nnx.MultiHeadAttention(2, D, decode=True, rngs=nnx.Rngs(0))
    layer.init_cache((B, S, D))
    return jnp.concatenate([layer(x[:, t : t + 1]) for t in range(S)], 1)


@case("flax", "nnx, decoding with a cache, is_causal", masks.causal(), own=True)
def nnx_causal_decoding(x: Any) -> Any:
    from flax import nnx

    layer = nnx.MultiHeadAttention(2, D, decode=True, rngs=nnx.Rngs(0))
    layer.init_cache((B, S, D))
    return jnp.concatenate([layer(x[:, t : t + 1], is_causal=True) for t in range(S)], 1)


# ---------------------------------------------------------------------------------------- keras


@case("keras", "MultiHeadAttention, use_causal_mask", masks.causal())
def keras_causal(x: Any) -> Any:
    import keras

    keras.utils.set_random_seed(0)
    return keras.layers.MultiHeadAttention(2, 4)(queries(), x, use_causal_mask=True)


@case("keras", "MultiHeadAttention, attention_mask of packed documents", packed)
def keras_packed(x: Any) -> Any:
    import keras

    keras.utils.set_random_seed(0)
    return keras.layers.MultiHeadAttention(2, 4)(queries(), x, attention_mask=PACKED)


@case("keras", "MultiHeadAttention, value_mask", padding)
def keras_padding(x: Any) -> Any:
    import keras

    keras.utils.set_random_seed(0)
    return keras.layers.MultiHeadAttention(2, 4)(queries(), x, value_mask=jnp.asarray(PADDING))


@case("keras", "MultiHeadAttention, sliding_window=3", masks.sliding_window(2, 2))
def keras_window(x: Any) -> Any:
    import keras

    keras.utils.set_random_seed(0)
    return keras.layers.MultiHeadAttention(2, 4, sliding_window=3)(queries(), x)


@case("keras", "GroupQueryAttention, use_causal_mask", masks.causal())
def keras_grouped(x: Any) -> Any:
    import keras

    keras.utils.set_random_seed(0)
    return keras.layers.GroupQueryAttention(4, 4, 2)(queries(), x, use_causal_mask=True)


@case("keras", "ops.dot_product_attention, is_causal", masks.causal())
def keras_function(x: Any) -> Any:
    import keras

    q, k = queries().reshape(B, S, 2, 4), x.reshape(B, S, 2, 4)
    return keras.ops.dot_product_attention(q, k, k, is_causal=True)


@case("keras", "MultiHeadAttention, a query that sees no key", row_out)
def keras_row_out(x: Any) -> Any:
    import keras

    keras.utils.set_random_seed(0)
    return keras.layers.MultiHeadAttention(2, 4)(queries(), x, attention_mask=ROW_OUT[None])


# ---------------------------------------------------------------------------- equinox and haiku


@case("equinox", "MultiheadAttention, causal mask", masks.causal())
def equinox_causal(x: Any) -> Any:
    import equinox as eqx

    layer = eqx.nn.MultiheadAttention(2, D, key=jax.random.key(0))
    return jax.vmap(lambda q, x: layer(q, x, x, np.tri(S, dtype=bool)))(queries(), x)


@case("equinox", "MultiheadAttention, packed documents", packed)
def equinox_packed(x: Any) -> Any:
    import equinox as eqx

    layer = eqx.nn.MultiheadAttention(2, D, key=jax.random.key(0))
    return jax.vmap(lambda q, x, mask: layer(q, x, x, mask))(queries(), x, jnp.asarray(PACKED))


@case("equinox", "MultiheadAttention, a query that sees no key", row_out)
def equinox_row_out(x: Any) -> Any:
    import equinox as eqx

    layer = eqx.nn.MultiheadAttention(2, D, key=jax.random.key(0))
    return jax.vmap(lambda q, x: layer(q, x, x, jnp.asarray(ROW_OUT)))(queries(), x)


@case("dm-haiku", "MultiHeadAttention, causal mask", masks.causal())
def haiku_causal(x: Any) -> Any:
    import haiku as hk

    mask = np.tri(S, dtype=bool)[None, None]
    layer = hk.transform(lambda q, x: hk.MultiHeadAttention(2, 4, w_init_scale=1.0)(q, x, x, mask))
    return layer.apply(layer.init(jax.random.key(0), queries(), x), None, queries(), x)


@case("dm-haiku", "MultiHeadAttention, packed documents", packed)
def haiku_packed(x: Any) -> Any:
    import haiku as hk

    mask = jnp.asarray(PACKED)[:, None]
    layer = hk.transform(lambda q, x: hk.MultiHeadAttention(2, 4, w_init_scale=1.0)(q, x, x, mask))
    return layer.apply(layer.init(jax.random.key(0), queries(), x), None, queries(), x)


@case("dm-haiku", "MultiHeadAttention, a query that sees no key", row_out)
def haiku_row_out(x: Any) -> Any:
    import haiku as hk

    mask = jnp.asarray(ROW_OUT)[None, None]
    layer = hk.transform(lambda q, x: hk.MultiHeadAttention(2, 4, w_init_scale=1.0)(q, x, x, mask))
    return layer.apply(layer.init(jax.random.key(0), queries(), x), None, queries(), x)


# ----------------------------------------------------------------------------- broken on purpose


@case(BROKEN, "the causal mask shows the next token", masks.causal())
def broken_next(x: Any) -> Any:
    logits = jnp.einsum("btd,bsd->bts", queries(), x)
    weights = jax.nn.softmax(jnp.where(np.tri(S, k=1, dtype=bool), logits, -jnp.inf))
    return weights @ x


@case(BROKEN, "the mask of packed documents is transposed", packed)
def broken_transposed(x: Any) -> Any:
    logits = jnp.einsum("btd,bsd->bts", queries(), x)
    weights = jax.nn.softmax(jnp.where(PACKED.swapaxes(1, 2), logits, -jnp.inf))
    return weights @ x


@case(BROKEN, "padding gets -5, not -1e9", padding)
def broken_bias(x: Any) -> Any:
    logits = jnp.einsum("btd,bsd->bts", queries(), x)
    return jax.nn.softmax(logits + jnp.where(PADDING[:, None], 0.0, -5.0)) @ x


@case(BROKEN, "weights are masked after the softmax", masks.causal())
def broken_after(x: Any) -> Any:
    weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", queries(), x))
    return jnp.where(np.tri(S, dtype=bool), weights, 0) @ x


@case(BROKEN, "features are normalized over the batch", masks.causal())
def broken_batch(x: Any) -> Any:
    x = (x - x.mean(0)) / (x.std(0) + 1e-5)
    logits = jnp.einsum("btd,bsd->bts", queries(), x)
    return jax.nn.softmax(jnp.where(np.tri(S, dtype=bool), logits, -jnp.inf)) @ x
