"""cuDNN's fused attention, for the masks that it knows: causal, windows of the past, lengths.

Masks are recognised by the constructors that made them, never by their values: `causal()`,
`sliding_window(left)`, `key_padding(lengths=)`, `query_padding(lengths=)`, and `&` of these.
Windows and the scale are part of the kernel, so they have to be concrete, and new ones are compiled
anew. Lengths may be traced.

cuDNN multiplies masked keys and values of a tile by weights of 0, and 0 * NaN is NaN. Keys and
values beyond the lengths are set to 0 first. But a NaN in the future, or outside the window, may
reach queries of its tile. The only derivative is the gradient.

The forward pass gives the same bits in every run. The backward does not, because cuDNN adds up dQ
in any order, unless `XLA_FLAGS` has `--xla_gpu_exclude_nondeterministic_ops=true`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from .. import masks
from ..checks.integers import concrete
from ..masks.by_array import KeyPadding, QueryPadding
from ..masks.by_position import Causal, Full, SlidingWindow
from ..masks.mask import And, Mask, Scalar
from ..mesh import varying_alike
from ..pytrees import pytree, static
from ..shapes import Array, Bool, Float
from . import base
from .base import Call

# The function behind `jax.nn.dot_product_attention(implementation="cudnn")`, which rounds the LSE
# to the query's 16 bits: an error of 1% in outputs with sinks. This function returns float32.
try:
    from jax._src.cudnn import fused_attention_stablehlo as fused
except ImportError:  # it is private, and may move
    fused = None  # type: ignore[assignment]

WHY = "cuDNN's own kernels; run to run, gradients may differ in their last bits"

LIMITS: tuple[str, ...] = (
    "a NaN or infinity in a key or value may reach queries for which it is masked, except in "
    "padding given by lengths",
    "no forward mode and no second order",
)

STATISTICS = base.Statistics()

# cuDNN's backward gives NaN for lengths that are not multiples of this, unless told the lengths
# (NVIDIA/cudnn-frontend issues 160 and 1072).
_GRANULE = 128


@pytree
class Band(Mask):
    """A mask of cuDNN's: `q - left <= k <= q`, each bound optional, and below lengths."""

    queries: tuple[Any, ...]  # lengths, [] or [B], all of which hold
    keys: tuple[Any, ...]
    causal: bool = static()
    left: int | None = static()
    scale: float = static()

    def __call__(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Bool[Array, ""]:
        parts = [masks.causal()] if self.causal else [masks.full()]
        if self.left is not None:
            parts.append(masks.sliding_window(self.left))
        parts += [masks.query_padding(lengths=n) for n in self.queries]
        parts += [masks.key_padding(lengths=n) for n in self.keys]
        return jnp.stack([part(b, h, q, k) for part in parts]).all()

    def __repr__(self) -> str:
        return f"band(causal={self.causal}, left={self.left})"


def refuse(call: Call) -> str | None:
    """Why cuDNN can't compute the call, or `None` if it can."""
    common = base.shared(call) or STATISTICS.missing(call) or base.not_on_nvidia(call)
    return common or _obstacle(call) or _missing(call)


def footprint(call: Call) -> int:
    """Bytes of the LSE and of copies of the inputs, padding made 0."""
    B, T, S, N, K, H, Hv = call.sizes
    copies = (B * T * N * H + B * S * K * (H + Hv)) * jnp.dtype(call.query.dtype).itemsize
    return int(copies + B * T * N * 4)


def prepare(call: Call) -> Call:
    """The call with its mask as a `Band`, what the kernel is compiled for: a concrete scale too."""
    band = _band(call)
    if isinstance(band, str):
        raise ValueError(f"backend: 'cudnn' can't compute this call: {band}")
    return replace(call, mask=None, tiles=None, prepared=band)


def run(call: Call) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output `[B, T, N, Hv]` in the query's dtype, and LSE `[B, T, N]`."""
    band = call.prepared
    assert isinstance(band, Band), "cudnn.run takes what cudnn.prepare returned"
    B, T, S, *_ = call.sizes
    query, key, value = call.query, call.key, call.value
    if band.causal and S > T:
        # These keys are masked for all queries; a NaN in them must not meet a weight of 0.
        key, value, S = key[:, :T], value[:, :T], T
    if not band.queries and not band.keys:
        ends: tuple[Array, ...] = ()
        if T % _GRANULE or S % _GRANULE:
            ends = (jnp.full(B, T, jnp.int32), jnp.full(B, S, jnp.int32))
        return _attend(_kernel(band), *_alike(query, key, value, ends))

    rows, columns = _ends(band, B, T, S)
    sees = jnp.arange(T)[None] < rows[:, None]  # [B, T]
    seen = (jnp.arange(S)[None] < columns[:, None])[..., None, None]
    nothing = jnp.zeros((), query.dtype)
    query = jnp.where(sees[..., None, None], query, nothing)
    key, value = (jnp.where(seen, x, nothing) for x in (key, value))
    # At least one row, of zeros, for empty sequences: cuDNN does not document a length of 0.
    ends = (jnp.maximum(rows, 1), jnp.maximum(columns, 1))
    out, lse = _attend(_kernel(band), *_alike(query, key, value, ends))
    # cuDNN may leave rows past the end as they are, or fill them with NaN.
    return (
        jnp.where(sees[..., None, None], out, nothing),
        jnp.where(sees[..., None], lse, -jnp.inf),
    )


def _ends(band: Band, B: int, T: int, S: int) -> tuple[Array, Array]:
    """The first queries that see a key, and the first keys that are visible: numbers `[B]`."""

    def end(lengths: tuple[Any, ...], most: int) -> Array:
        least = jnp.full(B, most, jnp.int32)
        for given in lengths:
            least = jnp.minimum(least, jnp.broadcast_to(jnp.asarray(given, jnp.int32), (B,)))
        return jnp.maximum(least, 0)

    rows, columns = end(band.queries, T), end(band.keys, S)
    if band.left is not None:
        # Later queries look back no further than to the padding.
        rows = jnp.minimum(rows, columns + band.left)
    rows = jnp.where(columns > 0, rows, 0)
    columns = jnp.where(rows > 0, columns, 0)
    return rows, jnp.minimum(columns, rows) if band.causal else columns


# --- what a mask is made of -----------------------------------------------------------------------


class _Bounds(NamedTuple):
    """`-right <= q - k <= left`, `q < queries[b]`, `k < keys[b]`: what is not `None` or empty."""

    left: int | None = None
    right: int | None = None
    queries: tuple[Any, ...] = ()
    keys: tuple[Any, ...] = ()


def _bounds(mask: Mask | None) -> _Bounds | str:
    """The bounds that a mask is made of, or what in it is no bound."""
    match mask:
        case None | Full():
            return _Bounds()
        case Causal():
            offset = 0 if mask.offset is None else concrete(mask.offset)
            if offset is None or np.any(offset):
                return f"{mask!r}: cuDNN's causal mask starts at the first query and the first key"
            return _Bounds(right=0)
        case SlidingWindow():
            sides = [concrete(side) for side in (mask.left, mask.right)]
            values = [set(side.reshape(-1).tolist()) for side in sides if side is not None]
            if len(values) < 2 or any(len(each) != 1 for each in values):
                return f"{mask!r}: a window of cuDNN is one concrete number for all heads"
            left, right = (int(each.pop()) for each in values)
            return _Bounds(left, right)
        case QueryPadding(valid=None):
            return _Bounds(queries=(mask.lengths,))
        case KeyPadding(valid=None):
            return _Bounds(keys=(mask.lengths,))
        case And():
            return _both(_bounds(mask.left), _bounds(mask.right))
    return f"cuDNN has no mask like {mask!r}"


def _both(a: _Bounds | str, b: _Bounds | str) -> _Bounds | str:
    """The bounds of `a & b`."""
    if isinstance(a, str) or isinstance(b, str):
        return a if isinstance(a, str) else b
    return _Bounds(
        _least(a.left, b.left), _least(a.right, b.right), a.queries + b.queries, a.keys + b.keys
    )


def _least(a: int | None, b: int | None) -> int | None:
    return min((n for n in (a, b) if n is not None), default=None)


def _band(call: Call) -> Band | str:
    """The mask and the scale as cuDNN takes them, or why it can't."""
    found = _bounds(None if call.mask is None else call.mask.given)
    if isinstance(found, str):
        return found
    _, T, S, *_ = call.sizes
    # A bound that no pair reaches is no bound.
    left = None if found.left is None or found.left >= T - 1 else found.left
    right = None if found.right and found.right >= S - 1 else found.right
    if right:
        return f"cuDNN's windows look back only; this one also looks {right} keys ahead"
    if left is not None and right is None:
        return "cuDNN's windows are causal; this one is not"
    if left is not None and T > S:
        return f"a window, {T} queries and {S} keys; cuDNN needs at least as many keys"
    scale = concrete(call.scale)
    if scale is None:
        return "the scale is traced, and cuDNN's kernels are compiled for a concrete one"
    return Band(found.queries, found.keys, right == 0, left, float(scale))


# --- what else stands in the way ------------------------------------------------------------------


def _obstacle(call: Call) -> str | None:
    """Why cuDNN could not compute the call on any machine, or None."""
    _, _, _, _, _, H, Hv = call.sizes
    if base.symbolic(*call.sizes):
        return "sizes are symbolic, and cuDNN's kernels are compiled for known ones"
    nothing = base.nothing_to_compute(call)
    if nothing is not None:
        return nothing
    if call.query.dtype not in (jnp.float16, jnp.bfloat16):
        return f"cuDNN takes float16 and bfloat16, not {call.query.dtype}"
    if Hv != H:
        return f"keys have head dimension {H} and values {Hv}; cuDNN needs the same for both"
    if H % 8:
        return f"the head dimension is {H}; cuDNN needs a multiple of 8"
    if call.score is not None:
        return f"cuDNN has no scores; got {call.score.given!r}"
    if call.dropout is not None:
        return "cuDNN's dropout would drop other weights than the other backends do"
    if any(position is not None for position in jax.tree.leaves(call.positions)):
        return "positions were given, and cuDNN counts from 0"
    band = _band(call)
    return band if isinstance(band, str) else None


def _missing(call: Call) -> str | None:
    """What this machine or this version of JAX lacks, or None."""
    if fused is None:
        return f"JAX {jax.__version__} has its cuDNN attention in another place"
    try:
        fused.check_cudnn_version()
    except RuntimeError as error:
        return str(error)
    age = base.capability(call)
    major = None if age is None else age[0]
    if major is not None and major < 8:
        return f"the GPU has compute capability {major}; cuDNN's kernels need 8 (Ampere)"
    most = 256 if major is None or major >= 9 else 128
    if most < call.sizes.H:
        return f"the head dimension is {call.sizes.H}; on this GPU cuDNN takes up to {most}"
    return None


# --- the kernel, differentiated and batched -------------------------------------------------------


class _Kernel(NamedTuple):
    """What a kernel is compiled for."""

    causal: bool
    left: int | None
    scale: float


def _kernel(band: Band) -> _Kernel:
    return _Kernel(band.causal, band.left, band.scale)


def _call(
    kernel: _Kernel, query: Array, key: Array, value: Array, ends: tuple[Array, ...]
) -> tuple[Array, Array]:
    """One call of cuDNN: output, and LSE in float32. JAX ignores the cotangent of the LSE."""
    kinds = fused.MaskType
    if ends:
        kind = kinds.PADDING_CAUSAL if kernel.causal else kinds.PADDING
    else:
        kind = kinds.CAUSAL if kernel.causal else kinds.NO_MASK
    out, lse = fused.dot_product_attention(
        query,
        key,
        value,
        q_seqlen=ends[0] if ends else None,
        kv_seqlen=ends[1] if ends else None,
        scale=kernel.scale,
        mask_type=kind,
        # cuDNN counts the query itself. Without the causal kind it would show later keys.
        sliding_window_length=None if kernel.left is None else kernel.left + 1,
        return_residual=True,
    )
    return out, jnp.swapaxes(lse, 1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    kernel: _Kernel, query: Array, key: Array, value: Array, ends: tuple[Array, ...]
) -> tuple[Array, Array]:
    """Output and LSE, differentiable through both."""
    query, key, value, ends = _together((query, key, value, ends))
    return _call(kernel, query, key, value, ends)


def _forward(kernel: _Kernel, *given: Any) -> Any:
    # With symbolic zeros, JAX wraps each argument in an object that says whether it is perturbed.
    args = jax.tree.map(lambda x: x.value, given, is_leaf=lambda x: hasattr(x, "perturbed"))
    query, key, value, ends = _together(args)

    def call(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        return _call(kernel, query, key, value, ends)

    out, back, lse = jax.vjp(call, query, key, value, has_aux=True)
    return (out, lse), (back, query, key, value, ends)


def _backward(kernel: _Kernel, saved: Any, cotangents: Any) -> Any:
    d_out, d_lse = cotangents
    of_out, of_lse = (not isinstance(x, SymbolicZero) for x in cotangents)
    grads = None
    if of_out:
        back, d_out = _together((saved[0], d_out))
        grads = back(d_out)
    if of_lse:
        more = (*_of_lse(kernel, *_together((*saved[1:], d_lse))), jnp.zeros_like(saved[3]))
        grads = more if grads is None else jax.tree.map(jnp.add, grads, more)
    if grads is None:
        grads = jax.tree.map(jnp.zeros_like, saved[1:4])
    return *grads, tuple(None for _ in saved[4])


def _of_lse(
    kernel: _Kernel, query: Array, key: Array, value: Array, ends: tuple[Array, ...], d_lse: Array
) -> tuple[Array, Array]:
    """Gradients of query and key through the LSE, which cuDNN's backward does not take.

    `d lse / d logit` is the weight: the query's is `scale * weights @ key`, attention with keys as
    values, and the key's is `scale * weights' @ query`, the gradient of such values. Another
    forward and another backward, where an LSE is differentiated at all.
    """
    mean, back = jax.vjp(lambda values: _call(kernel, query, key, values, ends)[0], key)
    by_row = (kernel.scale * d_lse)[..., None]
    d_query = (by_row * mean.astype(by_row.dtype)).astype(query.dtype)
    (d_key,) = back((by_row * query.astype(by_row.dtype)).astype(query.dtype))
    return d_query, d_key


_attend.defvjp(_forward, _backward, symbolic_zeros=True)


def _alike(query: Array, key: Array, value: Array, ends: tuple[Array, ...]) -> Any:
    query, key, value, *rest = varying_alike([query, key, value, *ends])
    return query, key, value, tuple(rest)


def _together(tree: Any) -> Any:
    """The same arrays; under `vmap`, all of them batched, on their first axis.

    JAX's own rules need that, and older versions don't ensure it. Empty arrays, which in JAX stand
    for missing ones, stay as they are.
    """
    leaves, structure = jax.tree.flatten(tree)
    held = [i for i, leaf in enumerate(leaves) if jnp.size(leaf)]
    for i, leaf in zip(held, _batched([leaves[i] for i in held]), strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


@custom_vmap
def _batched(arrays: list[Array]) -> list[Array]:
    return arrays


@_batched.def_vmap
def _batched_rule(size: int, batched: Any, arrays: list[Array]) -> Any:
    spread = [
        array if yes else jnp.broadcast_to(array, (size, *jnp.shape(array)))
        for yes, array in zip(batched[0], arrays, strict=True)
    ]
    return _batched(spread), [True] * len(spread)
