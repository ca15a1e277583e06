"""Kernels of the engine on a CPU (csrc/folovllm).

Tensors are passed as addresses (`Tensor.data_ptr()`); shapes are in elements and rows are contiguous unless a stride is
given. Callers check what they pass: a wrong size is memory corruption, so only the faces in `folovllm` call these.
All release the GIL, and run on the pool of `set_num_threads`. `dtype` is "float32", "bfloat16" or "float16".
"""

import numpy as np
import numpy.typing as npt

def set_num_threads(num_threads: int, cpus: list[int] = ...) -> None:
    """Run kernels on this many threads, the caller's included; thread i is pinned to cpus[i] unless `cpus` is empty.

    Raises:
        ValueError: not 1 to 256, or fewer cpus than threads.
        RuntimeError: a cpu that this process may not use.
    """

def num_threads() -> int:
    """Threads that kernels run on; at first one per cpu this process may use."""

def detected_isa() -> str:
    """The best of "portable", "avx2", "avx512", "avx512_bf16", "amx" that this machine has."""

def current_isa() -> str:
    """What kernels use: the best there is, unless limited."""

def limit_isa(name: str) -> None:
    """Use at most this instruction set; not while a kernel runs.

    Raises:
        ValueError: no such instruction set.
    """

# -- linear layers --------------------------------------------------------------------------------------------------

class PackedLinear:
    """A linear layer whose weights are packed once, in the order in which every kernel reads them.

    `dtype` is that of the weights and of the activations. All weights are zero at first. One thread fills, then any
    number may call `forward` at once.

    Raises:
        ValueError: an unknown dtype, a size below 1, rows that the layer does not have.
        MemoryError: no room for the weights.
    """

    def __init__(self, out_features: int, in_features: int, dtype: str) -> None: ...
    def fill(self, first_row: int, num_rows: int, source: int, row_stride: int, source_dtype: str) -> None:
        """Pack rows [first_row, first_row + num_rows) from [num_rows, in_features] of any dtype at `source`."""

    def set_bias(self, source: int, source_dtype: str) -> None:
        """Add [out_features] to every result; kept as float32."""

    def forward(
        self,
        x: int,
        num_rows: int,
        x_stride: int,
        out: int,
        out_stride: int,
        out_dtype: str,
        batch_invariant: bool = False,
    ) -> None:
        """out [num_rows, out_features] = x [num_rows, in_features] @ weights.T + bias.

        `out_dtype` is "float32" or the layer's dtype. A row of the result has the same bits whatever the other rows and
        the number of threads are; whatever `num_rows` is, too, in float32 and float16, and in bfloat16 with
        `batch_invariant`.
        """

    def forward_silu_mul(
        self, x: int, num_rows: int, x_stride: int, out: int, out_stride: int, batch_invariant: bool = False
    ) -> None:
        """out [num_rows, out_features / 2] = silu(gate) * up, where `forward` gives rows [gate | up]: the same bits.

        Raises:
            ValueError: out_features is no multiple of 32.
        """

    def unpack(self, first_row: int, num_rows: int, out: int) -> None:
        """Write rows of the weights to `out`: [num_rows, in_features] of the layer's dtype."""

    def gather(self, ids: int, num_rows: int, out: int) -> None:
        """Write the rows `ids` (int32 [num_rows], all of them there) likewise: an embedding that is the output head."""

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights, padding included."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...

# -- attention ------------------------------------------------------------------------------------------------------

class PagedAttention:
    """Causal attention over the paged cache `[num_blocks, 2, num_kv_heads, block_size, head_size]` of one layer.

    `dtype` is that of query, cache and out. Calls on one object take turns.

    Raises:
        ValueError: num_heads is no multiple of num_kv_heads, an odd head size or one above 512, a size below 1, an
            unknown dtype.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_size: int, block_size: int, scale: float, dtype: str
    ) -> None: ...
    def forward(
        self,
        query: int,
        query_stride: int,
        kv_cache: int,
        query_start_loc: int,
        seq_lens: int,
        block_tables: int,
        block_table_stride: int,
        num_reqs: int,
        out: int,
        out_stride: int,
        batch_invariant: bool = False,
    ) -> None:
        """out [num_tokens, num_heads * head_size] = attention of the query rows, which are laid out like out.

        Request i owns the rows [query_start_loc[i], query_start_loc[i + 1]), the last of its seq_lens[i] tokens, whose
        K and V are in the blocks block_tables[i]; these three are int32. A row of the result has the same bits whatever
        the other rows, the chunk it is computed in and the number of threads: always for float32 and float16, and for
        bfloat16 with `batch_invariant`.
        """

# -- elementwise and sampling ---------------------------------------------------------------------------------------

def rms_norm(x: int, x_stride: int, weight: int, out: int, num_rows: int, size: int, eps: float, dtype: str) -> None:
    """out = x / rms(x) * weight, rounded to `dtype` before the product; rows of x are `x_stride` elements apart."""

def add_rms_norm(
    x: int, residual: int, weight: int, out: int, num_rows: int, size: int, eps: float, dtype: str
) -> None:
    """residual += x, then out = residual / rms(residual) * weight. All `[num_rows, size]`; `out` may be `x`."""

def silu_mul(gate_up: int, out: int, num_rows: int, size: int, dtype: str) -> None:
    """`[num_rows, 2 * size]` of gate and up -> silu(gate) * up `[num_rows, size]`."""

def embed(
    table: int, row_stride: int, ids: int, num_rows: int, size: int, out: int, table_dtype: str, dtype: str
) -> None:
    """out[i] = table[ids[i]] (int32 ids), converted to `dtype`; rows of the table are `row_stride` elements apart."""

class QKVLayout:
    """What all steps of one attention layer share; keeps addresses, so the owner keeps the tensors.

    Args:
        block_size: tokens per block of the KV cache.
        cos_sin: `[max_positions, head_size]`: cos of head_size / 2 angles, then sin.
        q_norm: `[head_size]` weight of the RMS norm of queries; 0 for none.
        k_norm: the same of keys.
        eps: of the norms.

    Raises:
        ValueError: a size below 1, an odd head_size, or an unknown dtype.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        block_size: int,
        dtype: str,
        cos_sin: int,
        q_norm: int = 0,
        k_norm: int = 0,
        eps: float = 0.0,
    ) -> None: ...

def rotate_and_write(
    layout: QKVLayout,
    qkv: int,
    qkv_stride: int,
    positions: int,
    slot_mapping: int,
    kv_cache: int,
    query: int,
    num_tokens: int,
) -> None:
    """Norm (if any) and rotation of queries and keys; keys and values go to their slots.

    Args:
        layout: of the layer.
        qkv: rows [q heads | k heads | v heads].
        qkv_stride: elements from row to row.
        positions: `[num_tokens]` int64.
        slot_mapping: `[num_tokens]` int64; the key and value of a slot below 0 are not written.
        kv_cache: `[num_blocks, 2, num_kv_heads, block_size, head_size]`.
        query: receives `[num_tokens, num_heads * head_size]`.
        num_tokens: rows of the step.
    """

def argmax(logits: int, num_rows: int, vocab_size: int, row_stride: int, dtype: str, out: int) -> None:
    """The lowest index of the largest logit of each row, int64; NaN is passed over, and 0 is taken for a row of NaN."""

def sample(
    logits: int,
    num_rows: int,
    vocab_size: int,
    row_stride: int,
    temperature: int,
    top_k: int,
    top_p: int,
    min_p: int,
    uniform: int,
    out: int,
) -> None:
    """One token per row from softmax(logits / temperature), restricted by min_p, then top_k, then top_p.

    A row's token depends on nothing but the row, its options and its uniform number. Tokens are ordered by falling
    logit, then id, if top_k or top_p restricts the row, else by id.

    Args:
        logits: fp32, not changed.
        num_rows: rows of logits.
        vocab_size: logits of a row.
        row_stride: elements from row to row.
        temperature: `[num_rows]` fp32 above 0; address 0: 1 for all.
        top_k: `[num_rows]` int64, 0 keeps all; address 0: all for all.
        top_p: `[num_rows]` fp32, 1 keeps all; address 0: all for all.
        min_p: `[num_rows]` fp32, 0 keeps all; address 0: all for all.
        uniform: `[num_rows]` fp64 in [0, 1).
        out: receives `[num_rows]` int64.
    """

# -- quantised linear layers ----------------------------------------------------------------------------------------

class QuantizedLinear:
    """A linear layer of GPTQ weights, packed once from the checkpoint's tensors (quantization/packing.py).

    W[n, k] = scale[g, n] * (q[n, k] - zero[g, n]), with g = k / group_size in the order of `set_permutation`. One
    thread fills, then any number may call `forward` at once.

    Raises:
        ValueError: bits other than 4 and 8, an unknown dtype, sizes that do not fill 32-bit words, columns that the
            layer does not have.
        MemoryError: no room for the weights.
    """

    def __init__(
        self, out_features: int, in_features: int, bits: int, group_size: int, dtype: str, scale_dtype: str
    ) -> None:
        """`dtype` is that of the activations, `scale_dtype` that of the checkpoint's scales."""

    def set_permutation(self, permutation: int) -> None:
        """Place i of K is input permutation[i], int32 [in_features]; before `fill`.

        Raises:
            ValueError: it is no permutation.
        """

    def fill(
        self,
        first_column: int,
        num_columns: int,
        qweight: int,
        qweight_stride: int,
        qzeros: int,
        qzeros_stride: int,
        scales: int,
        scales_stride: int,
        zero_offset: int,
    ) -> None:
        """Pack output columns from `first_column` on; strides in elements from row to row of the checkpoint's tensors.

        `zero_offset` is added to the stored zero points: 1 for the format "gptq", 0 for "gptq_v2".
        """

    def set_bias(self, bias: int) -> None:
        """Add float32 [out_features] to every result."""

    def forward(
        self,
        x: int,
        num_rows: int,
        x_stride: int,
        out: int,
        out_stride: int,
        out_dtype: str,
        batch_invariant: bool = False,
    ) -> None:
        """out [num_rows, out_features] = x [num_rows, in_features] @ weights.T + bias.

        A row of the result has the same bits whatever the other rows and the number of threads are; whatever
        `num_rows` is, too, in float32 and float16, and in bfloat16 with `batch_invariant`.
        """

    def unpack(self, first_column: int, num_columns: int, out: int) -> None:
        """Write dequantised columns to `out`: float32 [num_columns, in_features], inputs in the checkpoint's order."""

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights, scales and zero points, padding included."""

# -- recording ------------------------------------------------------------------------------------------------------

class Recording:
    """A forward pass remembered as the kernels it called; used by one thread.

    Sizes are those of a step: its tokens, its requests, and the elements from row to row of its block tables. The
    others, and all addresses, stay as recorded: who records keeps what they point at, the layers' objects included.
    """

    def begin(self, num_tokens: int, num_reqs: int, block_table_stride: int) -> None:
        """Remember the kernels that this thread calls from here on, and forget those of before.

        Raises:
            RuntimeError: this thread records already.
        """

    def end(self) -> bool:
        """Stop; False, and nothing is kept, when a kernel was called for another number of rows than the tokens'."""

    def run(self, num_tokens: int, num_reqs: int, block_table_stride: int) -> None:
        """Call the kernels again, for a step of these sizes. REQUIRES: `end` returned True."""

    @property
    def num_calls(self) -> int:
        """Kernels remembered."""

# -- inputs ---------------------------------------------------------------------------------------------------------

class DecodePreparer:
    """Writes the inputs of steps in which each request computes one token. Keeps addresses: the owner keeps the arrays.

    Args:
        token_ids: of the batch, `[num_rows, ...]`.
        block_table: of the batch, `[num_rows, ...]`.
        num_tokens: of the batch, `[num_rows]`.
        num_computed: of the batch, `[num_rows]`.
        block_size: tokens of a block.
        input_ids: receives one entry per request, as do the next five.
        positions: of the tokens.
        slots: where their keys and values go: slot_blocks * block_size + slot_offsets.
        slot_blocks: the block of each slot.
        slot_offsets: its token within the block.
        seq_lens: tokens with KV once the step is done.
        block_tables: receives `[num_reqs, max_blocks]`.
    """

    def __init__(
        self,
        token_ids: npt.NDArray[np.int32],
        block_table: npt.NDArray[np.int32],
        num_tokens: npt.NDArray[np.int64],
        num_computed: npt.NDArray[np.int64],
        block_size: int,
        input_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int64],
        slots: npt.NDArray[np.int64],
        slot_blocks: npt.NDArray[np.int64],
        slot_offsets: npt.NDArray[np.int64],
        seq_lens: npt.NDArray[np.int32],
        block_tables: npt.NDArray[np.int32],
    ) -> None: ...
    def prepare(self, rows: npt.NDArray[np.int64]) -> tuple[int, int]:
        """Compute the next token of each of these rows of the batch, and count it as computed.

        Returns:
            max_blocks, the blocks of the longest request; and how many requests' last known token this is.
        """
