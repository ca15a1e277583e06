"""The model: its layers, its architectures and how a checkpoint fills them."""
