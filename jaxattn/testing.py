"""Assertions about your own model: masked inputs are changed, and outputs have to stay the same.

A wrong mask does not crash. The loss falls, often further than it should, and the model is wrong.
These functions treat a model as a black box: they change inputs on which an output must not depend,
and compare bits. The model under test need not use this library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .masks.mask import as_mask
from .shapes import Array, ArrayLike, Int, Shaped

__all__ = ["assert_packing_invariant", "assert_padding_invariant", "assert_respects_mask"]

Model = Callable[..., Any]


def assert_respects_mask(
    fn: Model,
    inputs: Shaped[ArrayLike, "..."],
    mask: Any,
    layers: int = 1,
    *,
    heads: int = 1,
    nonfinite: bool = True,
    seed: int = 0,
) -> None:
    """Raises if an output of `fn` depends on an input that no path of the mask allows.

    An output may depend on its own input (residuals, queries), and in each layer on what the mask
    shows it: with A the mask, outputs depend on inputs within `(A | I) ** layers`. Each input is
    changed to other finite values, one position after the other. Every output that must not depend
    on it has to keep its bits, and the gradient of that output with respect to it has to be exactly
    0. At positions that no query sees, NaN and inf are tried as well.

    Args:
      fn: the model, `fn(inputs) -> outputs`, outputs `[B, T, ...]` (or `[T, ...]`). Deterministic:
        dropout off.
      inputs: `[B, S, ...]`, or `[S, ...]` for a mask that does not depend on the batch row.
        Integers (tokens) are changed to other values between their least and greatest, and then
        only values are checked; floats are checked in gradients too. S = 64 takes seconds.
      mask: what the model should respect: a `Mask`, a callable, or a boolean array.
      layers: the number of layers, each of which may pass information along the mask.
      heads: query heads over which the mask is evaluated; a pair that one head sees is allowed.
      nonfinite: False leaves out NaN and inf, for models whose promise holds for numbers only.
      seed: the seed of the random changes.

    Raises:
      AssertionError: for the first leak: "output 3 depends on input 7, which no path of the mask
        allows".
      ValueError: for inputs or outputs whose axes do not fit the mask.

    Example:
      >>> import jax.numpy as jnp, jaxattn as ja
      >>> x = jnp.arange(24.0).reshape(1, 8, 3)
      >>> leaky = lambda x: x + x.mean(1, keepdims=True)
      >>> ja.testing.assert_respects_mask(leaky, x, ja.masks.causal())
      Traceback (most recent call last):
      ...
      AssertionError: output 0 depends on input 1, which no path of the mask allows (batch row 0)
    """
    array = jnp.asarray(inputs)
    run = jax.jit(fn)
    clean = run(array)
    batch, S, T = _axes(array, clean, mask)
    sees: Any = np.asarray(as_mask(mask).dense(T, S, batch=batch or 1, heads=heads)).any(1)
    reach = _reach(sees, layers)
    check = _Check(run, array, clean, reach, batch is not None, np.random.default_rng(seed))
    floats = jnp.issubdtype(array.dtype, jnp.floating)
    for k in range(S):
        check.values(k)
    if batch is not None:
        check.rows()
    if floats:
        check.gradients()
    if floats and nonfinite and S == T:
        unseen = ~sees.any(1)
        for poison in (np.nan, np.inf):
            check.poisoned_values(unseen, poison)
            # The gradient of a position that sees others carries its NaN to them, as it should.
            check.poisoned_gradients(unseen & ~sees.any(2), poison)


def _axes(inputs: Array, outputs: Any, mask: Any) -> tuple[int | None, int, int]:
    """The size of the batch (`None` without one), and the lengths of inputs and outputs."""
    if not hasattr(outputs, "shape"):
        raise ValueError(
            f"fn: returned {type(outputs).__name__}, expected one array [B, T, ...] or [T, ...]; "
            "wrap it to return the output to check"
        )
    # Inputs with enough axes have a batch, so a single sequence of features is given as
    # [1, S, ...].
    tokens = jnp.issubdtype(inputs.dtype, jnp.integer)
    batched = inputs.ndim >= (2 if tokens else 3)
    axis = 1 if batched else 0
    if outputs.ndim <= axis or (batched and outputs.shape[0] != inputs.shape[0]):
        raise ValueError(
            f"fn: returned shape {list(outputs.shape)} for inputs {list(inputs.shape)}, expected "
            f"{'[B, T, ...]' if batched else '[T, ...]'}"
        )
    return inputs.shape[0] if batched else None, inputs.shape[axis], outputs.shape[axis]


def _reach(sees: np.ndarray, layers: int) -> np.ndarray:
    """On which inputs an output may depend, `[B, T, S]`: paths of at most `layers` steps."""
    if layers < 1:
        raise ValueError(f"layers: got {layers}, expected at least 1")
    _, T, S = sees.shape
    if T != S:
        if layers > 1:
            raise ValueError(f"layers: got {layers} with T={T} and S={S}, expected 1 where T != S")
        return sees
    step = sees | np.eye(T, dtype=bool)
    reach = step
    for _ in range(layers - 1):
        reach = (reach.astype(np.float32) @ step.astype(np.float32)) > 0
    return reach


class _Check:
    """One model, its inputs, and on which of them its outputs may depend."""

    def __init__(
        self,
        run: Model,
        inputs: Array,
        clean: Array,
        reach: np.ndarray,
        batched: bool,
        rng: np.random.Generator,
    ) -> None:
        self.run, self.inputs, self.reach, self.batched, self.rng = run, inputs, reach, batched, rng
        self.clean = self._rows(clean)
        self._pull = jax.jit(lambda x, cotangent: jax.vjp(run, x)[1](cotangent)[0])

    def _rows(self, array: Any) -> np.ndarray:
        """An output or an input as `[B, T, everything else]`, with or without a batch."""
        values = np.asarray(array)
        values = values if self.batched else values[None]
        return values.reshape(*values.shape[:2], -1)

    def _replaced(self, at: Any) -> Array:
        """The inputs, with other values at an index."""
        old = np.asarray(self.inputs[at])
        new: Any
        if np.issubdtype(old.dtype, np.integer):
            low, high = int(self.inputs.min()), int(self.inputs.max())
            # Another value, never the same: a step of 1 to (high - low) around the ring of values.
            steps = self.rng.integers(1, max(high - low, 1) + 1, old.shape)
            new = low + (old - low + steps) % (high - low + 1)
        else:
            signs = self.rng.choice([-1, 1], old.shape)
            new = old.astype(np.float64) + signs * (1 + self.rng.random(old.shape))
        return self.inputs.at[at].set(jnp.asarray(new.astype(old.dtype)))

    def values(self, k: int) -> None:
        """Outputs that must not depend on input k keep their bits when it changes."""
        dirty = self._rows(self.run(self._replaced((slice(None), k) if self.batched else (k,))))
        self._expect(~_same(dirty, self.clean) & ~self.reach[:, :, k], f"input {k}")

    def poisoned_values(self, where: np.ndarray, poison: float) -> None:
        """Inputs that no query sees may hold anything: no other output changes a bit."""
        dirty = self._rows(self.run(self._poisoned(where, poison)))
        self._expect(~_same(dirty, self.clean) & ~where, f"unseen inputs that are {poison}")

    def poisoned_gradients(self, where: np.ndarray, poison: float) -> None:
        """Inputs that neither see nor are seen may hold anything: no other gradient changes."""
        noise = self._noise()
        cotangent = jnp.where(self._over(where, noise.ndim), 0, noise)
        clean, dirty = (
            self._rows(self._pull(inputs, cotangent))
            for inputs in (self.inputs, self._poisoned(where, poison))
        )
        what = f"unseen inputs that are {poison}"
        self._expect(~_same(clean, dirty) & ~where, what, "the gradient of input")

    def _over(self, where: np.ndarray, rank: int) -> np.ndarray:
        rows = where if self.batched else where[0]
        return rows.reshape(*rows.shape, *(1,) * (rank - rows.ndim))

    def _poisoned(self, where: np.ndarray, poison: float) -> Array:
        value = jnp.asarray(poison, self.inputs.dtype)
        return jnp.where(self._over(where, self.inputs.ndim), value, self.inputs)

    def _expect(self, leaks: np.ndarray, what: str, dependent: str = "output") -> None:
        if leaks.any():
            b, q = np.argwhere(leaks)[0]
            raise AssertionError(
                f"{dependent} {q} depends on {what}, which no path of the mask allows (batch "
                f"row {b})"
            )

    def _noise(self) -> Array:
        out = jax.eval_shape(self.run, self.inputs)
        return jnp.asarray(self.rng.standard_normal(out.shape), out.dtype)

    def rows(self) -> None:
        """A batch row does not depend on another."""
        for b in range(len(self.clean)):
            dirty = self._rows(self.run(self._replaced((b,))))
            leaks: Any = ~_same(dirty, self.clean).all(1)
            leaks[b] = False
            if leaks.any():
                other = np.flatnonzero(leaks)[0]
                raise AssertionError(f"batch row {other} of the output depends on batch row {b}")

    def gradients(self) -> None:
        """The gradient of output q with respect to inputs outside its paths is exactly 0."""
        noise = self._noise()
        axis = 1 if self.batched else 0
        for q in range(noise.shape[axis]):
            one = (jnp.arange(noise.shape[axis]) == q).reshape(
                [-1 if i == axis else 1 for i in range(noise.ndim)]
            )
            reached = (self._rows(self._pull(self.inputs, jnp.where(one, noise, 0))) != 0).any(-1)
            leaks = reached & ~self.reach[:, q]
            if leaks.any():
                b, k = np.argwhere(leaks)[0]
                raise AssertionError(
                    f"the gradient of output {q} reaches input {k}, which no path of the mask "
                    f"allows (batch row {b})"
                )


def _same(left: np.ndarray, right: np.ndarray) -> Any:
    """Which positions `[B, T]` of two `[B, T, values]` are equal; NaN equals NaN."""
    return ((left == right) | (np.isnan(left) & np.isnan(right))).all(-1)


def assert_padding_invariant(
    fn: Model,
    inputs: Shaped[ArrayLike, "B S ..."],
    lengths: Int[ArrayLike, "B"],
    *,
    extra: int = 5,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    seed: int = 0,
) -> None:
    """Raises if real outputs depend on the contents of padding, or on its length.

    Args:
      fn: the model, `fn(inputs, lengths) -> outputs`, outputs `[B, S, ...]`, of which the first
        `lengths[b]` positions are compared, or `[B, ...]` (a pooled result), compared whole.
      inputs: `[B, S, ...]`, padded on the right; at least one row has padding.
      lengths: the number of real positions in each row, `[B]`.
      extra: the number of positions of padding added for the second comparison.
      rtol, atol: tolerances of the second comparison; the first compares bits.
      seed: the seed of the values that fill the padding.

    Raises:
      AssertionError: for the first difference, with its row and position.
    """
    array, sizes = jnp.asarray(inputs), np.asarray(lengths)
    B, S = array.shape[:2]
    if sizes.shape != (B,) or not (sizes < S).any() or (sizes > S).any() or (sizes < 0).any():
        raise ValueError(
            f"lengths: got {sizes.tolist()}, expected [B] = [{B}] lengths from 0 to S = {S}, at "
            "least one of them below S: without padding nothing is tested"
        )
    rng = np.random.default_rng(seed)
    real = np.arange(S) < sizes[:, None]
    run = jax.jit(fn)
    clean = np.asarray(run(array, sizes))
    positional = clean.ndim >= 2 and clean.shape[1] == S

    def fill(shape: Sequence[int]) -> Array:
        values: Any
        if jnp.issubdtype(array.dtype, jnp.integer):
            values = rng.integers(int(array.min()), int(array.max()) + 1, shape)
        else:
            values = rng.standard_normal(shape) * 10
        return jnp.asarray(values.astype(array.dtype))

    def compare(dirty: Any, what: str, exact: bool) -> None:
        got = np.asarray(dirty)[:, :S] if positional else np.asarray(dirty)
        same = got == clean if exact else np.isclose(got, clean, rtol=rtol, atol=atol)
        same = same.reshape(B, S if positional else 1, -1).all(-1)
        leaks = ~same & (real if positional else True)
        if leaks.any():
            b, q = np.argwhere(leaks)[0]
            where = f"output {q} of batch row {b}" if positional else f"the output of batch row {b}"
            raise AssertionError(
                f"{where} depends on {what} (the row has {sizes[b]} real positions)"
            )

    where = real.reshape(B, S, *(1,) * (array.ndim - 2))
    compare(run(jnp.where(where, array, fill(array.shape)), sizes), "the contents of padding", True)
    tail = fill((B, extra, *array.shape[2:]))
    compare(run(jnp.concatenate([array, tail], 1), sizes), "the length of padding", False)


def assert_packing_invariant(
    fn: Model,
    documents: Sequence[Shaped[ArrayLike, "_ ..."]],
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> None:
    """Raises if the outputs of packed documents differ from those of the same documents alone.

    Args:
      fn: the model, `fn(inputs, segment_ids, positions) -> outputs`, inputs and outputs
        `[1, S, ...]`, ids and positions int32 `[1, S]`: the number of each document, and positions
        that begin at 0 in each.
      documents: at least two, each `[S, ...]`.
      rtol, atol: tolerances of the comparison.

    Raises:
      AssertionError: for the first difference, with its document and position.
    """
    parts = [np.asarray(document) for document in documents]
    if len(parts) < 2:
        raise ValueError(f"documents: got {len(parts)}, expected at least 2 to pack")
    ids = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    positions = np.concatenate([np.arange(len(part)) for part in parts])

    def run(inputs: Any, ids: Any, positions: Any) -> np.ndarray:
        row = (jnp.asarray(inputs), jnp.asarray(ids, jnp.int32), jnp.asarray(positions, jnp.int32))
        return np.asarray(fn(*(x[None] for x in row)))[0]

    packed = run(np.concatenate(parts), ids, positions)
    start = 0
    for number, part in enumerate(parts):
        alone = run(part, np.zeros(len(part)), np.arange(len(part)))
        together = packed[start : start + len(part)]
        same = np.isclose(together, alone, rtol=rtol, atol=atol).reshape(len(part), -1).all(-1)
        if not same.all():
            at = int(np.argmin(same))
            raise AssertionError(
                f"output {at} of document {number} depends on the documents packed with it: it "
                f"differs from the document alone by {np.abs(together[at] - alone[at]).max():.3g}"
            )
        start += len(part)
