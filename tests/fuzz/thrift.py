"""Numbers in Thrift's compact protocol, which Parquet's metadata and page headers are written in."""


def varints(data: bytes, at: int = 0) -> list[tuple[int, int]]:
    """Begin and end of all integers and lengths in the object that begins at a position of whole data."""
    found: list[tuple[int, int]] = []
    _struct(data, at, found)
    return found


def varint(value: int) -> bytes:
    """A signed number of 64 bits as it is written."""
    value, written = (value << 1 ^ value >> 63) % 2**64, b""
    while value > 0x7F:
        written, value = written + bytes([value & 0x7F | 0x80]), value >> 7
    return written + bytes([value])


def _end(data: bytes, at: int) -> int:
    while data[at] & 0x80:
        at += 1
    return at + 1


def _number(data: bytes, at: int, end: int) -> int:
    return sum((byte & 0x7F) << 7 * place for place, byte in enumerate(data[at:end]))


def _struct(data: bytes, at: int, found: list[tuple[int, int]]) -> int:
    while (head := data[at]) != 0:
        at = at + 1 if head >> 4 else _end(data, at + 1)
        if head & 15 > 2:  # 1 and 2 are booleans, in the head itself
            at = _value(data, at, head & 15, found)
    return at + 1


def _value(data: bytes, at: int, kind: int, found: list[tuple[int, int]]) -> int:
    if kind <= 3:
        return at + 1
    if kind == 7:
        return at + 8
    if kind == 12:
        return _struct(data, at, found)
    if kind in (9, 10):
        size, inner, at = data[at] >> 4, data[at] & 15, at + 1
        if size == 15:
            end = _end(data, at)
            size, at = _number(data, at, end), end
        for _ in range(size):
            at = _value(data, at, inner, found)
        return at
    end = _end(data, at)
    found.append((at, end))
    return end if kind != 8 else end + _number(data, at, end)
