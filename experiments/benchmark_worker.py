"""One contestant of the benchmark, in a process of its own; started by `benchmark.py`.

It reads requests as JSON lines, and answers each with one line. `{"prepare": case}` compiles, and
answers with the seconds that took. `{"run": true}` runs twice, and answers with the seconds of the
second run. `{"map": case}` times a tile map.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from contestant import serve

Run = Callable[[], Any]

# The tensors of a case: [B, T, N, H], with K = N heads of keys, drawn once for each shape.
GRID_WIDTH = 64
NEIGHBOURS = 8
DOCUMENT = 512
WINDOW = 256
DILATION = 4


def prefix_length(T: int) -> int:
    return T // 4


def real_length(T: int) -> int:
    return T * 5 // 8


# --- ours --------------------------------------------------------------------------------------


def our_mask(name: str, T: int) -> Any:
    import jax.numpy as jnp

    from jaxattn import masks

    return {
        "full": lambda: None,
        "causal": lambda: masks.causal(),
        "window": lambda: masks.sliding_window(WINDOW),
        "documents": lambda: masks.segments(jnp.arange(T) // DOCUMENT) & masks.causal(),
        "prefix": lambda: masks.prefix_lm(prefix_length(T)),
        "padding": lambda: masks.key_padding(lengths=real_length(T)),
        "dilated": lambda: masks.dilated(DILATION) & masks.causal(),
        "neighbourhood": lambda: masks.neighborhood((T // GRID_WIDTH, GRID_WIDTH), NEIGHBOURS),
    }[name]()


def lengths(case: dict[str, Any]) -> tuple[int, int, int, int]:
    """Lengths of query, key, value and the output's cotangent; decoding has one query."""
    T = case["T"]
    return (1, T, T, 1) if case["mask"] == "decode" else (T, T, T, T)


def jax_inputs(case: dict[str, Any]) -> list[Any]:
    """Query, key, value, and the output's cotangent."""
    import jax

    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (case["B"], n, case["N"], case["H"])).astype(case["dtype"])
        for key, n in zip(keys, lengths(case), strict=True)
    ]


def jax_run(attend: Callable[..., Any], case: dict[str, Any]) -> Run:
    """The jitted call or, for both passes, its gradients for a fixed cotangent."""
    import jax

    q, k, v, g = jax_inputs(case)
    if case["passes"] == "forward":
        run = jax.jit(attend)
        return lambda: jax.block_until_ready(run(q, k, v))

    @jax.jit
    def both(q: Any, k: Any, v: Any, g: Any) -> Any:
        out, back = jax.vjp(attend, q, k, v)
        return out, back(g)

    return lambda: jax.block_until_ready(both(q, k, v, g))


def jaxattn(case: dict[str, Any], backend: str) -> Run:
    import jaxattn as ja

    if case["mask"] == "decode":
        return from_cache(case)
    mask = our_mask(case["mask"], case["T"])
    return jax_run(lambda q, k, v: ja.attention(q, k, v, mask=mask, backend=backend), case)


def from_cache(case: dict[str, Any]) -> Run:
    """One query, at the end of a full cache."""
    import jax

    import jaxattn as ja

    if case["passes"] != "forward":
        raise ValueError("decoding has no backward pass")
    q, k, v, _ = jax_inputs(case)
    size = {"batch": case["B"], "capacity": case["T"], "heads": case["N"], "head_dim": case["H"]}
    cache = ja.KVCache.create(**size, dtype=q.dtype).append(k, v)

    @jax.jit
    def run(cache: ja.KVCache, q: Any) -> Any:
        return cache.attend(q, cache.upcoming(1) - 1, mask=ja.masks.causal())

    return lambda: jax.block_until_ready(run(cache, q))


# --- peers -------------------------------------------------------------------------------------


def jax_nn(case: dict[str, Any]) -> Run:
    import jax
    import jax.numpy as jnp

    name, T = case["mask"], case["T"]
    native: dict[str, dict[str, Any]] = {
        "full": {},
        "decode": {},
        "causal": {"is_causal": True},
        "window": {"local_window_size": (WINDOW, 0)},
        "padding": {"key_value_seq_lengths": jnp.full(case["B"], real_length(T), jnp.int32)},
    }
    options = native[name] if name in native else {"mask": our_mask(name, T).dense(T, T)}
    return jax_run(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options), case)


def torch_mask(name: str, T: int) -> Any:
    """FlexAttention's `mask_mod` of the case, or None for full attention."""
    import torch

    rows = T // GRID_WIDTH
    documents = torch.arange(T) // DOCUMENT
    if torch.cuda.is_available():
        documents = documents.cuda()

    def neighbourhood(b: Any, h: Any, q: Any, k: Any) -> Any:
        row = (q // GRID_WIDTH).clamp(NEIGHBOURS, rows - 1 - NEIGHBOURS) - k // GRID_WIDTH
        column = (q % GRID_WIDTH).clamp(NEIGHBOURS, GRID_WIDTH - 1 - NEIGHBOURS) - k % GRID_WIDTH
        return (row.abs() <= NEIGHBOURS) & (column.abs() <= NEIGHBOURS)

    return {
        "full": None,
        "decode": None,
        "causal": lambda b, h, q, k: q >= k,
        "window": lambda b, h, q, k: (q - k <= WINDOW) & (q >= k),
        "documents": lambda b, h, q, k: (documents[q] == documents[k]) & (q >= k),
        "prefix": lambda b, h, q, k: (k < prefix_length(T)) | (q >= k),
        "padding": lambda b, h, q, k: k < real_length(T),
        "dilated": lambda b, h, q, k: ((q - k) % DILATION == 0) & (q >= k),
        "neighbourhood": neighbourhood,
    }[name]


def torch_run(attend: Callable[..., Any], case: dict[str, Any]) -> Run:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[case["dtype"]]
    torch.manual_seed(0)
    q, k, v, g = (
        torch.randn((case["B"], case["N"], n, case["H"]), dtype=dtype, device=device)
        for n in lengths(case)
    )

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def forward() -> None:
        with torch.no_grad():
            attend(q, k, v)
        wait()

    def both() -> None:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        attend(*inputs).backward(g)
        wait()

    return forward if case["passes"] == "forward" else both


def torch_sdpa(case: dict[str, Any]) -> Run:
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attend

    name, T = case["mask"], case["T"]
    if name in ("full", "causal", "decode"):
        return torch_run(lambda q, k, v: attend(q, k, v, is_causal=name == "causal"), case)
    positions = torch.arange(T, device="cuda" if torch.cuda.is_available() else "cpu")
    mask = torch_mask(name, T)(0, 0, positions[:, None], positions[None, :]).expand(T, T)
    return torch_run(lambda q, k, v: attend(q, k, v, attn_mask=mask), case)


def torch_flex(case: dict[str, Any]) -> Run:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if case["passes"] != "forward" and device == "cpu":
        raise ValueError("FlexAttention has no backward pass on CPU")
    mask_mod = torch_mask(case["mask"], case["T"])
    T = case["T"]
    block = mask_mod and create_block_mask(mask_mod, None, None, T, T, device=device)
    torch._dynamo.reset()
    attend = torch.compile(flex_attention)
    return torch_run(lambda q, k, v: attend(q, k, v, block_mask=block), case)


CONTESTANTS: dict[str, Callable[[dict[str, Any]], Run]] = {
    "jaxattn": lambda case: jaxattn(case, "auto"),
    "jaxattn-dense": lambda case: jaxattn(case, "dense"),
    "jax.nn": jax_nn,
    "torch-sdpa": torch_sdpa,
    "torch-flex": torch_flex,
}


def time_map(case: dict[str, Any]) -> float:
    """Seconds to build the tile map of a mask at length T, compiled; the least of ten."""
    import jax

    import jaxattn as ja

    shape = (1, case["T"], 1, 64)
    # The mask is an argument. Otherwise the compiler would compute its map.
    build = jax.jit(lambda mask: ja.tile_map(mask, shape, shape).states)
    mask = our_mask(case["mask"], case["T"])
    build(mask).block_until_ready()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        build(mask).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)


def answer(request: dict[str, Any], state: dict[str, Run], name: str) -> dict[str, Any]:
    """The answer to one request."""
    if "map" in request:
        return {"seconds": time_map(request["map"])}
    if "prepare" in request:
        state["run"] = CONTESTANTS[name](request["prepare"])
    else:
        # As in a training loop: other processes have just used the caches, and threads sleep.
        state["run"]()
    start = time.perf_counter()
    state["run"]()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_bytes": peak}


def main(name: str) -> None:
    """Answer requests until standard input ends."""
    state: dict[str, Run] = {}
    serve(lambda request: answer(request, state, name))


if __name__ == "__main__":
    main(sys.argv[1])
