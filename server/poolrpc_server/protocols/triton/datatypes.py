"""Datatypes of the Open Inference Protocol, and the dtypes that they stand for."""

DATATYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "BF16": "bfloat16",
    "FP32": "float32",
    "FP64": "float64",
}
"""The dtype of each datatype that a layer supports."""

DATATYPE_OF = {dtype: name for name, dtype in DATATYPES.items()}
"""The datatype of each dtype."""

UNSUPPORTED_DATATYPES = ("UINT32", "UINT64", "BYTES")
"""The protocol's other datatypes."""

CONTENTS_FIELDS = {
    "bool": "bool_contents",
    "uint8": "uint_contents",
    "uint16": "uint_contents",
    "int8": "int_contents",
    "int16": "int_contents",
    "int32": "int_contents",
    "int64": "int64_contents",
    "float32": "fp32_contents",
    "float64": "fp64_contents",
}
"""The field of InferTensorContents that holds the elements of each dtype; float16 and bfloat16 can only be raw."""
