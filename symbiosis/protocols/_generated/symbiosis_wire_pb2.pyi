from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_FLOAT32: _ClassVar[Dtype]
    DTYPE_FLOAT64: _ClassVar[Dtype]
    DTYPE_FLOAT16: _ClassVar[Dtype]
    DTYPE_BFLOAT16: _ClassVar[Dtype]
    DTYPE_FIELD32: _ClassVar[Dtype]

class Direction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DIRECTION_UNSPECIFIED: _ClassVar[Direction]
    DIRECTION_FORWARD: _ClassVar[Direction]
    DIRECTION_BACKWARD: _ClassVar[Direction]

class BlobKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BLOB_UNSPECIFIED: _ClassVar[BlobKind]
    BLOB_MANIFEST: _ClassVar[BlobKind]
    BLOB_FILE: _ClassVar[BlobKind]
    BLOB_TENSOR: _ClassVar[BlobKind]
    BLOB_FACTS: _ClassVar[BlobKind]
DTYPE_UNSPECIFIED: Dtype
DTYPE_FLOAT32: Dtype
DTYPE_FLOAT64: Dtype
DTYPE_FLOAT16: Dtype
DTYPE_BFLOAT16: Dtype
DTYPE_FIELD32: Dtype
DIRECTION_UNSPECIFIED: Direction
DIRECTION_FORWARD: Direction
DIRECTION_BACKWARD: Direction
BLOB_UNSPECIFIED: BlobKind
BLOB_MANIFEST: BlobKind
BLOB_FILE: BlobKind
BLOB_TENSOR: BlobKind
BLOB_FACTS: BlobKind

class RequestHeader(_message.Message):
    __slots__ = ("hello", "call", "fetch", "draw")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    DRAW_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    call: Call
    fetch: Fetch
    draw: Draw
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., call: _Optional[_Union[Call, _Mapping]] = ..., fetch: _Optional[_Union[Fetch, _Mapping]] = ..., draw: _Optional[_Union[Draw, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "release", "session")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    release: str
    session: bytes
    def __init__(self, protocol: _Optional[int] = ..., release: _Optional[str] = ..., session: _Optional[bytes] = ...) -> None: ...

class Call(_message.Message):
    __slots__ = ("number", "layers", "direction", "dtype", "rows", "width", "byte_count", "segment_matrices", "segment_rows")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_MATRICES_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_ROWS_FIELD_NUMBER: _ClassVar[int]
    number: int
    layers: _containers.RepeatedScalarFieldContainer[int]
    direction: Direction
    dtype: Dtype
    rows: int
    width: int
    byte_count: int
    segment_matrices: _containers.RepeatedScalarFieldContainer[int]
    segment_rows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, number: _Optional[int] = ..., layers: _Optional[_Iterable[int]] = ..., direction: _Optional[_Union[Direction, str]] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., rows: _Optional[int] = ..., width: _Optional[int] = ..., byte_count: _Optional[int] = ..., segment_matrices: _Optional[_Iterable[int]] = ..., segment_rows: _Optional[_Iterable[int]] = ...) -> None: ...

class Draw(_message.Message):
    __slots__ = ("number", "layers", "direction", "rows", "key", "segment_matrices", "segment_rows")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_MATRICES_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_ROWS_FIELD_NUMBER: _ClassVar[int]
    number: int
    layers: _containers.RepeatedScalarFieldContainer[int]
    direction: Direction
    rows: int
    key: bytes
    segment_matrices: _containers.RepeatedScalarFieldContainer[int]
    segment_rows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, number: _Optional[int] = ..., layers: _Optional[_Iterable[int]] = ..., direction: _Optional[_Union[Direction, str]] = ..., rows: _Optional[int] = ..., key: _Optional[bytes] = ..., segment_matrices: _Optional[_Iterable[int]] = ..., segment_rows: _Optional[_Iterable[int]] = ...) -> None: ...

class Fetch(_message.Message):
    __slots__ = ("number", "kind", "name")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    number: int
    kind: BlobKind
    name: str
    def __init__(self, number: _Optional[int] = ..., kind: _Optional[_Union[BlobKind, str]] = ..., name: _Optional[str] = ...) -> None: ...

class ReplyHeader(_message.Message):
    __slots__ = ("number", "welcome", "answer", "blob", "refusal")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    number: int
    welcome: Welcome
    answer: Answer
    blob: Blob
    refusal: Refusal
    def __init__(self, number: _Optional[int] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., blob: _Optional[_Union[Blob, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "release", "tenant", "manifest_digest", "max_message_bytes", "unix_ms")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    release: str
    tenant: str
    manifest_digest: str
    max_message_bytes: int
    unix_ms: int
    def __init__(self, protocol: _Optional[int] = ..., release: _Optional[str] = ..., tenant: _Optional[str] = ..., manifest_digest: _Optional[str] = ..., max_message_bytes: _Optional[int] = ..., unix_ms: _Optional[int] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("dtype", "rows", "width", "byte_count")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    dtype: Dtype
    rows: int
    width: int
    byte_count: int
    def __init__(self, dtype: _Optional[_Union[Dtype, str]] = ..., rows: _Optional[int] = ..., width: _Optional[int] = ..., byte_count: _Optional[int] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("byte_count",)
    BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    byte_count: int
    def __init__(self, byte_count: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "message", "next_action", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    NEXT_ACTION_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    next_action: str
    retry_after_ms: int
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., next_action: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...
