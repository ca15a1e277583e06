# The files of the kernels, one list per area.
set(FOLOVLLM_KERNEL_SOURCES cpu_features.cpp thread_pool.cpp)
set(FOLOVLLM_BINDING_SOURCES bind_linear.cpp bind_attention.cpp bind_fused.cpp bind_quant.cpp)
set(FOLOVLLM_TESTS thread_pool_test)

# Linear layers.
list(APPEND FOLOVLLM_KERNEL_SOURCES)
list(APPEND FOLOVLLM_TESTS)

# Attention.
list(APPEND FOLOVLLM_KERNEL_SOURCES)
list(APPEND FOLOVLLM_TESTS)

# Elementwise and sampling.
list(APPEND FOLOVLLM_KERNEL_SOURCES)
list(APPEND FOLOVLLM_TESTS)

# Quantised linear layers.
list(APPEND FOLOVLLM_KERNEL_SOURCES)
list(APPEND FOLOVLLM_TESTS)
