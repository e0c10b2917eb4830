"""Text from a language model: prompts go into caches in chunks, then tokens follow one by one.

    writer = Writer(model, ends)
    state = writer.start(prompts, caches, limits, sampling)  # the prompts, and the first tokens
    state, tokens = writer.advance(state, sampling, 16)      # at most 16 more of each row

Three programs do all of it: `_feed` takes a chunk of each prompt, `_first` chooses the tokens after
the prompts, and `_advance` is a loop over tokens. Lengths, temperatures and limits are arrays, so
new ones need no new program.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from data import DataError
from flax import nnx
from llama import Caches, Llama

from jaxattn import masks
from jaxattn.shapes import Array, Bool, Float, Int

# What stands in place of a token where a row has none.
NONE = -1
# A tree of drafts: so many chains of so many tokens. A pass of five tokens takes two CPU cores
# hardly longer than one of a single token, since they wait for the weights; one of nine does.
BRANCHES, DEPTH = 1, 4
# Tokens that drafts append beyond the end of a text, before those that are wrong are dropped.
BEYOND = 1 + BRANCHES * DEPTH
# A ring keeps so many first tokens: four are enough, finds StreamingLLM, arXiv 2309.17453.
FIRST = 4


class Sampling(NamedTuple):
    """How a token is drawn from `softmax(logits / temperature)`.

    Attributes:
      temperature: 0 takes the likeliest token.
      top_p: only the likeliest tokens are drawn that have this probability together (Holtzman et
        al. 2020, arXiv 1904.09751).
      keys: of each row. With the position they give the draw, so that an answer does not depend on
        what shares its batch.
    """

    temperature: Float[Array, "B"]
    top_p: Float[Array, "B"]
    keys: Array

    @classmethod
    def of(cls, rows: int, temperature: float, top_p: float = 1.0, seed: int = 0) -> Sampling:
        """The same for all rows, but for their keys."""
        if temperature < 0:
            raise DataError(f"temperature {temperature:g}: expected 0 or more")
        if not 0 < top_p <= 1:
            raise DataError(f"top-p {top_p:g}: expected a number above 0 and up to 1")
        keys = jax.random.split(jax.random.key(seed), rows)
        return cls(jnp.full(rows, temperature), jnp.full(rows, top_p), keys)


def greedy(rows: int) -> Sampling:
    """The likeliest token, always."""
    return Sampling.of(rows, 0.0)


class State(NamedTuple):
    """Rows that are being continued.

    Attributes:
      token: the last token of each row, which is not in the caches yet.
      left: how many more tokens a row may have; 0 when it has ended.
      caches: of the tokens before.
    """

    token: Int[Array, "B"]
    left: Int[Array, "B"]
    caches: Caches


class Drafting(NamedTuple):
    """What drafts are made from.

    Attributes:
      history: the tokens of each row, prompts included.
      length: how many there are.
    """

    history: Int[Array, "B L"]
    length: Int[Array, "B"]


class Writer:
    """A model, and the programs that continue texts with it.

    Args:
      model: the language model.
      ends: tokens that end a text. They are not part of it.
      chunk: how many tokens of a prompt are computed at once.
    """

    def __init__(self, model: Llama, ends: Sequence[int], chunk: int = 128) -> None:
        self.model, self.chunk = model, chunk
        self.graph, self.params = nnx.split(model)
        self.ends = jnp.asarray(ends, jnp.int32)

    def feed(
        self, prompts: Sequence[Sequence[int]], caches: Caches
    ) -> tuple[Float[Array, "B D"], Caches]:
        """Appends a prompt to each row, and returns the features of its last token.

        A row with no tokens stays as it is. The caches that are given can't be used afterwards.
        """
        rows, width = len(prompts), self.model.config.width
        lengths = np.array([len(prompt) for prompt in prompts])
        last = jnp.zeros((rows, width), jnp.float32)
        for start in range(0, int(lengths.max()), self.chunk):
            tokens = np.zeros((rows, self.chunk), np.int32)
            for row, prompt in enumerate(prompts):
                part = prompt[start : start + self.chunk]
                tokens[row, : len(part)] = part
            counts = np.clip(lengths - start, 0, self.chunk).astype(np.int32)
            last, caches = _feed(self.graph, self.params, last, tokens, counts, caches)
        return last, caches

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        caches: Caches,
        limits: Sequence[int],
        sampling: Sampling,
    ) -> tuple[State, Int[np.ndarray, "B"]]:
        """Appends a prompt to each row, and chooses the first token after it.

        Args:
          prompts: at least one token for each row.
          caches: of what comes before the prompts; they can't be used afterwards.
          limits: the most tokens of each row after its prompt.
          sampling: how tokens are chosen.

        Returns:
          The state for `advance`, and the first tokens, `NONE` for a row that ends at once.
        """
        if not all(len(prompt) for prompt in prompts):
            raise DataError("an empty prompt: expected at least one token")
        last, caches = self.feed(prompts, caches)
        left = jnp.asarray(limits, jnp.int32)
        arguments = (self.graph, self.params, last, left, caches, sampling, self.ends)
        state, tokens = _first(*arguments)
        return state, np.asarray(tokens)

    def advance(
        self, state: State, sampling: Sampling, most: int, *, until_one_ends: bool = False
    ) -> tuple[State, Int[np.ndarray, "B most"]]:
        """At most so many more tokens of each row.

        Args:
          state: can't be used afterwards.
          sampling: as in `start`.
          most: the number of steps, after which it returns. It returns earlier when all rows have
            ended or, with `until_one_ends`, when another row has.

        Returns:
          The state after, and the tokens of each row, `NONE` where it has no more.
        """
        arguments = (self.graph, self.params, state, sampling, self.ends, most)
        state, tokens = _advance(*arguments, jnp.asarray(until_one_ends))
        return state, np.asarray(tokens)

    def drafting(self, prompts: Sequence[Sequence[int]], first: Any, size: int) -> Drafting:
        """What `advance_drafted` needs: the prompts, the first tokens, and room for `size`."""
        history = np.full((len(prompts), size), NONE, np.int32)
        for row, prompt in enumerate(prompts):
            history[row, : len(prompt) + 1] = [*prompt, first[row]]
        lengths = (history != NONE).sum(1, dtype=np.int32)
        return Drafting(jnp.asarray(history), jnp.asarray(lengths))

    def advance_drafted(
        self,
        state: State,
        drafting: Drafting,
        most: int,
        *,
        branches: int = BRANCHES,
        depth: int = DEPTH,
    ) -> tuple[State, Drafting, Int[np.ndarray, "B most"], int]:
        """What `advance` returns for greedy sampling, several tokens a step where drafts are right.

        Where the last two tokens occurred before in the text, what followed them then is the draft
        (prompt lookup, https://github.com/apoorvumang/prompt-lookup-decoding). The last `branches`
        occurrences make a tree of drafts, which one pass verifies (SpecInfer, arXiv 2305.09781).

        Args:
          state, drafting: can't be used afterwards. The caches need room for the tokens of a tree
            (`BEYOND`) after the longest text.
          most: tokens of each row, at most; more than `depth`.
          branches, depth: chains of drafts, and the tokens of each.

        Returns:
          State, drafting, tokens, and the number of steps, each of which is one pass.
        """
        if most <= depth:
            raise ValueError(f"most: got {most}, expected more than depth={depth}")
        arguments = (self.graph, self.params, state, drafting, self.ends, most, branches, depth)
        state, drafting, tokens, steps = _advance_drafted(*arguments)
        return state, drafting, np.asarray(tokens), int(steps)


# ---------------------------------------------------------------------------------------- programs


@partial(jax.jit, static_argnames="graph", donate_argnames=("last", "caches"))
def _feed(
    graph: Any,
    params: Any,
    last: Float[Array, "B D"],
    tokens: Int[Array, "B C"],
    counts: Int[Array, "B"],
    caches: Caches,
) -> tuple[Float[Array, "B D"], Caches]:
    """A chunk of each prompt; `last` becomes the features of a row's last token so far."""
    x, caches = nnx.merge(graph, params).proceed(tokens, caches, counts)  # [B, C, D]
    at = jnp.maximum(counts - 1, 0)[:, None, None]
    newest = jnp.take_along_axis(x, at, axis=1)[:, 0]
    return jnp.where(counts[:, None] > 0, newest, last), caches


@partial(jax.jit, static_argnames="graph", donate_argnames="caches")
def _first(
    graph: Any,
    params: Any,
    last: Float[Array, "B D"],
    left: Int[Array, "B"],
    caches: Caches,
    sampling: Sampling,
    ends: Int[Array, "E"],
) -> tuple[State, Int[Array, "B"]]:
    logits = nnx.merge(graph, params).logits(last)
    token = chosen(logits, sampling, caches[0].length)
    shown, left = _counted(token, left, ends)
    return State(token, left, caches), shown


@partial(jax.jit, static_argnames=("graph", "most"), donate_argnames="state")
def _advance(
    graph: Any,
    params: Any,
    state: State,
    sampling: Sampling,
    ends: Int[Array, "E"],
    most: int,
    until_one_ends: Bool[Array, ""],
) -> tuple[State, Int[Array, "B most"]]:
    model = nnx.merge(graph, params)
    live_before = jnp.sum(state.left > 0)

    def goes_on(carry: Any) -> Bool[Array, ""]:
        step, state, _ = carry
        live = jnp.sum(state.left > 0)
        return (step < most) & (live > 0) & ~(until_one_ends & (live < live_before))

    def step(carry: Any) -> Any:
        i, state, out = carry
        # A row that has ended is computed with the others, and appends nothing.
        live = (state.left > 0).astype(jnp.int32)
        x, caches = model.proceed(state.token[:, None], state.caches, live)
        token = chosen(model.logits(x[:, 0]), sampling, caches[0].length)
        shown, left = _counted(token, state.left, ends)
        return i + 1, State(token, left, caches), out.at[:, i].set(shown)

    out = jnp.full((state.token.shape[0], most), NONE, jnp.int32)
    _, state, out = jax.lax.while_loop(goes_on, step, (0, state, out))
    return state, out


def chosen(
    logits: Float[Array, "B V"], sampling: Sampling, positions: Int[Array, "B"]
) -> Int[Array, "B"]:
    """The next token of each row."""

    def draw(logits: Float[Array, "V"], one: Sampling, position: Int[Array, ""]) -> Int[Array, ""]:
        likely = jax.lax.top_k(logits, logits.size)  # in falling order
        scaled = likely[0] / jnp.maximum(one.temperature, 1e-6)
        weights = jax.nn.softmax(scaled)
        # The probability of all that are likelier: 0 for the first, which is always kept.
        before = jnp.cumsum(weights) - weights
        kept = jnp.where(before < one.top_p, scaled, -jnp.inf)
        drawn = jax.random.categorical(jax.random.fold_in(one.keys, position), kept)
        return jnp.where(one.temperature > 0, likely[1][drawn], likely[1][0])

    # Sorting the vocabulary costs more than the rest of the choice.
    return jax.lax.cond(
        jnp.any(sampling.temperature > 0),
        lambda: jax.vmap(draw)(logits, sampling, positions).astype(jnp.int32),
        lambda: jnp.argmax(logits, -1).astype(jnp.int32),
    )


def _counted(
    token: Int[Array, "B"], left: Int[Array, "B"], ends: Int[Array, "E"]
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """What is shown of new tokens, and how many may follow."""
    over = (left <= 0) | jnp.any(token[:, None] == ends, axis=1)
    return jnp.where(over, NONE, token), jnp.where(over, 0, left - 1)


# ------------------------------------------------------------------------------------------ drafts


@partial(
    jax.jit,
    static_argnames=("graph", "most", "branches", "depth"),
    donate_argnames=("state", "drafting"),
)
def _advance_drafted(
    graph: Any,
    params: Any,
    state: State,
    drafting: Drafting,
    ends: Int[Array, "E"],
    most: int,
    branches: int,
    depth: int,
) -> tuple[State, Drafting, Int[Array, "B most"], Int[Array, ""]]:
    model = nnx.merge(graph, params)
    rows = jnp.arange(state.token.shape[0])[:, None]
    # The tree: node 0 is the last token, and each branch a chain below it.
    node = 1 + jnp.arange(branches * depth).reshape(branches, depth)
    above = jnp.where(jnp.arange(depth) == 0, 0, node - 1)
    parents = jnp.concatenate([jnp.array([-1]), above.reshape(-1)])  # [1 + R D]
    levels = jnp.concatenate([jnp.array([0]), jnp.tile(1 + jnp.arange(depth), branches)])

    def goes_on(carry: Any) -> Bool[Array, ""]:
        _, state, _, count, _ = carry
        # Every step needs room for all that it may accept.
        live = state.left > 0
        return jnp.any(live) & jnp.all(~live | (count + depth + 1 <= most))

    def step(carry: Any) -> Any:
        steps, state, (history, length), count, out = carry
        live = state.left > 0
        drafts = drafted(history, length, branches, depth)  # [B, R, D]
        tokens = jnp.concatenate([state.token[:, None], drafts.reshape(len(rows), -1)], 1)
        begin = state.caches[0].length
        x, caches = model.proceed(
            tokens,
            state.caches,
            live * tokens.shape[1],
            mask=masks.tree(parents, begin),
            places=begin[:, None] + levels,
        )
        best = jnp.argmax(model.logits(x), -1).astype(jnp.int32)  # [B, 1 + R D]
        right = drafts == best[:, above]
        counts = jnp.cumprod(right, axis=-1).sum(-1)  # [B, R]
        branch = jnp.argmax(counts, -1)
        accepted = jnp.max(counts, -1)
        path = jnp.concatenate([jnp.zeros_like(rows), node[branch]], 1)  # [B, 1 + D]
        # The tokens that follow the nodes of the path: one more than were accepted.
        new = jnp.take_along_axis(best, path, 1)
        is_end = jnp.any(new[..., None] == ends, -1)
        ended = jnp.cumsum(is_end, 1) > 0
        order = jnp.arange(depth + 1)
        shown = (order <= accepted[:, None]) & (order < state.left[:, None]) & ~ended
        number = shown.sum(1)
        stopped = jnp.any(is_end & (order <= accepted[:, None]), 1)
        left = jnp.where(stopped, 0, state.left - number)
        # Where the limit cuts the path, the rest of it goes too.
        kept = live * jnp.minimum(1 + accepted, number + stopped)
        caches = tuple(c.accept(begin, begin[:, None] + path, kept) for c in caches)
        token = jnp.take_along_axis(new, accepted[:, None], 1)[:, 0]

        def written(to: Int[Array, "B L"], start: Int[Array, "B"]) -> Int[Array, "B L"]:
            place = jnp.where(shown, start[:, None] + order, to.shape[1])
            return to.at[rows, place].set(new, mode="drop")

        drafting = Drafting(written(history, length), length + number)
        state = State(token, left, caches)
        return steps + 1, state, drafting, count + number, written(out, count)

    out = jnp.full((len(rows), most), NONE, jnp.int32)
    start = (0, state, drafting, jnp.zeros(len(rows), jnp.int32), out)
    steps, state, drafting, _, out = jax.lax.while_loop(goes_on, step, start)
    return state, drafting, out, jnp.asarray(steps)


def drafted(
    history: Int[Array, "B L"], length: Int[Array, "B"], branches: int, depth: int
) -> Int[Array, "B R D"]:
    """What followed the last occurrences of the last tokens: three equal ones before two.

    Where there is no occurrence a draft is arbitrary. It costs nothing to be wrong.
    """
    places = jnp.arange(history.shape[1])

    def row(tokens: Int[Array, "L"], n: Int[Array, ""]) -> Int[Array, "R D"]:
        same = [jnp.roll(tokens, back) == tokens[n - 1 - back] for back in range(3)]
        earlier = (places >= 2) & (places < n - 1)
        score = places * (same[0] & same[1] & earlier)
        score += history.shape[1] * (same[0] & same[1] & same[2] & earlier)
        _, found = jax.lax.top_k(score, branches)
        at = found[:, None] + 1 + jnp.arange(depth)
        return jnp.maximum(tokens[jnp.minimum(at, n - 1)], 0)

    return jax.vmap(row)(history, length)
