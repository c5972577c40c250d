"""What trainers save beside weights, by the names that a pickle gives it.

Nothing of it is ever looked up, built or called: a name on this list is stepped over, any other refuses the
file.
"""

_PATHS = "Path PurePath PosixPath PurePosixPath WindowsPath PureWindowsPath"
_TYPES = "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple"
_NUMBERS = "bool float16 float32 float64 int8 int16 int32 int64 uint8 complex64 complex128"
_ARRAYS = "_frombuffer _reconstruct scalar"
_HARMLESS = {
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,  # in Python 3.13
    "datetime": "date time datetime timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID",
    "collections": "defaultdict Counter deque",
    "_codecs": "encode",  # how pickles of protocol 2 have bytes
    "builtins": _TYPES,
    "__builtin__": f"{_TYPES} long unicode xrange",  # what pickles of protocol 2 call it
    "typing": "Any",
    "numpy": f"{_NUMBERS} bool_ uint16 uint32 uint64 str_ bytes_ dtype ndarray",
    "numpy.dtypes": "BoolDType Float16DType Float32DType Float64DType Int8DType Int16DType Int32DType "
    "Int64DType UInt8DType UInt16DType UInt32DType UInt64DType",
    "numpy.core.multiarray": _ARRAYS,
    "numpy.core.numeric": _ARRAYS,
    "numpy._core.multiarray": _ARRAYS,  # since NumPy 2
    "numpy._core.numeric": _ARRAYS,
    "torch": f"{_NUMBERS} bfloat16 Size device",
    "torch.torch_version": "TorchVersion",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
    "lightning.pytorch.utilities.parsing": "AttributeDict",
    "lightning_fabric.utilities.data": "AttributeDict",
    "lightning.fabric.utilities.data": "AttributeDict",
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": "ValueNode AnyNode StringNode IntegerNode FloatNode BooleanNode BytesNode EnumNode "
    "PathNode",
    "easydict": "EasyDict",
    "yacs.config": "CfgNode",
    "mmengine.config.config": "Config ConfigDict",
    "mmengine.logging.history_buffer": "HistoryBuffer",
}
_NAMES = frozenset((module, name) for module, names in _HARMLESS.items() for name in names.split())


def is_harmless(module: str, name: str) -> bool:
    """Return whether what a pickle calls so only describes how weights came about."""
    return (module, name) in _NAMES
