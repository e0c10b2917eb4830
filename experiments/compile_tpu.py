"""Compiles the kernels for TPUs that are not here, to find what lowering cannot find.

    make compile-tpu                              # v5e and v6e
    make compile-tpu ARGS="v5p --schedule"

Prints the seconds of each case, forward and backward together, and the memory of its temporary
arrays. Cases of long rows fail if they need much memory. With `--schedule` also what the compiler
says of a step of each kernel: the vector memory beside arrays that it keeps there whole, as it does
with short rows, the instructions, of which one is issued a cycle, and the share of the matrix
units' slots that are filled. The steps of a PARTIAL and of a FULL tile are both in it, one after
the other. The exit status is 1 if a case fails.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

# Set before JAX is imported: there is no TPU to look for.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import jax
import jax.numpy as jnp
import tyro
from compile_cases import Case, T, arguments, cases, gradients
from jax.experimental import topologies

from jaxattn import masks

Kind = Literal["v5e", "v5p", "v6e"]
TOPOLOGIES: dict[Kind, str] = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@dataclass(frozen=True)
class Config:
    """Compile every kernel for TPUs that are not here."""

    kinds: Annotated[tuple[Literal["v5e", "v5p", "v6e"], ...], tyro.conf.Positional] = (
        "v5e",
        "v6e",
    )
    schedule: bool = False
    """What the compiler says of a step; takes three times as long."""


class Kernel(NamedTuple):
    """What the compiler says of a kernel.

    Attributes:
      name: of the kernel.
      memory: bytes of vector memory.
      instructions: of the schedule, each of several operations at once.
      busy: the share of the matrix units' slots that are filled.
    """

    name: str
    memory: int
    instructions: int
    busy: float

    def __str__(self) -> str:
        memory = f"{self.memory / 2**20:.1f} MB"
        return f"{self.name} {memory}, {self.instructions} instructions, {self.busy:.0%} busy"


# Temporary arrays of a case of long rows, in sizes of its inputs.
MOST = 6.0


def long_rows() -> Iterator[Case]:
    """Rows that no array of fits into a core's memory."""
    wide = [(64, jnp.bfloat16), (128, jnp.bfloat16), (256, jnp.bfloat16), (128, jnp.float32)]
    for H, dtype in wide:
        yield Case("causal", H, dtype, {"mask": masks.causal()}, extents=(2, 65536))
    # Each batch row has a mask of its own: as many steps as one call takes.
    rows, length = 3, 131072
    ids = jnp.zeros((rows, length), jnp.int32)
    options = {"mask": masks.causal() & masks.segments(ids)}
    yield Case("documents", 128, jnp.bfloat16, options, extents=(rows, length))


def compile_for(device: jax.Device, case: Case) -> jax.stages.Compiled:
    """Compiles a case; raises the compiler's errors."""
    kind = jax.sharding.AbstractDevice(
        device_kind=device.device_kind, num_cores=None, platform="tpu"
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(gradients(case)).trace(*arguments(case, device))
    return traced.lower(lowering_platforms=("tpu",)).compile()


def scheduled(folder: Path) -> list[Kernel]:
    """What the compiler wrote into a folder of the kernels since the last call."""
    found = {}
    for path in folder.glob("*jaxattn_*-final_hlo-static-per-bundle-utilization.txt"):
        name = re.search(r"jaxattn_([a-z]+)", path.name)
        assert name is not None
        start = path.name.split(name[0])[0] + name[0]
        (used,) = folder.glob(f"{start}*-pre-finalize-registers-and-allocations.txt")
        sizes = re.findall(r"space=vmem, size = (0x[0-9a-f]+), scoped", used.read_text())
        lines = [line.split() for line in path.read_text().splitlines()]
        most, *rows = [[int(n) for n in line] for line in lines if line and line[0].isdigit()]
        busy = sum(row[0] for row in rows) / (most[0] * len(rows))
        memory = sum(int(size, 16) for size in sizes)
        found[name[1]] = Kernel(name[1], memory, len(rows), busy)
    for made in folder.iterdir():
        made.unlink()
    return [found[name] for name in sorted(found)]


def main(config: Config) -> int:
    """Compiles every case for each kind of TPU; returns the number of cases that failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        if config.schedule:
            # Read when the compiler is loaded.
            dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            os.environ["LIBTPU_INIT_ARGS"] = dump
        for kind in config.kinds:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[kind])
            for case in (*cases(), *long_rows()):
                if case.backend == "triton":
                    failed += not reported(kind, topology.devices[0], case._replace(backend="tpu"))
                for kernel in scheduled(Path(folder)):
                    print(f"    {kernel}", flush=True)
    return failed


def reported(kind: str, device: jax.Device, case: Case) -> bool:
    """Compiles a case, prints how that went, and returns whether it did."""
    dtype, length = jnp.dtype(case.dtype).name, case.extents[1]
    name = f"{kind}: {case.name}, {dtype}, head dimension {case.H}, T = {length}"
    start = time.perf_counter()
    try:
        memory = compile_for(device, case).memory_analysis()
        assert memory is not None
        times = memory.temp_size_in_bytes / memory.argument_size_in_bytes
        much = case.extents[1] > T and times > MOST
        found = f"{'FAILED' if much else 'ok'}: memory of {times:.1f} times its inputs"
    except jax.errors.JaxRuntimeError as error:
        found = f"FAILED: {str(error).splitlines()[0][:100]}"
    print(f"{name:74} {time.perf_counter() - start:5.1f} s  {found}", flush=True)
    return found.startswith("ok")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)) > 0)
