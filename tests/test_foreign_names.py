"""Names of other libraries get the spelling here for an answer."""

from __future__ import annotations

import importlib
import inspect
import re
from importlib import metadata
from typing import Any

import jax.numpy as jnp
import pytest

import jaxattn as ja
from jaxattn import masks, scores
from jaxattn.checks import foreign_names
from jaxattn.dispatch import BACKENDS

x = jnp.ones((1, 3, 2, 4))

KEYWORDS = {
    "is_causal": "masks.causal",
    "bias": "scores.bias",
    "attn_mask": "from_array",
    "softcap": "scores.soft_cap",
    "window": "masks.sliding_window",
    "sliding_window": "masks.sliding_window",
    "local_window_size": "masks.sliding_window",
    "dropout": "dropout_rate=",
    "dropout_p": "dropout_rate=",
    "segment_ids": "masks.segments",
    "key_padding_mask": "masks.key_padding",
    "mask_mod": "mask=",
    "score_mod": "score=",
    "block_mask": "mask=.*tile_map",
    "enable_gqa": "nothing",
    "implementation": "backend=",
}
CALLS = {
    "attention": lambda **names: ja.attention(x, x, x, **names),
    "attention_weights": lambda **names: ja.attention_weights(x, x, **names),
    "explain": lambda **names: ja.explain(x, x, x, **names),
}


@pytest.mark.parametrize("function", CALLS)
def test_keywords(function: str) -> None:
    for name, meant in KEYWORDS.items():
        with pytest.raises(
            TypeError, match=rf"^{function}\(\) got .*'{name}'; here it is .*{meant}"
        ):
            CALLS[function](**{name: None})


def test_the_twin_of_jax_nn_has_its_own() -> None:
    for name in KEYWORDS.keys() - inspect.signature(ja.dot_product_attention).parameters.keys():
        with pytest.raises(TypeError, match=rf"'{name}'; jaxattn.attention says it by"):
            ja.dot_product_attention(x, x, x, **{name: None})


def test_keywords_through_a_cache() -> None:
    cache = ja.KVCache.create(batch=1, capacity=4, heads=2, head_dim=4).append(x, x)
    with pytest.raises(TypeError, match=r"is_causal.*masks\.causal"):
        cache.attend(x, jnp.arange(3)[None], is_causal=True)


@pytest.mark.parametrize("function", CALLS)
def test_unknown_keywords_are_plain_errors(function: str) -> None:
    for name, near in {"maks": "mask", "scores": "score", "postions": "positions"}.items():
        with pytest.raises(TypeError, match=rf"argument '{name}'; did you mean '{near}'\?$"):
            CALLS[function](**{name: None})
    with pytest.raises(TypeError, match=r"argument 'zzz'$"):
        CALLS[function](zzz=1)


def test_positional_mask() -> None:
    with pytest.raises(TypeError, match=r"3 positional arguments \(query, key, value\).*as mask="):
        ja.attention(x, x, x, masks.causal())


def test_no_answer_is_for_a_name_that_exists() -> None:
    names = inspect.signature(ja.attention).parameters
    assert not foreign_names.KEYWORDS.keys() & names.keys()
    assert not foreign_names.BACKENDS.keys() & BACKENDS.keys()
    assert not [name for name in foreign_names.METHODS if hasattr(masks.causal(), name)]
    for module, table in (
        (ja, foreign_names._PACKAGE),
        (masks, foreign_names._MASKS),
        (scores, foreign_names._SCORES),
    ):
        assert not [name for name in table if name in module.__all__]


def test_answers_name_what_exists() -> None:
    """Every `masks.name` and `scores.name` that is said can be typed."""
    tables = [value for value in vars(foreign_names).values() if isinstance(value, dict)]
    said = " ".join(str(text) for table in tables for text in table.values())
    for module, name in re.findall(r"\b(masks|scores|jaxattn)\.([a-zA-Z]\w*)", said):
        owner = {"masks": masks, "scores": scores, "jaxattn": ja}[module]
        assert name in owner.__all__, f"{module}.{name}"
    for name in re.findall(r"\bmask\.(\w+)\(", said):
        assert hasattr(ja.Mask, name)


def test_signatures_are_not_hidden() -> None:
    for function in (ja.attention, ja.attention_weights, ja.dot_product_attention):
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds
        assert function.__doc__


@pytest.mark.usefixtures("own_errors")
def test_words_for_masks() -> None:
    for word, meant in {
        "causal": r"masks\.causal\(\)",
        "full": "masks.full",
        "no": "a Mask",
    }.items():
        with pytest.raises(TypeError, match=f"^mask: got '{word}', .*{meant}"):
            ja.attention(x, x, x, mask=word)
    with pytest.raises(TypeError, match=r"^&: got 'causal', say masks\.causal\(\)"):
        masks.full() & "causal"


@pytest.mark.usefixtures("own_errors")
def test_backends() -> None:
    for name, meant in {None: "'auto'", "xla": "'auto'", "flash": "'tiled'", "pallas": "'triton'",
                        "eager": "'dense'", "xla_chunked": "'tiled'"}.items():  # fmt: skip
        with pytest.raises(
            ValueError, match=rf"^backend: got {name!r}, expected .*; here it is .*{meant}"
        ):
            ja.attention(x, x, x, backend=name)
    for name in ("zzz", 3, ["dense"]):
        with pytest.raises(
            ValueError, match=r"^backend: got .*expected one of 'auto', 'dense'[^;]*$"
        ):
            ja.attention(x, x, x, backend=name)
    with pytest.raises(ValueError, match=r"^implementation: got 'flash', expected .*'auto'"):
        ja.dot_product_attention(x, x, x, implementation="flash")


@pytest.mark.parametrize(
    ("owner", "name", "meant"),
    [
        (masks, "causal_lower_right", r"masks\.causal\(S - T\)"),
        (masks, "and_masks", "a & b"),
        (masks, "or_masks", r"a \| b"),
        (masks, "create_block_mask", "tile_map"),
        (masks, "alibi", r"jaxattn\.scores\.alibi"),
        (scores, "softcap", "scores.soft_cap"),
        (scores, "causal", r"jaxattn\.masks\.causal"),
        (ja, "flex_attention", "jaxattn.attention"),
        (ja, "create_block_mask", "tile_map"),
        (ja, "and_masks", "a & b"),
        (ja, "causal", r"jaxattn\.masks\.causal"),
        (ja, "soft_cap", r"jaxattn\.scores\.soft_cap"),
        (masks.causal(), "to_dense", r"mask\.dense\(T, S\)"),
        (masks.causal() & masks.full(), "materialize", r"mask\.dense\(T, S\)"),
    ],
)
def test_attributes(owner: Any, name: str, meant: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}'; here it is .*{meant}"):
        getattr(owner, name)


def test_other_attributes_are_plain_errors() -> None:
    for owner in (ja, masks, scores, masks.causal()):
        with pytest.raises(AttributeError, match=r"no attribute 'zzz'$"):
            owner.zzz  # noqa: B018
        assert not hasattr(owner, "zzz")
    assert not hasattr(masks.causal(), "shape")


# --- the package itself ---------------------------------------------------------------------------


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", ja.__version__)
    assert metadata.version("jaxattn") == ja.__version__


def test_dir_has_public_names_alone() -> None:
    names = {name for name in dir(ja) if not name.startswith("__")}
    assert names == set(ja.__all__)
    assert {"masks", "scores", "nn", "testing"} <= names
    assert "__version__" in dir(ja)


def test_internal_modules_can_be_imported_all_the_same() -> None:
    assert importlib.import_module("jaxattn.masks.mask") is ja.masks.mask
    assert ja.backends.base
    from jaxattn.tiles import tile_map

    assert tile_map.TileMap is ja.TileMap
