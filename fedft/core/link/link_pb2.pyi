from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Activity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTIVITY_UNSPECIFIED: _ClassVar[Activity]
    LOADING: _ClassVar[Activity]
    WAITING: _ClassVar[Activity]
    TRAINING: _ClassVar[Activity]
    EVALUATING: _ClassVar[Activity]

class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERDICT_UNSPECIFIED: _ClassVar[Verdict]
    SEND: _ClassVar[Verdict]
    ACCEPTED: _ClassVar[Verdict]
    DUPLICATE: _ClassVar[Verdict]
    LATE: _ClassVar[Verdict]
    STALE: _ClassVar[Verdict]
    REFUSED: _ClassVar[Verdict]
ACTIVITY_UNSPECIFIED: Activity
LOADING: Activity
WAITING: Activity
TRAINING: Activity
EVALUATING: Activity
VERDICT_UNSPECIFIED: Verdict
SEND: Verdict
ACCEPTED: Verdict
DUPLICATE: Verdict
LATE: Verdict
STALE: Verdict
REFUSED: Verdict

class EnrolRequest(_message.Message):
    __slots__ = ("csr",)
    CSR_FIELD_NUMBER: _ClassVar[int]
    csr: bytes
    def __init__(self, csr: _Optional[bytes] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ("certificate", "refusal")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    refusal: str
    def __init__(self, certificate: _Optional[bytes] = ..., refusal: _Optional[str] = ...) -> None: ...

class FromSite(_message.Message):
    __slots__ = ("hello", "offer", "heartbeat", "result", "chunk", "goodbye")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    offer: Offer
    heartbeat: Heartbeat
    result: Result
    chunk: Chunk
    goodbye: Goodbye
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ...) -> None: ...

class FromServer(_message.Message):
    __slots__ = ("task", "welcome", "refusal", "heartbeat", "work", "chunk", "ack", "cancel", "drain")
    TASK_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    task: Task
    welcome: Welcome
    refusal: Refusal
    heartbeat: Heartbeat
    work: Work
    chunk: Chunk
    ack: Ack
    cancel: Cancel
    drain: Drain
    def __init__(self, task: _Optional[_Union[Task, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., work: _Optional[_Union[Work, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "versions", "instance", "site")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    versions: _containers.ScalarMap[str, str]
    instance: str
    site: str
    def __init__(self, protocol: _Optional[int] = ..., versions: _Optional[_Mapping[str, str]] = ..., instance: _Optional[str] = ..., site: _Optional[str] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("run", "spec", "hashes")
    RUN_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    run: str
    spec: str
    hashes: Hashes
    def __init__(self, run: _Optional[str] = ..., spec: _Optional[str] = ..., hashes: _Optional[_Union[Hashes, _Mapping]] = ...) -> None: ...

class Hashes(_message.Message):
    __slots__ = ("base_model", "tokenizer", "data_schema")
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    DATA_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    base_model: str
    tokenizer: str
    data_schema: str
    def __init__(self, base_model: _Optional[str] = ..., tokenizer: _Optional[str] = ..., data_schema: _Optional[str] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("examples", "rank", "memory_mib", "hashes")
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    MEMORY_MIB_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    examples: int
    rank: int
    memory_mib: float
    hashes: Hashes
    def __init__(self, examples: _Optional[int] = ..., rank: _Optional[int] = ..., memory_mib: _Optional[float] = ..., hashes: _Optional[_Union[Hashes, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("reason", "retry", "mismatch")
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    MISMATCH_FIELD_NUMBER: _ClassVar[int]
    reason: str
    retry: bool
    mismatch: bool
    def __init__(self, reason: _Optional[str] = ..., retry: bool = ..., mismatch: bool = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("activity", "round")
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    activity: Activity
    round: int
    def __init__(self, activity: _Optional[_Union[Activity, str]] = ..., round: _Optional[int] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Ticket(_message.Message):
    __slots__ = ("run", "round", "site", "kind", "base")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    site: str
    kind: str
    base: str
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., site: _Optional[str] = ..., kind: _Optional[str] = ..., base: _Optional[str] = ...) -> None: ...

class Work(_message.Message):
    __slots__ = ("ticket", "plan", "content")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    plan: str
    content: Content
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., plan: _Optional[str] = ..., content: _Optional[_Union[Content, _Mapping]] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("ticket", "content", "failure")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    content: Content
    failure: Failure
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., content: _Optional[_Union[Content, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "reason")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("ticket", "verdict", "reason")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    verdict: Verdict
    reason: str
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., verdict: _Optional[_Union[Verdict, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("tickets",)
    TICKETS_FIELD_NUMBER: _ClassVar[int]
    tickets: _containers.RepeatedCompositeFieldContainer[Ticket]
    def __init__(self, tickets: _Optional[_Iterable[_Union[Ticket, _Mapping]]] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("finished", "reason")
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    finished: bool
    reason: str
    def __init__(self, finished: bool = ..., reason: _Optional[str] = ...) -> None: ...

class Content(_message.Message):
    __slots__ = ("records", "metrics")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[Arrays]
    metrics: _containers.RepeatedCompositeFieldContainer[Metric]
    def __init__(self, records: _Optional[_Iterable[_Union[Arrays, _Mapping]]] = ..., metrics: _Optional[_Iterable[_Union[Metric, _Mapping]]] = ...) -> None: ...

class Arrays(_message.Message):
    __slots__ = ("name", "arrays")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    name: str
    arrays: _containers.RepeatedCompositeFieldContainer[ArrayHeader]
    def __init__(self, name: _Optional[str] = ..., arrays: _Optional[_Iterable[_Union[ArrayHeader, _Mapping]]] = ...) -> None: ...

class ArrayHeader(_message.Message):
    __slots__ = ("name", "dtype", "shape", "format", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    format: str
    size: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., format: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class Metric(_message.Message):
    __slots__ = ("name", "whole", "real")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    name: str
    whole: int
    real: float
    def __init__(self, name: _Optional[str] = ..., whole: _Optional[int] = ..., real: _Optional[float] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...
