"""ONNX's pooling nodes: their attributes, their layers, their indices, and what no layer computes."""
