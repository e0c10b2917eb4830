"""The sentence encoder: against NumPy written out, padded and packed; its files; the command."""

from __future__ import annotations

import io
import json
import math
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from cases import rng
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import bert
import compare_models
import embed
import packing
import weights
from data import DataError

pytestmark = pytest.mark.usefixtures("as_users_run")

WORDS = [
    *("a", "the", "cat", "dog", "kitten", "sleeps", "runs", "market", "fell", "on", "sofa"),
    *("street", "in", "##s", "un", "##seen"),
]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
D, LAYERS, HEADS, F, P, LONGEST = 8, 2, 2, 12, 40, 24
EPSILON = 1e-12


# --- a tiny model in the files of a real one --------------------------------------------------------


def settings() -> dict[str, Any]:
    steps = [{"type": f"sentence_transformers.models.{s}"} for s in bert._STEPS]
    return {
        "config.json": {
            "model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute",
            "vocab_size": len(VOCABULARY), "hidden_size": D, "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS, "intermediate_size": F, "max_position_embeddings": P,
            "type_vocab_size": 2, "layer_norm_eps": EPSILON,
        },
        "modules.json": steps,
        "1_Pooling/config.json": {
            "word_embedding_dimension": D, "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
        },
        "sentence_bert_config.json": {"max_seq_length": LONGEST, "do_lower_case": False},
    }  # fmt: skip


def tensors() -> dict[str, np.ndarray]:
    make = rng(131)
    shapes = {
        "embeddings.word_embeddings.weight": (len(VOCABULARY), D),
        "embeddings.position_embeddings.weight": (P, D),
        "embeddings.token_type_embeddings.weight": (2, D),
        "embeddings.LayerNorm.weight": (D,),
        "embeddings.LayerNorm.bias": (D,),
        "pooler.dense.weight": (D, D),
        "pooler.dense.bias": (D,),
    }
    for i in range(LAYERS):
        for name, to, of in (
            ("attention.self.query", D, D), ("attention.self.key", D, D),
            ("attention.self.value", D, D), ("attention.output.dense", D, D),
            ("intermediate.dense", F, D), ("output.dense", D, F),
        ):  # fmt: skip
            shapes |= {f"encoder.layer.{i}.{name}.weight": (to, of)}
            shapes |= {f"encoder.layer.{i}.{name}.bias": (to,)}
        for name in ("attention.output", "output"):
            shapes |= {f"encoder.layer.{i}.{name}.LayerNorm.{p}": (D,) for p in ("weight", "bias")}
    found = {name: make.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {"embeddings.position_ids": np.arange(P)[None]}


def tokenizer() -> Tokenizer:
    """With the padding and the truncation that the real one has, which the loader replaces."""
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_padding(length=16)
    made.enable_truncation(16)
    return made


def archive(path: Path, **changed: Any) -> Path:
    """The archive, with other contents of some files; those of None are left out."""
    files = {name: json.dumps(value).encode() for name, value in settings().items()}
    files["tokenizer.json"] = tokenizer().to_str().encode()
    files["model.safetensors"] = safetensors.numpy.save(tensors())
    with zipfile.ZipFile(path, "w") as made:
        for name, raw in (files | changed).items():
            if raw is not None:
                made.writestr(name, raw)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: Any) -> Path:
    return archive(tmp_path_factory.mktemp("model") / "model.zip")


@pytest.fixture(scope="module")
def encoder(path: Path) -> embed.Encoder:
    return embed.Encoder(path)


def written_out(ids: np.ndarray) -> np.ndarray:
    """The embedding of one text, in float64."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors().items()}

    def norm(at: str, x: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)
        return x * w[f"{at}.LayerNorm.weight"] + w[f"{at}.LayerNorm.bias"]

    def linear(at: str, x: Any) -> Any:
        return x @ w[f"{at}.weight"].T + w[f"{at}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm("embeddings", x + w["embeddings.token_type_embeddings.weight"][0])
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        q, k, v = (
            linear(f"{at}.attention.self.{name}", x).reshape(len(ids), HEADS, D // HEADS)
            for name in ("query", "key", "value")
        )
        logits = np.einsum("qnh,knh->nqk", q, k) / math.sqrt(D // HEADS)
        e = np.exp(logits - logits.max(-1, keepdims=True))
        seen = np.einsum("nqk,knh->qnh", e / e.sum(-1, keepdims=True), v).reshape(len(ids), D)
        x = norm(f"{at}.attention.output", x + linear(f"{at}.attention.output.dense", seen))
        hidden = linear(f"{at}.intermediate.dense", x)
        hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
        x = norm(f"{at}.output", x + linear(f"{at}.output.dense", hidden))
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def some_texts(count: int, seed: int = 0) -> list[str]:
    make = rng(137, seed)
    plain = [word for word in WORDS if not word.startswith("##")]
    return [" ".join(make.choice(plain, make.integers(0, LONGEST - 1))) for _ in range(count)]


# --- the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [*embed.WAYS, "in order"])
def test_embeddings_are_those_written_out(encoder: embed.Encoder, way: Any) -> None:
    """Whatever shares a text's row or batch."""
    texts, cut = encoder.tokens(some_texts(60))
    assert not cut
    lengths = [len(text) for text in texts]
    assert min(lengths) < 4
    assert max(lengths) > LONGEST - 4
    made = embed.padded(lengths, True) if way == "in order" else embed.batches(way, lengths)
    assert sorted(i for b in made for row in b.rows for i in row) == list(range(60))
    found = encoder.embed(texts, made)
    np.testing.assert_allclose(found, [written_out(text) for text in texts], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_a_row_alone_is_a_text(encoder: embed.Encoder) -> None:
    """Without mask and places, a row is one text."""
    (text,), _ = encoder.tokens(["the unseen cats sleeps"])
    assert text.tolist() == [2, 5, 18, 19, 6, 17, 9, 3]
    model = bert.nnx.merge(encoder.graph, encoder.params)
    mean = np.asarray(model(text[None]))[0].mean(0)
    np.testing.assert_allclose(mean / np.linalg.norm(mean), written_out(text), atol=1e-5)


def test_new_lengths_compile_nothing(encoder: embed.Encoder, compilations: Any) -> None:
    def run(count: int, seed: int, way: Any) -> None:
        texts, _ = encoder.tokens(some_texts(count, seed))
        encoder.embed(texts, embed.batches(way, [len(text) for text in texts]))

    for way, counts in (("packed", (1, 3, 4)), ("padded", (600, 601, 700))):
        run(counts[0], 1, way)
        compilations.reset()
        for seed, count in enumerate(counts[1:], 2):
            run(count, seed, way)
        assert compilations.count == 0


def test_rows_are_full_and_batches_alike() -> None:
    """Best fit leaves little room, and few shapes are compiled."""
    lengths = (2 + np.minimum(rng(139).exponential(40, 3000), 254)).astype(int).tolist()
    rows = packing.fitted(lengths, 256)
    assert sorted(i for row in rows for i in row) == list(range(3000))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 256
    assert 256 * len(rows) < 1.02 * sum(lengths)
    for way, most in (("packed", 0.06), ("padded", 0.25)):
        made = embed.batches(way, lengths)
        assert embed.padding(made, lengths) < most
        assert len({(len(b.rows), b.width) for b in made}) <= len(embed.WIDTHS)
        for b in made:
            assert max(sum(lengths[i] for i in row) for row in b.rows) <= b.width
            assert max(map(len, b.rows)) <= b.most


# --- files ------------------------------------------------------------------------------------------


def changed(file: str, **values: Any) -> dict[str, bytes]:
    return {file: json.dumps(settings()[file] | values).encode()}


def without(name: str) -> dict[str, bytes]:
    kept = {n: tensor for n, tensor in tensors().items() if n != name}
    return {"model.safetensors": safetensors.numpy.save(kept)}


def more(**given: np.ndarray) -> dict[str, bytes]:
    return {"model.safetensors": safetensors.numpy.save(tensors() | given)}


KEY = "encoder.layer.1.attention.self.key.bias"
STEPS = settings()["modules.json"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (lambda: without(KEY), f"no tensor '{KEY}'; this is the file of another model"),
        (lambda: more(**{KEY: np.zeros(3, np.float32)}), f"{KEY} has shape \\[3\\], expected \\[8\\]"),
        (lambda: more(other=np.zeros(1)), "1 tensors have no place in the model: other"),
        (lambda: {"model.safetensors": safetensors.numpy.save(tensors())[:-9]},
         "not a whole safetensors file .*; download it again"),
        (lambda: {"model.safetensors": None}, "no item named 'model.safetensors'"),
        (lambda: {"config.json": b"{"}, "config.json: no JSON"),
        (lambda: {"tokenizer.json": b"{}"}, "tokenizer.json can't be read"),
        (lambda: changed("config.json", model_type="roberta"),
         "model_type is 'roberta', expected 'bert'"),
        (lambda: changed("config.json", hidden_act="gelu_new"),
         "hidden_act is 'gelu_new', expected 'gelu'"),
        (lambda: changed("config.json", position_embedding_type="relative_key"),
         "position_embedding_type is 'relative_key', expected 'absolute'"),
        (lambda: changed("config.json", num_attention_heads=3), "3 heads do not divide 8 features"),
        (lambda: changed("config.json", vocab_size=9), "the tokenizer has 20 tokens, .* of 9"),
        (lambda: {"config.json": b'{"model_type": "bert"}'}, "config.json lacks vocab_size"),
        (lambda: changed("1_Pooling/config.json", pooling_mode_cls_token=True),
         "the pooling is pooling_mode_cls_token, pooling_mode_mean_tokens, expected"),
        (lambda: {"modules.json": json.dumps(STEPS[:2]).encode()},
         "the steps are Transformer, Pooling, expected Transformer, Pooling, Normalize"),
        (lambda: changed("sentence_bert_config.json", max_seq_length=41),
         "max_seq_length is 41, expected 3 to 40"),
        (lambda: changed("sentence_bert_config.json", do_lower_case=True), "do_lower_case is true"),
    ],
)  # fmt: skip
def test_other_models_and_broken_files_are_refused(
    files: Callable[[], dict[str, Any]], says: str, tmp_path: Path
) -> None:
    given = archive(tmp_path / "model.zip", **files())
    with pytest.raises(DataError, match=says) as error:
        bert.load(given)
    assert str(error.value).startswith(str(given))
    assert "\n" not in str(error.value)


def test_broken_archives_are_refused(path: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.zip"
    half.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="not a whole zip file"):
        bert.load(half)
    with pytest.raises(DataError, match="no such file"):
        bert.load(tmp_path / "none.zip")


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture
def run(path: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = embed.main([*arguments, "--model", str(path)])
        return status, *capsys.readouterr()

    return run


def test_a_file_becomes_embeddings(run: Any, encoder: embed.Encoder) -> None:
    """Row n is line n, empty lines and lines that are too long included."""
    long = " ".join(["cat"] * 40)
    Path("in.txt").write_text(f"the cat sleeps\n\n  {long} \nthe dog runs\n")
    for way in embed.WAYS:
        status, out, err = run("in.txt", "--out", "new/out.npy", "--rows", way)
        assert (status, out) == (0, "")
        assert "1 empty lines, whose rows are 0" in err
        assert "1 sentences are longer than 24 tokens, and are cut; the first is line 3" in err
        assert "new/out.npy: 4 x 8, float32" in err
        found = np.load("new/out.npy")
        texts, _ = encoder.tokens(["the cat sleeps", long, "the dog runs"])
        assert len(texts[1]) == LONGEST
        np.testing.assert_allclose(found[[0, 2, 3]], [written_out(t) for t in texts], atol=1e-5)
        np.testing.assert_array_equal(found[1], 0)


def test_a_query_finds_the_nearest(run: Any) -> None:
    lines = "the cat sleeps\n\na market fell\nthe kitten runs on the street\n"
    status, out, err = run("--query", "A market fell", "--top", "2", stdin=lines.encode())
    assert status == 0
    first, second = out.splitlines()
    assert first == "1.0000  a market fell"
    assert second.split("  ")[1] in lines.split("\n")
    assert "3 sentences of" in err
    assert not list(Path().iterdir())


def test_a_terminal_shows_a_bar(run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(embed, "Console", partial(embed.Console, force_terminal=True))
    Path("in.txt").write_text("the cat\n" * 3)
    status, out, err = run("in.txt", "--query", "a cat", "--top", "1")
    assert (status, out.count("\n")) == (0, 1)
    assert "3/3" in err
    assert "a second" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.txt"], "none.txt: no such file"),
        (["empty.txt"], "empty.txt: empty"),
        (["latin.txt"], "latin.txt: line 1 is not UTF-8"),
        (["."], ".: cannot be read"),
        ([], "standard input: empty"),
        (["one.txt", "--out", "."], ".: a folder; give the name of a .npy file"),
        (["one.txt", "--out", "one.txt/out.npy"], "one.txt/out.npy: cannot be written"),
        (["one.txt", "--query", " "], "--query is empty"),
        (["one.txt", "--query", "a", "--top", "0"], "--top 0: expected 1 or more"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(run: Any, arguments: list[str], says: str) -> None:
    Path("one.txt").write_text("the cat")
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes(b"caf\xe9")
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"embed.py: {says}")
    assert err.count("\n") == 1


def test_ctrl_c_ends_with_status_130(run: Any, monkeypatch: Any) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bert, "embed", stopped)
    assert run("--query", "a", stdin=b"a")[0] == 130


def test_ways_are_measured(run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(embed, "docstrings", lambda count: some_texts(count))
    status, out, _ = run("measure", "--texts", "20", "--repeats", "1")
    assert status == 0
    for way in ("padded, as they come", "padded, by length", "packed"):
        assert way.split(",")[0] in out


def test_docstrings_are_lines(monkeypatch: Any) -> None:
    library = packing.standard_library()
    monkeypatch.setattr(
        packing, "standard_library", lambda: [p for p in library if p.name == "textwrap.py"]
    )
    found = embed.docstrings(100)
    assert "Text wrapping and filling." in found
    assert all("\n" not in text for text in found)
    assert embed.docstrings(3) == found[:3]


# --- the comparison ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "status"), [(0.0, 0), (1e-4, 1)])
def test_a_peer_with_other_numbers_is_an_error(
    path: Path, error: float, status: int, monkeypatch: Any, capsys: Any
) -> None:
    """A stand-in for transformers answers with the numbers written out."""
    ours = embed.Encoder(path)

    class Peer:
        def __init__(self, folder: Path, library: str) -> None:
            assert library == "transformers"
            self.folder = folder

        def __enter__(self) -> Peer:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def ask(self, do: str, **request: Any) -> dict[str, Any]:
            if do == "load_encoder":
                assert (Path(request["folder"]) / "model.safetensors").exists()
                return {"name": "PyTorch 0.0"}
            texts, _ = ours.tokens(json.loads(Path(request["texts"]).read_text()))
            if request.get("out"):
                np.save(request["out"], [written_out(text) + error for text in texts])
            return {"seconds": 1.0, "tokens": 2 * sum(map(len, texts))}

    monkeypatch.setattr(compare_models, "Peer", Peer)
    monkeypatch.setattr(weights, "installed", lambda *_: path)
    monkeypatch.setattr(embed, "docstrings", lambda count: some_texts(count))
    sizes = [
        "--only",
        "encoder",
        "--encoder.compared",
        "20",
        "--encoder.timed",
        "30",
        "--encoder.repeats",
        "1",
    ]
    assert compare_models.main(sizes) == status
    out, err = capsys.readouterr()
    assert "packed: embeddings of 20 texts differ by at most" in out
    assert "50%" in out
    assert err.count("\n") == status


def test_without_peers_one_line_says_how_to_install_them(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(compare_models, "PEERS_PYTHON", Path("none"))
    assert compare_models.main([]) == 2
    assert capsys.readouterr().err == "compare_models.py: no .venv-peers; run: make peers\n"
