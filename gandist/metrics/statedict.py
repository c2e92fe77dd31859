"""The tensors of an old `torch.save` file, read from its opcodes and never unpickled: nothing is imported, nothing called."""

from __future__ import annotations

import io
import math
import pickletools
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gandist.recipe import InputError

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what torch wrote before 1.6, and on request after it
MAX_OPCODES = 1_000_000

_DICTIONARY, _REBUILD = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
_STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
}


@dataclass(frozen=True)
class _Global:
    """A name that the file says, of those that a state dict needs; it is compared and never looked up."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _Plan:
    """A tensor to be: a strided view of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _natural(*values: object) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _storage(identity: object) -> _Storage:
    match identity:
        case ("storage", _Global(name), str(key), str(), int(numel), None) if name in _STORAGES and _natural(numel):
            return _Storage(key, _STORAGES[name], numel)
    raise ValueError("a storage is not described as torch does")


def _plan(arguments: object) -> _Plan:
    match arguments:
        case (_Storage() as storage, int(offset), tuple(size), tuple(stride), bool(), dict(hooks), *_) if (
            _natural(offset, *size, *stride) and len(size) == len(stride) and not hooks
        ):
            last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
            numel = math.prod(size)
            if numel and (last >= storage.numel or numel > storage.numel):  # a stride of 0 could ask for any memory
                raise ValueError(f"a tensor of {list(size)} reaches beyond its storage of {storage.numel} values")
            return _Plan(storage, offset, size, stride)
    raise ValueError("a tensor is not described as torch does")


def _reduced(function: object, arguments: object) -> object:
    if function == _Global(_DICTIONARY) and arguments == ():
        return {}
    if function == _Global(_REBUILD):
        return _plan(arguments)
    raise ValueError("calls something else than a tensor's builder")


def _put(dictionary: object, items: list[Any]) -> None:
    if type(dictionary) is not dict or len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
        raise ValueError("sets an item of something that is no dictionary, or under a key that is no text")
    dictionary.update(zip(items[::2], items[1::2], strict=True))


def _evaluate(file: BinaryIO) -> Any:
    """The value that the opcodes up to the next STOP make of plain values, `_Storage` and `_Plan`; all else is refused."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under each mark
    memo: dict[int, Any] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count > MAX_OPCODES:
            raise ValueError(f"has more than {MAX_OPCODES} opcodes")
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                value = stack.pop()
                if stack or below:
                    raise ValueError("ends with values left over")
                return value
            case "MARK":
                below.append(stack)
                stack = []
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE":
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "TUPLE1":
                stack[-1:] = [(stack[-1],)]
            case "TUPLE2":
                stack[-2:] = [(stack[-2], stack[-1])]
            case "TUPLE3":
                stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
            case "TUPLE":
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                if opcode.name == "APPEND":
                    items = [stack.pop()]
                else:
                    items, stack = stack, below.pop()
                if type(stack[-1]) is not list:
                    raise ValueError("appends to something that is no list")
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _put(stack[-1], [key, value])
            case "SETITEMS":
                items, stack = stack, below.pop()
                _put(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[int(argument or 0)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[int(argument or 0)])
            case "GLOBAL" if argument in (_DICTIONARY, _REBUILD, *_STORAGES):
                stack.append(_Global(argument))
            case "GLOBAL":
                raise ValueError(f"names {str(argument)[:80]!r}")
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_reduced(function, arguments))
            case "BUILD":  # the attributes of the dictionary: versions of its modules, which nothing here reads
                attributes = stack.pop()
                if type(attributes) is not dict or type(stack[-1]) is not dict:
                    raise ValueError("sets attributes of something that is no dictionary")
            case other:
                raise ValueError(f"has the opcode {other}")
    raise ValueError("ends before it is complete")


def _read(file: BinaryIO, storage: _Storage) -> Tensor:
    size = storage.numel * storage.dtype.itemsize
    length, data = file.read(8), file.read(size)
    if len(length) != 8 or int.from_bytes(length, "little") != storage.numel or len(data) != size:
        raise ValueError(f"the storage {storage.key!r} does not have the {storage.numel} values that it should")
    return torch.frombuffer(bytearray(data), dtype=storage.dtype) if size else torch.empty(0, dtype=storage.dtype)


def read_state_dict(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors by name of a file `name` with these bytes; raises InputError for anything but a plain state dict.

    A pickle is a program. Of its language only what writes dictionaries, numbers and tensors is understood here, and a tensor
    is a view of bytes that are there.
    """
    file = io.BytesIO(data)
    try:
        if _evaluate(file) != MAGIC or _evaluate(file) != PROTOCOL:
            raise ValueError("is not in torch's format of before 1.6")
        system, state, keys = _evaluate(file), _evaluate(file), _evaluate(file)
        if type(system) is not dict or system.get("little_endian") is not True:
            raise ValueError("is not little-endian")
        if type(state) is not dict or not all(isinstance(plan, _Plan) for plan in state.values()):
            raise ValueError("holds something else than tensors")
        storages: dict[str, _Storage] = {}
        for plan in state.values():
            if storages.setdefault(plan.storage.key, plan.storage) != plan.storage:
                raise ValueError(f"describes the storage {plan.storage.key!r} twice")
        if type(keys) is not list or len(keys) != len(storages) or set(keys) != set(storages):
            raise ValueError("lists other storages than its tensors have")
        values = {key: _read(file, storages[key]) for key in keys}
        if file.read(1):
            raise ValueError("goes on after its end")
    except (ValueError, TypeError, LookupError) as error:
        raise InputError(f"{name}: {error}; only a plain dictionary of tensors is read, and no program") from None
    return {
        key: values[plan.storage.key].as_strided(plan.size, plan.stride, plan.offset).clone()
        for key, plan in state.items()
    }
