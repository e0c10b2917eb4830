"""Assertions: inputs that must not be felt are changed, and outputs have to stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checks.arrays import array_of, described
from ..checks.integers import plain
from ..checks.options import flag
from ..masks.mask import as_mask
from ..shapes import Array, ArrayLike, Int, Shaped
from .changes import Model, Probe, check_function, same
from .depth import power


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
    check_function(fn, "fn(inputs)")
    layers, heads = plain(layers, "layers", 1), plain(heads, "heads", 1)
    nonfinite, seed = flag(nonfinite, "nonfinite"), plain(seed, "seed", 0)
    array = array_of(inputs, "inputs", "floats or integers [B, S, ...]")
    run = jax.jit(fn)
    probe = Probe(run, array, run(array), np.random.default_rng(seed))
    S, T, B = probe.S, probe.T, len(probe.clean)
    sees: Any = np.asarray(as_mask(mask).dense(T, S, batch=B, heads=heads)).any(1)
    check = _Check(probe, _reach(sees, layers))
    for k in range(S):
        check.values(k)
    check.rows()
    if probe.floats:
        check.gradients()
    if probe.floats and nonfinite and S == T:
        unseen = ~sees.any(1)
        for poison in (np.nan, np.inf):
            check.poisoned_values(unseen, poison)
            # The gradient of a position that sees others carries its NaN to them, as it should.
            check.poisoned_gradients(unseen & ~sees.any(2), poison)


def _reach(sees: np.ndarray, layers: int) -> np.ndarray:
    """On which inputs an output may depend, `[B, T, S]`: paths of at most `layers` steps."""
    _, T, S = sees.shape
    if T != S:
        if layers > 1:
            raise ValueError(f"layers: got {layers} with T={T} and S={S}, expected 1 where T != S")
        return sees
    return power(sees | np.eye(T, dtype=bool), layers)


class _Check:
    """One model, its inputs, and on which of them its outputs may depend."""

    def __init__(self, probe: Probe, reach: np.ndarray) -> None:
        self.probe, self.reach = probe, reach
        self._pull = jax.jit(lambda x, cotangent: jax.vjp(probe.run, x)[1](cotangent)[0])

    def values(self, k: int) -> None:
        """Outputs that must not depend on input k keep their bits when it changes."""
        felt = self.probe.felt(self.probe.at(slice(None), k))
        self._expect(felt & ~self.reach[:, :, k], f"input {k}")

    def poisoned_values(self, where: np.ndarray, poison: float) -> None:
        """Inputs that no query sees may hold anything: no other output changes a bit."""
        felt = self.probe.differs(self._poisoned(where, poison))
        self._expect(felt & ~where, f"unseen inputs that are {poison}")

    def poisoned_gradients(self, where: np.ndarray, poison: float) -> None:
        """Inputs that neither see nor are seen may hold anything: no other gradient changes."""
        noise = self._noise()
        cotangent = jnp.where(self._over(where, noise.ndim), 0, noise)
        clean, dirty = (
            self.probe.rows(self._pull(inputs, cotangent))
            for inputs in (self.probe.inputs, self._poisoned(where, poison))
        )
        what = f"unseen inputs that are {poison}"
        self._expect(~same(clean, dirty) & ~where, what, "the gradient of input")

    def _over(self, where: np.ndarray, rank: int) -> np.ndarray:
        rows = where if self.probe.batched else where[0]
        return rows.reshape(*rows.shape, *(1,) * (rank - rows.ndim))

    def _poisoned(self, where: np.ndarray, poison: float) -> Array:
        value = jnp.asarray(poison, self.probe.inputs.dtype)
        return jnp.where(self._over(where, self.probe.inputs.ndim), value, self.probe.inputs)

    def _expect(self, leaks: np.ndarray, what: str, dependent: str = "output") -> None:
        if leaks.any():
            b, q = np.argwhere(leaks)[0]
            raise AssertionError(
                f"{dependent} {q} depends on {what}, which no path of the mask allows (batch "
                f"row {b})"
            )

    def _noise(self) -> Array:
        out = jax.eval_shape(self.probe.run, self.probe.inputs)
        return jnp.asarray(self.probe.rng.standard_normal(out.shape), out.dtype)

    def rows(self) -> None:
        """A batch row does not depend on another."""
        mixed = np.argwhere(self.probe.mixed_rows().T)
        if len(mixed):
            row, other = mixed[0]
            raise AssertionError(f"batch row {other} of the output depends on batch row {row}")

    def gradients(self) -> None:
        """The gradient of output q with respect to inputs outside its paths is exactly 0."""
        noise = self._noise()
        axis = 1 if self.probe.batched else 0
        for q in range(noise.shape[axis]):
            one = (jnp.arange(noise.shape[axis]) == q).reshape(
                [-1 if i == axis else 1 for i in range(noise.ndim)]
            )
            reached = (
                self.probe.rows(self._pull(self.probe.inputs, jnp.where(one, noise, 0))) != 0
            ).any(-1)
            leaks = reached & ~self.reach[:, q]
            if leaks.any():
                b, k = np.argwhere(leaks)[0]
                raise AssertionError(
                    f"the gradient of output {q} reaches input {k}, which no path of the mask "
                    f"allows (batch row {b})"
                )


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
    check_function(fn, "fn(inputs, lengths)")
    extra, seed = plain(extra, "extra", 0), plain(seed, "seed", 0)
    array = array_of(inputs, "inputs", "an array [B, S, ...]")
    if array.ndim < 2:
        raise ValueError(f"inputs: got shape {list(array.shape)}, expected [B, S, ...]")
    B, S = array.shape[:2]
    sizes = array_of(lengths, "lengths", f"integers [B] = [{B}]", np.asarray)
    if not np.issubdtype(sizes.dtype, np.integer):
        raise TypeError(f"lengths: got dtype {sizes.dtype}, expected integers [B] = [{B}]")
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
    check_function(fn, "fn(inputs, segment_ids, positions)")
    if isinstance(documents, (str, bytes)) or not isinstance(documents, Sequence):
        raise TypeError(f"documents: got {described(documents)}, expected a list of arrays")
    parts = [
        array_of(document, f"documents[{i}]", "an array [S, ...]", np.asarray)
        for i, document in enumerate(documents)
    ]
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
