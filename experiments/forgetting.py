"""Caches of fixed size: after each chunk, what is worth least is forgotten.

They are `KVCache`s whose `step` ends with `keep`, so that a model decodes from them as from any
other cache, and knows nothing of it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from generate import FIRST

import jaxattn as ja
from jaxattn import stats
from jaxattn.pytrees import pytree, static
from jaxattn.shapes import Array, Float


@pytree
class Forgetting(ja.KVCache):
    """A cache that keeps the last tokens of each row, and of those before them the worthiest.

    Attributes:
      budget: how many tokens it keeps.
      recent: how many of them are the last ones.
    """

    budget: int = static(default=0)
    recent: int = static(default=0)
    # The part of the budget that is for the last tokens.
    share: ClassVar[float] = 0.5

    @classmethod
    def made(cls, budget: int, chunk: int, key: Array, *, heads: int, head_dim: int) -> Self:
        """An empty cache of one row, with room for the budget and a chunk."""
        made = cls.create(1, budget + chunk, heads, head_dim)
        return replace(made, budget=budget, recent=round(budget * cls.share))

    @abstractmethod
    def worth(self) -> Float[Array, "B S"]:
        """What decides among the older tokens."""

    def step(self, *given: Any, **options: Any) -> Any:
        out, after = super().step(*given, **options)
        return out, after.cut()

    def cut(self) -> Any:
        """The cache with what it keeps."""
        worth = jnp.where(self.positions < 0, -jnp.inf, self.worth())
        last = self.positions >= self.length[:, None] - self.recent
        return self.keep(jax.lax.top_k(jnp.where(last, jnp.inf, worth), self.budget)[1])


@pytree
class FirstAndLast(Forgetting):
    """The first four tokens, and the last ones (StreamingLLM, arXiv 2309.17453)."""

    @classmethod
    def made(cls, budget: int, chunk: int, key: Array, **size: int) -> Self:
        return replace(super().made(budget, chunk, key, **size), recent=budget - FIRST)

    def worth(self) -> Float[Array, "B S"]:
        return -self.positions.astype(jnp.float32)


@pytree
class Random(Forgetting):
    """Half of the budget is the last tokens, and half a uniform sample of those before.

    Attributes:
      first: how many of the first tokens are kept in any case.
      seed: a key. A token's draw depends on it and on the position alone: what was forgotten is
        not drawn again, and all of the past has the same chance.
    """

    seed: Any = None
    first: int = static(default=0)

    @classmethod
    def made(cls, budget: int, chunk: int, key: Array, **size: int) -> Self:
        return replace(super().made(budget, chunk, key, **size), seed=key)

    def worth(self) -> Float[Array, "B S"]:
        def draw(position: Array) -> Array:
            return jax.random.uniform(jax.random.fold_in(self.seed, position))

        return jnp.where(self.positions < self.first, 2, jax.vmap(jax.vmap(draw))(self.positions))


@pytree
class FirstAndRandom(Random):
    """`Random`, and the first four tokens: what a sample lacks without them is not chance."""

    first: int = static(default=FIRST)


@pytree
class HeavyHitters(Forgetting):
    """Half of the budget is the last tokens, and half those that received most weight before.

    H2O (arXiv 2306.14048), with weights summed over the heads of a layer too, which share their
    places; H2O chooses for each head.

    Attributes:
      received: `[B, S]`: the weight that the token in each place received from all queries so far.
      decay: what earlier weight counts after each step; 1, as in H2O, is a sum.
    """

    received: Any = None
    decay: float = static(default=1.0)

    @classmethod
    def made(cls, budget: int, chunk: int, key: Array, **size: int) -> Self:
        made = super().made(budget, chunk, key, **size)
        return replace(made, received=jnp.zeros(made.positions.shape, jnp.float32))

    def worth(self) -> Float[Array, "B S"]:
        return self.received

    def step(self, *given: Any, **options: Any) -> Any:
        asked = options | {"stats": stats.received()}
        (out, got), after = ja.KVCache.step(self, *given, **asked)
        kept = replace(after, received=self.decay * self.received + got.sum(-1)).cut()
        # A place that is free begins at 0 for the next token.
        return out, replace(kept, received=jnp.where(kept.positions < 0, 0, kept.received))


@pytree
class LatelyHeavy(HeavyHitters):
    """`HeavyHitters` that fade: a sum favours old tokens, which more queries have seen.

    So it is the latest queries that choose, as in SnapKV (arXiv 2404.14469).
    """

    # With chunks of 64, weight counts half after 450 tokens.
    decay: float = static(default=0.9)
