"""Masked attention on one GPU: checks that every kernel is right, then measures its speed.

    python experiments/benchmark.py --suite gpu               # everything, in 8 minutes
    python experiments/benchmark_gpu.py --lengths 8192 --masks causal window --minutes 3
    python experiments/benchmark_gpu.py --device cpu --lengths 128 --matmul 256 ...   # a rehearsal

The most important cases come first. When the time budget is spent, the run ends between two cases;
`--resume` measures the others. Results are written as JSON and Markdown after every case. Every
contestant runs in a process of its own. All contestants compile a group of cases at the same time;
then each is timed alone. A request that takes too long is killed. A contestant is left out after
three kills.

TFLOP/s count the pairs that the mask allows: `4 * H` operations for each pair and head forward (two
products, with a multiplication and an addition each), 3.5 times as many forward+backward (five more
products). For causal attention the report also gives the share of the speed that a matrix product
reaches in the same run.

PyTorch is expected beside JAX, or in `.venv-peers`. `--tune` tries different tiles for each backend
whose `run` takes `tile=`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from benchmark_gpu_worker import visible
from contestant import ROOT, Contestant

HERE = Path(__file__).parent
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"

Mask = Literal[
    "causal", "full", "window", "documents", "prefix", "padding", "neighbourhood", "alibi",
    "soft-cap",
]  # fmt: skip
Passes = Literal["forward", "forward+backward"]
# Norm of the error over the norm of the reference. Rounding inputs, weights and results to
# bfloat16 gives 0.003 to 0.006; a tile left out or a mask off by one in a window of 1024, above.
TOLERANCE = {"out": 0.01, "query": 0.02, "key": 0.02, "value": 0.02}
# The share of the time that checks may take.
CHECKING = 0.3
# A contestant that was killed this many times is left out: its time goes to the others.
STRIKES = 3


@dataclass
class GpuConfig:
    """What the GPU suite measures."""

    masks: tuple[Mask, ...] = (
        "causal", "full", "window", "documents", "prefix", "padding", "neighbourhood", "alibi",
        "soft-cap",
    )  # fmt: skip
    passes: tuple[Passes, ...] = ("forward", "forward+backward")
    lengths: tuple[int, ...] = (8192, 2048, 32768)  # in this order, as long as there is time
    contestants: tuple[str, ...] = (
        "auto", "cudnn", "triton", "mosaic", "jax.nn-cudnn", "torch-flex", "torch-sdpa", "jax.nn",
    )  # fmt: skip
    batch: int = 2
    heads: int = 16
    head_dims: tuple[int, ...] = (128,)
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    check: int = 2048  # length at which results are compared with the reference; 0: none
    matmul: int = 8192  # extent of the matrix product that is measured; 0: none
    repeats: int = 5  # samples of 50 ms or a call; the median ignores two disturbances
    most_dense: float = 40e9  # bytes of float32 logits that plain XLA may hold: half of a GPU
    minutes: float = 8.0  # for the whole run
    timeout: float = 75.0  # seconds for a compilation; torch.compile's autotuning takes two minutes
    group: int = 3  # masks that are compiled at once
    compiling: float = 0.12  # the share of the time that this may take
    tune: bool = False  # sweep the tiles of our kernels instead of comparing with peers
    tiles: tuple[int, ...] = (32, 64, 128, 256)
    device: Literal["gpu", "tpu", "cpu"] = "gpu"
    resume: bool = False  # measure what the run that wrote `output` did not reach
    output: Path = HERE / "results" / "benchmark-gpu.json"

    # Whether one process runs all contestants, one after the other.
    together: ClassVar[bool] = False


class Crew:
    """The contestants: started when asked, killed when too slow, left out when killed too often."""

    def __init__(self, config: GpuConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        # The last seconds are for the report.
        self.deadline = time.monotonic() + 60 * config.minutes - 8
        self.running: dict[str, Contestant] = {}
        self.strikes: dict[str, int] = {}

    def left(self) -> float:
        """Seconds that are left of the budget."""
        return self.deadline - time.monotonic()

    def ask(self, name: str, timeout: float | None = None, **request: Any) -> dict[str, Any]:
        """An answer, or `{"error": ...}`."""
        if self.strikes.get(name, 0) >= STRIKES:
            return {"error": f"left out: killed or died {STRIKES} times"}
        if self.left() <= 0:
            return {"error": "out of time"}
        process = "everyone" if self.config.together else name
        if process not in self.running or not self.running[process].alive:
            self.running[process] = self._start(process)
            # A start has a time of its own: it is no part of what is asked.
            limit = min(self.config.timeout, self.left())
            self.running[process].ask(limit, contestant=name, hello=True)
        seconds = min(timeout or self.config.timeout, self.left())
        reply = self.running[process].ask(seconds, contestant=name, **request)
        if reply.pop("killed", False):
            self.strikes[name] = self.strikes.get(name, 0) + 1
            reply["error"] += self._last_words(process)
        return reply

    @property
    def workers(self) -> int:
        """How many contestants may be asked at the same time."""
        return 1 if self.config.together else 1 + len(self.config.contestants)

    def _start(self, name: str) -> Contestant:
        environment = {
            # Several processes share the GPU.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            # The library of this checkout, installed or not.
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        if self.config.together:
            # What a killed process compiled for others is not lost.
            environment["JAX_COMPILATION_CACHE_DIR"] = str(self.folder / "compiled")
        if self.config.device == "cpu":
            environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return Contestant(
            name,
            HERE / "benchmark_gpu_worker.py",
            python=python_of(name),
            environment=environment,
            log=self._log(name),
        )

    def _log(self, name: str) -> Path:
        return self.folder / f"{name.replace(':', '-')}.log"

    def _last_words(self, name: str) -> str:
        lines = self._log(name).read_text(errors="replace").strip().splitlines()
        return f"; its last line: {lines[-1][:200]}" if lines else ""

    def close(self) -> None:
        """End all processes."""
        for each in self.running.values():
            each.kill()


def python_of(name: str) -> str | Path:
    """The Python interpreter that has the packages of a contestant."""
    beside = importlib.util.find_spec("torch") is not None
    return PEERS_PYTHON if name.startswith("torch") and not beside else sys.executable


def case_of(config: GpuConfig, mask: str, passes: str, T: int, **more: Any) -> dict[str, Any]:
    """A case in the form that workers read."""
    size = {"B": config.batch, "N": config.heads, "H": config.head_dims[0], "dtype": config.dtype}
    return {"mask": mask, "passes": passes, "T": T, **size, **more}


def work(case: dict[str, Any]) -> float:
    """Floating-point operations of the pairs that a case's mask allows."""
    forward = 4.0 * case["H"] * visible(case["mask"], case["T"]) * case["B"] * case["N"]
    return forward * (1 if case["passes"] == "forward" else 3.5)


def unfit(name: str, case: dict[str, Any], most_dense: float) -> str | None:
    """Why a contestant is not asked to run a case, or None."""
    logits = 4 * case["B"] * case["N"] * case["T"] ** 2
    # Logits and weights, and their gradients.
    held = logits * (2 if case["passes"] == "forward" else 4)
    if name == "jax.nn" and held > most_dense:
        return f"would hold {held / 1e9:.0f} GB"
    given = {"torch-sdpa": ("alibi",), "jax.nn-cudnn": ("alibi",)}.get(name, ())
    if case["mask"] in given and logits / 2 > most_dense / 4:
        return f"would need a bias of {logits / 2 / case['B'] / 1e9:.0f} GB"
    # PyTorch makes the array of a mask operation by operation, in int64.
    made = 32 * case["T"] ** 2
    if name == "torch-sdpa" and case["mask"] not in ("full", "causal") and made > most_dense / 2:
        return f"would need {made / 1e9:.0f} GB to make its mask"
    return None


def contestants(crew: Crew, said: dict[str, Any]) -> list[str]:
    """The contestants on this machine: backends of this version, and peers."""
    found = []
    ours = said.get("backends", [])
    for name in crew.config.contestants:
        if name.startswith("torch"):
            beside = importlib.util.find_spec("torch") is not None
            if beside or PEERS_PYTHON.exists():
                found.append(name)
        elif name in ours or name in ("auto", "jax.nn", "jax.nn-cudnn", "splash"):
            found.append(name)
    return found


# --- correctness ----------------------------------------------------------------------------------


def check(crew: Crew, names: list[str], report: dict[str, Any]) -> None:
    """Compares output and gradients of every contestant with the definition in float32."""
    config = crew.config
    # One process has no time for both: the last one contains the other.
    checked = config.passes[-1:] if config.together else config.passes[::-1]
    cases = [
        case_of(config, mask, passes, config.check) for passes in checked for mask in config.masks
    ]
    until = time.monotonic() + CHECKING * crew.left()

    def results(name: str) -> list[dict[str, Any]]:
        replies: list[dict[str, Any]] = []
        for i, case in enumerate(cases):
            path = str(crew.folder / f"{name.replace(':', '-')}-{i}.npz")
            # The reference has no time limit: without it nothing is checked.
            if time.monotonic() > until and name != "reference":
                reply = {"error": "no time left for checks"}
            else:
                reply = crew.ask(name, save=case, path=path)
            replies.append({**reply, "path": path})
        return replies

    everyone = ["reference", *names]
    with ThreadPoolExecutor(crew.workers) as pool:
        found = dict(zip(everyone, pool.map(results, everyone), strict=True))
    if "reference" in crew.running:
        crew.running.pop("reference").kill()
    for name in names:
        for case, got, gold in zip(cases, found[name], found["reference"], strict=True):
            row: dict[str, Any] = {"contestant": name, "mask": case["mask"]}
            row["passes"] = case["passes"]
            if "error" in got or "error" in gold:
                row["error"] = got.get("error") or f"reference: {gold['error']}"
            else:
                row["errors"] = compared(got["path"], gold["path"])
                row["passed"] = all(row["errors"][n] <= TOLERANCE[n] for n in row["errors"])
            report["checks"].append(row)
            say_check(row)


def compared(path: str, gold_path: str) -> dict[str, float]:
    """Norms of the errors over norms of the reference; infinite where anything is not finite."""
    errors = {}
    with np.load(path) as got, np.load(gold_path) as gold:
        for what in got.files:
            error = np.linalg.norm(got[what] - gold[what]) / np.linalg.norm(gold[what])
            errors[what] = float(error) if np.isfinite(error) else float("inf")
    return errors


def say_check(row: dict[str, Any]) -> None:
    result = "-" if "error" in row else "pass" if row["passed"] else "FAIL"
    told = row.get("error") or ", ".join(f"{n} {e:.4f}" for n, e in row["errors"].items())
    head = f"check {row['contestant']:>14} {row['mask']:<14} {row['passes']:<17}"
    print(f"{head} {result:<5} {told[:150]}", flush=True)


# --- speed ----------------------------------------------------------------------------------------


def groups(config: GpuConfig) -> list[list[dict[str, Any]]]:
    """Groups of cases, the most important first."""
    masks = [config.masks[i : i + config.group] for i in range(0, len(config.masks), config.group)]
    return [
        [case_of(config, mask, passes, T, H=H) for mask in some for passes in config.passes]
        for T in config.lengths
        for H in config.head_dims
        for some in masks
    ]


def measure(crew: Crew, names: list[str], cases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All contestants compile at the same time; then each is timed alone."""

    until = time.monotonic() + crew.config.compiling * 60 * crew.config.minutes

    def prepare(name: str) -> list[dict[str, Any]]:
        replies: list[dict[str, Any]] = []
        for case in cases:
            why = unfit(name, case, crew.config.most_dense)
            if time.monotonic() > until:
                why = "not compiled in time"
            replies.append({"error": why} if why else crew.ask(name, prepare=case))
        return replies

    with ThreadPoolExecutor(crew.workers) as pool:
        prepared = dict(zip(names, pool.map(prepare, names), strict=True))
    for i, case in enumerate(cases):
        row: dict[str, Any] = {**case, "flop": work(case), "seconds": {}, "errors": {}}
        row["backend"] = prepared.get("auto", [{}] * len(cases))[i].get("backend")
        row["first_call_seconds"] = {
            n: p[i]["seconds"] for n, p in prepared.items() if "seconds" in p[i]
        }
        for name in names:
            reply = prepared[name][i]
            if "error" not in reply:
                repeats = crew.config.repeats
                reply = crew.ask(name, crew.config.timeout / 3, measure=case, repeats=repeats)
            if "error" in reply:
                row["errors"][name] = reply["error"]
            else:
                row["seconds"][name] = reply["seconds"]
        if crew.left() <= 0:
            return
        row["tflops"] = {name: row["flop"] / s / 1e12 for name, s in row["seconds"].items()}
        speeds = ", ".join(f"{n} {t:.3g}" for n, t in row["tflops"].items())
        head = f"{case['mask']:>14} {case['passes']:<17} T={case['T']:<6} H={case['H']:<3}"
        auto = f"  (auto runs {row['backend']})" if "auto" in names else ""
        print(f"{head} TFLOP/s: {speeds or '-'}{auto}", flush=True)
        yield row
    for name in names:
        # Cases compiled for the checks are timed later.
        if cases[0]["T"] != crew.config.check:
            crew.ask(name, forget=cases[0]["T"])


def tune(crew: Crew, names: list[str], report: dict[str, Any]) -> None:
    """Times our kernels with every tile, on the masks that show most."""
    config = crew.config
    for T in config.lengths:
        for mask in config.masks:
            for passes in config.passes:
                for name in names:
                    for tile in ((a, b) for a in config.tiles for b in config.tiles):
                        case = case_of(config, mask, passes, T, tile=tile)
                        reply = crew.ask(name, prepare=case)
                        if "error" not in reply:
                            reply = crew.ask(name, 30, measure=case, repeats=config.repeats)
                        crew.ask(name, forget=T)
                        row = {**case, "contestant": name, **reply}
                        report["tuning"].append(row)
                        seconds = reply.get("seconds")
                        told = (
                            f"{work(case) / seconds / 1e12:.3g} TFLOP/s"
                            if seconds
                            else reply["error"]
                        )
                        print(f"{name} {mask} {passes} T={T} {tile}: {told[:120]}", flush=True)
                        if crew.left() <= 0:
                            return
                write(report, config.output)


# --- the report -----------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    machine = report["machine"]
    versions = [f"JAX {machine['jax']}"]
    versions += [f"PyTorch {machine['torch']}"] if machine.get("torch") else []
    lines = [", ".join([machine["device"], *versions, machine["date"]]) + ".", ""]
    bound = report.get("matmul_tflops")
    if bound:
        lines += [f"A matrix product reaches {bound:.0f} TFLOP/s.", ""]
    failed = [c for c in report["checks"] if not c.get("passed", True)]
    passed = sum(c.get("passed", False) for c in report["checks"])
    lines += [f"Checks: {passed} passed, {len(failed)} failed.", ""]
    lines += [
        f"- FAILED: {c['contestant']} {c['mask']} {c['passes']}: {c['errors']}" for c in failed
    ]
    lines += [
        f"- not checked: {c['contestant']} {c['mask']} {c['passes']}: {c['error'][:150]}"
        for c in report["checks"]
        if "error" in c
    ]
    keys = list(dict.fromkeys((c["T"], c["H"], c["passes"]) for c in report["cases"]))
    for T, H, passes in keys:
        cases = [c for c in report["cases"] if (c["T"], c["H"], c["passes"]) == (T, H, passes)]
        names = [n for n in report["contestants"] if any(n in c["tflops"] for c in cases)]
        auto = ["auto runs"] if "auto" in names else []
        header = ["mask", *names, *auto]
        lines += ["", f"**{passes}, T={T}, H={H}, TFLOP/s**", "", "| " + " | ".join(header) + " |"]
        lines += ["|---" * len(header) + "|"]
        for case in cases:
            speeds = []
            for name in names:
                speed = case["tflops"].get(name)
                share = bound and speed and case["mask"] == "causal"
                share_of = f" ({speed / bound:.0%})" if share else ""
                speeds.append("-" if speed is None else f"{speed:.3g}{share_of}")
            runs = [str(case["backend"])] if auto else []
            lines.append("| " + " | ".join([case["mask"], *speeds, *runs]) + " |")
        lines.append("")
        for case in cases:
            errors = case["errors"].items()
            lines += [f"- {name}, {case['mask']}: {error[:150]}" for name, error in errors]
    for row in report["tuning"]:
        said = f"{row['seconds'] * 1e3:.3g} ms" if "seconds" in row else row["error"][:80]
        at = f"{row['contestant']} {row['mask']} {row['passes']} T={row['T']} {row['tile']}"
        lines.append(f"- {at}: {said}")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Speed by mask and contestant, at the length and head dimension that were measured first."""
    if importlib.util.find_spec("matplotlib") is None or not report["cases"]:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    passes = list(dict.fromkeys(c["passes"] for c in report["cases"]))
    size = {"figsize": (13, 4 * len(passes)), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(len(passes), 1, **size)
    T, H = report["cases"][0]["T"], report["cases"][0]["H"]
    for axis, which in zip(axes[:, 0], passes, strict=True):
        cases = [c for c in report["cases"] if (c["T"], c["H"], c["passes"]) == (T, H, which)]
        names = [n for n in report["contestants"] if any(n in c["tflops"] for c in cases)]
        for i, name in enumerate(names):
            at = [x + i * 0.8 / len(names) for x in range(len(cases))]
            heights = [c["tflops"].get(name, 0) for c in cases]
            axis.bar(at, heights, 0.8 / len(names), label=name)
        axis.set_xticks(range(len(cases)), [c["mask"] for c in cases])
        axis.set_ylabel("TFLOP/s of visible pairs")
        axis.set_title(f"{which}, {report['config']['dtype']}, T={T}, H={H}")
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(report: dict[str, Any], path: Path) -> None:
    """Writes JSON and Markdown of the results so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, default=str) + "\n")
    path.with_suffix(".md").write_text(table(report))


def name_of(case: dict[str, Any]) -> tuple[str, str, int, int]:
    """What tells the cases of a run apart."""
    return case["mask"], case["passes"], case["T"], case["H"]


def without(cases: list[dict[str, Any]], done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases that are not done."""
    names = {name_of(case) for case in done}
    return [case for case in cases if name_of(case) not in names]


def resume(path: Path, report: dict[str, Any]) -> None:
    """Takes over the checks and cases that an earlier run on this machine wrote."""
    if not path.exists():
        raise SystemExit(f"nothing to resume: {path} does not exist")
    old = json.loads(path.read_text())
    same = [("machine", name) for name in ("device", "jax")]
    same += [("config", name) for name in ("batch", "heads", "dtype")]
    for what, name in same:
        before, now = old[what][name], report[what][name]
        if before != now:
            raise SystemExit(f"can't resume {path.name}: its {name} is {before}, now {now}")
    names = dict.fromkeys([*old["contestants"], *report["contestants"]])
    report |= {"checks": old["checks"], "cases": old["cases"], "contestants": list(names)}


def main(config: GpuConfig) -> dict[str, Any]:
    """Checks, measures, writes; returns the report."""
    with tempfile.TemporaryDirectory() as folder:
        crew = Crew(config, Path(folder))
        try:
            return suite(crew)
        finally:
            crew.close()


def suite(crew: Crew) -> dict[str, Any]:
    """Everything in the configuration, as long as there is time."""
    config = crew.config
    said = crew.ask("auto", hello=True)
    if "error" in said:
        raise SystemExit(f"jaxattn does not start: {said['error']}")
    device = config.device
    if device not in ("cpu", said["platform"]):
        raise SystemExit(
            f"no {device.upper()}: JAX computes on {said['platform']}; for a rehearsal on CPU give "
            f"--{device}.device cpu, or --device cpu to benchmark_{device}.py"
        )
    names = contestants(crew, said)
    torch = next((n for n in names if n.startswith("torch")), None)
    said |= {} if torch is None else {"torch": crew.ask(torch, hello=True).get("torch")}
    report: dict[str, Any] = {
        "machine": {
            **said,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        },
        "config": {**asdict(config), "output": config.output.name},
        "contestants": names,
        "checks": [],
        "cases": [],
        "tuning": [],
        "not_reached": [],
    }
    if config.resume:
        resume(config.output, report)
    print(f"{said['device']}, JAX {said['jax']}: {', '.join(names)}", flush=True)
    if config.matmul:
        reply = crew.ask("auto", matmul=config.matmul, dtype=config.dtype)
        if "seconds" in reply:
            report["matmul_tflops"] = 2 * config.matmul**3 / reply["seconds"] / 1e12
            print(f"matrix product: {report['matmul_tflops']:.4g} TFLOP/s", flush=True)
    if config.check and not report["checks"]:
        check(crew, names, report)
        write(report, config.output)
    if config.tune:
        mine = [n for n in names if n.split(":")[0] in said["tiled"]]
        tune(crew, mine, report)
    else:
        for some in groups(config):
            left = without(some, report["cases"])
            for row in measure(crew, names, left) if left and crew.left() > 0 else ():
                report["cases"].append(row)
                write(report, config.output)
        left = without([case for some in groups(config) for case in some], report["cases"])
        report["not_reached"] = [list(name_of(case)) for case in left]
        if report["not_reached"]:
            print(f"out of time: {len(report['not_reached'])} cases not reached", flush=True)
    write(report, config.output)
    plot(report, config.output.with_suffix(".png"))
    print(config.output.with_suffix(".md"), flush=True)
    return report


def start(kind: type[GpuConfig], description: str | None) -> None:
    """Runs the suite with the options of the command line."""
    # A machine with an accelerator may lack tyro: then the defaults are used.
    if importlib.util.find_spec("tyro") is None:
        main(kind())
    else:
        import tyro

        main(tyro.cli(kind, description=description))


if __name__ == "__main__":
    start(GpuConfig, __doc__)
