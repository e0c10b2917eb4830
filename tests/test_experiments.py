"""The training experiment's parts: its corpus, its loader, its model, and a run of a few steps."""

import csv
import gzip
import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import everyday

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import corpus  # noqa: E402
import data  # noqa: E402
import decoding  # noqa: E402
import language_model  # noqa: E402
import sentences  # noqa: E402
import training  # noqa: E402
import transformer  # noqa: E402
import translate  # noqa: E402
from report import Report  # noqa: E402
from rich.console import Console  # noqa: E402

scripts = pytest.mark.usefixtures("as_users_run")


# ------------------------------------------------------------------------------------- the corpus


@pytest.mark.parametrize(
    ("n", "pt", "en"),
    [
        (0, "zero", "zero"),
        (16, "dezesseis", "sixteen"),
        (40, "quarenta", "forty"),
        (100, "cem", "one hundred"),
        (101, "cento e um", "one hundred and one"),
        (321, "trezentos e vinte e um", "three hundred and twenty-one"),
        (1000, "mil", "one thousand"),
        (1002, "mil e dois", "one thousand and two"),
        (1100, "mil e cem", "one thousand one hundred"),
        (1101, "mil cento e um", "one thousand one hundred and one"),
        (1200, "mil e duzentos", "one thousand two hundred"),
        (1202, "mil duzentos e dois", "one thousand two hundred and two"),
        (2026, "dois mil e vinte e seis", "two thousand and twenty-six"),
        (100_000, "cem mil", "one hundred thousand"),
        (200_101, "duzentos mil cento e um", "two hundred thousand one hundred and one"),
        (
            999_999,
            "novecentos e noventa e nove mil novecentos e noventa e nove",
            "nine hundred and ninety-nine thousand nine hundred and ninety-nine",
        ),
    ],
)
def test_cardinals(n, pt, en):
    assert corpus.portuguese(n) == pt
    assert corpus.english(n) == en


def test_cardinals_agree_in_gender():
    assert corpus.portuguese(1, feminine=True) == "uma"
    assert corpus.portuguese(222, feminine=True) == "duzentas e vinte e duas"
    assert corpus.portuguese(102_101, feminine=True) == "cento e duas mil cento e uma"
    assert corpus.portuguese(100, feminine=True) == "cem"


@pytest.mark.parametrize("words", [corpus.portuguese, corpus.english])
def test_cardinals_differ_from_each_other(words):
    numbers = [*range(3000), *range(3000, 1_000_000, 97)]
    assert len({words(n) for n in numbers}) == len(numbers)


@pytest.mark.parametrize("words", [corpus.portuguese, corpus.english])
@pytest.mark.parametrize("n", [-1, 1_000_000])
def test_cardinals_out_of_range_raise(words, n):
    with pytest.raises(ValueError, match="n must be 0 to 999,999"):
        words(n)


def test_ordinals_and_years():
    wanted = {1: "first", 2: "second", 3: "third", 5: "fifth", 8: "eighth", 9: "ninth"}
    wanted |= {12: "twelfth", 20: "twentieth", 21: "twenty-first", 30: "thirtieth"}
    assert {n: corpus.ordinal(n) for n in wanted} == wanted
    years = {1900: "nineteen hundred", 1905: "nineteen oh five", 1998: "nineteen ninety-eight"}
    years |= {2000: "two thousand", 2026: "two thousand and twenty-six"}
    assert {year: corpus.english_year(year) for year in years} == years


@pytest.mark.parametrize(
    ("hour", "minute", "to_next", "pt", "en"),
    [
        (0, 0, False, "meia-noite", "midnight"),
        (12, 0, False, "meio-dia", "noon"),
        (12, 30, False, "meio-dia e meia", "half past noon"),
        (13, 15, False, "uma e quinze da tarde", "a quarter past one in the afternoon"),
        (2, 40, False, "duas e quarenta da madrugada", "two forty in the early morning"),
        (14, 45, True, "quinze para as três da tarde", "a quarter to three in the afternoon"),
        (23, 50, True, "dez para a meia-noite", "ten to midnight"),
        (11, 59, True, "um para o meio-dia", "one to noon"),
        (0, 35, True, "vinte e cinco para a uma da madrugada", None),
        (20, 0, False, "oito da noite", "eight o'clock at night"),
    ],
)
def test_clock(hour, minute, to_next, pt, en):
    found = corpus.clock(hour, minute, to_next)
    assert found[0] == pt
    assert en is None or found[1] == en


def test_money_agrees():
    pound, none = corpus.CURRENCIES[3]
    assert none is None
    assert pound.amount(202) == ("duzentas e duas libras", "two hundred and two pounds")
    real, centavo = corpus.CURRENCIES[0]
    assert real.amount(1) == ("um real", "one real")
    assert centavo.amount(2) == ("dois centavos", "two centavos")


@pytest.mark.parametrize(
    ("preposition", "det", "whole"),
    [
        ("em", "o", "no"),
        ("em", "as", "nas"),
        ("em", "um", "num"),
        ("em", "esta", "nesta"),
        ("em", "aquele", "naquele"),
        ("em", "nosso", "em nosso"),
        ("de", "a", "da"),
        ("de", "os", "dos"),
        ("de", "estes", "destes"),
        ("de", "um", "de um"),
        ("de", "minha", "de minha"),
    ],
)
def test_contractions(preposition, det, whole):
    assert sentences.contract(preposition, det) == whole


def test_noun_phrases_agree():
    rng = random.Random(0)
    (house,) = (noun for noun in sentences.THINGS if noun.one == "casa")
    seen = {
        sentences.noun_phrase(rng, (house,), sentences.INERT[:2], plural=plural).pt
        for plural in (False, True)
        for _ in range(300)
    }
    assert {"a casa", "as casas grandes", "uma casa pequena", "duas casas pequenas"} <= seen
    words = {word for phrase in seen for word in phrase.split()}
    assert not words & {"o", "os", "um", "uns", "este", "aqueles", "pequeno", "pequenos", "dois"}


def test_possession_and_apostrophes():
    rng = random.Random(0)
    found = [sentences._owned(rng)[1] for _ in range(500)]
    assert any("girls' " in text for text in found)
    assert any("children's " in text for text in found)
    assert not any("s's " in text or "childrens" in text for text in found)


SMALL = {"number": 300, "date": 200, "time": 200, "price": 200, "sentence": 300}


def test_split_is_disjoint_and_unambiguous():
    train, test = corpus.generate(train_pairs=SMALL, test_pairs=60)
    for category, count in SMALL.items():
        assert sum(pair.category == category for pair in train) == count
        assert sum(pair.category == category for pair in test) == 60
    assert not {pair.source for pair in train} & {pair.source for pair in test}
    answers: dict[str, str] = {}
    for pair in train + test:
        assert answers.setdefault(pair.source, pair.target) == pair.target


@pytest.mark.parametrize("category", list(corpus.CATEGORIES))
def test_no_value_is_on_both_sides(category):
    # The same value in other words (a time as "it is", or of a meeting) stays on its side.
    rng = random.Random(1)
    sides: dict[str, set[bool]] = {}
    texts: dict[str, set[str]] = {}
    for _ in range(3000):
        example = corpus.CATEGORIES[category](rng)
        sides.setdefault(example.value, set()).add(corpus.held_out(category, example.value))
        texts.setdefault(example.source, set()).add(example.value)
    assert all(len(side) == 1 for side in sides.values())
    assert all(len(values) == 1 for values in texts.values())  # so one text has one side
    share = np.mean([side == {True} for side in sides.values()])
    assert 0.05 < share < 0.16


def test_corpus_is_the_same_on_every_run():
    assert corpus.generate(train_pairs=SMALL) == corpus.generate(train_pairs=SMALL)
    assert corpus.held_out("number", "321") == corpus.held_out("number", "321")


# ------------------------------------------------------------------------------------- the loader


def test_reads_pairs_and_aligned_files(tmp_path):
    (tmp_path / "a.pt").write_text("um\n\ndois\r\ntrês\n", "utf-8")
    with gzip.open(tmp_path / "a.en.gz", "wt", encoding="utf-8") as file:
        file.write("one\n\ntwo\nthree\n")
    found = data.read_aligned(tmp_path / "a.pt", tmp_path / "a.en.gz")
    assert [pair[:2] for pair in found] == [("um", "one"), ("dois", "two"), ("três", "three")]

    anki = tmp_path / "por.tsv.gz"
    with gzip.open(anki, "wt", encoding="utf-8") as file:
        file.write("Go.\tVai.\tCC-BY 2.0\nHi.\tOi.\tCC-BY 2.0\n")
    assert [p[:2] for p in data.read_pairs(anki, (2, 1))] == [("Vai.", "Go."), ("Oi.", "Hi.")]


def _files(folder: Path) -> None:
    (folder / "three").write_text("a\nb\nc\n", "utf-8")
    (folder / "two").write_text("a\nb\n", "utf-8")
    (folder / "empty").write_text(" \n\n", "utf-8")
    (folder / "latin").write_bytes("um\nmaçã\n".encode("latin-1"))
    (folder / "plain.gz").write_bytes(b"not compressed")
    (folder / "one_column").write_text("a\tb\nonly\n", "utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "missing", "--target", "two"], "missing: no such file"),
        (["--pairs", "missing.tsv"], "missing.tsv: no such file"),
        (["--source", ".", "--target", "two"], ".: cannot be read (Is a directory)"),
        (["--source", "three", "--target", "two"], "three has 3 lines but two has 2;"),
        (["--source", "latin", "--target", "two"], "latin: line 2 is not UTF-8 (byte 0xe7);"),
        (["--source", "two", "--target", "empty"], "empty: empty"),
        (["--source", "plain.gz", "--target", "two"], "plain.gz: not a complete gzip file"),
        (["--pairs", "one_column"], "one_column: line 2 has 1 tab-separated columns"),
        (["--pairs", "one_column", "--columns", "1", "1"], "columns are two different numbers"),
        (["--pairs", "two", "--source", "two"], "--pairs and --source/--target"),
        (["--source", "two"], "--source and --target go together"),
        (["--test-source", "two", "--test-target", "two"], "--test-source needs --pairs or"),
        (["--source", "two", "--target", "two"], "2 pairs are too few"),
        (["translate"], "nothing to translate; give sentences"),
        (["translate", "um", "--model", "nowhere"], "nowhere: no saved model; train one first"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    _files(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert translate.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"translate.py: {message}")
    assert err.count("\n") == 1


def test_status_2_reaches_the_shell(tmp_path):
    script = str(EXPERIMENTS / "translate.py")
    command = [sys.executable, script, "--pairs", str(tmp_path / "missing.tsv")]
    environment = os.environ | {"PYTHONPATH": str(EXPERIMENTS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr == f"translate.py: {tmp_path}/missing.tsv: no such file\n"


def test_files_are_split_by_source_and_target():
    pairs = [data.Pair(f"fonte {i % 500}", f"text {i % 700}", "all") for i in range(2000)]
    split = data.split(pairs)
    assert split.train
    assert split.test
    for side in (0, 1):
        assert not {pair[side] for pair in split.train} & {pair[side] for pair in split.test}


def test_a_separate_test_set_is_taken_out_of_training():
    train = [data.Pair("a", "x", "all"), data.Pair("B", "y", "all"), data.Pair("c", "z", "all")]
    found = data.without(train, [data.Pair("b", "w", "all")])
    assert [pair.source for pair in found.train] == ["a", "c"]


# ------------------------------------------------------------------------- tokenizer and batches


@pytest.fixture(scope="module")
def small():
    train, test = corpus.generate(train_pairs=SMALL, test_pairs=20)
    return train, test, data.train_tokenizer(train, 600)


def test_tokenizer_gives_texts_back(small):
    train, test, tokenizer = small
    for pair in [*train[::50], *test, data.Pair("", "日本 €5 naïve", "all")]:
        (ids,) = data.encode_target(tokenizer, [pair.target])
        assert ids[0] == data.BOS
        assert ids[-1] == data.EOS
        assert data.decode_tokens(tokenizer, [*ids[1:], data.PAD, 77]) == pair.target
    (lower,), (upper,) = (data.encode_source(tokenizer, [t]) for t in ("três", "TRÊS"))
    np.testing.assert_array_equal(lower, upper)
    assert data.labels(tokenizer, lower.tolist())[-1] == "[END]"


def test_batches_cover_every_example_once_in_few_shapes(small):
    train, _, tokenizer = small
    sources = data.encode_source(tokenizer, [pair.source for pair in train])
    targets = data.encode_target(tokenizer, [pair.target for pair in train])
    longest = max(len(s) for s in sources)
    widths = data.bucket_widths([len(s) for s in sources], longest)
    assert len(widths) <= 3
    rows, shapes = [], set()
    widths = (*widths[:-1], 4 * ((max(longest, max(map(len, targets))) + 3) // 4))
    for batch in data.batches(sources, targets, widths, 512, np.random.default_rng(0)):
        shapes.add(batch.source.shape)
        for row, example in enumerate(batch.rows):
            if example < 0:
                assert not batch.source[row].any()
                assert not batch.target[row].any()
            else:
                rows.append(example)
                source = sources[example]
                np.testing.assert_array_equal(batch.source[row, : len(source)], source)
                assert not batch.source[row, len(source) :].any()
    assert sorted(rows) == list(range(len(train)))
    assert len(shapes) <= 3


# -------------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def tiny():
    model = transformer.Transformer(
        vocabulary=50, d_model=16, layers=1, heads=2, d_ff=32, dropout=0.1, attention_dropout=0.1
    )
    tokens = jnp.ones((1, 3), jnp.int32)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        params = jax.jit(model.init)(jax.random.key(0), tokens, tokens)["params"]
    return model, params


@scripts
def test_padding_and_later_tokens_are_not_felt(tiny):
    model, params = tiny
    logits = jax.jit(lambda s, t: model.apply({"params": params}, s, t))
    source, target = jnp.array([[5, 6, 7, 2]]), jnp.array([[1, 8, 9, 10]])
    found = logits(source, target)
    padded = logits(jnp.pad(source, ((0, 0), (0, 3))), jnp.pad(target, ((0, 0), (0, 2))))
    np.testing.assert_allclose(padded[:, :4], found, atol=1e-5)
    later = logits(source, target.at[0, 3].set(20))
    np.testing.assert_allclose(later[:, :3], found[:, :3], atol=1e-6)
    assert float(jnp.abs(later[:, 3] - found[:, 3]).max()) > 1e-3


@pytest.fixture(scope="module")
def search():
    return jax.jit(decoding.search, static_argnums=(0, 3, 4))


@scripts
def test_greedy_is_the_argmax_of_each_prefix(tiny, search):
    """Token by token from caches, and the same tokens without them."""
    model, params = tiny
    source = jnp.array([[5, 6, 2, 0], [7, 8, 9, 2], [0, 0, 0, 0]])
    found = np.asarray(search(model, params, source, 6, 1))
    assert found.shape == (3, 6)
    assert not found[2].any()  # an empty row is not translated
    logits = jax.jit(lambda target: model.apply({"params": params}, source, target))
    for i in range(6):
        prefix = np.pad(np.c_[[data.BOS] * 3, found[:, :i]], ((0, 0), (0, 5 - i)))
        likeliest = np.asarray(logits(jnp.asarray(prefix))[:, i].argmax(-1))
        for row in (0, 1):
            if data.EOS in found[row, :i]:
                assert found[row, i] == data.PAD
            else:
                assert found[row, i] == likeliest[row]
    anew = jax.jit(decoding.recomputed, static_argnums=(0, 3))(model, params, source, 6)
    np.testing.assert_array_equal(found, anew)


@scripts
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_enough_beams_find_the_best(tiny, search, penalty):
    """As many beams as words: every first word survives, so that no pair of words is missed."""
    model, params = tiny
    # Sharper than at random, so that beams matter.
    params = params | {"embedding": jax.tree.map(lambda p: p * 4, params["embedding"])}
    source = jnp.array([[5, 6, 2, 0]])
    found = np.asarray(search(model, params, source, 2, 50, penalty))[0]
    targets = jnp.stack([jnp.full(50, data.BOS), jnp.arange(50)], 1)
    logits = jax.jit(model.apply)({"params": params}, jnp.repeat(source, 50, 0), targets)
    gain = np.asarray(jax.nn.log_softmax(logits))
    best, words = -np.inf, None
    for first in range(50):
        for second in range(50):
            ended = first == data.EOS
            total = gain[0, 0, first] + (0 if ended else gain[first, 1, second])
            rank = total / ((5 + (1 if ended else 2)) / 6) ** penalty
            if rank > best:
                best, words = rank, (first, data.PAD if ended else second)
    assert tuple(found) == words


@scripts
@pytest.mark.parametrize("norm", everyday(["pre", "post"]))
def test_norms_and_bfloat16(norm):
    """Both places of the norm decode from caches as they train; 16 bits are near 32."""
    logits = {}
    tokens, target = jnp.array([[5, 6, 7, 2]]), jnp.array([[1, 8, 9, 10]])
    for dtype in (jnp.float32, jnp.bfloat16):
        model = transformer.Transformer(50, 16, 1, 2, 32, 0.0, 0.0, norm=norm, dtype=dtype)
        init = partial(model.init, jax.random.key(0), tokens, target)
        assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(jax.eval_shape(init)))
        if not logits:
            params = jax.jit(init)()["params"]
        logits[dtype] = jax.jit(model.apply)({"params": params}, tokens, target)
        assert logits[dtype].dtype == jnp.float32
        begin, proceed = (
            jax.jit(partial(model.apply, {"params": params}, method=method), static_argnums=static)
            for method, static in (("begin", (1, 2)), ("proceed", ()))
        )
        memories, caches = begin(tokens, 1, 4)
        for i in range(4):
            step, caches = proceed(target[:, i : i + 1], tokens, memories, caches)
            tolerance = 1e-5 if dtype == jnp.float32 else 0.1
            np.testing.assert_allclose(step, logits[dtype][:, i], atol=tolerance)
    np.testing.assert_allclose(logits[jnp.bfloat16], logits[jnp.float32], atol=0.2)


@scripts
def test_attention_maps_are_the_weights_of_the_library(tiny):
    model, params = tiny
    source, target = jnp.array([[5, 6, 7, 2, 0]]), jnp.array([[1, 8, 9]])
    maps = jax.jit(transformer.attention_maps, static_argnums=0)(model, params, source, target)
    assert maps.shape == (1, model.layers, 2, 3, 5)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    assert not maps[..., 4].any()


@scripts
def test_loss_is_the_smoothed_cross_entropy_without_padding():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    labels = jnp.array([[3, 4, 0], [1, 0, 0]])
    loss, accuracy = transformer.masked_loss_and_accuracy(logits, labels, 0.1)
    expected, right = [], []
    for i, j in ((0, 0), (0, 1), (1, 0)):
        wanted = np.full(5, 0.02)
        wanted[labels[i, j]] += 0.9
        expected.append(-np.sum(wanted * np.asarray(jax.nn.log_softmax(logits[i, j]))))
        right.append(int(logits[i, j].argmax()) == int(labels[i, j]))
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
    np.testing.assert_allclose(accuracy, np.mean(right), rtol=1e-5)


@scripts
def test_schedule_warms_up_then_falls_as_the_inverse_root():
    schedule = transformer.inverse_sqrt(64, warmup=100, factor=2.0)
    np.testing.assert_allclose(schedule(99), 2 * 64**-0.5 * 100**-0.5, rtol=1e-6)
    np.testing.assert_allclose(schedule(49) * 2, schedule(99), rtol=1e-6)
    np.testing.assert_allclose(schedule(399) * 2, schedule(99), rtol=1e-6)


def test_scores_and_bleu():
    test = [data.Pair("um", "one", "a"), data.Pair("dois", "two", "a"), data.Pair("três", "3", "b")]
    assert translate.scores(test, ["one", "too", "3"]) == {"a": (1, 2), "b": (1, 1)}
    text = "the old house is very big"
    assert translate.bleu([text], [text]).startswith("BLEU 100.0 (nrefs:1|")


def test_samples_say_that_mistakes_were_chosen(capsys):
    test = [data.Pair(str(n), f"right {n}", "number") for n in range(40)]
    found = [pair.target for pair in test]
    found[17] = "wrong"
    translate.show_samples(Console(), test, found, most=4)
    title, category, *samples = capsys.readouterr().out.strip().splitlines()
    assert title == "held-out samples, chosen so that mistakes come first (! is the right answer)"
    assert category == "number: 1 of 40 wrong"
    assert samples[:3] == ["  17", "  = wrong", "  ! right 17"]
    assert len(samples) == 9


def test_time_left_is_said_once_it_is_known(capsys):
    """Compilation, in the first steps and now and then later, is no pace of what is left."""
    seconds = {1: 25, 20: 75, 40: 85, 60: 95, 80: 105, 100: 115, 120: 145, 140: 155}
    report = Report(Console(), 700, None)
    said = {step: report.left({"step": step, "seconds": s}) for step, s in seconds.items()}
    assert [said[step] for step in (1, 20, 40)] == [None] * 3
    for step in (60, 80, 100, 120, 140):
        assert said[step] == (700 - step) * 0.5
    stops = Report(Console(), 700, 2)
    for step, s in seconds.items():
        left = stops.left({"step": step, "seconds": s})
    assert left == 0
    # A run that goes on begins with the steps of another.
    resumed = Report(Console(), 700, None)
    later = [resumed.left({"step": 300 + 20 * n, "seconds": 900 + 10 * n}) for n in range(4)]
    assert later == [None] * 3 + [340 * 0.5]
    report = Report(Console(), 700, None)
    report.update({"step": 1, "seconds": 25, "loss": 7.0, "tokens_per_second": 60})
    assert "left" not in capsys.readouterr().out


@pytest.mark.parametrize("script", [translate, language_model])
def test_help_names_the_verbs(script, capsys):
    verbs = {translate: ["translate"], language_model: ["sample", "packing", "context"]}[script]
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "--config" in out
    for verb in verbs:
        assert f"{script.__name__}.py {verb}" in out
        with pytest.raises(SystemExit):
            script.main([verb, "--help"])
        assert f"{script.__name__}.py {verb}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ a whole run


@pytest.fixture
def small_corpus(monkeypatch):
    small = dict.fromkeys(corpus.CATEGORIES, 120)
    monkeypatch.setattr(corpus, "generate", lambda generate=corpus.generate: generate(0, small, 12))
    # One width: most of these tests' time is compilation.
    monkeypatch.setattr(data, "bucket_widths", lambda lengths, longest: (28,))
    return ["--d-model", "16", "--d-ff", "32", "--layers", "1", "--heads", "2",
            "--batch-tokens", "512"]  # fmt: skip


# Every day the language model's run is stopped and goes on, by the same code.
@pytest.mark.deep
@scripts
def test_a_stopped_run_ends_as_one_that_was_not(tmp_path, monkeypatch, capsys, small_corpus):
    """Ctrl-C saves, a kill loses one interval at most, and --resume goes on: the same bits, dropout
    and data order included."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    stop, kill = [], []

    class Stopping(training.Report):
        def update(self, row):
            super().update(row)
            if stop and row["step"] == 1:
                signal.raise_signal(signal.SIGINT)
            if kill and row["step"] == 8:
                raise Killed

    class Killed(BaseException):
        """Ends a run as a kill does: whatever is not on disk is lost."""

    monkeypatch.setattr(training, "Report", Stopping)

    def run(name, *more):
        return translate.main(
            ["--out", str(tmp_path / name), "--steps", "13", *small_corpus, *more]
        )

    assert run("whole") == 0
    stop.append(True)
    assert run("parts") == 130
    assert "stopped after 2 steps, and saved" in capsys.readouterr().out
    assert not (tmp_path / "parts" / "model").exists()
    assert run("parts", "--resume", "--dropout", "0") == 2
    assert "cannot resume with other settings: --dropout was 0.1" in capsys.readouterr().err
    saved = str(tmp_path / "parts" / "config.json")
    assert translate.main(["--config", saved, "--resume"]) == 0
    stop.clear()
    kill.append(True)
    with pytest.raises(Killed):
        run("killed", "--save-every", "4")
    kept = (tmp_path / "killed" / "checkpoints").iterdir()
    assert [step.name for step in kept if step.is_dir()] == ["4"]
    kill.clear()
    assert run("killed", "--save-every", "4", "--resume") == 0
    names = "whole", "parts", "killed"
    ends = [(tmp_path / name / "model" / "params.msgpack").read_bytes() for name in names]
    assert ends[0] == ends[1] == ends[2]
    with (tmp_path / "parts" / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "13"]
    assert translate.main(["--config", str(tmp_path / "nowhere.json")]) == 2
    assert "nowhere.json: no such file" in capsys.readouterr().err


@scripts
def test_a_short_run_leaves_its_files_and_a_model_that_translates(tmp_path, capsys, small_corpus):
    """On all the devices there are, here eight."""
    arguments = ["--out", str(tmp_path), "--steps", "25", "--dropout", "0", *small_corpus]
    assert translate.main(arguments) == 0
    out = capsys.readouterr().out
    assert "step 25/25" in out
    assert "1 beam" in out
    assert "1 beams" not in out
    for category in corpus.CATEGORIES:
        assert category in out
    for name in ("loss.png", "attention.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert str(tmp_path / name) in out
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "20", "25"]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[-1]["held_out_loss"]) > 0

    model = ["--model", str(tmp_path / "model")]
    assert translate.main(["translate", "trezentos e vinte e um", "um", *model]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    assert translate.main(["translate", "um " * 500, *model]) == 2
    assert "sub-words; at most" in capsys.readouterr().err
