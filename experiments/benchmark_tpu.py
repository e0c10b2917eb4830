"""Masked attention on one TPU: checks that the kernels are right, then measures their speed.

    python experiments/benchmark.py --suite tpu               # the most important, in 10 minutes
    python experiments/benchmark.py --suite tpu --tpu.resume  # the next ones
    python experiments/benchmark_tpu.py --tune --masks causal --lengths 8192 --contestants tpu
    python experiments/benchmark_tpu.py --device cpu --lengths 128 --matmul 256 ...   # a rehearsal

Needs JAX for TPUs (`pip install "jax[tpu]"`), NumPy, and tyro for options. The suite is that of
`benchmark_gpu.py`, with JAX's splash attention among the peers. A TPU belongs to one process, which
runs all contestants, one after the other. It is killed when a compilation or a measurement takes
too long, and another process goes on. What is compiled is kept in a folder until the run ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from benchmark_gpu import HERE, GpuConfig, Mask, start


@dataclass
class TpuConfig(GpuConfig):
    """What the TPU suite measures."""

    masks: tuple[Mask, ...] = ("causal", "full", "window", "documents", "prefix")
    lengths: tuple[int, ...] = (8192, 32768, 2048, 16384, 4096)
    contestants: tuple[str, ...] = ("tpu", "splash", "jax.nn", "tiled")
    batch: int = 1
    heads: int = 8
    head_dims: tuple[int, ...] = (128, 64)
    most_dense: float = 9e9  # about half of the memory of a v5e
    minutes: float = 10.0
    timeout: float = 60.0  # seconds for a compilation; for a measurement a third
    group: int = 1
    compiling: float = 0.25  # one contestant after the other
    tiles: tuple[int, ...] = (256, 512, 1024)
    device: Literal["gpu", "tpu", "cpu"] = "tpu"
    output: Path = HERE / "results" / "benchmark-tpu.json"

    together: ClassVar[bool] = True


if __name__ == "__main__":
    start(TpuConfig, __doc__)
