"""The experiment on chosen blocks: its questions have far answers, its choice is MoBA's, it runs."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import chosen_blocks
from chosen_blocks import Config

pytestmark = pytest.mark.usefixtures("as_users_run")
TINY = Config(
    steps=2, batch=2, test=2, length=32, block=4, names=20, colours=3, heads=1, head_dim=8,
    counts=(1, 3), timed_length=1024, timed_block=256, timed_heads=1, turns=1,
)  # fmt: skip


def test_each_block_of_questions_is_about_one_far_block():
    row = chosen_blocks.drawn(TINY, jax.random.key(0), 8)
    half = TINY.length // 2
    for names, colours, answers in zip(*map(np.asarray, row), strict=True):
        assert (colours[half:] == TINY.colours).all()
        place = {name: at for at, name in enumerate(names[:half])}
        at = np.array([place[name] for name in names[half:]])
        np.testing.assert_array_equal(colours[at], answers)
        of_blocks = (at // TINY.block).reshape(-1, TINY.block)
        assert (of_blocks == of_blocks[:, :1]).all()
        assert len(set(of_blocks[:, 0])) == half // TINY.block


def test_a_query_sees_its_own_block_and_the_best_of_the_past():
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 24, 2, 8))
    scores = chosen_blocks.scores_of_blocks(q, k, 4)
    got = np.asarray(chosen_blocks.chosen(scores, 2, 4).dense(24, 24, heads=2))[0]
    q, k = np.asarray(q)[0], np.asarray(k)[0]
    for h in range(2):
        mean_q, mean_k = (x[:, h].reshape(6, 4, 8).mean(1) for x in (q, k))
        for i in range(24):
            best = sorted(range(i // 4), key=lambda j: -(mean_q[i // 4] @ mean_k[j]))[:2]
            seen = {t for t in range(i + 1) if t // 4 in {*best, i // 4}}
            assert set(np.flatnonzero(got[h, i])) == seen


def test_numbers_of_blocks_share_one_program():
    key = jax.random.key(2)
    params = chosen_blocks.start(TINY, key)
    state = chosen_blocks._optimizer(TINY).init(params)
    chosen_blocks.train_step.clear_cache()
    for count in TINY.counts:
        loss = chosen_blocks.train_step(TINY, "chosen", count, params, state, key)[2]
        assert jnp.isfinite(loss)
    assert chosen_blocks.train_step._cache_size() == 1


def test_a_run(tmp_path):
    chosen_blocks.main(Config(**{**vars(TINY), "out": tmp_path}))
    found = json.loads((tmp_path / "chosen_blocks.json").read_text())
    names = ["all of the past", "window", "1 chosen", "3 chosen"]
    assert list(found["accuracy"]) == list(found["cost"]) == names
    cost = found["cost"]
    assert cost["1 chosen"]["pairs"] < cost["3 chosen"]["pairs"] == cost[names[0]]["pairs"]
