"""Compiles the kernels for an H100 on a machine without a GPU, to find what lowering cannot find.

    make compile-gpu

Prints the seconds of each case, forward and backward together. The exit status is 1 if a case does
not compile because it needs too much shared memory, or too many registers. The assembler reports on
stderr what Triton's kernels spill; what Mosaic's kernels spill is printed beside the case.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Set before JAX is imported. There is no GPU to look for, and no cuDNN to check. The assembler runs
# as a program of its own, which reports what it spills; the one in the library does not.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0")
ASSEMBLER = Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cuda_nvcc")
for found in ASSEMBLER:
    os.environ["PATH"] = f"{found / 'bin'}:{os.environ['PATH']}"
    os.environ["XLA_FLAGS"] = (
        "--xla_gpu_enable_libnvptxcompiler=false --xla_gpu_enable_libnvjitlink=false "
        f"--xla_gpu_cuda_data_dir={found}"
    )

# Mosaic compiles its kernels itself, and writes the results into this folder.
DUMP = tempfile.TemporaryDirectory()
os.environ["MOSAIC_GPU_DUMP_TO"] = DUMP.name

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from compile_cases import Case, arguments, cases, gradients  # noqa: E402
from jax.experimental import topologies  # noqa: E402

KIND = "NVIDIA H100 80GB HBM3"
# The properties of an H100 as NVIDIA and CUDA give them; the compiler needs no others.
H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{KIND}"
"""


def compile_for(device: Any, case: Case) -> None:
    """Compiles a case; raises the compiler's errors."""
    described = jax.sharding.AbstractDevice(device_kind=KIND, num_cores=None, platform="cuda")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=described)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(gradients(case)).trace(*arguments(case, device))
    options = {"xla_gpu_fail_ptx_compilation_on_register_spilling": case.fits}
    traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=options)


def spilled() -> int:
    """Bytes that Mosaic's kernels spilled since the last call."""
    total = 0
    for code in Path(DUMP.name).glob("*.ptx"):
        asked = ["ptxas", "-v", "-arch=sm_90a", str(code), "-o", os.devnull]
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stderr
        total += sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))
    for made in Path(DUMP.name).iterdir():
        made.unlink()
    return total


def main() -> int:
    """Compiles every case; returns the number of cases that failed."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    failed = 0
    for case in cases():
        name = f"{case.backend}: {case.name}, {jnp.dtype(case.dtype).name}, head dimension {case.H}"
        if case.backend == "mosaic" and jax.__version_info__ < (0, 11):
            print(f"{name:66} left out: needs JAX 0.11 or later, this is {jax.__version__}")
            continue
        start = time.perf_counter()
        try:
            compile_for(topology.devices[0], case)
            bytes_ = spilled()
            found = f"ok, {bytes_} bytes spilled" if bytes_ else "ok"
            if bytes_ and case.fits:
                found, failed = f"FAILED: {bytes_} bytes spilled", failed + 1
        except jax.errors.JaxRuntimeError as error:
            found = f"FAILED: {str(error).splitlines()[0][:100]}"
            failed += 1
        print(f"{name:66} {time.perf_counter() - start:5.1f} s  {found}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main() > 0)
