"""QK-Clip, the statistics that it reads, and a tiny run of the monitor."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import decoder
import monitor
import packing

from jaxattn.nn.nnx import MultiHeadAttention

pytestmark = pytest.mark.usefixtures("as_users_run")

N, LAYERS = 4, 2


def model_of(kv_heads: int) -> decoder.Decoder:
    """A decoder that watches its heads, with biases and large logits."""
    attention = partial(MultiHeadAttention, stats=monitor.ASKED)
    model = decoder.Decoder(
        30, 16, LAYERS, N, kv_heads, 24, window=3, full_every=2, attention=attention,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    draw = rng(97, kv_heads)
    for block in model.blocks:
        for projection in (block.attention.query, block.attention.key):
            for part in (projection.kernel, projection.bias):
                part[...] = jnp.asarray(draw.normal(size=part.shape), jnp.float32)
    return model


def batch() -> Any:
    documents = [rng(71, n).integers(2, 30, n).astype(np.int32) for n in (7, 5, 9, 4)]
    rows = [documents[:2], documents[2:]]
    return tuple(jnp.asarray(a) for a in vars(packing.pack(rows, 16)).values())


@nnx.jit
def heads(model: decoder.Decoder, batch: Any) -> Any:
    _, seen = nnx.capture(decoder.loss_of, nnx.Intermediate)(model, *batch)
    return monitor.heads_of(seen, batch[1][:, :-1] >= 0)


@pytest.mark.parametrize("kv_heads", [N, 2], ids=["own keys", "shared keys"])
def test_the_clip(kv_heads: int) -> None:
    """The largest logit of a clipped head is tau on the same inputs; other heads keep their bits.

    Later layers get other inputs, so one layer is clipped at a time, the last one first.
    """
    model, given = model_of(kv_heads), batch()
    largest, _ = heads(model, given)
    for layer in reversed(range(LAYERS)):
        before = nnx.to_pure_dict(nnx.state(model.blocks[layer]))
        tau = jnp.sort(largest[layer])[1:3].mean()
        only = jnp.where(jnp.arange(LAYERS)[:, None] == layer, largest, -jnp.inf)
        monitor.clip(model, only, tau)
        after, _ = heads(model, given)
        over = np.asarray(largest[layer] > tau)
        assert over.sum() == 2
        np.testing.assert_allclose(after[layer][over], tau, rtol=1e-5)
        np.testing.assert_array_equal(after[layer][~over], largest[layer][~over])
        now = nnx.to_pure_dict(nnx.state(model.blocks[layer]))
        changed = {"query": over, "key": over if kv_heads == N else np.zeros(kv_heads, bool)}
        for name, parts in before["attention"].items():
            for part, old in parts.items():
                new = now["attention"][name][part]
                if name in changed:
                    by_head = {"kernel": (0, 2), "bias": 1}[part]
                    np.testing.assert_array_equal((new != old).any(by_head), changed[name])
                else:
                    np.testing.assert_array_equal(new, old)
        largest = after


def test_heads_are_those_of_the_real_tokens() -> None:
    """Their largest logit and mean entropy, whatever the padding is."""
    model, (tokens, ids, places) = model_of(2), batch()
    largest, entropy = heads(model, (tokens, ids, places))
    assert largest.shape == entropy.shape == (LAYERS, N)
    padding = jnp.where(ids < 0, 7, tokens)
    assert (padding != tokens).any()
    for got, want in zip(heads(model, (padding, ids, places)), (largest, entropy), strict=True):
        np.testing.assert_array_equal(got, want)
    assert (entropy > 0).all()
    assert (entropy < np.log(9)).all()


def test_muon_takes_the_matrices_within_layers() -> None:
    """With their heads as one axis; embeddings, norms and biases are Adam's."""
    dims = monitor.matrices(nnx.state(model_of(2)))
    leaves = jax.tree_util.tree_leaves_with_path(dims, is_leaf=lambda x: hasattr(x, "output_axis"))
    found: dict[str, Any] = {}
    for path, each in leaves:
        names = [str(key.key) for key in path if hasattr(key, "key")]
        assert names[-1] == "kernel"
        found.setdefault(names[-2], set()).add((each.reduction_axis, each.output_axis))
    heads_out, heads_in, plain = ((0,), (1, 2)), ((0, 1), (2,)), ((0,), (1,))
    assert found == {
        "query": {heads_out}, "key": {heads_out}, "value": {heads_out}, "out": {heads_in},
        "mlp_in": {plain}, "mlp_out": {plain},
    }  # fmt: skip


def test_a_run(tmp_path: Path, capsys: Any) -> None:
    """Two runs of a few steps: a picture, numbers, and logits that the clip bounds."""
    words = rng(79).integers(0, 20, 300)
    text = "\n".join(f"def f{i}(a{i % 7}):\n    return a{i % 7} + {i % 5}" for i in words)
    (tmp_path / "a.py").write_text(text)
    sizes = {"vocabulary": 300, "length": 32, "rows": 2, "d-model": 16, "layers": 1, "d-ff": 16,
             "steps": 12, "warmup": 1, "rate": 0.1, "tau": 4}  # fmt: skip
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    out = tmp_path / "out"
    given = ["--text", str(tmp_path / "a.py"), "--out", str(out), *options]
    assert monitor.main(given) == 0
    said = capsys.readouterr().out
    assert "QK-Clip at 4" in said
    assert (out / "monitor.png").stat().st_size > 10_000
    found = json.loads((out / "monitor.json").read_text())
    assert found["config"]["tau"] == 4
    free, clipped = found["runs"].values()
    for run in (free, clipped):
        assert np.shape(run["loss"]) == (12,)
        assert np.shape(run["largest"]) == np.shape(run["entropy"]) == (12, 1, 4)
    # The same weights and batches until a head exceeds tau.
    first = np.argmax(np.max(free["largest"], (1, 2)) > 4)
    assert 0 < first < 11
    np.testing.assert_array_equal(free["loss"][: first + 1], clipped["loss"][: first + 1])
    assert np.max(clipped["largest"]) < np.max(free["largest"])
    assert monitor.main([*given, "--tau", "0"]) == 2
    assert "tau" in capsys.readouterr().err
