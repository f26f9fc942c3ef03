"""The GPU benchmark is run where no test runs: here all of it but CUDA."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Shape

TINY = {"tiny": Shape(blocks=2, hidden=32, intermediate=64, heads=4, kv_heads=2, vocabulary=50)}


@pytest.fixture(scope="module")
def section() -> dict[str, object]:
    cpu = torch.device("cpu")
    return gpu.section("tiny/8/2", 1, cpu, models=TINY, cohorts=(1, 3))


def test_a_section_has_a_row_for_every_contender_and_precision(section: dict[str, object]) -> None:
    rows = section["rows"]
    assert isinstance(rows, list)
    names = [(row["contender"], row["precision"]) for row in rows]
    expected = ["peft", "cohort 1", "cohort 3", "one adapter 3"]
    assert names == [(name, p) for p in ("fp32", "tf32", "bf16") for name in expected]
    for row in rows:
        assert row["ms_a_sample"]["median"] > 0
        assert row["tokens_a_sample"] == 8
        assert row["share_of_gemm"].keys() == {"peak", "model"}


def test_memory_is_modelled_for_as_many_sites_as_are_in_a_pass(section: dict[str, object]) -> None:
    shape = Shape(blocks=2, hidden=64, intermediate=128, heads=4, kv_heads=4, vocabulary=50)
    engines, _ = gpu._engines(shape, torch.device("cpu"))
    examples = gpu.contenders.random_rows(50, 64, 32, 0)
    size = gpu.Size(2, (1, 4), tokens=1, widest=10_000)
    fp32 = [c for c in gpu.contenders.line_up(engines, examples, size) if c.precision == "fp32"]
    bytes_of = {c.name: gpu._modelled(shape, c, 64, 2) for c in fp32}
    base = 4 * fp32[0].engine.base.shapes.parameters
    assert bytes_of["cohort 1"] == bytes_of["peft"] > base
    assert bytes_of["cohort 4"] - base == pytest.approx(4 * (bytes_of["cohort 1"] - base))
    assert bytes_of["one adapter 4"] < bytes_of["cohort 4"]


def test_the_nominal_work_counts_weights_by_tokens_and_the_output_layer_by_answers() -> None:
    base = gpu.random_base(TINY["tiny"], "fp32", torch.device("cpu"))
    block = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64  # q; k, v; o; gate, up, down
    assert gpu.contenders.weights(base.model) == (2 * block, 50 * 32)
    examples = gpu.contenders.random_rows(50, 8, 32, 0)
    own = [gpu.contenders.site_batches(examples, 0, 2, 3)]
    made = gpu.contenders.engines({"fp32": base})
    contender = gpu.Contender("peft", 1, made["peft", "fp32"], "fp32", own)
    assert contender.samples == 6
    assert contender.flop == 4 * (2 * block * 6 * 8 + 50 * 32 * 6 * 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpu"])
        with pytest.raises(SystemExit, match="needs a GPU"):
            gpu.main()


def test_neither_ray_nor_flower_is_needed() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("ray", "flwr", "flwr_datasets", "datasets", "grpc", "server"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import benchmarks.gpu
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
