"""Names of other libraries, and what to write here instead."""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_CAUSAL = "mask=masks.causal(); masks.causal(S - T) aligns the last query with the last key"
_WINDOW = (
    "mask=masks.sliding_window(left, right), where left counts the keys before the query: a window "
    "of W tokens with the query itself is masks.sliding_window(W - 1)"
)
_CAP = "score=scores.soft_cap(cap)"
_BIAS = "score=scores.bias(array); where it removes keys, mask=masks.from_array(array, 'additive')"
_ARRAY = (
    "mask=, of booleans, True where a query may attend; masks.from_array(array, convention) reads "
    "arrays that mean it otherwise"
)
_DROPOUT = "dropout_rate= with dropout_seed="
_SEGMENTS = "mask=masks.segments(q_ids, k_ids)"
_LENGTHS = (
    "mask=masks.key_padding(lengths=lengths), for queries masks.query_padding(lengths=lengths)"
)
_PADDING = (
    "mask=masks.key_padding(valid), True at real tokens: torch's, True at padding, is "
    "masks.key_padding(~array)"
)
_WEIGHTS = "jaxattn.attention_weights(query, key, mask=...); stats= has sums of them, and no [T, S]"
_LARGEST = "stats=stats.max(), the largest logit of each query"
_POSITIONS = "positions=Positions(q=..., k=...)"
_BLOCKS = (
    "mask=, the mask itself; jaxattn.tile_map(mask, query.shape, key.shape) makes one to share "
    "among layers"
)

# Arguments of attention.
KEYWORDS = {
    "q": "query, the first argument",
    "k": "key, the second argument",
    "v": "value, the third argument",
    "keys": "key, the second argument",
    "values": "value, the third argument",
    "is_causal": _CAUSAL,
    "causal": _CAUSAL,
    "use_causal_mask": _CAUSAL,
    "bias": _BIAS,
    "attn_bias": _BIAS,
    "ab": _BIAS,
    "attn_mask": _ARRAY,
    "attention_mask": _ARRAY,
    "softcap": _CAP,
    "soft_cap": _CAP,
    "logits_soft_cap": _CAP,
    "attn_logits_soft_cap": _CAP,
    "window": _WINDOW,
    "window_size": _WINDOW,
    "sliding_window": _WINDOW,
    "local_window_size": _WINDOW,
    "dropout": _DROPOUT,
    "dropout_p": _DROPOUT,
    "dropout_rng": "dropout_seed=, a uint32 or a jax.random.key",
    "dropout_key": "dropout_seed=, a uint32 or a jax.random.key",
    "rng": "dropout_seed=, a uint32 or a jax.random.key",
    "deterministic": "dropout_rate=0.0, the default",
    "training": "dropout_rate=0.0 outside of training",
    "segment_ids": _SEGMENTS,
    "q_segment_ids": _SEGMENTS,
    "kv_segment_ids": _SEGMENTS,
    "key_padding_mask": _PADDING,
    "query_seq_lengths": _LENGTHS,
    "key_value_seq_lengths": _LENGTHS,
    "kv_lengths": _LENGTHS,
    "lengths": _LENGTHS,
    "mask_mod": "mask=, the same function",
    "score_mod": "score=, the same function",
    "mask_fn": "mask=, the function (b, h, q, k) -> bool",
    "score_fn": "score=, the function (logit, b, h, q, k) -> logit",
    "block_mask": _BLOCKS,
    "alibi_slopes": "score=scores.alibi(slopes)",
    "softmax_scale": "scale=",
    "sm_scale": "scale=",
    "enable_gqa": "nothing: key heads are shared wherever the query has a multiple of them",
    "implementation": "backend=",
    "impl": "backend=",
    "return_residual": "return_lse=True",
    "return_residuals": "return_lse=True",
    "return_weights": _WEIGHTS,
    "need_weights": _WEIGHTS,
    "return_attn_probs": _WEIGHTS,
    "return_max_logits": _LARGEST,
    "max_scores": _LARGEST,
    "return_aux": _LARGEST + "; return_lse=True for the LSE",
    "statistics": "stats=",
    "sink": "sinks=",
    "s_aux": "sinks=",
    "position_ids": _POSITIONS,
    "q_offset": _POSITIONS,
    "kv_offset": _POSITIONS,
    "dtype": "nothing: the output has the query's dtype, and the softmax is float32",
}

# Arguments of the views of a mask.
VIEWS = dict.fromkeys(("row", "rows", "batch"), "b=, the batch row, as in a predicate")
VIEWS |= dict.fromkeys(("head", "heads"), "h=, the query head, as in a predicate")
VIEWS |= {"colour": "color="}

# Backends.
BACKENDS = {
    None: "'auto', which chooses",
    "default": "'auto', which chooses",
    "xla": "'auto', which chooses; 'tiled' and 'dense' are plain XLA",
    "jax": "'auto', which chooses; 'tiled' and 'dense' are plain XLA",
    "flash": "'auto', which chooses; 'tiled', 'cudnn' and 'triton' compute tile by tile",
    "flash_attention": "'auto', which chooses; 'tiled', 'cudnn' and 'triton' go tile by tile",
    "flash_attention_2": "'auto', which chooses; 'tiled', 'cudnn' and 'triton' go tile by tile",
    "splash": "'tpu'; 'auto' chooses it where it can",
    "pallas_tpu": "'tpu'",
    "pallas": "'triton', or 'mosaic' for Hopper",
    "mosaic_gpu": "'mosaic'",
    "flex": "'tiled', which takes any mask",
    "flex_attention": "'tiled', which takes any mask",
    "xla_chunked": "'tiled'",
    "chunked": "'tiled'",
    "efficient": "'tiled'",
    "mem_efficient": "'tiled'",
    "cuDNN": "'cudnn'",
    "eager": "'dense'",
    "math": "'dense'",
    "naive": "'dense'",
    "reference": "'dense'",
    "sdpa": "'auto', which chooses",
}

# Strings in place of masks.
WORDS = {
    "causal": "masks.causal()",
    "full": "masks.full(), or None",
    "none": "None",
    "local": "masks.sliding_window(left, right)",
    "sliding_window": "masks.sliding_window(left, right)",
    "padding": "masks.key_padding(valid), or masks.key_padding(lengths=lengths)",
    "prefix": "masks.prefix_lm(lengths)",
    "segment": "masks.segments(ids)",
}

_DENSE = "mask.dense(T, S), booleans [batch, heads, T, S]"
_AND = "a & b"
_OR = "a | b"
_TILES = (
    "the mask itself, where attention takes one; jaxattn.tile_map(mask, query.shape, key.shape) "
    "makes a map of its tiles to share among layers"
)
_ATTENTION = "jaxattn.attention(query, key, value, mask=mask, score=score)"
_FLAX = "jaxattn.nn.linen.{0} or jaxattn.nn.nnx.{0}"
_BOTTOM_RIGHT = "masks.causal(S - T)"
_LOCAL = "masks.sliding_window(left, right)"

# Attributes of masks.
METHODS = {
    "to_dense": _DENSE,
    "todense": _DENSE,
    "as_array": _DENSE,
    "to_array": _DENSE,
    "materialize": _DENSE,
    "numpy": "np.asarray(mask.dense(T, S))",
    "sparsity": "the density of jaxattn.explain(query, key, value, mask=mask)",
    "to_string": "mask.show(T, S)",
    "visualize": "mask.show(T, S), mask.plot(), mask.html()",
    "intersect": _AND,
    "union": _OR,
    "logical_and": _AND,
    "logical_or": _OR,
    "logical_not": "~mask",
    "from_seqlens": "masks.segments(ids)",
    "make_causal": "mask & masks.causal()",
}

_MASKS = {
    "and_masks": _AND,
    "or_masks": _OR,
    "not_mask": "~a",
    "combine_masks": _AND,
    "create_block_mask": _TILES,
    "create_mask": _DENSE,
    "noop_mask": "masks.full()",
    "FullMask": "masks.full()",
    "causal_mask": "masks.causal()",
    "CausalMask": "masks.causal()",
    "make_causal_mask": "masks.causal()",
    "LowerTriangularMask": "masks.causal()",
    "create_look_ahead_mask": "masks.causal()",
    "look_ahead": "masks.causal()",
    "tril": "masks.causal()",
    "causal_upper_left": "masks.causal()",
    "causal_lower_right": _BOTTOM_RIGHT,
    "LowerTriangularFromBottomRightMask": _BOTTOM_RIGHT,
    "local": _LOCAL,
    "window": _LOCAL,
    "LocalMask": _LOCAL,
    "LocalAttentionFromBottomRightMask": _LOCAL + " with positions=Positions(q=arange(T) + S - T)",
    "make_local_attention_mask": _LOCAL,
    "sliding_window_mask": _LOCAL,
    "prefix": "masks.prefix_lm(lengths)",
    "padding": "masks.key_padding(valid), or masks.key_padding(lengths=lengths)",
    "create_padding_mask": "masks.key_padding(tokens != 0)",
    "make_attention_mask": "masks.query_padding(valid) & masks.key_padding(valid)",
    "document": "masks.segments(ids)",
    "documents": "masks.segments(ids)",
    "SegmentIds": "masks.segments(q_ids, k_ids)",
    "BlockDiagonalMask": "masks.segments(ids)",
    "BlockDiagonalCausalMask": "masks.segments(ids) & masks.causal()",
    "NumpyMask": "masks.dense(array)",
    "MultiHeadMask": "masks.per_head([...])",
    "natten": "masks.neighborhood(shape, radius)",
    "sliding_tile": "masks.neighborhood(shape, radius, tile=(height, width))",
    "generate_sta_mask": "masks.neighborhood(shape, radius, tile=(frames, height, width))",
    "moba": "masks.causal() & (masks.chunked(block) | masks.top_blocks(scores, count, block))",
    "top_k_blocks": "masks.top_blocks(scores, count, block)",
    "image_blocks": "masks.causal() | masks.spans(ids)",
    "bidirectional_image": "masks.causal() | masks.spans(ids)",
    "invert": "~mask",
}

_SCORES = {
    "softcap": "scores.soft_cap(cap)",
    "tanh_softcap": "scores.soft_cap(cap)",
    "generate_tanh_softcap": "scores.soft_cap(cap)",
    "alibi_bias": "scores.alibi(slopes)",
    "generate_alibi_bias": "scores.alibi(scores.alibi_slopes(heads))",
    "t5_bias": "scores.relative_bias(table)",
    "relative_position_bias": "scores.relative_bias(table)",
    "compose": "scores.chain(first, second)",
}

_PACKAGE = {
    "flex_attention": _ATTENTION,
    "flash_attention": _ATTENTION,
    "splash_attention": _ATTENTION,
    "memory_efficient_attention": _ATTENTION,
    "mha": _ATTENTION,
    "sdpa": "jaxattn.scaled_dot_product_attention(q, k, v, mask)",
    "BlockMask": "jaxattn.TileMap",
    "create_block_mask": _TILES,
    "MultiHeadAttention": _FLAX.format("MultiHeadAttention"),
    "MultiHeadDotProductAttention": _FLAX.format("MultiHeadAttention"),
    "TransformerBlock": _FLAX.format("TransformerBlock"),
    "Cache": "jaxattn.KVCache, or jaxattn.PagedKVCache",
    "mask": "jaxattn.masks",
    "score": "jaxattn.scores",
}


def unknown_attribute(module: str, name: str, thing: Any) -> AttributeError:
    """The error for an attribute that a module lacks; it says what to write, if that is known."""
    own = {"jaxattn.masks": _MASKS, "jaxattn.scores": _SCORES}.get(module, _PACKAGE)
    meant = own.get(name)
    if meant is None:
        # The name may belong to another module.
        elsewhere = {"jaxattn.masks": _MASKS, "jaxattn.scores": _SCORES, "jaxattn": _PACKAGE}
        for other, names in elsewhere.items():
            meant = meant or names.get(name) or _public(other, name)
    message = f"module {module!r} has no attribute {name!r}"
    return AttributeError(
        f"{message}; here it is {meant}" if meant else message, name=name, obj=thing
    )


def _public(module: str, name: str) -> str | None:
    """A public name with its module, if the module has it."""
    public = getattr(sys.modules.get(module), "__all__", ())
    return f"{module}.{name}" if name in public else None


def unknown_method(thing: Any, name: str) -> AttributeError:
    """The error for an attribute that a mask lacks."""
    message = f"{type(thing).__name__!r} object has no attribute {name!r}"
    meant = METHODS.get(name)
    return AttributeError(
        f"{message}; here it is {meant}" if meant else message, name=name, obj=thing
    )


def with_remedies(
    words: dict[str, str] = KEYWORDS, name: str | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a public function: an unknown argument raises an error that says what to write instead.

    Args:
      words: what to write for arguments of other libraries.
      name: the function, as users write it; by default its own name.
    """

    def decorate(fn: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(fn).parameters.values()
        called = name or fn.__name__
        names = frozenset(each.name for each in parameters)
        positional = [
            each.name
            for each in parameters
            if each.kind in (each.POSITIONAL_OR_KEYWORD, each.POSITIONAL_ONLY)
        ]

        @functools.wraps(fn)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if len(args) > len(positional):
                raise TypeError(
                    f"{called}() takes {len(positional)} positional arguments "
                    f"({', '.join(positional)}) but {len(args)} were given; name the others, "
                    "as mask="
                )
            if not names.issuperset(kwargs):
                raise unexpected(called, kwargs, names, words)
            return fn(*args, **kwargs)

        return call

    return decorate


def unexpected(
    function: str, given: Any, names: frozenset[str], words: dict[str, str] = KEYWORDS
) -> TypeError:
    """The error for the first of the given arguments that a function does not have."""
    wrong = next(name for name in given if name not in names)
    message = f"{function}() got an unexpected keyword argument {wrong!r}"
    if meant := words.get(wrong):
        at = "here it is" if function != "dot_product_attention" else "jaxattn.attention says it by"
        return TypeError(f"{message}; {at} {meant}")
    near = difflib.get_close_matches(wrong, names, 1)
    return TypeError(f"{message}; did you mean {near[0]!r}?" if near else message)
