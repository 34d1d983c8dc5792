"""Reads the pickles of a DCP directory as data: nothing is imported, nothing that a pickle names is called.

Python's own unpickler cannot be made safe for bytes that anyone may have written, even with an allow-list of classes:
a memo index makes it allocate gigabytes, a nested tuple as a key makes it hash for years, BUILD writes into whatever
is on the stack. So the few instructions that torch's pickles consist of are carried out here. What they make is text,
numbers, tuples, lists, dictionaries and `Record`s, never more of them than there are bytes.

Source: the comments on each opcode in Python's `pickletools`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass


class PickleRefused(ValueError):
    """The bytes are no pickle of the kind that is expected; says at which byte, and what is there."""


@dataclass(frozen=True, slots=True)
class Constructor:
    """What stands for a class or function of the allow-list: `make` turns the arguments of a call into the result.

    `make` raises ValueError for arguments that it does not take.
    """

    make: Callable[[tuple[object, ...]], object]


class Record:
    """An object of an allowed class: its class's `name`, the arguments of its construction, and its state, if any."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[object, ...] = ()) -> None:
        self.name = name
        self.arguments = arguments
        self.state: object = None


def record_of(name: str) -> Constructor:
    """The stand-in for a class whose objects become records."""
    return Constructor(lambda arguments: Record(name, arguments))


def read_pickle(
    content: bytes,
    allowed: Mapping[tuple[str, str], object],
    *,
    persistent: Callable[[object], object] | None = None,
) -> object:
    """The object that a pickle describes.

    `allowed` maps (module, name) to a `Constructor`, or to the value itself. `persistent` makes something of a
    persistent id. Keys of dictionaries are text or records. Raises PickleRefused. Takes time and memory in proportion
    to `content`.
    """
    machine = _Machine(content, allowed, persistent)
    try:
        return machine.run()
    except PickleRefused:
        raise
    except (IndexError, KeyError, struct.error):
        raise PickleRefused(f"ends, or has nothing to work on, at byte {machine.at} of {len(content)}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise PickleRefused(f"makes no sense before byte {machine.at}: {error}"[:500]) from None


_INT32 = struct.Struct("<i")
_UINT32 = struct.Struct("<I")
_UINT64 = struct.Struct("<Q")
_DOUBLE = struct.Struct(">d")


class _Machine:
    """The stack, the memo and the position of one pickle."""

    def __init__(
        self,
        content: bytes,
        allowed: Mapping[tuple[str, str], object],
        persistent: Callable[[object], object] | None,
    ) -> None:
        self.content = content
        self.at = 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        self.allowed = allowed
        self.persistent = persistent

    def run(self) -> object:
        content, instructions = self.content, _INSTRUCTIONS
        while True:
            opcode = content[self.at]
            if opcode == _STOP:
                break
            instruction = instructions[opcode]
            if instruction is None:
                raise PickleRefused(f"uses an instruction at byte {self.at} ({opcode:#04x}) that torch does not")
            self.at += 1
            instruction(self)
        if len(self.stack) != 1:
            raise PickleRefused(f"stops at byte {self.at} with {len(self.stack)} objects instead of one")
        return self.stack[0]

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.content):
            raise PickleRefused(f"ends before the {count} bytes that are announced at byte {self.at}")
        part = self.content[self.at : end]
        self.at = end
        return part

    def number(self, layout: struct.Struct) -> int:
        (value,) = layout.unpack_from(self.content, self.at)
        self.at += layout.size
        return int(value)

    def line(self) -> str:
        end = self.content.index(b"\n", self.at)
        text = self.content[self.at : end].decode()
        self.at = end + 1
        return text

    def since_mark(self) -> list[object]:
        start = self.marks.pop()
        if start > len(self.stack):
            raise PickleRefused(f"took more from the stack than there was before byte {self.at}")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def named(self, module: object, name: object) -> object:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleRefused(f"names a class by something that is no text, before byte {self.at}")
        try:
            return self.allowed[module, name]
        except KeyError:
            raise PickleRefused(
                f"carries {module[:200]}.{name[:200]} (before byte {self.at}), which is none of the classes that torch "
                "writes there; nothing of it was imported or executed"
            ) from None


def _proto(machine: _Machine) -> None:
    (version,) = machine.take(1)
    if version > 5:
        raise PickleRefused(f"is of version {version}")


def _frame(machine: _Machine) -> None:
    machine.take(8)  # how many bytes follow; they are all in memory already


def _mark(machine: _Machine) -> None:
    machine.marks.append(len(machine.stack))


def _memoize(machine: _Machine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _binput(machine: _Machine) -> None:
    machine.memo[machine.content[machine.at]] = machine.stack[-1]
    machine.at += 1


def _long_binput(machine: _Machine) -> None:
    machine.memo[machine.number(_UINT32)] = machine.stack[-1]


def _binget(machine: _Machine) -> None:
    machine.stack.append(machine.memo[machine.content[machine.at]])
    machine.at += 1


def _long_binget(machine: _Machine) -> None:
    machine.stack.append(machine.memo[machine.number(_UINT32)])


def _binint1(machine: _Machine) -> None:
    machine.stack.append(machine.content[machine.at])
    machine.at += 1


def _binint2(machine: _Machine) -> None:
    machine.stack.append(int.from_bytes(machine.take(2), "little"))


def _binint(machine: _Machine) -> None:
    machine.stack.append(machine.number(_INT32))


def _long1(machine: _Machine) -> None:
    machine.stack.append(int.from_bytes(machine.take(machine.take(1)[0]), "little", signed=True))


def _binfloat(machine: _Machine) -> None:
    machine.stack.append(_DOUBLE.unpack(machine.take(8))[0])


def _short_binunicode(machine: _Machine) -> None:
    machine.stack.append(machine.take(machine.take(1)[0]).decode())


def _binunicode(machine: _Machine) -> None:
    machine.stack.append(machine.take(machine.number(_UINT32)).decode())


def _binunicode8(machine: _Machine) -> None:
    machine.stack.append(machine.take(machine.number(_UINT64)).decode())


def _none(machine: _Machine) -> None:
    machine.stack.append(None)


def _newtrue(machine: _Machine) -> None:
    machine.stack.append(True)


def _newfalse(machine: _Machine) -> None:
    machine.stack.append(False)


def _empty_dict(machine: _Machine) -> None:
    machine.stack.append({})


def _empty_list(machine: _Machine) -> None:
    machine.stack.append([])


def _empty_tuple(machine: _Machine) -> None:
    machine.stack.append(())


def _tuple(machine: _Machine) -> None:
    machine.stack.append(tuple(machine.since_mark()))


def _tuple1(machine: _Machine) -> None:
    machine.stack[-1:] = [(machine.stack[-1],)]


def _tuple2(machine: _Machine) -> None:
    machine.stack[-2:] = [(machine.stack[-2], machine.stack[-1])]


def _tuple3(machine: _Machine) -> None:
    machine.stack[-3:] = [(machine.stack[-3], machine.stack[-2], machine.stack[-1])]


def _append(machine: _Machine) -> None:
    value = machine.stack.pop()
    _extend(machine, [value])


def _appends(machine: _Machine) -> None:
    _extend(machine, machine.since_mark())


def _extend(machine: _Machine, values: list[object]) -> None:
    target = machine.stack[-1]
    if type(target) is not list:
        raise PickleRefused(f"appends to something that is no list, before byte {machine.at}")
    target.extend(values)


def _setitem(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _update(machine, [key, value])


def _setitems(machine: _Machine) -> None:
    _update(machine, machine.since_mark())


def _update(machine: _Machine, items: list[object]) -> None:
    target = machine.stack[-1]
    if type(target) is not dict or len(items) % 2:
        raise PickleRefused(f"fills something that is no dictionary, before byte {machine.at}")
    for key in items[::2]:
        # Their hashes take constant time, and nobody can choose them.
        if type(key) is not str and type(key) is not Record:
            raise PickleRefused(f"has a {type(key).__name__} as a key, before byte {machine.at}")
    target.update(zip(items[::2], items[1::2], strict=True))


def _global(machine: _Machine) -> None:
    module = machine.line()
    machine.stack.append(machine.named(module, machine.line()))


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.named(module, name))


def _call(machine: _Machine) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    if type(function) is not Constructor or type(arguments) is not tuple:
        raise PickleRefused(f"calls something that is no class, before byte {machine.at}")
    machine.stack.append(function.make(arguments))


def _build(machine: _Machine) -> None:
    state, target = machine.stack.pop(), machine.stack[-1]
    if type(target) is not Record or target.state is not None:
        raise PickleRefused(f"gives a state to something that takes none, before byte {machine.at}")
    target.state = state


def _binpersid(machine: _Machine) -> None:
    if machine.persistent is None:
        raise PickleRefused(f"refers to something outside of itself, before byte {machine.at}")
    machine.stack.append(machine.persistent(machine.stack.pop()))


_STOP = ord(".")
_BY_OPCODE: Mapping[bytes, Callable[[_Machine], None]] = {
    b"\x80": _proto,
    b"\x95": _frame,
    b"(": _mark,
    b"\x94": _memoize,
    b"q": _binput,
    b"r": _long_binput,
    b"h": _binget,
    b"j": _long_binget,
    b"K": _binint1,
    b"M": _binint2,
    b"J": _binint,
    b"\x8a": _long1,
    b"G": _binfloat,
    b"\x8c": _short_binunicode,
    b"X": _binunicode,
    b"\x8d": _binunicode8,
    b"N": _none,
    b"\x88": _newtrue,
    b"\x89": _newfalse,
    b"}": _empty_dict,
    b"]": _empty_list,
    b")": _empty_tuple,
    b"t": _tuple,
    b"\x85": _tuple1,
    b"\x86": _tuple2,
    b"\x87": _tuple3,
    b"a": _append,
    b"e": _appends,
    b"s": _setitem,
    b"u": _setitems,
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _call,
    b"\x81": _call,  # NEWOBJ: the allow-list says what a class makes of its arguments either way
    b"b": _build,
    b"Q": _binpersid,
}
_INSTRUCTIONS: list[Callable[[_Machine], None] | None] = [_BY_OPCODE.get(bytes([opcode])) for opcode in range(256)]
