"""Export trained networks: ONNX, int8, plain run folders, the Hugging Face Hub."""
