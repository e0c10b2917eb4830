"""The benchmarks: their arithmetic, their patience, and rehearsals on CPU."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import benchmark_gpu  # noqa: E402
import benchmark_gpu_worker as worker  # noqa: E402
import benchmark_shapes  # noqa: E402
import compile_parallel  # noqa: E402
import splash  # noqa: E402
from benchmark_gpu import GpuConfig  # noqa: E402
from benchmark_shapes import SHAPES, ShapesConfig  # noqa: E402
from benchmark_tpu import TpuConfig  # noqa: E402
from contestant import Contestant  # noqa: E402

pytestmark = pytest.mark.no_cover


@pytest.mark.parametrize("mask", GpuConfig.masks)
def test_pairs_are_counted(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    T, B = 192, 2
    monkeypatch.setattr(worker, "WINDOW", 50)
    monkeypatch.setattr(worker, "DOCUMENT", 40)
    monkeypatch.setattr(worker, "GRID_WIDTH", 16)
    monkeypatch.setattr(worker, "NEIGHBOURS", 2)
    arrays, make = worker.our_options(mask, {"T": T, "B": B, "N": 2})
    found = make(**arrays).get("mask")
    counted = T * T if found is None else int(np.asarray(found.dense(T, T, B)[0, 0]).sum())
    assert worker.visible(mask, T) == counted


def test_operations_are_of_visible_pairs() -> None:
    case = benchmark_gpu.case_of(GpuConfig(), "full", "forward", 8192)
    # Two products of 2 * H operations a pair, for 2 * 16 heads.
    assert benchmark_gpu.work(case) == 2 * 2 * 128 * 8192**2 * 32
    both = benchmark_gpu.case_of(GpuConfig(), "full", "forward+backward", 8192)
    assert benchmark_gpu.work(both) == 3.5 * benchmark_gpu.work(case)


def test_what_does_not_fit_is_not_tried() -> None:
    def why(name: str, mask: str, T: int) -> str | None:
        case = benchmark_gpu.case_of(GpuConfig(), mask, "forward+backward", T)
        return benchmark_gpu.unfit(name, case, GpuConfig.most_dense)

    assert why("jax.nn", "causal", 8192) is None
    assert "would hold" in str(why("jax.nn", "causal", 32768))
    assert "bias" in str(why("torch-sdpa", "alibi", 32768))
    assert "mask" in str(why("torch-sdpa", "window", 32768))
    assert why("torch-sdpa", "window", 8192) is None
    assert why("torch-sdpa", "causal", 32768) is None
    assert why("auto", "causal", 32768) is None


def test_the_important_comes_first() -> None:
    order = benchmark_gpu.groups(GpuConfig())
    assert [c["mask"] for c in order[0][::2]] == ["causal", "full", "window"]
    assert [group[0]["T"] for group in order] == 3 * [8192] + 3 * [2048] + 3 * [32768]
    assert len({json.dumps(c) for group in order for c in group}) == 9 * 2 * 3


HANGS = """
import sys, time
sys.path.insert(0, {path!r})
from contestant import serve

def answer(request):
    request.pop("contestant", None)
    if "hang" in request:
        time.sleep(60)
    if "die" in request:
        print("out of registers", file=sys.stderr, flush=True)
        sys.exit(1)
    return request

serve(answer)
"""


def test_a_hang_is_killed_and_a_death_is_told(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(HANGS.format(path=str(EXPERIMENTS)))
    one = Contestant("one", script)
    assert one.ask(10, a=1) == {"a": 1}
    assert "killed" in one.ask(0.2, hang=True)["error"]
    assert not one.alive
    assert one.ask(a=1)["killed"]
    one.close()
    other = Contestant("other", script, log=tmp_path / "log")
    assert other.ask(10, die=True)["error"] == "the process died"
    assert "out of registers" in (tmp_path / "log").read_text()
    other.close()


def test_who_hangs_too_often_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text(HANGS.format(path=str(EXPERIMENTS)))
    crew = benchmark_gpu.Crew(GpuConfig(device="cpu"), tmp_path)
    monkeypatch.setattr(crew, "_start", lambda name: Contestant(name, script, log=crew._log(name)))
    assert "its last line: out of registers" in crew.ask("one", die=True)["error"]
    for _ in range(benchmark_gpu.STRIKES - 1):
        assert "killed" in crew.ask("one", 0.2, hang=True)["error"]
    assert "left out" in crew.ask("one", 5, a=1)["error"]
    assert crew.ask("two", 5, a=1) == {"a": 1}
    crew.deadline = 0.0
    assert crew.ask("two", 5, a=1) == {"error": "out of time"}
    crew.close()


class Inside:
    """A contestant in this process: the workers themselves, without the start of another JAX."""

    def __init__(self) -> None:
        self.workers, self.alive = worker.Workers(), True

    def ask(self, timeout: float, **request: Any) -> dict[str, Any]:
        try:
            return json.loads(json.dumps(self.workers.answer(json.loads(json.dumps(request)))))
        except ValueError as error:
            return {"error": str(error)}

    def kill(self) -> None:
        self.alive = False


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_gpu.Crew, "_start", lambda crew, name: Inside())
    # What was drawn for a shape is kept for the next case, not for the next test.
    yield
    worker.jax_inputs.cache_clear()


@pytest.mark.usefixtures("inside")
def test_a_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks, times and writes, on the smallest of cases."""
    config = GpuConfig(
        masks=("causal", "documents"), passes=("forward+backward",), lengths=(32,),
        contestants=("auto", "dense", "absent"), batch=2, heads=2, head_dims=(8,), check=32, matmul=32,
        repeats=1, device="cpu", output=tmp_path / "gpu.json",
    )  # fmt: skip
    report = benchmark_gpu.main(config)
    assert report["contestants"] == ["auto", "dense"]
    assert len(report["checks"]) == 4
    assert all(row["passed"] for row in report["checks"])
    assert [row["mask"] for row in report["cases"]] == ["causal", "documents"]
    for row in report["cases"]:
        assert row["tflops"].keys() == {"auto", "dense"}
        assert row["backend"] == "rows"
    assert json.loads(config.output.read_text())["not_reached"] == []
    text = config.output.with_suffix(".md").read_text()
    assert "Checks: 4 passed, 0 failed" in text
    assert "| causal |" in text
    assert config.output.with_suffix(".png").exists()
    assert "check           auto causal" in capsys.readouterr().out


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(("suite", "name"), [(GpuConfig, "tiled"), (TpuConfig, "tpu")])
def test_tiles_are_swept(suite: type[GpuConfig], name: str, tmp_path: Path) -> None:
    config = suite(
        masks=("causal",), passes=("forward",), lengths=(32,), contestants=(name, "auto"),
        batch=1, heads=2, head_dims=(8,), check=0, matmul=0, repeats=1, device="cpu", tune=True,
        tiles=(16,), output=tmp_path / "gpu.json",
    )  # fmt: skip
    report = benchmark_gpu.main(config)
    assert [row["tile"] for row in report["tuning"]] == [(16, 16)]
    assert all("seconds" in row for row in report["tuning"])


def test_a_budget_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two cases, with what was measured written and the rest named; another goes on."""
    config = GpuConfig(contestants=("auto",), check=0, matmul=0, output=tmp_path / "gpu.json")

    def ask(crew: Any, name: str, timeout: Any = None, **request: Any) -> dict[str, Any]:
        if "measure" in request:
            crew.deadline -= 50
        said = {"device": "a GPU", "platform": "gpu", "jax": "0", "backends": {}, "tiled": []}
        return {"seconds": 1.0, "backend": "tiled", **said}

    monkeypatch.setattr(benchmark_gpu.Crew, "ask", ask)
    report = benchmark_gpu.main(config)
    # 472 s at 50 a case: nine, and a tenth that came too late.
    assert len(report["cases"]) == 9
    assert len(report["not_reached"]) == 45
    left = json.loads(config.output.read_text())["not_reached"]
    assert left[0] == ["prefix", "forward+backward", 8192, 128]
    again = benchmark_gpu.main(dataclasses.replace(config, resume=True))
    assert again["cases"][:9] == json.loads(json.dumps(report["cases"]))
    assert list(benchmark_gpu.name_of(again["cases"][9])) == left[0]
    assert len(again["cases"]) == 18
    with pytest.raises(SystemExit, match="its batch is 2, now 3"):
        benchmark_gpu.main(dataclasses.replace(config, resume=True, batch=3))
    with pytest.raises(SystemExit, match="nothing to resume"):
        benchmark_gpu.main(dataclasses.replace(config, resume=True, output=tmp_path / "none"))
    monkeypatch.setattr(benchmark_gpu.Crew, "ask", lambda *_, **__: {"platform": "cpu"})
    with pytest.raises(SystemExit, match="no GPU: JAX computes on cpu"):
        benchmark_gpu.main(config)


def test_without_a_tpu_the_suite_ends_at_once(tmp_path: Path) -> None:
    output = tmp_path / "tpu.json"
    with pytest.raises(SystemExit, match=r"no TPU: JAX computes on cpu; .* --tpu\.device cpu"):
        benchmark_gpu.main(TpuConfig(output=output))
    assert not output.exists()


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(
    "masks",
    [("documents",), pytest.param(("full", "window", "prefix", "alibi"), marks=pytest.mark.deep)],
)
def test_the_tpu_suite_is_rehearsed(masks: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Splash and the library's kernels are interpreted: one block, and tiles of 16."""
    for module in (worker, splash):
        monkeypatch.setattr(module, "WINDOW", 50)
        monkeypatch.setattr(module, "DOCUMENT", 40)
    config = TpuConfig(
        masks=masks, passes=("forward+backward",), lengths=(128,), contestants=("tpu", "splash"),
        heads=2, head_dims=(64,), check=128, matmul=32, repeats=1, device="cpu",
        output=tmp_path / "tpu.json",
    )  # fmt: skip
    report = benchmark_gpu.main(config)
    assert len(report["checks"]) == 2 * len(masks)
    failed = [(row["contestant"], row["mask"]) for row in report["checks"] if "error" in row]
    assert failed == [("splash", mask) for mask in masks if mask == "alibi"]
    assert all(row["passed"] for row in report["checks"] if "error" not in row)
    for row in report["cases"]:
        assert row["seconds"].keys() | row["errors"].keys() == {"tpu", "splash"}
    text = config.output.with_suffix(".md").read_text()
    assert "| mask | tpu | splash |" in text
    assert "PyTorch" not in text
    assert ("- splash, alibi: splash has no alibi" in text) == ("alibi" in masks)
    assert ("- not checked: splash alibi" in text) == ("alibi" in masks)


def test_one_process_runs_all_contestants(tmp_path: Path, monkeypatch: Any) -> None:
    """After a kill another one goes on; the strike is that of the contestant that hung."""
    script = tmp_path / "worker.py"
    script.write_text(HANGS.format(path=str(EXPERIMENTS)))
    crew, started = benchmark_gpu.Crew(TpuConfig(device="cpu"), tmp_path), []

    def start(name: str) -> Contestant:
        started.append(name)
        return Contestant(name, script, log=crew._log(name))

    monkeypatch.setattr(crew, "_start", start)
    assert crew.ask("one", 5, a=1) == crew.ask("two", 5, a=1) == {"a": 1}
    assert len(started) == 1
    assert "killed" in crew.ask("two", 0.2, hang=True)["error"]
    assert crew.ask("one", 5, a=1) == {"a": 1}
    assert len(started) == 2
    assert crew.strikes == {"two": 1}
    assert crew.workers == 1
    crew.close()


def test_the_most_valuable_cells_come_first() -> None:
    order = [
        benchmark_gpu.name_of(case) for group in benchmark_gpu.groups(TpuConfig()) for case in group
    ]
    assert order[:2] == [
        ("causal", "forward", 8192, 128),
        ("causal", "forward+backward", 8192, 128),
    ]
    assert len(order) == len(set(order)) == 5 * 2 * 2 * 5
    assert {T for _, _, T, _ in order} == {2048, 4096, 8192, 16384, 32768}


def test_a_worker_of_its_own(tmp_path: Path) -> None:
    crew = benchmark_gpu.Crew(GpuConfig(device="cpu"), tmp_path)
    said = crew.ask("auto", hello=True)
    assert said["platform"] == "cpu"
    assert "tiled" in said["backends"]
    assert "Error" in crew.ask("auto", prepare={"mask": "none such"})["error"]
    crew.close()


def test_wrong_results_are_seen(tmp_path: Path) -> None:
    gold = np.random.default_rng(0).normal(size=(2, 8, 2, 4)).astype(np.float32)
    np.savez(tmp_path / "gold.npz", out=gold)
    np.savez(tmp_path / "near.npz", out=gold * 1.004)
    np.savez(tmp_path / "off.npz", out=np.roll(gold, 1, axis=1))
    np.savez(tmp_path / "nan.npz", out=np.where(gold > 2, np.nan, gold))

    def error(name: str) -> float:
        path, against = str(tmp_path / f"{name}.npz"), str(tmp_path / "gold.npz")
        return benchmark_gpu.compared(path, against)["out"]

    assert error("near") == pytest.approx(0.004, rel=0.01)
    assert error("near") <= benchmark_gpu.TOLERANCE["out"] < error("off")
    assert error("nan") == float("inf")


# --- ordinary shapes ------------------------------------------------------------------------------


def test_there_are_40_shapes_that_fit() -> None:
    assert len(SHAPES) == len(set(SHAPES.values())) == 40
    for B, T, S, N, K, _ in SHAPES.values():
        assert N % K == 0
        assert 4 * B * N * T * S < 2**30


def test_causal_is_for_equal_lengths() -> None:
    found = list(benchmark_shapes.cells(ShapesConfig()))
    assert len(set(found)) == len(found)
    unequal = {name for name, shape in SHAPES.items() if shape.T != shape.S}
    assert {c.mask for c in found if c.name in unequal} == {"none", "padding"}
    assert {c.mask for c in found if c.name not in unequal} == set(ShapesConfig.masks)


@pytest.mark.parametrize("mask", ShapesConfig.masks)
def test_both_compute_the_same(mask: Any) -> None:
    cell = benchmark_shapes.Cell("tiny-16", mask, "float32", "forward+backward")
    mine = benchmark_shapes.run_of(benchmark_shapes.ours(cell, "auto"), cell)()
    other = benchmark_shapes.run_of(benchmark_shapes.theirs(cell), cell)()
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_suite_of_shapes_is_rehearsed(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "shapes.json"
    config = ShapesConfig(
        only="tiny-8", masks=("none", "both"), dtypes=("float32",), seconds=0, matmul=64,
        output=output,
    )  # fmt: skip
    benchmark_shapes.main(config)
    report = json.loads(output.read_text())
    assert len(report["cells"]) == 2 * len(config.passes)
    assert all(row["ratio"] > 0 and row["backend"] == "rows" for row in report["cells"])
    assert report["summary"]["cells"] == len(report["cells"])
    assert set(report["matmul"]) == {"float32", "bfloat16"}
    assert output.with_suffix(".png").exists()
    assert output.with_suffix(".md").read_text().count("| tiny-8 |") == 2
    assert "geometric mean, float32 forward" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        benchmark_shapes.main(ShapesConfig(only="no such shape", matmul=0, output=output))


SCHEDULED = """
%body (p: f32[8]) -> f32[8] {
  %start.1 = ((f32[8]{0}, f32[8]{0}), (f32[8]{0}, f32[8]{0})) collective-permute-start(%a, %b)
  %start.2 = (pred[8]{0}, pred[8]{0}) collective-permute-start(%c)
  %add.1 = f32[8]{0} add(%a, %b)
  %found.1 = f32[8]{0} conditional(%flag, %a, %b), branch_computations={%x, %y}
  %done.1 = (f32[8]{0}, f32[8]{0}) collective-permute-done(%start.1), metadata={op_name="jit(f)"}
  %done.2 = pred[8]{0} collective-permute-done(%start.2)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %start.3 = (f32[8]{0}, f32[8]{0}) collective-permute-start(f32[8]{0} %p)
  %done.3 = f32[8]{0} collective-permute-done((f32[8]{0}, f32[8]{0}) %start.3)
  ROOT %last = f32[8]{0} collective-permute(%done.3)
}
"""


def test_a_transfer_is_hidden_by_what_is_computed_before_it_ends() -> None:
    assert compile_parallel.transfers(SCHEDULED) == [
        ("a loop", "start.1", ("conditional",)),
        ("the program", "start.3", ()),
        ("the program", "last", ()),
    ]
