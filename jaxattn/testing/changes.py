"""Changed inputs, and the outputs that feel them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checks.arrays import described
from ..shapes import Bool

Model = Callable[..., Any]


def check_function(fn: Any, called: str) -> None:
    """Checks that the model under test is a function, that is called so."""
    if not callable(fn):
        raise TypeError(f"fn: got {described(fn)}, expected a function, called as {called}")


class Probe:
    """One model with its inputs: it changes some of them, and says which outputs feel it.

    Outputs and flags have a batch of one where the inputs have no batch.

    Attributes:
      run: the model, `run(inputs) -> outputs`.
      inputs: `[B, S, ...]`, or `[S, ...]` without a batch; integers are tokens.
      clean: the outputs, `[B, T, values]`.
      floats: whether the inputs are floats, not tokens.
      batched: whether the inputs have a batch.
      S, T: lengths of inputs and outputs.
    """

    def __init__(self, run: Model, inputs: Any, clean: Any, rng: np.random.Generator) -> None:
        """Takes the outputs `clean`, as the model returned them, from clean inputs.

        Raises:
          ValueError: for outputs that are no array or have other axes, and for inputs that cannot
            be changed.
        """
        self.run, self.inputs, self.rng = run, inputs, rng
        self._given = np.asarray(inputs)
        tokens = jnp.issubdtype(self._given.dtype, jnp.integer)
        self.floats = bool(jnp.issubdtype(self._given.dtype, jnp.floating))
        if not (tokens or self.floats) or not self._given.size:
            raise ValueError(
                f"inputs: got {self._given.dtype}{list(self._given.shape)}, expected floats "
                "(features) or integers (tokens), at least one"
            )
        if tokens:
            self._least, self._greatest = int(self._given.min()), int(self._given.max())
            if self._least == self._greatest:
                raise ValueError(
                    f"inputs: got the token {self._least} everywhere, expected at least two "
                    "different ones: tokens are changed to others between the least and the "
                    "greatest; use random tokens of the vocabulary"
                )
        # Inputs with enough axes have a batch, so a single sequence of features is given as
        # [1, S, ...].
        self.batched = self._given.ndim >= (2 if tokens else 3)
        axis = 1 if self.batched else 0
        expected = "[B, T, ...]" if self.batched else "[T, ...]"
        if not hasattr(clean, "shape"):
            raise ValueError(
                f"fn: returned {type(clean).__name__}, expected one array {expected}; wrap it to "
                "return the output to check: lambda x: fn(x)[0]"
            )
        shape = tuple(clean.shape)
        if len(shape) <= axis or (self.batched and shape[0] != len(self._given)):
            raise ValueError(
                f"fn: returned shape {list(shape)} for inputs {list(self._given.shape)}, expected "
                f"{expected}"
            )
        self.clean = self.rows(clean)
        self.S, self.T = self._given.shape[axis], shape[axis]

    def rows(self, array: Any) -> np.ndarray:
        """An output or an input as `[B, T, everything else]`, with or without a batch."""
        values = np.asarray(array)
        values = values if self.batched else values[None]
        return values.reshape(*values.shape[:2], -1)

    def at(self, rows: Any, positions: Any) -> Any:
        """The index of positions in some batch rows."""
        return (rows, positions) if self.batched else (positions,)

    def like_inputs(self, values: np.ndarray) -> Any:
        """Values as an array of the kind that the inputs are: JAX's or NumPy's."""
        return jnp.asarray(values) if isinstance(self.inputs, jax.Array) else values

    def replaced(self, at: Any) -> Any:
        """The inputs, with other values at an index."""
        old = self._given[at]
        new: Any
        if self.floats:
            wide = old.astype(np.float64)
            signs = self.rng.choice([-1, 1], old.shape)
            new = wide + signs * np.maximum(1, np.abs(wide)) * (1 + self.rng.random(old.shape))
        else:
            # Another value, never the same: a step of 1 to `span` around the ring of values.
            span = self._greatest - self._least
            steps = self.rng.integers(1, span + 1, old.shape)
            new = self._least + (old.astype(np.int64) - self._least + steps) % (span + 1)
        changed = self._given.copy()
        changed[at] = new.astype(old.dtype)
        return self.like_inputs(changed)

    def differs(self, inputs: Any) -> Bool[np.ndarray, "B T"]:
        """Which outputs for other inputs differ in any bit from the clean ones."""
        return ~same(self.rows(self.run(inputs)), self.clean)

    def felt(self, at: Any) -> Bool[np.ndarray, "B T"]:
        """Which outputs change when the inputs at an index do."""
        return self.differs(self.replaced(at))

    def mixed_rows(self) -> Bool[np.ndarray, "B B"]:
        """`[i, j]`: whether row i of the outputs depends on another row j of the inputs."""
        B = len(self.clean)
        found = np.zeros((B, B), bool)
        for row in range(B if B > 1 else 0):
            found[:, row] = self.felt(self.at(row, slice(None))).any(1)
        np.fill_diagonal(found, False)
        return found


def same(left: np.ndarray, right: np.ndarray) -> Any:
    """Which positions `[B, T]` of two `[B, T, values]` are equal; NaN equals NaN."""
    equal = left == right
    if jnp.issubdtype(left.dtype, jnp.inexact):
        equal |= np.isnan(left) & np.isnan(right)
    return equal.all(-1)
