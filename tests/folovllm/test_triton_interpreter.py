"""The Triton kernels without a GPU: in Triton's interpreter, and through its compiler."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNEL_TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests/gpu").glob("test_triton_*.py"))
DEADLINE_S = 280

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_kernels_pass_their_tests_in_the_interpreter():
    # A process of its own: Triton decides when it is imported whether it interprets.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, KERNEL_TESTS)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=DEADLINE_S)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout


SMALLEST_SHARED_MEMORY = {86: 99 * 1024, 90: 227 * 1024}


@needs_triton
@pytest.mark.parametrize("capability", SMALLEST_SHARED_MEMORY)
@pytest.mark.parametrize(("dtype", "head_size", "query_len"), [("bf16", 128, 1), ("fp16", 256, 512)])
def test_attention_compiles_into_the_cards_shared_memory(
    dtype, head_size, query_len, capability, tmp_path, monkeypatch
):
    # A compiler's cache of its own, and no word on its default for fused multiply-adds, which calls set.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget

    from folovllm.attention import triton_unified as kernels

    plan = kernels.make_plan(
        kernels.HeadShape(2, 8, head_size, 4 if dtype == "fp32" else 2), 1, query_len, query_len, 4096, 132
    )
    constants = kernels.kernel_constants(plan, 16, head_size, 2, 16)
    names = kernels.unified_attention_kernel.arg_names
    result = "fp32" if plan.num_splits > 1 else dtype
    types = {"query_ptr": dtype, "kv_ptr": dtype, "output_ptr": result, "logs_ptr": result}
    types |= dict.fromkeys(["query_start_loc", "seq_lens", "block_tables"], "i32")
    signature = {name: f"*{types[name]}" if name in types else "i32" for name in names}
    signature |= {"scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    aligned = [name for name in names if name.endswith("_ptr") or (name.startswith("stride_") and name != "stride_table")]
    source = triton.compiler.ASTSource(
        kernels.unified_attention_kernel,
        signature,
        constants,
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": plan.num_warps, "num_stages": 2, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= SMALLEST_SHARED_MEMORY[capability]
