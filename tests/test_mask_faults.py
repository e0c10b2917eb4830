"""The experiment on masking faults: its data is what it says, and its faults are found."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import mask_faults
from mask_faults import FAULTS, TASKS, Config

pytestmark = pytest.mark.usefixtures("as_scripts_run")
BY_NAME = {task.name: task for task in TASKS}
TINY = Config(seeds=2, steps=4, batch=4, test=4, d_model=8, layers=1, heads=2, rows=2)


@pytest.fixture
def as_scripts_run():
    """What scripts run under: Flax's and optax's own code is not strict about promotion.

    Nothing here runs for long, so programs are compiled fast rather than to be fast.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def drawn(name: str, rows: int = 64) -> mask_faults.Batch:
    batch = mask_faults.drawn(BY_NAME[name], jax.random.key(1), rows)
    return mask_faults.Batch(*(np.asarray(leaf) for leaf in batch))


@pytest.mark.parametrize("name", list(BY_NAME))
def test_rows(name):
    batch = drawn(name)
    for leaf in batch:
        assert leaf.shape == (64, mask_faults.T)
    assert batch.asked.any(1).all()
    assert not (batch.asked & ~batch.valid).any()
    assert not batch.valid.all()
    for tokens in (batch.tokens[batch.valid], batch.tokens[~batch.valid]):
        assert tokens.min() >= 0
        assert tokens.max() < mask_faults.V
    # Padding is no special token: everything in it is seen in real places too, and it varies.
    assert set(batch.tokens[~batch.valid]) <= set(batch.tokens[batch.valid])
    assert len(set(batch.tokens[~batch.valid])) > mask_faults.V // 2
    # It belongs to a document that the row has.
    for ids, valid in zip(batch.ids, batch.valid, strict=True):
        assert set(ids[~valid]) <= set(ids[valid])


@pytest.mark.parametrize("name", ["random tokens", "copy"])
def test_answers_are_the_next_tokens_of_the_document(name):
    batch = drawn(name)
    b, q = np.nonzero(batch.asked)
    assert (batch.labels[b, q] == batch.tokens[b, q + 1]).all()
    assert (batch.ids[b, q] == batch.ids[b, q + 1]).all()
    assert batch.valid[b, q + 1].all()
    assert len(set(batch.ids.ravel())) == 2


def test_reverse_answers():
    batch = drawn("reverse")
    for tokens, labels, valid in zip(batch.tokens, batch.labels, batch.valid, strict=True):
        n = valid.sum()
        assert valid[:n].all()
        assert (labels[:n] == tokens[:n][::-1]).all()
    assert len(set(batch.valid.sum(1))) == 4


def test_copy_answers_are_the_source_but_for_noise():
    batch, half = drawn("copy"), mask_faults.HALF
    b, q = np.nonzero(batch.asked)
    right = (batch.tokens[b, q + 1 - half] == batch.labels[b, q]).mean()
    assert abs(right - (1 - mask_faults.NOISE * (1 - 1 / mask_faults.V))) < 0.06  # 640 answers


def test_recall_answers():
    """The answer stands in the question's document; neighbours and padding say otherwise."""
    batch = drawn("recall")
    pairs = mask_faults.DOCUMENTS * (mask_faults.PAIRS + 1)
    misled = 0
    for tokens, labels, asked, ids, valid in zip(*batch, strict=True):
        key, value = tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        real, document = valid[: 2 * pairs : 2], ids[: 2 * pairs : 2]
        assert (key < mask_faults.KEYS).all()
        assert len(set(value)) == pairs
        assert value.min() >= mask_faults.KEYS
        for q in np.flatnonzero(asked):
            (answer,) = value[real & (key == tokens[q]) & (document == ids[q])]
            assert answer == labels[q]
            others = real & (key == tokens[q]) & (document != ids[q])
            assert others.sum() == mask_faults.DOCUMENTS - 1
            misled += (~real & (key == tokens[q]) & (document == ids[q])).sum()
    assert misled == 64 * mask_faults.DOCUMENTS


@pytest.mark.parametrize("task", TASKS, ids=list(BY_NAME))
def test_faults_are_faults(task):
    """Every planted mask differs from the right one, in the way its name says."""
    batch = mask_faults.drawn(task, jax.random.key(1), 64)
    dense = {name: np.asarray(mask_faults.dense(task, name, batch))[:, 0] for name in FAULTS}
    right, q, k = dense["correct"], *np.indices((mask_faults.T, mask_faults.T))
    b = np.arange(64)[:, None, None]
    ids, valid = np.asarray(batch.ids), np.asarray(batch.valid)
    assert task.faults[0] == "correct"
    assert (dense["inverted"] == ~right).all()
    new = {name: mask & ~right for name, mask in dense.items()}
    for name in task.faults[1:]:
        assert new[name].any()
    assert not (new["no padding mask"] & valid[b, k]).any()
    if task.causal:
        assert not (right & (q < k)).any()
        assert (k > q)[None].repeat(64, 0)[new["leaky look-ahead"]].all()
        assert (k == q + 1)[None].repeat(64, 0)[new["off-by-one causal"]].all()
    if task.packed:
        assert (ids[b, q] != ids[b, k])[new["no segment mask"]].all()


def test_exactly_the_planted_leaks_are_found():
    task = BY_NAME["recall"]  # where every fault can be made
    assert task.faults == FAULTS
    found = [f for f in task.faults if mask_faults.leak(TINY, task, f, jax.random.key(2))]
    assert found == list(task.faults[1:])


def test_free_running_reads_no_truth():
    """Answers in the input change nothing; the tokens before them do."""
    task = BY_NAME["copy"]
    model, params = mask_faults.model_of(TINY), mask_faults.start(TINY, jax.random.key(0))
    batch = mask_faults.drawn(task, jax.random.key(1), 64)
    answers = jnp.pad(batch.asked[:, :-1], ((0, 0), (1, 0)))
    other = batch._replace(tokens=jnp.where(answers, 3, batch.tokens))
    mask = mask_faults.dense(task, "leaky look-ahead", batch)
    free = jax.jit(mask_faults.free_running, static_argnums=0)
    assert free(model, params, batch, mask) == free(model, params, other, mask)


def test_a_run(tmp_path, monkeypatch):
    """One task of the four, two masks of its three, a few steps: pictures, tables, numbers."""
    monkeypatch.setattr(mask_faults, "TASKS", (BY_NAME["reverse"],))
    monkeypatch.setattr(mask_faults, "FAULTS", ("correct", "no padding mask"))
    monkeypatch.setattr(
        mask_faults,
        "leak",
        lambda config, task, fault, seed: None if fault == "correct" else "found",
    )
    sizes = {"seeds": 2, "steps": 2, "batch": 2, "test": 2, "d-model": 8, "layers": 1, "rows": 1}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    assert mask_faults.main(["--out", str(tmp_path), *options]) == 0
    assert (tmp_path / "faults.png").stat().st_size > 10_000
    assert (tmp_path / "tables.md").read_text().count("no padding mask") == 2
    results = json.loads((tmp_path / "faults.json").read_text())
    assert set(results["cells"]["reverse"]) == {"correct", "no padding mask"}
    for cell in results["cells"]["reverse"].values():
        assert {name: len(values) for name, values in cell.items()} == {
            "training_loss": 2, "excess": 2, "accuracy": 2,
        }  # fmt: skip
    assert results["leaks"]["reverse"] == {"correct": None, "no padding mask": "found"}


def test_verdicts():
    right = {"training_loss": [1.0, 1.1]}
    for losses, said in {(1.0, 1.12): "the same", (2.0, 1.5): "higher", (0.0, 0.1): "lower",
                         (0.0, 2.0): "mixed"}.items():  # fmt: skip
        assert mask_faults.verdict({"training_loss": list(losses)}, right) == said
