"""Contestants of the GPU and TPU suites, in a process of their own; see `benchmark_gpu.py`.

It reads requests as JSON lines, and answers each with one line. Each names its `"contestant"`. A
case is `{"mask", "passes", "T", "B", "N", "H", "dtype"}`:

- `{"hello": true}` answers with the device and the versions;
- `{"prepare": case}` compiles and warms up, and answers with the seconds that took;
- `{"measure": case, "repeats": n}` answers with the median seconds of a call;
- `{"save": case, "path": file}` writes output and gradients to a file, for comparison;
- `{"forget": T}` frees the cases of one length;
- `{"matmul": n, "dtype": d}` answers with the seconds of an n x n x n product.

The name of the contestant chooses the kernels: `auto` or a backend of jaxattn (`tiled`, `cudnn`,
...), `reference` (jaxattn's `dense` in float32), `jax.nn`, `jax.nn-cudnn`, `splash`, `torch-sdpa`
or `torch-flex`. Kernels for TPUs are interpreted on CPU.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from contestant import serve

# What the masks are: a window and documents as in long-context training, a neighbourhood of
# 17 x 17 on a grid as in vision, caps and slopes as in Gemma 2 and the ALiBi paper.
WINDOW = 1024
DOCUMENT = 1024
GRID_WIDTH = 64
NEIGHBOURS = 8
CAP = 50.0
# Up to this length all contestants get the same numbers, so that results can be compared.
SHARED = 4096
SEED = 20240229


class Ready(NamedTuple):
    """A compiled call: `launch` starts it, `wait` waits for its results."""

    launch: Callable[[], Any]
    wait: Callable[[Any], Any]


def prefix_length(T: int) -> int:
    return T // 4


def real_length(T: int) -> int:
    return T * 5 // 8


def slopes(N: int) -> np.ndarray:
    """The slopes of ALiBi, for a number of heads that is a power of 2."""
    return np.asarray([2.0 ** (-8 * (h + 1) / N) for h in range(N)], np.float32)


def visible(name: str, T: int) -> int:
    """The number of query-key pairs that a mask allows, out of T x T."""
    q = np.arange(T, dtype=np.int64)
    return {
        "full": lambda: T * T,
        "window": lambda: int(np.minimum(q + 1, WINDOW + 1).sum()),
        "documents": lambda: int((q % DOCUMENT + 1).sum()),
        "prefix": lambda: int(np.maximum(q + 1, prefix_length(T)).sum()),
        "padding": lambda: T * real_length(T),
        "neighbourhood": lambda: T * (2 * NEIGHBOURS + 1) ** 2,
    }.get(name, lambda: T * (T + 1) // 2)()


def numbers(shape: tuple[int, int, int, int]) -> list[np.ndarray] | None:
    """Query, key, value and the output's cotangent `[B, T, N, H]`; `None` for long ones."""
    if shape[1] > SHARED:
        return None
    make = np.random.default_rng([SEED, *shape])
    return [make.standard_normal(shape, np.float32) for _ in range(4)]


def shape_of(case: dict[str, Any]) -> tuple[int, int, int, int]:
    return case["B"], case["T"], case["N"], case["H"]


# --- JAX ------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def jax_inputs(shape: tuple[int, int, int, int], rounded: str, dtype: str) -> list[Any]:
    """The four arrays of a shape, shared by its cases: in one dtype, rounded to another before."""
    import jax
    import jax.numpy as jnp

    shared = numbers(shape)
    if shared is not None:
        return [jnp.asarray(x).astype(rounded).astype(dtype) for x in shared]
    return [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 4)]


def jax_ready(attend: Callable[..., Any], case: dict[str, Any], arrays: Any, dtype: str) -> Ready:
    """`attend(q, k, v, arrays)`, or its output and gradients, compiled.

    Arrays of masks are arguments. Otherwise the compiler would compute their tile maps.
    """
    import jax

    q, k, v, g = jax_inputs(shape_of(case), case["dtype"], dtype)
    if case["passes"] == "forward":
        run = jax.jit(attend)
        return Ready(lambda: run(q, k, v, arrays), jax.block_until_ready)

    @jax.jit
    def both(q: Any, k: Any, v: Any, g: Any, arrays: Any) -> Any:
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, arrays), q, k, v)
        return out, back(g)

    return Ready(lambda: both(q, k, v, g, arrays), jax.block_until_ready)


def our_options(name: str, case: dict[str, Any]) -> tuple[dict[str, Any], Callable[..., Any]]:
    """The arrays of mask and score, and a function that turns them into options of `attention`."""
    import jax.numpy as jnp

    from jaxattn import masks, scores

    T, B, N = case["T"], case["B"], case["N"]
    causal = masks.causal()
    arrays: dict[str, Any] = {
        "documents": {"ids": jnp.arange(T) // DOCUMENT},
        "prefix": {"n": jnp.full(B, prefix_length(T))},
        "padding": {"n": jnp.full(B, real_length(T))},
        "alibi": {"slopes": jnp.asarray(slopes(N))},
    }.get(name, {})
    make: dict[str, Callable[..., dict[str, Any]]] = {
        "full": dict,
        "causal": lambda: {"mask": causal},
        "window": lambda: {"mask": masks.sliding_window(WINDOW)},
        "documents": lambda ids: {"mask": masks.segments(ids) & causal},
        "prefix": lambda n: {"mask": masks.prefix_lm(n)},
        "padding": lambda n: {"mask": masks.key_padding(lengths=n)},
        "neighbourhood": lambda: {
            "mask": masks.neighborhood((T // GRID_WIDTH, GRID_WIDTH), NEIGHBOURS)
        },
        "alibi": lambda slopes: {"mask": causal, "score": scores.alibi(slopes)},
        "soft-cap": lambda: {"mask": causal, "score": scores.soft_cap(CAP)},
    }
    return arrays, make[name]


def ours(case: dict[str, Any], backend: str) -> Ready:
    import jaxattn as ja

    dtype = case["dtype"]
    if backend == "reference":
        backend, dtype = "dense", "float32"
    arrays, make = our_options(case["mask"], case)
    tile = case.get("tile")

    def attend(q: Any, k: Any, v: Any, arrays: Any) -> Any:
        with interpreted_on_cpu(backend):
            if tile is None:
                return ja.attention(q, k, v, **make(**arrays), backend=backend)
            from jaxattn.arguments import checked_call

            module = importlib.import_module(f"jaxattn.backends.{backend}")
            return module.run(checked_call(q, k, v, **make(**arrays)), tile=tuple(tile))[0]

    return jax_ready(attend, case, arrays, dtype)


def on_cpu() -> bool:
    import jax

    return bool(jax.default_backend() == "cpu")


def interpreted_on_cpu(backend: str) -> contextlib.AbstractContextManager[None]:
    """Inside, kernels for TPUs can be rehearsed."""
    if backend != "tpu" or not on_cpu():
        return contextlib.nullcontext()
    from jaxattn.backends import tpu

    return tpu.interpreted()


def splash(case: dict[str, Any]) -> Ready:
    import jax
    import jax.numpy as jnp
    from splash import splash as made

    one = made(case["mask"], case["T"], case["N"], interpret=on_cpu())

    def attend(q: Any, k: Any, v: Any, arrays: Any) -> Any:
        heads_first = (jnp.swapaxes(x, 1, 2) for x in (q * case["H"] ** -0.5, k, v))
        return jnp.swapaxes(jax.vmap(one)(*heads_first), 1, 2)

    return jax_ready(attend, case, {}, case["dtype"])


def jax_nn(case: dict[str, Any], implementation: str) -> Ready:
    import jax
    import jax.numpy as jnp

    name, T = case["mask"], case["T"]
    if name == "soft-cap":
        raise ValueError("jax.nn has no soft-cap")
    native: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"is_causal": True},
        # Without is_causal cuDNN would attend to the future.
        "window": {"local_window_size": (WINDOW, 0), "is_causal": True},
        "padding": {},
        "alibi": {"is_causal": True},
    }
    arrays: dict[str, Any] = {}
    if name == "padding":
        arrays["key_value_seq_lengths"] = jnp.full(case["B"], real_length(T), jnp.int32)
    elif name == "alibi":
        apart = jnp.abs(jnp.arange(T)[:, None] - jnp.arange(T)).astype(case["dtype"])
        steep = jnp.asarray(slopes(case["N"])).astype(case["dtype"])
        arrays["bias"] = -steep[None, :, None, None] * apart
    elif name not in native:
        held, make = our_options(name, case)
        rows = case["B"] if name == "prefix" else 1
        arrays["mask"] = jax.jit(lambda held: make(**held)["mask"].dense(T, T, rows))(held)
    options: Any = native.get(name, {}) | {"implementation": implementation}

    def attend(q: Any, k: Any, v: Any, arrays: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, **arrays, **options)

    return jax_ready(attend, case, arrays, case["dtype"])


# --- PyTorch --------------------------------------------------------------------------------------


def torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_mask(name: str, T: int) -> Any:
    """FlexAttention's `mask_mod` of the case, or None for full attention."""
    import torch

    documents = torch.arange(T, device=torch_device()) // DOCUMENT
    rows, width, near = T // GRID_WIDTH, GRID_WIDTH, NEIGHBOURS

    def neighbourhood(b: Any, h: Any, q: Any, k: Any) -> Any:
        row = (q // width).clamp(near, rows - 1 - near) - k // width
        column = (q % width).clamp(near, width - 1 - near) - k % width
        return (row.abs() <= near) & (column.abs() <= near)

    return {
        "full": None,
        "window": lambda b, h, q, k: (q - k <= WINDOW) & (q >= k),
        "documents": lambda b, h, q, k: (documents[q] == documents[k]) & (q >= k),
        "prefix": lambda b, h, q, k: (k < prefix_length(T)) | (q >= k),
        "padding": lambda b, h, q, k: k < real_length(T),
        "neighbourhood": neighbourhood,
    }.get(name, lambda b, h, q, k: q >= k)


@functools.lru_cache(maxsize=2)
def torch_inputs(shape: tuple[int, int, int, int], dtype: str) -> list[Any]:
    """The same four arrays, heads first."""
    import torch

    device, kind = torch_device(), getattr(torch, dtype)
    shared = numbers(shape)
    if shared is not None:
        return [torch.from_numpy(x).to(device, kind).transpose(1, 2).contiguous() for x in shared]
    B, T, N, H = shape
    torch.manual_seed(0)
    return [torch.randn((B, N, T, H), dtype=kind, device=device) for _ in range(4)]


def torch_ready(attend: Callable[..., Any], case: dict[str, Any]) -> Ready:
    import torch

    device = torch_device()
    q, k, v, g = torch_inputs(shape_of(case), case["dtype"])

    def wait(found: Any) -> Any:
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    def forward() -> Any:
        with torch.no_grad():
            return attend(q, k, v)

    def both() -> Any:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*inputs)
        return out.detach(), torch.autograd.grad(out, inputs, g)

    return Ready(forward if case["passes"] == "forward" else both, wait)


def torch_sdpa(case: dict[str, Any]) -> Ready:
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attend

    name, T = case["mask"], case["T"]
    if name == "soft-cap":
        raise ValueError("SDPA has no soft-cap")
    if name in ("full", "causal"):
        return torch_ready(lambda q, k, v: attend(q, k, v, is_causal=name == "causal"), case)
    at = torch.arange(T, device=torch_device())
    mask = torch_mask(name, T)(0, 0, at[:, None], at[None, :]).expand(T, T)
    if name == "alibi":
        dtype = getattr(torch, case["dtype"])
        steep = torch.from_numpy(slopes(case["N"])).to(at.device, dtype)
        apart = (at[:, None] - at[None, :]).abs().to(dtype)
        mask = torch.where(mask, -steep[None, :, None, None] * apart, float("-inf"))
    return torch_ready(lambda q, k, v: attend(q, k, v, attn_mask=mask), case)


def torch_flex(case: dict[str, Any]) -> Ready:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, name, T = torch_device(), case["mask"], case["T"]
    if case["passes"] != "forward" and device == "cpu":
        raise ValueError("FlexAttention has no backward pass on CPU")
    mask_mod = torch_mask(name, T)
    # Compiled; otherwise it would hold all T x T pairs.
    make = torch.compile(create_block_mask) if device == "cuda" else create_block_mask
    block = None if mask_mod is None else make(mask_mod, None, None, T, T, device=device)
    steep = torch.from_numpy(slopes(case["N"])).to(device)
    score = {
        "alibi": lambda logit, b, h, q, k: logit - steep[h] * (q - k).abs(),
        "soft-cap": lambda logit, b, h, q, k: CAP * torch.tanh(logit / CAP),
    }.get(name)
    # One program for each case: beyond the limit it would run eagerly, and hold all pairs.
    for limit in ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit"):
        if hasattr(torch._dynamo.config, limit):
            setattr(torch._dynamo.config, limit, 1000)
    attend = torch.compile(flex_attention, dynamic=False)
    return torch_ready(lambda q, k, v: attend(q, k, v, score_mod=score, block_mask=block), case)


PEERS: dict[str, Callable[[dict[str, Any]], Ready]] = {
    "jax.nn": lambda case: jax_nn(case, "xla"),
    "jax.nn-cudnn": lambda case: jax_nn(case, "cudnn"),
    "splash": splash,
    "torch-sdpa": torch_sdpa,
    "torch-flex": torch_flex,
}


# --- answers --------------------------------------------------------------------------------------


def timed(ready: Ready, repeats: int) -> float:
    """Median seconds of a call. Calls are queued, so that the time to start one does not count."""

    def once(calls: int) -> float:
        start = time.perf_counter()
        found = None
        for _ in range(calls):
            found = ready.launch()
        ready.wait(found)
        return (time.perf_counter() - start) / calls

    # 50 ms a sample: a thousand times what a clock and a queue add.
    calls = max(1, min(50, int(0.05 / max(once(1), 1e-6))))
    return statistics.median(once(calls) for _ in range(repeats))


def save(name: str, ready: Ready, case: dict[str, Any], path: str) -> None:
    """Output and gradients `[B, T, N, H]` of the first and last batch rows and heads."""
    found = ready.wait(ready.launch())
    out, grads = (found, ()) if case["passes"] == "forward" else found
    arrays = {}
    for what, array in zip(("out", "query", "key", "value"), (out, *grads), strict=False):
        if name.startswith("torch"):
            whole = array.transpose(1, 2).float().cpu().numpy()
        else:
            whole = np.asarray(array.astype("float32"))
        arrays[what] = whole[[0, -1]][:, :, [0, -1]]
    np.savez(path, **arrays)


def matmul(n: int, dtype: str) -> float:
    """Seconds of a product of two n x n matrices."""
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    product = jax.jit(lambda a: a @ a)
    ready = Ready(lambda: product(a), jax.block_until_ready)
    ready.wait(ready.launch())
    return timed(ready, 7)


def hello(name: str) -> dict[str, Any]:
    """The device, the versions, and the backends of jaxattn that exist."""
    if name.startswith("torch"):
        import torch

        kind = torch.cuda.get_device_name() if torch_device() == "cuda" else "cpu"
        return {"torch": torch.__version__, "device": kind}
    import jax

    from jaxattn.dispatch import BACKENDS

    tiled = [n for n, m in BACKENDS.items() if "tile" in inspect.signature(m.run).parameters]
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "device": device.device_kind,
        "platform": device.platform,
        "backends": list(BACKENDS),
        "tiled": tiled,
    }


def chosen(name: str, case: dict[str, Any]) -> str:
    """The backend of jaxattn that computes a case."""
    import jax

    import jaxattn as ja

    if name != "auto" or case.get("tile"):
        return name
    x = jax.ShapeDtypeStruct((case["B"], case["T"], case["N"], case["H"]), case["dtype"])
    arrays, make = our_options(case["mask"], case)
    return str(ja.explain(x, x, x, **make(**arrays)).backend)


class Worker:
    """The compiled cases of one contestant."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.make = PEERS.get(name) or functools.partial(ours, backend=name)
        self.ready: dict[str, Ready] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        if "hello" in request:
            return hello(self.name)
        if "matmul" in request:
            return {"seconds": matmul(request["matmul"], request["dtype"])}
        if "forget" in request:
            done = f'"T": {request["forget"]},'
            self.ready = {key: ready for key, ready in self.ready.items() if done not in key}
            gc.collect()
            if "torch" in sys.modules:
                sys.modules["torch"].cuda.empty_cache()
            return {}
        case = request.get("prepare") or request.get("measure") or request["save"]
        key = json.dumps(case, sort_keys=True)
        start = time.perf_counter()
        if key not in self.ready:
            made = self.make(case)
            made.wait(made.launch())
            self.ready[key] = made
        if "prepare" in request:
            reply: dict[str, Any] = {"seconds": time.perf_counter() - start}
            if self.name not in PEERS:
                reply["backend"] = chosen(self.name, case)
            return reply
        if "measure" in request:
            return {"seconds": timed(self.ready[key], request["repeats"])}
        save(self.name, self.ready[key], case, request["path"])
        return {"saved": True}


class Workers:
    """All contestants of a process."""

    def __init__(self) -> None:
        self.by_name: dict[str, Worker] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of the contestant that a request names."""
        name = request.pop("contestant")
        if name not in self.by_name:
            self.by_name[name] = Worker(name)
        return self.by_name[name].answer(request)


if __name__ == "__main__":
    serve(Workers().answer)
