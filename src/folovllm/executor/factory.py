"""Which executor a configuration asks for."""

from folovllm.config import EngineConfig
from folovllm.executor.abstract import Executor
from folovllm.executor.uniproc_executor import UniProcExecutor


def create_executor(config: EngineConfig) -> Executor:
    """Build the executor; the model is loaded when this returns.

    Raises:
        ModelLoadError: the checkpoint is unusable.
        ConfigError: an option is not possible on this device, or the KV connector cannot be loaded.
    """
    if config.parallel_config.tensor_parallel_size > 1:
        from folovllm.executor.multiproc_executor import MultiprocExecutor  # torch.distributed takes its time

        return MultiprocExecutor(config)
    return UniProcExecutor(config)
