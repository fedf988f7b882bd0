"""The torch engine: any transformers causal LM, on CPU, CUDA, ROCm and MPS from one code path."""

from swarm.engine.torch.engine import TorchEngine

__all__ = ["TorchEngine"]
