"""TensorRT engines: building, keeping and finding them; needs neither torch nor onnx."""
