"""The Triton kernels without a GPU: in Triton's interpreter, and through its compiler."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KERNEL_TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests/gpu").glob("test_triton_*.py"))
DEADLINE_S = 900

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(DEADLINE_S + 60)
def test_kernels_pass_their_tests_in_the_interpreter():
    # A process of its own: Triton decides when it is imported whether it interprets.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, KERNEL_TESTS)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=DEADLINE_S)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout


SHARED_MEMORY = {86: 99 * 1024, 90: 227 * 1024}
"""What a program may take, by compute capability: the least of all cards, and Hopper."""


def compile_for(kernel: Any, capability: int, types: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
    """The kernel for a card that need not be there; parameters that `types` does not name are int32."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    signature = {name: types.get(name, "i32") for name in names} | dict.fromkeys(constants, "constexpr")
    aligned = [
        name for name in names if name.endswith("_ptr") or (name.startswith("stride_") and name != "stride_table")
    ]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True, **options})


@pytest.fixture(autouse=True)
def own_compiler_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@needs_triton
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(("dtype", "head_size", "query_len"), [("bf16", 128, 1), ("fp16", 256, 512)])
def test_attention_compiles_into_the_cards_shared_memory(dtype, head_size, query_len, capability):
    from folovllm.attention import triton_unified as kernels

    plan = kernels.make_plan(kernels.HeadShape(2, 8, head_size, 2), 1, query_len, query_len, 4096, 132)
    result = "*fp32" if plan.num_splits > 1 else f"*{dtype}"
    types = {"query_ptr": f"*{dtype}", "kv_ptr": f"*{dtype}", "output_ptr": result, "logs_ptr": result, "scale": "fp32"}
    types |= dict.fromkeys(["query_start_loc", "seq_lens", "block_tables"], "*i32")
    compiled = compile_for(
        kernels.unified_attention_kernel,
        capability,
        types,
        kernels.kernel_constants(plan, 16, head_size, 2, 16),
        num_warps=plan.num_warps,
        num_stages=3,
    )
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]


@needs_triton
def test_the_other_kernels_compile():
    from folovllm.attention import triton_unified, triton_write
    from folovllm.ops import triton_ops
    from folovllm.sample.ops import triton_nucleus

    bf16, fp32, i64 = "*bf16", "*fp32", "*i64"
    head = {"HEAD": 128, "HEAD_PADDED": 128}
    kernels: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
        (
            triton_unified.reduce_splits_kernel,
            {"parts_ptr": fp32, "logs_ptr": fp32, "output_ptr": bf16},
            {"NUM_SPLITS": 64, **head},
        ),
        (
            triton_write.write_kv_kernel,
            {"kv_ptr": bf16, "key_ptr": bf16, "value_ptr": bf16, "slot_blocks": i64, "slot_offsets": i64},
            {"NUM_KV_HEADS": 8, "HEADS_PADDED": 8, **head},
        ),
        (
            triton_ops.rms_norm_kernel,
            {**dict.fromkeys(["x_ptr", "residual_ptr", "weight_ptr", "out_ptr"], bf16), "eps": "fp32"},
            {"SIZE": 1024, "BLOCK": 1024, "HAS_RESIDUAL": True},
        ),
        (
            triton_ops.silu_mul_kernel,
            {"gate_up_ptr": bf16, "out_ptr": bf16},
            {"SIZE": 3072, "BLOCK": 1024},
        ),
        (
            triton_ops.rotate_and_write_kernel,
            {
                **dict.fromkeys(["qkv_ptr", "query_ptr", "kv_ptr", "cos_sin_ptr", "q_norm_ptr", "k_norm_ptr"], bf16),
                **dict.fromkeys(["positions", "slot_mapping"], i64),
                "eps": "fp32",
            },
            {"NUM_HEADS": 16, "NUM_KV_HEADS": 8, "BLOCK_SIZE": 16, "HALF": 64, "HALF_PADDED": 64, "HAS_NORM": True},
        ),
        (
            triton_nucleus.wide_nucleus_kernel,
            {
                **dict.fromkeys(["logits_ptr", "top_p_ptr", "uniform_ptr"], fp32),
                "is_wide_ptr": "*i1",
                "tokens_ptr": i64,
            },
            {"BLOCK": 4096},
        ),
    ]
    for kernel, types, constants in kernels:
        compile_for(kernel, 90, types, constants)
