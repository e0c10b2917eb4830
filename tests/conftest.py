"""What every test runs under: strict promotion, checked shapes, several devices."""

import gc
import inspect
import os
import time
from importlib import metadata
from pathlib import Path

# Before jax is imported: tests of sharding want devices to shard over, and all of them compile far
# longer than they run. Where XLA still has its older code generator, that compiles twice as fast.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * metadata.version("jaxlib").startswith("0.10."),
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Processes share what they compile, and later runs find it again: JAX keeps a program under a hash
# of its text, of XLA and of the options above.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / "build/programs")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis
import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("jaxattn", "typechecker.check")

import jaxattn  # noqa: E402

# Pytrees are also built of what is no array: partition specs, axes of vmap, None.
_base = jaxattn.backends.base
for _tree in (
    jaxattn.Positions, jaxattn.KVCache, jaxattn.PagedKVCache, _base.Call, _base.Dropout,
):  # fmt: skip
    _tree.__init__ = inspect.unwrap(_tree.__init__)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "default", max_examples=12, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile("deep", max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("default")


def pytest_collection_finish() -> None:
    """What is here now stays to the end, and tracing makes many objects: to look through them all,
    again and again, takes almost a tenth of the time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_configure(config: pytest.Config) -> None:
    """Programs of two weeks ago are deleted: most are of code that has changed since."""
    if not hasattr(config, "workerinput"):
        for path in (config.rootpath / "build/programs").glob("*-cache"):
            if time.time() - path.stat().st_mtime > 14 * 24 * 3600:
                path.unlink(missing_ok=True)


@pytest.fixture
def own_errors():
    """Wrong calls meet the library's own checks, not those of the test-only type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def as_users_run():
    """JAX's own defaults: users, Flax and optax are not strict about promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Compilations:
    """How many programs XLA compiled since `reset()`, and how many JAX keeps at most."""

    count = 0
    kept = 0

    def reset(self) -> None:
        self.count = 0

    def heard(self, event: str, *_: object, **__: object) -> None:
        compiled = event.endswith("backend_compile_duration")
        self.count += compiled
        self.kept += compiled

    def forget(self) -> None:
        jax.clear_caches()
        gc.collect()
        self.kept = 0


_compilations = Compilations()
jax.monitoring.register_event_duration_secs_listener(_compilations.heard)


@pytest.fixture(autouse=True)
def _few_programs():
    """JAX forgets programs in time: each takes some of the 65530 maps of memory that Linux grants a
    process, and without one left XLA crashes."""
    yield
    if _compilations.kept > 1500:
        _compilations.forget()


@pytest.fixture
def compilations() -> Compilations:
    """The counter of compilations, at 0."""
    _compilations.reset()
    return _compilations
