"""The device side: run artifacts and check them; no torch, no onnx."""
