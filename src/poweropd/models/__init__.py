"""Language models: loading, student and teacher, attention, sharding, sizes."""

#: Name of a dtype in a recipe -> the dtype, as "module:name".
DTYPES = {
    "bfloat16": "torch:bfloat16",
    "float16": "torch:float16",
    "float32": "torch:float32",
}
#: The name in a recipe of the dtype that suits the machine; `devices.dtype_here` knows which.
AUTO_DTYPE = "auto"
