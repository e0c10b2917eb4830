"""Caches of keys and values, for decoding token by token.

In come the keys and values of the next tokens. Out comes a cache that holds them, with the
position of each key (`positions`) and a mask of the places that hold one (`mask`). Attention knows
nothing of caches: it is given positions and a mask, as in any other call. So the example of all
rooms, two documents under a causal mask, is decoded with the mask of training:

>>> import jax, jax.numpy as jnp, jaxattn as ja
>>> mask = ja.masks.segments(jnp.array([0, 0, 0, 1, 1, 1])) & ja.masks.causal()
>>> x = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
>>> cache = ja.KVCache.create(batch=1, capacity=6, heads=2, head_dim=8)
>>> first, cache = cache.step(x[:, :4], x[:, :4], x[:, :4], mask=mask)
>>> last, cache = cache.step(x[:, 4:], x[:, 4:], x[:, 4:], mask=mask)
>>> whole = ja.attention(x, x, x, mask=mask)
>>> bool(jnp.allclose(jnp.concatenate([first, last], 1), whole, atol=1e-6))
True

Read `cache` (what every cache can do), then `kv_cache` (each row has places of its own: as many as
tokens, or a ring of the last ones) and `paged` (the rows share pages of memory).
"""
