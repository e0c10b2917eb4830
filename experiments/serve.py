"""Requests that arrive and leave at any step: continuous batching over pages (Orca, vLLM).

A batch has a fixed number of slots. A request that comes in takes a free slot and pages for its
prompt; its slot takes more pages as it grows, and gives all back when it ends. The other rows of
the batch go on meanwhile: nobody waits for the longest answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from data import DataError
from generate import NONE, Sampling, State, Writer

import jaxattn as ja
from jaxattn.shapes import Array, Bool, Int

# Caches whose rows share pages.
Pages = tuple[Any, ...]


@dataclass(frozen=True)
class Request:
    """A prompt, and the most tokens that may follow it."""

    prompt: Sequence[int]
    limit: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Answer(NamedTuple):
    """The tokens that follow a prompt; `number` is the request's place in the queue, from 0."""

    number: int
    tokens: list[int]


class Server:
    """A batch of slots, over pages that they share.

    Args:
      writer: the model.
      slots: requests that run at once.
      pages: in the pool.
      page: tokens in a page.
      longest: tokens of the longest request, its prompt included.
      prefix: tokens with which prompts may begin, as a system prompt. They are computed once, and
        prompts that begin with them share their pages, as far as those are full.
      burst: steps between looks at the queue, while no request ends.
    """

    def __init__(
        self,
        writer: Writer,
        slots: int,
        pages: int,
        page: int,
        longest: int,
        *,
        prefix: Sequence[int] = (),
        burst: int = 16,
    ) -> None:
        self.writer, self.burst, self.page = writer, burst, page
        self.pages, self.columns = pages, -(-longest // page)
        self.prefix = list(prefix[: len(prefix) // page * page])
        # A row more, which never ends and is never continued, holds the pages of the prefix.
        rows = slots + bool(self.prefix)
        create = partial(ja.PagedKVCache.create, rows, pages, page, pages_per_row=self.columns)
        zeros = jnp.zeros(rows, jnp.int32)
        self.state = State(zeros, zeros, writer.model.caches(create))
        self.sampling = Sampling.of(rows, 0.0)
        # Of each slot: the request's number, its tokens so far, and the pages it may come to need.
        self.running: list[tuple[int, list[int]] | None] = [None] * slots
        self.reserved = [0] * slots
        self.most_pages = 0
        if self.prefix:
            row, others = _lent(self.state.caches, slots, len(self.prefix), 0)
            _, row = writer.feed([self.prefix], row)
            self.state = self.state._replace(caches=_returned(row, others, slots))
            self.pages -= len(self.prefix) // page

    def run(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """The answers, in the order in which they end.

        Raises:
          DataError: for a request that is longer than the longest.
        """
        queue = deque(enumerate(requests))
        for number, request in queue:
            most = min(self.columns, self.pages + self._shared(request)) * self.page
            if len(request.prompt) + request.limit - 1 > most:
                raise DataError(
                    f"request {number} has {len(request.prompt)} tokens, and up to {request.limit} "
                    f"more: expected at most {most} in all"
                )
        while queue or any(self.running):
            yield from self._admit(queue)
            waiting = bool(queue)
            self.state, tokens = self.writer.advance(
                self.state, self.sampling, self.burst, until_one_ends=waiting
            )
            self._count_pages()
            for slot, running in enumerate(self.running):
                if running is not None:
                    running[1].extend(int(token) for token in tokens[slot] if token != NONE)
            yield from self._ended()

    def _shared(self, request: Request) -> int:
        """How many pages of the prefix a request uses: all, or none."""
        n = len(self.prefix)
        # One token of the prompt is left at least, so that there is something to continue.
        begins = n < len(request.prompt) and list(request.prompt[:n]) == self.prefix
        return n // self.page if begins else 0

    def _needs(self, request: Request) -> int:
        """How many pages of its own a request may come to need; its last token needs no place."""
        all_pages = -(-(len(request.prompt) + request.limit - 1) // self.page)
        return all_pages - self._shared(request)

    def _admit(self, queue: deque[tuple[int, Request]]) -> Iterator[Answer]:
        """Requests in their order, as long as a slot is free and pages for all that they may need.

        Pages are taken as they are needed. They are counted here all the same, since a request that
        finds none on its way could not go on.
        """
        for slot, running in enumerate(self.running):
            if not queue or sum(self.reserved) + self._needs(queue[0][1]) > self.pages:
                break
            if running is not None:
                continue
            number, request = queue.popleft()
            self.reserved[slot] = self._needs(request)
            first = self._prefill(slot, request)
            self.running[slot] = number, [] if first == NONE else [first]
        yield from self._ended()

    def _prefill(self, slot: int, request: Request) -> int:
        """Appends the prompt to the pages of one slot, alone; its first token."""
        own = Sampling.of(1, request.temperature, request.top_p, request.seed)
        token, left, caches = self.state
        shared = self._shared(request)
        prompt = request.prompt[shared * self.page :]
        row, others = _lent(caches, slot, len(prompt), shared)
        state, first = self.writer.start([prompt], row, [request.limit], own)
        self.sampling = jax.tree.map(lambda a, b: a.at[slot].set(b[0]), self.sampling, own)
        self.state = State(
            token.at[slot].set(state.token[0]),
            left.at[slot].set(state.left[0]),
            _returned(state.caches, others, slot),
        )
        self._count_pages()
        return int(first[0])

    def _ended(self) -> Iterator[Answer]:
        """Answers that are complete; their pages are free after it."""
        left = np.asarray(self.state.left)
        over = np.zeros(len(left), bool)
        for slot, running in enumerate(self.running):
            over[slot] = running is not None and left[slot] == 0
        if over.any():
            self.state = self.state._replace(caches=_freed(self.state.caches, over))
        for slot, running in enumerate(self.running):
            if running is not None and over[slot]:
                self.running[slot], self.reserved[slot] = None, 0
                yield Answer(*running)

    def _count_pages(self) -> None:
        caches: Pages = self.state.caches
        held = caches[0].key[0].shape[0] - int(caches[0].available)
        self.most_pages = max(self.most_pages, held)


def server_for(writer: Writer, requests: Sequence[Request], slots: int, page: int = 16) -> Server:
    """A server that has room for any `slots` of the requests at once.

    What all prompts begin with is computed once.
    """
    longest = max(len(request.prompt) + request.limit for request in requests)
    same = 0
    if len(requests) > 1:
        columns = zip(*(request.prompt for request in requests), strict=False)
        same = next((i for i, column in enumerate(columns) if len(set(column)) > 1), 0)
    slots = min(slots, len(requests))
    pages = slots * -(-longest // page) + same // page
    return Server(writer, slots, pages, page, longest, prefix=requests[0].prompt[:same])


# ---------------------------------------------------------------------------------------- programs


class Rows(NamedTuple):
    """What a paged cache knows of its rows."""

    table: Int[Array, "B P"]
    length: Int[Array, "B"]
    overflowed: Bool[Array, "B"]

    @classmethod
    def of(cls, cache: ja.PagedKVCache) -> Rows:
        return cls(cache.table, cache.length, cache.overflowed)


@partial(jax.jit, donate_argnames="caches")
def _lent(
    caches: Pages, slot: Int[Array, ""], tokens: Int[Array, ""], shared: Int[Array, ""]
) -> tuple[Pages, tuple[Rows, ...]]:
    """One row as a cache of its own, in the same pool, with pages for so many tokens; and the rows.

    The row begins with the first `shared` pages of the last row. Pages are taken here, because a
    cache of one row does not know which pages the others have.
    """
    alone, rows = [], []
    for cache in caches:
        begins = jnp.arange(cache.table.shape[1]) < shared
        table = jnp.where(begins, cache.table[-1], cache.table[slot])
        cache = replace(
            cache,
            table=cache.table.at[slot].set(table),
            length=cache.length.at[slot].add(shared * cache.page),
        )
        mine = jnp.arange(cache.length.shape[0]) == slot
        cache = cache.allocate(mine * tokens)
        row = Rows.of(cache)
        rows.append(row)
        alone.append(replace(cache, **Rows(*(a[slot][None] for a in row))._asdict()))
    return tuple(alone), tuple(rows)


def _returned(alone: Pages, rows: tuple[Rows, ...], slot: int) -> Pages:
    """All rows again, after the one that was lent."""
    changed = _with_row(rows, tuple(map(Rows.of, alone)), slot)
    return tuple(replace(c, **row._asdict()) for c, row in zip(alone, changed, strict=True))


@jax.jit
def _with_row(
    rows: tuple[Rows, ...], new: tuple[Rows, ...], slot: Int[Array, ""]
) -> tuple[Rows, ...]:
    return jax.tree.map(lambda a, b: a.at[slot].set(b[0]), rows, new)


@partial(jax.jit, donate_argnames="caches")
def _freed(caches: Pages, rows: Bool[Array, "B"]) -> Pages:
    return tuple(cache.free(rows) for cache in caches)
