"""Compiles a ring over eight devices that are not here, and shows what hides what is sent.

    make compile-parallel                   # eight TPUs v5e
    make compile-parallel ARGS=h100         # eight H100s

XLA's scheduler puts the start and the end of every transfer in order with what is computed. A
transfer is hidden if the computation of a part lies between them. The exit status is 1 if one in a
loop is not: all steps but the first and the last are in loops. Nothing is left that could hide the
gradients' last step home.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

# Set before JAX is imported: there is no accelerator to look for here.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from jaxattn import masks, parallel

# What hides a transfer: the computation of a part, under its condition, or the loop in it.
COMPUTATION = ("conditional", "while")


@dataclass(frozen=True)
class Config:
    """Compile forward and backward of one causal layer over eight devices."""

    device: Annotated[Literal["v5e", "h100"], tyro.conf.Positional] = "v5e"
    tokens: int = 8192
    heads: int = 8
    kv_heads: int = 2
    width: int = 128


class Transfer(NamedTuple):
    """A transfer: the computation that it is in, its name, and what is computed meanwhile."""

    place: str
    name: str
    meanwhile: tuple[str, ...]


def devices(kind: str) -> np.ndarray:
    """Eight devices that are described to the compiler."""
    if kind == "v5e":
        found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    else:
        # Imported here: it sets up the assembler for all that follows.
        from compile_gpu import H100

        found = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x8")
    return np.array(found.devices)


def compiled(config: Config) -> str:
    """The scheduled program, as text."""
    mesh = Mesh(devices(config.device), ("seq",))
    split = P(None, "seq")

    def local(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return parallel.attention(
            query, key, value, mask=masks.causal(), schedule="ring", backend="tiled"
        )

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        run = jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split)
        return (run(query, key, value).astype(jnp.float32) ** 2).sum()

    def shape(heads: int) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, split)
        return jax.ShapeDtypeStruct(
            (1, config.tokens, heads, config.width), jnp.bfloat16, sharding=where
        )

    args = (shape(config.heads), shape(config.kv_heads), shape(config.kv_heads))
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile().as_text()
    assert text is not None
    return text


def transfers(text: str) -> list[Transfer]:
    """Every transfer of floats, in the order of the schedule."""
    found = []
    for block in text.split("\n\n"):
        head = re.match(r"\s*(ENTRY )?%?([\w.\-]+)", block)
        place = "the program" if head and head.group(1) else "a loop"
        started: dict[str, list[str]] = {}
        for line in block.splitlines():
            step = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(", line)
            if step is None:
                continue
            name, dtype, op = step.groups()
            if op.startswith("collective-permute") and "pred" in dtype:
                continue
            if op == "collective-permute-start":
                started[name] = []
            elif op == "collective-permute-done":
                ended = [n for n in started if re.search(rf"\b{re.escape(n)}\)", line)]
                found += [Transfer(place, n, tuple(started.pop(n))) for n in ended]
            elif op == "collective-permute":
                found.append(Transfer(place, name, ()))
            elif op in COMPUTATION:
                for seen in started.values():
                    seen.append(op)
    return found


def main(config: Config) -> int:
    """Prints a table; returns the number of transfers in loops that are not hidden."""
    table = Table("transfer", "in", "computed meanwhile", title=f"ring, 8 x {config.device}")
    found = transfers(compiled(config))
    for each in found:
        said = ", ".join(sorted(set(each.meanwhile))) or "nothing"
        table.add_row(each.name, each.place, said)
    Console().print(table)
    inside = [each for each in found if each.place == "a loop"]
    exposed = [each for each in inside if not each.meanwhile]
    print(f"in loops {len(inside) - len(exposed)} of {len(inside)} transfers are hidden")
    return len(exposed) + (not inside)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)) > 0)
