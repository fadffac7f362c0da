"""Networks, loaders and samplers: plain torch and ONNX, no Ray."""
