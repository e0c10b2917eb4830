"""The explorer's cells are those of the library."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import gallery
import javascript

AT = "const at = (a, i) => a[Math.min(Math.max(i, 0), a.length - 1)];"


@pytest.mark.skipif(shutil.which("node") is None, reason="install node (Debian: nodejs)")
@pytest.mark.usefixtures("own_errors")
def test_the_translation_of_every_mask_is_its_dense_array() -> None:
    T, expected, asked = 16, {}, []
    for name, entry in gallery.GALLERY.items():
        mask = entry.make(T)
        leaves, tree = jax.tree.flatten(mask)
        values = [jnp.asarray(leaf) for leaf in leaves]
        code = javascript.javascript(
            lambda *p, tree=tree: jax.tree.unflatten(tree, p), values, name
        )
        given = json.dumps([np.asarray(v).tolist() for v in values])
        asked.append(f"{json.dumps(name)}: cells({code}, {given})")
        expected[name] = np.asarray(mask.dense(T, T)[0, 0])
    program = f"""{AT}
    const cells = (f, p) => Array.from({{length: {T * T}}},
      (_, i) => f(0, 0, Math.floor(i / {T}), i % {T}, p));
    console.log(JSON.stringify({{{", ".join(asked)}}}));"""
    out = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    found = json.loads(out.stdout)
    for name, cells in expected.items():
        np.testing.assert_array_equal(np.reshape(found[name], (T, T)), cells, err_msg=name)


def test_an_operation_without_a_translation_is_named() -> None:
    with pytest.raises(NotImplementedError, match="odd: got the operation population_count"):
        javascript.javascript(lambda: lambda b, h, q, k: jax.lax.population_count(q) > k, [], "odd")
