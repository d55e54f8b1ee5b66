"""A small client of the protocol `pelton/1`, written from docs/PROTOCOL.md alone, on aioquic.

`connect` opens a `Session`; `Session` sends single frames and reads answers. All numbers are little-endian.
"""

import asyncio
import contextlib
import hashlib
import json
import ssl
import struct
from dataclasses import dataclass

from aioquic.asyncio.client import connect as quic_connect
from aioquic.quic.configuration import QuicConfiguration
from cryptography.hazmat.primitives.serialization import Encoding

ALPN = "pelton/1"
HEADER = struct.Struct("<IBBHQ")

HELLO, WELCOME, ERROR, GOODBYE, HEARTBEAT, HEARTBEAT_ACK = 1, 2, 3, 4, 5, 6
SUBMIT, SUBMIT_ANSWER, FINISHED, STOP, STOP_ANSWER, WAIT = 16, 17, 18, 19, 20, 21
QUERY, QUERY_ANSWER = 24, 25
REGISTER, REGISTERED, EXECUTE, OUTCOME, OUTCOME_ACK, CANCEL, RESUME, RESUMED = range(32, 40)

OK, NOT_FOUND, FAILED_PRECONDITION, ID_REUSED, STALE_LEASE = 0, 4, 6, 7, 8
SUCCEEDED, FAILED, THROTTLED, REJECTED, STOPPED = 1, 2, 3, 4, 5
KEPT, REFUSED, KNOWN = 0, 1, 2
STATUS_STOPPING, STATUS_SUCCEEDED, STATUS_FAILED, STATUS_STOPPED = 7, 8, 9, 10

FUNCTION_SET, STATS, GET = 18, 48, 1

ANSWER_DUPLICATE, ANSWER_SEQUENTIAL = 2, 0x80


class Refused(Exception):
    """The server answered with an error frame."""

    def __init__(self, code, text):
        super().__init__(f"code {code}: {text}")
        self.code = code


@dataclass
class Frame:
    kind: int
    flags: int
    count: int
    tag: int
    body: bytes


class Cursor:
    """Reads a body from its beginning to its end."""

    def __init__(self, body):
        self.body = body
        self.at = 0

    def bytes(self, count):
        assert self.at + count <= len(self.body), "the body is too short"
        piece = self.body[self.at : self.at + count]
        self.at += count
        return piece

    def unsigned(self, count):
        return int.from_bytes(self.bytes(count), "little")

    def text(self, count):
        return self.bytes(count).decode()

    def left(self):
        return len(self.body) - self.at

    def end(self):
        assert self.left() == 0, "bytes are left behind the last field"


@dataclass(frozen=True)
class Lease:
    request_id: int
    generation: int
    attempt: int

    @staticmethod
    def read(cursor):
        return Lease(cursor.unsigned(16), cursor.unsigned(2), cursor.unsigned(2))

    def pack(self):
        return self.request_id.to_bytes(16, "little") + struct.pack("<HH", self.generation, self.attempt)


@dataclass
class Execute:
    lease: Lease
    function: int
    timeout_ms: int
    task_id: str
    payload: bytes


@dataclass
class Answer:
    code: int
    duplicate: bool
    request_id: int
    text: str


@dataclass
class Finished:
    submit_tag: int
    request_id: int
    status: int
    code: int
    attempts: int
    error: str
    result: bytes | None


class Session:
    """One stream. Frames that the server sends by itself wait in `unasked`."""

    def __init__(self, reader, writer):
        self.reader = reader
        self.writer = writer
        self.tag = 0
        self.unasked = []

    def send(self, kind, body=b"", count=0, flags=0):
        self.tag += 1
        self.writer.write(HEADER.pack(len(body), kind, flags, count, self.tag) + body)
        return self.tag

    async def read(self):
        length, kind, flags, count, tag = HEADER.unpack(await self.reader.readexactly(HEADER.size))
        return Frame(kind, flags, count, tag, await self.reader.readexactly(length))

    async def answer(self, kind, tag):
        """The frame of this type and tag; others wait for their turn."""
        while True:
            frame = await self.read()
            if frame.kind == ERROR and frame.tag in (0, tag):
                cursor = Cursor(frame.body)
                code = cursor.unsigned(2)
                cursor.bytes(6)
                raise Refused(code, cursor.text(cursor.left()))
            if frame.kind == kind and frame.tag == tag:
                return frame
            self.unasked.append(frame)

    async def next(self, kind):
        """The next frame of this type that nobody asked for."""
        for place, frame in enumerate(self.unasked):
            if frame.kind == kind:
                return self.unasked.pop(place)
        while True:
            frame = await self.read()
            if frame.kind == kind:
                return frame
            assert frame.kind != ERROR, frame
            self.unasked.append(frame)

    async def hello(self, executor=None, tenant="", key=b""):
        body = struct.pack(
            "<HBBQHBB",
            1,
            1 if key else 0,
            0 if executor is None else 1,
            executor or 0,
            len(key),
            len(tenant),
            6,
        )
        tag = self.send(HELLO, body + key + tenant.encode() + b"python")
        cursor = Cursor((await self.answer(WELCOME, tag)).body)
        assert cursor.unsigned(2) == 1
        tenant_len = cursor.unsigned(1)
        assert cursor.unsigned(1) == 0
        welcome = dict(
            server=cursor.unsigned(8),
            frame_bytes_max=cursor.unsigned(4),
            payload_bytes_max=cursor.unsigned(4),
            in_flight_tasks_max=cursor.unsigned(4),
            heartbeat_ms=cursor.unsigned(4),
            lease_ms=cursor.unsigned(4),
            tenant=cursor.text(tenant_len),
        )
        cursor.end()
        return welcome

    async def submit(self, function, tasks, notify=False):
        """Hands in pairs of task_id and payload; the tag and one answer for each."""
        body = bytes([1, len(function)]) + function.encode()
        for task_id, payload in tasks:
            body += struct.pack(
                "<BBBBBBBBHHIQI", 0, 0, 0, 0, len(task_id), 0, 0, 0, 0, 0, 0, 0, len(payload)
            )
            body += task_id.encode() + payload
        tag = self.send(SUBMIT, body, len(tasks), 3 if notify else 0)
        answers = {}
        while len(answers) < len(tasks):
            answers |= read_answers(await self.answer(SUBMIT_ANSWER, tag))
        return tag, [answers[place] for place in range(len(tasks))]

    async def finished(self):
        frame = await self.next(FINISHED)
        return read_finished(frame)

    async def wait(self, request_id, timeout_ms):
        body = struct.pack("<IBBBB", timeout_ms, 0, 0, 0, 0) + request_id.to_bytes(16, "little")
        tag = self.send(WAIT, body, flags=1)
        (finished,) = read_finished(await self.answer(FINISHED, tag))
        assert finished.submit_tag == tag
        return finished

    async def stop(self, request_id, grace_ms=0):
        tag = self.send(STOP, request_id.to_bytes(16, "little") + struct.pack("<I", grace_ms), 1)
        cursor = Cursor((await self.answer(STOP_ANSWER, tag)).body)
        assert cursor.unsigned(16) == request_id
        code, status = cursor.unsigned(2), cursor.unsigned(1)
        assert cursor.unsigned(1) == 0
        cursor.end()
        return code, status

    async def query(self, operation, fields):
        body = struct.pack("<HH", operation, 0) + json.dumps(fields).encode()
        tag = self.send(QUERY, body)
        cursor = Cursor((await self.answer(QUERY_ANSWER, tag)).body)
        code = cursor.unsigned(2)
        assert cursor.unsigned(2) == 0
        answer = json.loads(cursor.text(cursor.left()))
        if code != OK:
            raise Refused(code, answer["error"])
        return answer

    async def register(self, functions):
        """Offers pairs of function and slots; the code of each."""
        body = struct.pack("<III", 0, 0, 0)
        for function, slots in functions:
            body += struct.pack("<IB", slots, len(function)) + function.encode()
        tag = self.send(REGISTER, body, len(functions))
        frame = await self.answer(REGISTERED, tag)
        cursor = Cursor(frame.body)
        cursor.unsigned(2)
        codes = [cursor.unsigned(2) for _ in range(frame.count)]
        cursor.end()
        return codes

    async def execute(self):
        """The attempts of the next execute frame."""
        frame = await self.next(EXECUTE)
        cursor = Cursor(frame.body)
        attempts = []
        for _ in range(frame.count):
            lease = Lease.read(cursor)
            function = cursor.unsigned(2)
            flags, task_id_len, key_len, content_type_len = cursor.bytes(4)
            cursor.unsigned(2)
            timeout_ms, payload_len = cursor.unsigned(4), cursor.unsigned(4)
            task_id = cursor.text(task_id_len)
            cursor.bytes(key_len + content_type_len + (55 if flags & 1 else 0))
            attempts.append(Execute(lease, function, timeout_ms, task_id, cursor.bytes(payload_len)))
        cursor.end()
        return attempts

    async def outcome(self, lease, status, result=b"", error="", retry_after_ms=0):
        """Tells how an attempt ended; the code that it is refused with, or `OK`."""
        body = lease.pack() + struct.pack(
            "<BBHHHIII", status, 0, len(error), 0, 0, retry_after_ms, 1, len(result)
        )
        tag = self.send(OUTCOME, body + error.encode() + result, 1)
        frame = await self.answer(OUTCOME_ACK, tag)
        cursor = Cursor(frame.body)
        refused = [(cursor.unsigned(2), cursor.unsigned(2), cursor.unsigned(4)) for _ in range(frame.count)]
        cursor.end()
        return refused[0][1] if refused else OK

    async def cancelled(self):
        """The leases of the next cancel frame."""
        frame = await self.next(CANCEL)
        cursor = Cursor(frame.body)
        leases = []
        for _ in range(frame.count):
            leases.append(Lease.read(cursor))
            cursor.unsigned(4)
        cursor.end()
        return leases

    async def heartbeat(self, leases):
        """Shows life; those of the leases that are lost."""
        tag = self.send(HEARTBEAT, b"".join(lease.pack() for lease in leases), len(leases))
        frame = await self.answer(HEARTBEAT_ACK, tag)
        cursor = Cursor(frame.body)
        lost = [Lease.read(cursor) for _ in range(frame.count)]
        cursor.end()
        return lost

    async def resume(self, leases):
        """Presents leases on a new connection; the verdict on each."""
        tag = self.send(RESUME, b"".join(lease.pack() for lease in leases), len(leases))
        frame = await self.answer(RESUMED, tag)
        return list(frame.body)


def read_answers(frame):
    cursor = Cursor(frame.body)
    runs = []
    for _ in range(frame.count):
        first, length, code = cursor.unsigned(2), cursor.unsigned(2), cursor.unsigned(2)
        flags, text = cursor.unsigned(1), cursor.unsigned(1)
        cursor.unsigned(4)
        runs.append((first, length, code, flags, text, cursor.unsigned(4), cursor.unsigned(16)))
    texts = [""]
    if cursor.left():
        for _ in range(cursor.unsigned(1)):
            texts.append(cursor.text(cursor.unsigned(2)))
    cursor.end()
    answers = {}
    for first, length, code, flags, text, step, request_id in runs:
        for n in range(length):
            identity = request_id
            if flags & ANSWER_SEQUENTIAL:
                sequence = ((request_id >> 32) + n) & (2**40 - 1)
                slot = (request_id + n * step) & (2**32 - 1)
                identity = request_id >> 72 << 72 | sequence << 32 | slot
            duplicate = flags & ANSWER_DUPLICATE != 0
            answers[first + n] = Answer(code, duplicate, identity, texts[text])
    return answers


def read_finished(frame):
    cursor = Cursor(frame.body)
    items = []
    for _ in range(frame.count):
        submit_tag, request_id, _ = cursor.unsigned(8), cursor.unsigned(16), cursor.unsigned(4)
        status, flags = cursor.unsigned(1), cursor.unsigned(1)
        code, attempts, error_len = cursor.unsigned(2), cursor.unsigned(2), cursor.unsigned(2)
        result_len = cursor.unsigned(4)
        error, result = cursor.text(error_len), cursor.bytes(result_len)
        items.append(
            Finished(submit_tag, request_id, status, code, attempts, error, result if flags & 1 else None)
        )
    cursor.end()
    return items


def name(request_id):
    """A request id as it is written."""
    return f"t{request_id:032x}"


@contextlib.asynccontextmanager
async def connect(address, fingerprint):
    """A session on a connection of its own; hello is not said yet."""
    host, port = address.rsplit(":", 1)
    configuration = QuicConfiguration(
        is_client=True,
        alpn_protocols=[ALPN],
        # The certificate is compared with the known one below.
        verify_mode=ssl.CERT_NONE,
        idle_timeout=30.0,
    )
    async with quic_connect(host, int(port), configuration=configuration) as protocol:
        certificate = protocol._quic.tls._peer_certificate
        digest = hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()
        assert digest == fingerprint, "another server answers"
        reader, writer = await protocol.create_stream()
        yield Session(reader, writer)


async def within(seconds, awaitable):
    """What is awaited, unless it takes too long."""
    return await asyncio.wait_for(awaitable, seconds)
