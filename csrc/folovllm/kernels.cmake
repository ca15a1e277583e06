# The files of the kernels, one list per area.
set(FOLOVLLM_KERNEL_SOURCES cpu_features.cpp thread_pool.cpp recording.cpp step_inputs.cpp)
set(FOLOVLLM_BINDING_SOURCES bind_linear.cpp bind_attention.cpp bind_fused.cpp bind_sampling.cpp bind_quant.cpp
    bind_recording.cpp bind_step_inputs.cpp)
set(FOLOVLLM_TESTS thread_pool_test)

# Linear layers.
list(APPEND FOLOVLLM_KERNEL_SOURCES number_formats.cpp packed_weights.cpp packed_linear.cpp gemm.cpp gemm_portable.cpp
     gemm_avx2.cpp gemm_avx512.cpp gemm_avx512_bf16.cpp gemm_amx.cpp)
list(APPEND FOLOVLLM_TESTS packed_linear_test)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  # gcc 12 finds its own intrinsics uninitialised (its bug 105593).
  set(FOLOVLLM_GEMM_OPTIONS -Wno-uninitialized -Wno-maybe-uninitialized -mavx2 -mfma -mf16c)
  set(FOLOVLLM_GEMM_512_OPTIONS ${FOLOVLLM_GEMM_OPTIONS} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  set_source_files_properties(gemm_avx2.cpp PROPERTIES COMPILE_OPTIONS "${FOLOVLLM_GEMM_OPTIONS}")
  set_source_files_properties(gemm_avx512.cpp PROPERTIES COMPILE_OPTIONS "${FOLOVLLM_GEMM_512_OPTIONS}")
  set_source_files_properties(gemm_avx512_bf16.cpp gemm_amx.cpp PROPERTIES
                              COMPILE_OPTIONS "${FOLOVLLM_GEMM_512_OPTIONS};-mavx512bf16")
endif()

# Attention.
list(APPEND FOLOVLLM_KERNEL_SOURCES attention_paged.cpp attention_plan.cpp attention_portable.cpp)
list(APPEND FOLOVLLM_TESTS attention_test)
# The order and rounding of operations is part of the contract: no contraction but the fma that are written.
set(FOLOVLLM_ATTENTION_OPTIONS -ffp-contract=off)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND FOLOVLLM_KERNEL_SOURCES attention_avx2.cpp attention_avx512.cpp attention_avx512_bf16.cpp
       attention_amx.cpp)
  # gcc 12 finds its own intrinsics uninitialised (its bug 105593).
  set(FOLOVLLM_ATTENTION_AVX2 ${FOLOVLLM_ATTENTION_OPTIONS} -Wno-uninitialized -Wno-maybe-uninitialized
                              -mavx2 -mfma -mf16c)
  set(FOLOVLLM_ATTENTION_AVX512 ${FOLOVLLM_ATTENTION_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  set_source_files_properties(attention_avx2.cpp PROPERTIES COMPILE_OPTIONS "${FOLOVLLM_ATTENTION_AVX2}")
  set_source_files_properties(attention_avx512.cpp PROPERTIES COMPILE_OPTIONS "${FOLOVLLM_ATTENTION_AVX512}")
  set_source_files_properties(attention_avx512_bf16.cpp attention_amx.cpp PROPERTIES
                              COMPILE_OPTIONS "${FOLOVLLM_ATTENTION_AVX512};-mavx512bf16")
endif()
set_source_files_properties(attention_portable.cpp PROPERTIES COMPILE_OPTIONS "${FOLOVLLM_ATTENTION_OPTIONS}")

# Elementwise and sampling. One source, compiled for each level of instructions; contracted to fused multiply-adds only
# where they are written, so that all levels give the same bits.
list(APPEND FOLOVLLM_KERNEL_SOURCES fused_ops.cpp fused_portable.cpp fused_avx2.cpp fused_avx512.cpp)
list(APPEND FOLOVLLM_KERNEL_SOURCES sampling.cpp sampling_row.cpp sampling_top.cpp sampling_ranks.cpp
     sampling_portable.cpp sampling_avx2.cpp sampling_avx512.cpp)
list(APPEND FOLOVLLM_TESTS fused_test sampling_test)
# gcc 12 finds its own intrinsics uninitialised (its bug 105593).
set(FOLOVLLM_LEVEL_OPTIONS -ffp-contract=off -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized)
set_source_files_properties(fused_portable.cpp sampling_portable.cpp PROPERTIES
                            COMPILE_OPTIONS "${FOLOVLLM_LEVEL_OPTIONS}")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(FOLOVLLM_AVX2_OPTIONS ${FOLOVLLM_LEVEL_OPTIONS} -mavx2 -mfma -mf16c)
  set(FOLOVLLM_AVX512_OPTIONS ${FOLOVLLM_AVX2_OPTIONS} -mavx512f -mavx512bw -mavx512dq -mavx512vl
                              -mprefer-vector-width=512)
  set_source_files_properties(fused_avx2.cpp sampling_avx2.cpp PROPERTIES COMPILE_OPTIONS "${FOLOVLLM_AVX2_OPTIONS}")
  set_source_files_properties(fused_avx512.cpp sampling_avx512.cpp PROPERTIES
                              COMPILE_OPTIONS "${FOLOVLLM_AVX512_OPTIONS}")
endif()

# Quantised linear layers.
list(APPEND FOLOVLLM_KERNEL_SOURCES
     quantized_linear.cpp
     quantized_forward.cpp
     quantized_kernel_portable.cpp
     quantized_kernel_avx2.cpp
     quantized_kernel_avx512.cpp
     quantized_kernel_avx512_bf16.cpp
     quantized_kernel_vnni.cpp
     quantized_kernel_amx.cpp)
list(APPEND FOLOVLLM_TESTS quantized_linear_test)
# gcc 12 finds its own intrinsics uninitialised (its bug 105593).
set_source_files_properties(quantized_kernel_avx2.cpp quantized_kernel_avx512.cpp quantized_kernel_avx512_bf16.cpp
                            quantized_kernel_vnni.cpp PROPERTIES COMPILE_OPTIONS "-Wno-uninitialized;-Wno-maybe-uninitialized")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set_source_files_properties(quantized_kernel_amx.cpp PROPERTIES
                              COMPILE_OPTIONS "${FOLOVLLM_GEMM_512_OPTIONS};-mavx512bf16")
endif()

# gcc 12 turns a loop over rows into vectors that read a row too many, which may lie beyond its page.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set_property(SOURCE gemm_portable.cpp attention_portable.cpp quantized_kernel_portable.cpp
               APPEND PROPERTY COMPILE_OPTIONS -fno-tree-loop-vectorize)
endif()
