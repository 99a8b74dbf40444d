"""PyTorch: ``from headrace.torch import StreamingDataset, StreamingDataLoader``."""

from headrace.client.torch import StreamingDataLoader, StreamingDataset

__all__ = ["StreamingDataLoader", "StreamingDataset"]
