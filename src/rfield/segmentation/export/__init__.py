"""Trained networks for others: ONNX, int8, plain run folders, the Hugging Face Hub."""
