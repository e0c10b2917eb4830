"""The heads of a model, and caches of fixed size: on tiny random models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng
from flax import nnx
from tiny_models import vocabulary, write_llama

import jaxattn as ja

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import forgetting
import heads
import llama
import measure_chat

pytestmark = pytest.mark.usefixtures("as_users_run")

T, CHUNK = 24, 4


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_llama(path)
    return path


@pytest.fixture(scope="module")
def loaded(file: Path) -> llama.Loaded:
    return llama.load(file)


def text() -> np.ndarray:
    return rng(7).integers(0, len(vocabulary()), T + 1).astype(np.int32)


def weights(model: llama.Llama, tokens: Any, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits and weights `[N, T, T]` of a layer, written out."""
    x = model.embedding(jnp.asarray(tokens[None]))
    for block in model.blocks[:layer]:
        x = block(x)
    attention = model.blocks[layer].attention
    x, at = model.blocks[layer].attention_norm(x), jnp.arange(x.shape[1])
    q, k = (np.asarray(attention.rope(f(x), at))[0] for f in (attention.query, attention.key))
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    logits = np.einsum("tnh,snh->nts", q, k) * q.shape[2] ** -0.5
    logits = np.where(np.tri(len(tokens), dtype=bool), logits, -np.inf)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return logits, exp / exp.sum(-1, keepdims=True)


def test_numbers_of_heads_are_those_of_the_weights(loaded: llama.Loaded) -> None:
    tokens = text()[:-1]
    found = heads.heads_of(*nnx.split(loaded.model), jnp.asarray(tokens[None]), 3, 5)
    distance = np.arange(T)[:, None] - np.arange(T)
    for layer in range(2):
        logits, p = weights(loaded.model, tokens, layer)
        wanted = {
            "entropy": -(p * np.log(np.where(p > 0, p, 1))).sum(-1).mean(-1),
            "distance": (p * distance).sum(-1).mean(-1),
            "first": p[..., :3].sum(-1).mean(-1),
            "last": (p * (distance < 5)).sum(-1).mean(-1),
            "largest logit": logits.max((-1, -2)),
        }
        assert found.keys() == wanted.keys()
        for name, each in wanted.items():
            np.testing.assert_allclose(found[name][layer], each, rtol=1e-4, err_msg=name)


def chunks(cache: Any, draw: np.random.Generator) -> Iterator[tuple[Any, np.ndarray]]:
    """The cache after each chunk of random tokens, and what they were."""
    step = jax.jit(lambda cache, *given: cache.step(*given, mask=ja.masks.causal())[1])
    for _ in range(T // CHUNK):
        given = draw.standard_normal((3, 1, CHUNK, 2, 8)).astype(np.float32)
        cache = step(cache, *given)
        yield cache, given


def held(cache: Any) -> set[int]:
    return set(np.asarray(cache.positions[0]).tolist()) - {-1}


@pytest.mark.parametrize("kind", [kind for kind, _ in heads.FORGETTING.values()])
def test_caches_keep_their_budget_and_the_last_tokens(kind: Any) -> None:
    budget = 10
    empty = kind.made(budget, CHUNK, jax.random.key(0), heads=2, head_dim=8)
    before: set[int] = set()
    for n, (cache, _) in enumerate(chunks(empty, rng(8)), 1):
        now = held(cache)
        assert len(now) == min(budget, n * CHUNK)
        assert now >= set(range(n * CHUNK - cache.recent, n * CHUNK)) - {-1, -2}
        assert now - before <= set(range((n - 1) * CHUNK, n * CHUNK))
        before = now
    if kind is not forgetting.FirstAndLast:
        assert cache.recent == 5
    if kind in (forgetting.FirstAndLast, forgetting.FirstAndRandom):
        assert before >= set(range(4))
    assert cache.capacity == budget + CHUNK
    assert not cache.overflowed.any()


@pytest.mark.parametrize("kind", [forgetting.HeavyHitters, forgetting.LatelyHeavy])
def test_heavy_hitters_are_those_of_a_plain_count(kind: Any) -> None:
    """Against a list of tokens, and weights written out from what was there at each chunk."""
    budget = 6
    empty = kind.made(budget, CHUNK, jax.random.key(0), heads=2, head_dim=8)
    keys: dict[int, np.ndarray] = {}
    got: dict[int, float] = {}
    for n, (cache, (query, key, _)) in enumerate(chunks(empty, rng(9))):
        got = {k: weight * empty.decay for k, weight in got.items()}
        for t in range(CHUNK):
            keys[n * CHUNK + t], got[n * CHUNK + t] = key[0, t], 0.0
        for t in range(CHUNK):
            past = [k for k in sorted(keys) if k <= n * CHUNK + t]
            logits = np.einsum("nh,snh->ns", query[0, t], np.stack([keys[k] for k in past]))
            p = np.exp(logits * 8**-0.5)
            p /= p.sum(-1, keepdims=True)
            for k, weight in zip(past, p.sum(0), strict=True):
                got[k] += weight
        order = sorted(keys)
        older = sorted(order[:-3], key=lambda k: -got[k])[:3]
        keys = {k: keys[k] for k in {*older, *order[-3:]}}
        got = {k: got[k] for k in keys}
        assert held(cache) == set(keys)
        where = np.asarray(cache.positions[0])
        for place, position in enumerate(where):
            wanted = got[position] if position >= 0 else 0
            np.testing.assert_allclose(cache.received[0, place], wanted, rtol=1e-5)


def test_a_random_choice_is_a_sample_of_the_whole_past() -> None:
    """The tokens with the largest draws of all so far, whatever was forgotten in between."""
    empty = forgetting.Random.made(8, CHUNK, jax.random.key(3), heads=2, head_dim=8)
    draws = [jax.random.uniform(jax.random.fold_in(jax.random.key(3), k)) for k in range(T)]
    *_, (cache, _) = chunks(empty, rng(10))
    best = sorted(range(T - 4), key=lambda k: -draws[k])[:4]
    assert held(cache) == {*best, *range(T - 4, T)}


def test_a_budget_for_all_changes_no_loss(loaded: llama.Loaded) -> None:
    tokens = text()
    whole = loaded.model.caches(partial(ja.KVCache.create, 1, T))
    wanted = measure_chat.losses_of(loaded, tokens, whole, CHUNK)
    caches = heads.forgetting(loaded, forgetting.HeavyHitters, T, CHUNK, 0)
    found = measure_chat.losses_of(loaded, tokens, caches, CHUNK)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text for a vocabulary without words."""
    monkeypatch.setattr(measure_chat, "passages", lambda seed: ["the cat sat " * 40] * 2)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.usefixtures("short")
def test_both_commands_run(file: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--model", str(file), "--tokens", "32"]
    assert heads.main([*arguments, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "of 8" in said
    assert "largest logit is" in said
    rows = (tmp_path / "heads.csv").read_text().splitlines()
    assert rows[0] == "layer,head,entropy,distance,first,last,largest logit"
    assert len(rows) == 9
    assert (tmp_path / "heads.png").stat().st_size > 10_000
    more = ["--chunk", "8", "--shares", "0.5", "--kinds", "whole", "random", "--seeds", "2"]
    assert heads.main(["cache", *arguments, *more]) == 0
    said = capsys.readouterr().out
    assert "half at random, half the last" in said
    assert " to " in said
    assert "the first 4, and the last" not in said


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--tokens", "100000"), "--tokens 100000: expected 1 to"),
        (("cache", "--tokens", "100"), "--tokens 100: expected a multiple of 2 x --chunk"),
        (("cache", "--tokens", "128", "--shares", "2"), "--shares: expected more than 4 tokens"),
        (("--model", "/nowhere"), "/nowhere: no such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    file: Path, capsys: Any, arguments: tuple[str, ...], says: str
) -> None:
    model = () if "--model" in arguments else ("--model", str(file))
    assert heads.main([*arguments, *model]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
