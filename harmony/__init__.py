"""WHAT is learned: the method as plain PyTorch modules. No files, no processes, no DeepSpeed."""
