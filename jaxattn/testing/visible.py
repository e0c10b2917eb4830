"""`visible`: which inputs the outputs of any function depend on."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..checks.arrays import array_of, described
from ..checks.integers import plain
from ..shapes import ArrayLike, Shaped
from .changes import Model, Probe, check_function, same
from .depth import OneLayer, one_layer
from .findings import Visible
from .layers import Layer

# Who waits longer than this wants to know how long it will take.
_QUIET = 3.0

# A power of 2, so that no bit is lost; it makes products of queries and keys 256 times smaller.
_NEAR_0 = 1 / 16

X = TypeVar("X")


def visible(
    fn: Model,
    inputs: Shaped[ArrayLike, "..."],
    *,
    layers: int = 1,
    stride: int = 1,
    where: Any = None,
    padding: Any = None,
    outputs: int | None = None,
    tries: int | None = None,
    backend: str = "auto",
    seed: int = 0,
) -> Visible:
    """Finds the mask that a function from a sequence to a sequence really applies.

    Inputs are changed, one position after the other in all batch rows at once, and the bits of the
    outputs are compared. Where the function is JAX and its inputs are floats, tangents
    (`jax.jvp`) are taken as well, at the same inputs made smaller: they feel what rounding and a
    saturated softmax hide. An output that changes depends on
    the input; what stays the same in all tries does not, as far as was tried. Queries and residuals
    are inputs too: a model that makes its queries of the same inputs sees its diagonal.

    Args:
      fn: `fn(inputs) -> outputs`, `[B, S, ...] -> [B, T, ...]` (or `[S, ...] -> [T, ...]`), of JAX
        or not. Deterministic: dropout off. JAX functions are compiled; others are called as they
        are, with arrays of the kind that `inputs` is.
      inputs: `[B, S, ...]`, floats or integers (tokens, changed to others between the least and the
        greatest); a single sequence is `[S]` tokens or `[S, D]` features.
      layers: through how many layers with the same mask information flows. The mask of one layer is
        then solved for, where structure determines it; `reach` keeps what all of them see.
      stride: how many neighbouring inputs are changed together, for long inputs: `S / stride`
        steps. A query then sees all of them if it sees any.
      where: a layer to measure instead of all of `fn`, on the inputs that it really gets: the path
        of a linen module (`"layers_0/attention"`) or of an attribute of `fn`
        (`"layers.0.attention"`, for nnx), or the module object that `fn` calls. Of several
        calls the first is measured, in its first argument.
      padding: which inputs are real, bool `[B, S]`, or their numbers, int `[B]`; then it is said
        whether real queries feel the others.
      outputs: T, where it is not S: cross-attention, or the last token alone.
      tries: how many changed values are tried at each position; by default 1 beside a tangent, and
        2 without.
      backend: `"jax"` compiles, `"calls"` calls `fn` as it is, `"auto"` compiles what can be
        traced.
      seed: the seed of the random changes.

    Returns:
      The mask, a `Visible`. `print` says it in words, with what is strange about it and how sure it
      is.

    Raises:
      ValueError: for a function that is not deterministic, returns several arrays or another
        length, or needs other arguments; and for inputs that cannot be changed.

    Example:
      >>> import jax.numpy as jnp, jaxattn as ja
      >>> x = jnp.sin(jnp.arange(24.0)).reshape(1, 8, 3)
      >>> def model(x):
      ...     return ja.attention(*[x[:, :, None]] * 3, mask=ja.masks.sliding_window(2))
      >>> seen = ja.testing.visible(model, x)
      >>> print(str(seen).splitlines()[0])
      sliding_window(2)
      >>> print(ja.masks.diff(seen, ja.masks.sliding_window(2), 8))
      the same 21 of 64 pairs
    """
    numbers = {"layers": layers, "stride": stride, "tries": tries}
    for name, number in numbers.items():
        if number is not None or name in ("layers", "stride"):
            plain(number, name, 1)
    plain(seed, "seed", 0)
    if outputs is not None:
        plain(outputs, "outputs", 1)
    _check_call(fn, inputs)
    given: Any = inputs
    if not isinstance(inputs, jax.Array):
        given = array_of(inputs, "inputs", "floats or integers [B, S, ...]", np.asarray)
    if given.ndim == 0 or given.dtype.kind in "OSU":
        raise ValueError(
            f"inputs: got {described(inputs)}, expected floats or integers [B, S, ...]"
        )
    if where is not None:
        fn = Layer(fn, where, given)
        given = fn.inputs
    run, clean, compiled = _runner(fn, given, backend)
    probe = Probe(run, given, clean, np.random.default_rng(seed))
    _check_length(probe, outputs)
    if layers > 1 and probe.T != probe.S:
        raise ValueError(
            f"layers: got {layers} with T={probe.T} and S={probe.S}, expected 1 where T != S"
        )
    real = None if padding is None else _real(padding, len(probe.clean), probe.S)
    across = probe.mixed_rows()
    push = _tangents(probe) if compiled and probe.floats else None
    tries = tries or (1 if push else 2)
    ways = [probe.felt] * tries + ([push] if push else [])
    reach = np.zeros((len(ways), len(probe.clean), probe.T, probe.S), bool)
    # What mixes rows is changed row by row: otherwise a row would feel the changes of the others.
    rows: Sequence[Any] = range(len(probe.clean)) if across.any() else [slice(None)]
    starts = range(0, probe.S, stride)
    steps = [(way, b, start) for way in range(len(ways)) for b in rows for start in starts]
    for way, b, start in _shown(steps):
        keys = slice(start, start + stride)
        reach[way, b, :, keys] = ways[way](probe.at(b, keys))[b, ..., None]
    every = np.asarray(reach.any(0))
    layer = OneLayer(every, True, "") if layers == 1 else one_layer(every, layers)
    return Visible(
        array=jnp.asarray(layer.mask[:, None]),
        reach=every[:, None],
        across=across,
        real=real,
        determined=layer.determined,
        depth=layer.told,
        sure=tuple(_sure(probe, reach, tries, compiled, push is not None, stride, seed)),
    )


def _check_call(fn: Model, inputs: Any) -> None:
    """Checks that a function can be called with the inputs alone."""
    check_function(fn, "fn(inputs)")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # a function without one, as some of NumPy's
        return
    try:
        signature.bind(inputs)
    except TypeError as error:
        raise ValueError(
            f"fn: takes {signature}, expected a function of the inputs alone ({error}); wrap it: "
            "lambda x: fn(x, ...)"
        ) from None


def _runner(fn: Model, inputs: Any, backend: str) -> tuple[Model, Any, bool]:
    """How the function is run, its outputs for clean inputs, and whether it is compiled.

    It is called twice before it is traced: what draws random numbers or keeps a state would be the
    same in every run of a compiled program.
    """
    if backend not in ("auto", "jax", "calls"):
        raise ValueError(f"backend: got {backend!r}, expected 'auto', 'jax' or 'calls'")
    clean = _twice(fn, inputs)
    if backend == "calls":
        return fn, clean, False
    try:
        jax.eval_shape(fn, inputs)
    except Exception:  # whatever a function that is not JAX does with a tracer
        if backend == "jax":
            raise
        return fn, clean, False
    run = jax.jit(fn)
    return run, _twice(run, inputs), True


def _twice(run: Model, inputs: Any) -> Any:
    """The outputs, which have to be the same in a second run.

    Raises:
      ValueError: where they are not.
    """
    # A copy: a function may return a buffer of its own, or one that it fills again.
    first, second = (_copied(run(inputs)) for _ in range(2))
    if not hasattr(first, "shape"):
        return first  # the probe says what was expected
    if first.shape != second.shape or not same(first.reshape(-1), second.reshape(-1)):
        raise ValueError(
            "fn: returned other outputs in a second run on the same inputs, expected equal bits; "
            "dropout left on is the likely reason: use deterministic=True, or model.eval(); a "
            "state that calls change, such as a cache, is the next one"
        )
    return first


def _copied(outputs: Any) -> Any:
    return np.array(outputs) if hasattr(outputs, "shape") else outputs


def _check_length(probe: Probe, outputs: int | None) -> None:
    expected = probe.S if outputs is None else outputs
    if expected != probe.T:
        raise ValueError(
            f"fn: returned {probe.T} outputs for {probe.S} inputs, expected {expected}; where "
            f"outputs are no inputs' own (cross-attention, the last token), say outputs={probe.T}, "
            "and wrap a function that pools or returns another array"
        )


def _real(padding: Any, B: int, S: int) -> np.ndarray:
    """Which inputs are not padding, `[B, S]`."""
    given = array_of(padding, "padding", f"bool [B, S] = [{B}, {S}] or int [B]", np.asarray)
    if given.dtype == bool and given.shape in ((B, S), (1, S)):
        return np.broadcast_to(given, (B, S))
    if np.issubdtype(given.dtype, np.integer) and given.shape == (B,):
        return np.arange(S) < given[:, None]
    raise ValueError(
        f"padding: got {given.dtype}{list(given.shape)}, expected bool [B, S] = [{B}, {S}], True "
        f"where an input is real, or the numbers of real inputs, int [B] = [{B}]"
    )


def _tangents(probe: Probe) -> Any:
    """A function like `probe.felt` by forward mode; None where the model has none."""
    # Near 0, where logits are alike and a softmax hides no key: at the inputs it may be saturated.
    push = jax.jit(lambda x, tangent: jax.jvp(probe.run, (x * _NEAR_0,), (tangent,))[1])
    shape, dtype = probe.inputs.shape, probe.inputs.dtype
    if not jnp.issubdtype(probe.clean.dtype, jnp.floating):
        return None
    try:
        push(probe.inputs, probe.inputs)
    except (TypeError, ValueError):  # JAX's errors for reverse mode only, and for callbacks
        return None

    def felt(at: Any) -> np.ndarray:
        tangent = np.zeros(shape, dtype)
        tangent[at] = probe.rng.choice([-1, 1], tangent[at].shape) * (
            1 + probe.rng.random(tangent[at].shape)
        )
        moved = probe.rows(push(probe.inputs, tangent))
        # NaN says nothing: 0 times inf is NaN as well.
        return np.asarray(((moved != 0) & np.isfinite(moved)).any(-1))

    return felt


def _shown(steps: Sequence[X]) -> Iterator[X]:
    """The steps, with progress on stderr where they take more than a few seconds."""
    began = told = time.monotonic()
    for n, step in enumerate(steps):
        yield step
        now = time.monotonic()
        if now - told > _QUIET:
            told, done = now, n + 1
            left = (now - began) * (len(steps) - done) / done
            print(
                f"visible: {done} of {len(steps)} runs, {left:.0f} s left",
                file=sys.stderr, flush=True,
            )  # fmt: skip


def _sure(
    probe: Probe,
    reach: np.ndarray,
    tries: int,
    compiled: bool,
    pushed: bool,
    stride: int,
    seed: int,
) -> Iterator[str]:
    """How it was found, and what could have been missed."""
    yield (
        f"tried: {tries} changed value{'s' * (tries > 1)} at each of {probe.S} inputs"
        + (f", {stride} together" if stride > 1 else "")
        + (f", and a tangent at the inputs times {_NEAR_0}" if pushed else "")
        + (", compiled by JAX" if compiled else ", by calls")
        + f", seed {seed}"
    )
    changes = reach[:tries]
    if unsteady := int((changes.any(0) & ~changes.all(0)).sum()):
        yield (
            f"pairs felt in some tries only: {unsteady}; they are near rounding, or the mask "
            "depends on the values of inputs"
        )
    if pushed and (hidden := int((reach[-1] & ~changes.any(0)).sum())):
        yield f"pairs felt by the tangent only: {hidden}; rounding or saturation hides them"
    if (
        jnp.issubdtype(probe.clean.dtype, jnp.inexact)
        and (bad := np.isnan(probe.clean).any(-1)).any()
    ):
        yield f"outputs that hold NaN, in which changes are not seen: {int(bad.sum())}"
    missed = ["a mask that depends on the values of inputs", "a function that is flat here"]
    if not pushed:
        missed.insert(0, f"an effect below the rounding of {probe.clean.dtype}")
    yield "could have been missed: " + ", ".join(missed)
